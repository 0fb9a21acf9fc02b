"""Greedy tokens do not depend on the path a request takes: here, there, moved, or in transformers.

The reference is `transformers` on the same GGUF file. One forward pass over prompt + our tokens
tells at every position what it would have chosen there; if that is our token each time, its own
greedy run is ours. Where its two best logits are nearly tied either may come out: listed as a
warning. Outputs that all pass can differ from one another behind a near tie only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.prompts import real_prompts
from support.stack import MODEL_PATH
from support.worker_stack import WorkerStack
from transformers import AutoModelForCausalLM, GgufConfig

MAX_TOKENS = 64
NEAR_TIE = 1e-4
"""In logits, which spread over about 40."""
CHUNKS = {"prefill-chunk-tokens-max": 128}
"""The longest prompts take ten prefill chunks."""
pytestmark = pytest.mark.timeout(900)


class Reference:
    """Says whether an output is the model's own. Outputs that several paths gave cost once."""

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(MODEL_PATH.parent),
            gguf_file=MODEL_PATH.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        self._eos = self._model.config.eos_token_id
        self._seen: set[tuple[int, tuple[int, ...]]] = set()

    def check(self, path: str, outputs: Sequence[Sequence[int]]) -> None:
        """Fails unless `outputs` are greedy continuations of the real prompts, in order."""
        assert len(outputs) == len(real_prompts())
        for index, output in enumerate(outputs):
            key = (index, tuple(output))
            if key not in self._seen:
                self._check(f"{path}, prompt {index}", real_prompts()[index], list(output))
                self._seen.add(key)

    def _check(self, what: str, prompt: list[int], output: list[int]) -> None:
        assert len(output) == MAX_TOKENS or output[-1] == self._eos, f"{what}: ends too early"
        assert self._eos not in output[:-1], f"{what}: goes on behind its end"
        with torch.inference_mode():
            tokens = torch.tensor([prompt + output[:-1]])
            logits = self._model(tokens, logits_to_keep=len(output)).logits[0]
        best = logits.topk(2)
        for position, token in enumerate(output):
            if token == best.indices[position, 0]:
                continue
            gap = float(best.values[position, 0] - best.values[position, 1])
            near = token == best.indices[position, 1] and gap < NEAR_TIE
            assert near, f"{what}: token {position} is {token}, not {best.indices[position]}"
            warnings.warn(f"{what}: a tie within {gap:.1e} at token {position}", stacklevel=2)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def without_servers() -> Iterator[WorkerStack]:
    with WorkerStack(servers=0, worker_flags={"be-placement": "device"} | CHUNKS) as stack:
        yield stack


def run(stack: WorkerStack, *, best_effort: bool) -> list[list[int]]:
    """Sends all prompts at once; returns their tokens."""
    streams = stack.start_all(real_prompts(), MAX_TOKENS, best_effort=best_effort)
    return [stream.finish() for stream in streams]


def test_latency_sensitive_requests_get_the_reference_tokens(
    reference: Reference, without_servers: WorkerStack
) -> None:
    reference.check("LS", run(without_servers, best_effort=False))


def test_best_effort_on_the_device_gets_the_reference_tokens(
    reference: Reference, without_servers: WorkerStack
) -> None:
    reference.check("device", run(without_servers, best_effort=True))
    by_path = without_servers.telemetry().be_tokens_by_path
    assert by_path.device_resident > 0
    assert by_path.boarded + by_path.be_only == 0


def test_best_effort_through_two_servers_gets_the_reference_tokens(reference: Reference) -> None:
    with WorkerStack(worker_flags={"be-placement": "host"} | CHUNKS) as stack:
        reference.check("host", run(stack, best_effort=True))
        stack.wait_until(
            "KV read by both servers",
            lambda status: [s.kv_bytes_read > 0 for s in status.attention_servers] == [True] * 2,
        )
        assert stack.telemetry().ring_waits == 0

        # Again with LS requests in the same stages: real piggybacking.
        streams = stack.start_all(real_prompts(), MAX_TOKENS, best_effort=True)
        chats = [stack.generate(prompt, MAX_TOKENS) for prompt in real_prompts()[1:4]]
        reference.check("beside LS", [stream.finish() for stream in streams])
        alone = [stack.generate(prompt, MAX_TOKENS) for prompt in real_prompts()[1:4]]
        assert chats == alone
        stack.wait_until("boarded rows", lambda status: status.telemetry.boarded_rows > 0)


def test_forced_demotions_and_promotions_change_no_token(reference: Reference) -> None:
    moves = {"fault-moves-per-pass": 0.05, "fault-seed": 1}
    with WorkerStack(worker_flags=moves | CHUNKS) as stack:
        reference.check("moves", run(stack, best_effort=True))
        stack.wait_until(
            "demotions and promotions",
            lambda status: status.telemetry.demotions > 0 and status.telemetry.promotions > 0,
        )


@pytest.mark.slow
def test_late_and_reordered_answers_change_no_token(reference: Reference) -> None:
    host = {"be-placement": "host"}
    with WorkerStack(server_flags={"fault-delay-ms": 20}, worker_flags=host | CHUNKS) as stack:
        reference.check("delays", run(stack, best_effort=True))
        assert stack.telemetry().ring_waits == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["ls-first", "reserve", "sync-offload", "preempt"])
def test_every_policy_gives_both_classes_the_reference_tokens(
    reference: Reference, policy: str
) -> None:
    flags = {"policy": policy, "device-kv-tokens": 4096}  # too few for all of them
    with WorkerStack(worker_flags=flags | CHUNKS) as stack:
        streams = stack.start_all(real_prompts(), MAX_TOKENS, best_effort=True)
        chats = [stack.generate(prompt, MAX_TOKENS) for prompt in real_prompts()[1:4]]
        outputs = [stream.finish() for stream in streams]
        reference.check(policy, outputs)
        reference.check(f"{policy}, LS", [outputs[0], *chats, *outputs[4:]])
        assert stack.status().policy == policy


@pytest.mark.slow
def test_the_yardstick_queues_best_effort_and_serves_the_rest(reference: Reference) -> None:
    with WorkerStack(worker_flags={"policy": "ls-only"} | CHUNKS) as stack:
        queued = stack.start_all(real_prompts()[:2], MAX_TOKENS, best_effort=True)
        reference.check("ls-only", run(stack, best_effort=False))
        waiting = len(queued)
        stack.wait_until("a queue", lambda status: status.telemetry.be_waiting == waiting)
        assert stack.telemetry().be_output_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_moves_between_servers_that_answer_late_change_no_token(
    reference: Reference, seed: int
) -> None:
    late = {"fault-delay-ms": 20, "fault-seed": seed}
    moves = {"fault-moves-per-pass": 0.1, "fault-seed": seed}
    with WorkerStack(server_flags=late, worker_flags=moves | CHUNKS) as stack:
        reference.check(f"late moves {seed}", run(stack, best_effort=True))
        assert stack.telemetry().ring_waits == 0
