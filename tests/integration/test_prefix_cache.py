"""Requests that find their beginning computed get the tokens that they would have got anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.tiny_model import ARENA_BYTES, PAGE_TOKENS, VOCABULARY, TinyModel
from support.worker_stack import WorkerStack

from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2

TOKENS = 40
BOTH_CLASSES = pytest.mark.parametrize("best_effort", [False, True], ids=["LS", "BE"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(Path(tmp_path_factory.mktemp("model")))


def start(model: TinyModel, **flags: Any) -> WorkerStack:
    worker_flags = model.flags() | {"prefill-chunk-tokens-max": 128}
    worker_flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    return WorkerStack(worker_flags=worker_flags, arena_bytes=ARENA_BYTES)


@pytest.fixture(scope="module")
def stack(model: TinyModel) -> Iterator[WorkerStack]:
    with start(model, device_kv_tokens=2048) as stack:
        yield stack


def prompt(seed: int, tokens: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, VOCABULARY) for _ in range(tokens)]


def answer(stack: WorkerStack, tokens: list[int], **options: Any) -> tuple[list[int], int]:
    """Returns the output and how many tokens of the prompt were cached."""
    stream = stack.start(tokens, TOKENS, ignore_eos=True, **options)
    return stream.finish(), stream.cached_tokens


@BOTH_CLASSES
def test_the_same_prompt_again_is_found_but_for_its_last_block(
    stack: WorkerStack, model: TinyModel, best_effort: bool
) -> None:
    for seed, tokens, found in ((1, 100, 96), (2, 96, 80), (3, 1, 0), (4, 300, 288)):
        asked = prompt(seed + 10 * best_effort, tokens)
        first = answer(stack, asked, best_effort=best_effort)
        assert model.is_greedy(asked, first[0])
        assert first[1] == 0
        assert answer(stack, asked, best_effort=best_effort) == (first[0], found)


def test_classes_share_a_system_prompt(stack: WorkerStack, model: TinyModel) -> None:
    system = prompt(20, 200)
    for turn in range(6):
        asked = system + prompt(21 + turn, 30)
        output, cached = answer(stack, asked, best_effort=turn % 2 == 1)
        assert model.is_greedy(asked, output)
        assert cached == (192 if turn else 0)


@BOTH_CLASSES
def test_the_next_turn_of_a_chat_finds_prompt_and_answer_of_the_last(
    stack: WorkerStack, model: TinyModel, best_effort: bool
) -> None:
    asked = prompt(40 + best_effort, 50)
    for turn in range(4):
        output, cached = answer(stack, asked, best_effort=best_effort)
        assert model.is_greedy(asked, output)
        # What was computed last turn: all but its last sampled token, in whole blocks.
        computed = len(asked) - 25 - 1
        assert cached == (computed // PAGE_TOKENS * PAGE_TOKENS if turn else 0)
        asked = asked + output + prompt(50 + turn, 25)


def test_a_prompt_that_many_others_have_evicted_is_computed_again(
    stack: WorkerStack, model: TinyModel
) -> None:
    asked = prompt(60, 200)
    first, _ = answer(stack, asked)
    assert answer(stack, asked) == (first, 192)
    for seed in range(61, 70):  # 9 x 300 tokens where 2,048 have room
        other = prompt(seed, 260)
        assert model.is_greedy(other, answer(stack, other)[0])
    assert answer(stack, asked) == (first, 0)


def test_tenants_share_nothing(stack: WorkerStack) -> None:
    asked = prompt(80, 100)
    outputs = [answer(stack, asked, tenant=tenant) for tenant in ("", "a", "b", "a")]
    assert [cached for _, cached in outputs] == [0, 0, 0, 96]
    assert len({tuple(output) for output, _ in outputs}) == 1


@BOTH_CLASSES
def test_what_a_cancelled_request_had_computed_is_found(
    stack: WorkerStack, model: TinyModel, best_effort: bool
) -> None:
    asked = prompt(90 + best_effort, 500)
    cancelled = stack.start(asked, 1500, best_effort=best_effort, ignore_eos=True)
    cancelled.read(1)
    assert stack.cancel(cancelled)
    cancelled.finish()
    output, cached = answer(stack, asked, best_effort=best_effort)
    assert cached == 496
    assert model.is_greedy(asked, output)


def test_requests_at_once_with_one_beginning_do_not_disturb_one_another(
    stack: WorkerStack, model: TinyModel
) -> None:
    system = prompt(100, 160)
    asked = [system + prompt(101 + i, 5 + 7 * i) for i in range(10)]
    streams = [
        stack.start(tokens, TOKENS, best_effort=index % 2 == 0, ignore_eos=True)
        for index, tokens in enumerate(asked)
    ]
    for tokens, stream in zip(asked, streams, strict=True):
        assert model.is_greedy(tokens, stream.finish())


def test_usage_is_in_the_figures(stack: WorkerStack) -> None:
    before = stack.telemetry()
    asked = prompt(120, 100)
    for _ in range(2):
        answer(stack, asked)
    stack.wait_until(
        "counters",
        lambda status: (
            status.telemetry.prefix_cache_query_tokens == before.prefix_cache_query_tokens + 200
            and status.telemetry.prefix_cache_hit_tokens == before.prefix_cache_hit_tokens + 96
        ),
    )


@pytest.mark.parametrize("placement", ["auto", "host"])
def test_found_kv_is_mirrored_before_it_is_given_up_and_comes_back(
    model: TinyModel, placement: str
) -> None:
    """BE requests with one beginning, moved to the servers and back at random."""
    moves = {"be_placement": placement, "fault_moves_per_pass": 0.1, "fault_seed": 4}
    system = prompt(200, 150)
    asked = [system + prompt(201 + i, 3 + i) for i in range(12)]
    with start(model, device_kv_tokens=1024, **moves) as stack:
        for _ in range(2):
            streams = [
                stack.start(tokens, 100, best_effort=True, ignore_eos=True) for tokens in asked
            ]
            for tokens, stream in zip(asked, streams, strict=True):
                assert model.is_greedy(tokens, stream.finish())
        stack.wait_until(
            "hits and moves of requests that had them",
            lambda status: (
                status.telemetry.prefix_cache_hit_tokens > 2000
                and min(status.telemetry.demotions, status.telemetry.promotions) > 10
            ),
        )
        assert stack.telemetry().recomputed_tokens == 0


def test_ls_gets_the_memory_of_requests_that_share_pages(model: TinyModel) -> None:
    """A demotion frees none of the pages that another request still holds."""
    system = prompt(250, 300)
    asked = [system + prompt(251 + i, 3 + i) for i in range(3)]
    with start(model, device_kv_tokens=1024) as stack:
        whole = status_pb2.Limits(
            ls_running_max=8,
            be_rows_per_stage=16,
            be_prefill_tokens_per_iteration=64,
            be_device_kv_share=1.0,
        )
        stack.stub.SetLimits(worker_pb2.SetLimitsRequest(limits=whole))
        batch = [stack.start(tokens, 600, best_effort=True, ignore_eos=True) for tokens in asked]
        for stream in batch:
            stream.read(2)
        chat = prompt(260, 940)
        output, _ = answer(stack, chat)
        assert model.is_greedy(chat, output)
        for tokens, stream in zip(asked, batch, strict=True):
            assert model.is_greedy(tokens, stream.finish())
        stack.wait_until("demotions", lambda status: status.telemetry.demotions >= 2)
        assert stack.telemetry().recomputed_tokens == 0


def test_kv_from_an_int8_arena_is_not_shared(model: TinyModel) -> None:
    """BE outputs are those of int8 KV; LS ones behind the same tokens those of float32."""
    moves = {"kv_dtype": "int8", "fault_moves_per_pass": 0.1, "device_kv_tokens": 1024}
    with start(model, **moves) as stack:
        for seed in range(300, 306):
            asked = prompt(seed, 60)
            batch = stack.start(asked, 120, best_effort=True, ignore_eos=True).finish()
            behind = asked + batch + prompt(seed + 50, 20)
            output, _ = answer(stack, behind)
            assert model.is_greedy(behind, output)
        stack.wait_until("moves", lambda status: status.telemetry.promotions > 10)


def test_without_the_cache_nothing_is_found(model: TinyModel) -> None:
    asked = prompt(400, 100)
    with start(model, prefix_cache=False) as stack:
        outputs = [answer(stack, asked) for _ in range(2)]
        assert outputs[0] == outputs[1]
        assert outputs[1][1] == 0
        assert stack.telemetry().prefix_cache_hit_tokens == 0
