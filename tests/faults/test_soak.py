"""Everything at once, for long: arrivals, cancels, moves, stalls and restarts, by a seeded draw.

Whatever happens to a request, its tokens are those of a run alone, and nothing leaks: with forced
moves the engine looks over all its pools in every iteration.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from support.signals import send
from support.tiny_model import ARENA_BYTES, LAYERS, VOCABULARY, TinyModel
from support.worker_stack import Stream, WorkerStack

from omniserve.v1 import types_pb2

CPU = "omniserve.gpuworker"
RUNNING_MAX = 32
FLAGS = {"prefill-chunk-tokens-max": 128, "device-kv-tokens": 2048}
# Small enough that requests wait for one another's memory.
TIGHT_ARENA_BYTES = ARENA_BYTES // 2


@dataclass
class Asked:
    """A request, and what has come of it."""

    prompt: list[int]
    max_tokens: int
    stream: Stream
    cancelled: bool = False


@dataclass
class Soak:
    """Draws what happens next. At any time one server at most is stopped."""

    stack: WorkerStack
    random: Random
    asked: list[Asked] = field(default_factory=list)
    running: list[Asked] = field(default_factory=list)
    stopped: int = -1
    happened: dict[str, int] = field(default_factory=dict)

    def run(self, iterations: int) -> None:
        for rare in (self._stop_one, self._restart_one, self._lose_an_arena):
            self._steps(20)
            rare()
        while self.iterations() < iterations:
            self._steps(20)
        self._go_on()
        for request in self.running:
            request.stream.finish()

    def iterations(self) -> int:
        """At least so many iterations the engine has done."""
        telemetry = self.stack.telemetry()
        return telemetry.passes + telemetry.be_only_stages // (LAYERS + 1)

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        happenings = {
            self._arrive: 35,
            self._read_one: 20,
            self._cancel_one: 4,
            self._stop_one: 2,
            self._go_on: 3,
            self._restart_one: 0.5,
            self._lose_an_arena: 0.3,
        }
        (happens,) = self.random.choices(list(happenings), list(happenings.values()))
        self.happened[happens.__name__] = self.happened.get(happens.__name__, 0) + 1
        happens()
        time.sleep(self.random.choice([0, 0, 0.005, 0.02]))

    def _arrive(self) -> None:
        if len(self.running) >= RUNNING_MAX:
            self._read_one()
            return
        beginning = Random(self.random.randrange(5))  # of one of five system prompts
        system = [beginning.randrange(3, VOCABULARY) for _ in range(beginning.randrange(200))]
        own = [self.random.randrange(3, VOCABULARY) for _ in range(self.random.randint(1, 60))]
        prompt = system + own
        max_tokens = self.random.choice([1, 8, 30, 60, 150])
        stream = self.stack.start(
            prompt,
            max_tokens,
            best_effort=self.random.random() < 0.6,
            ignore_eos=True,
            tenant=self.random.choice(["", "other"]),
        )
        self.asked.append(Asked(prompt, max_tokens, stream))
        self.running.append(self.asked[-1])

    def _read_one(self) -> None:
        """Waits for the end of a request that no stopped server can hold up."""
        if self.running and self.stopped < 0:
            request = self.running.pop(self.random.randrange(len(self.running)))
            request.stream.finish()

    def _cancel_one(self) -> None:
        if self.running:
            request = self.random.choice(self.running)
            request.cancelled = self.stack.cancel(request.stream) or request.cancelled

    def _stop_one(self) -> None:
        if self.stopped < 0:
            self.stopped = self.random.randrange(2)
            send(self.stack.servers[self.stopped].process, signal.SIGSTOP)

    def _go_on(self) -> None:
        if self.stopped >= 0:
            send(self.stack.servers[self.stopped].process, signal.SIGCONT)
            self.stopped = -1

    def _restart_one(self, *, arena_lost: bool = False) -> None:
        self._go_on()
        index = self.random.randrange(2)
        self.stack.servers[index].kill()
        if arena_lost:
            # None if it was killed before it had made one.
            (self.stack.folder / f"a{index}.arena").unlink(missing_ok=True)
        self.stack.servers[index].restart()

    def _lose_an_arena(self) -> None:
        self._restart_one(arena_lost=True)


def soak(model: TinyModel, iterations: int, seed: int, worker: str = CPU) -> None:
    moves = {"fault-moves-per-pass": 0.1, "fault-seed": seed}
    stack = WorkerStack(
        worker_flags=model.flags() | FLAGS | moves,
        arena_bytes=TIGHT_ARENA_BYTES,
        worker_module=worker,
    )
    with stack:
        run = Soak(stack, Random(seed))
        run.run(iterations)
        stack.wait_until_idle()
        telemetry = stack.telemetry()
        assert telemetry.ring_waits == 0
        assert min(telemetry.demotions, telemetry.promotions) > 0
        assert telemetry.prefix_cache_hit_tokens > 0
        print(f"{run.iterations()} iterations, {len(run.asked)} requests, {run.happened}")
        print(telemetry)
    alone = model.flags() | FLAGS | {"be-placement": "device", "prefix-cache": False}
    with WorkerStack(servers=0, worker_flags=alone) as stack:
        for request in run.asked:
            _check(model, stack, request)


def _check(model: TinyModel, alone: WorkerStack, request: Asked) -> None:
    tokens = request.stream.tokens
    reason = request.stream.finish_reason
    if reason == types_pb2.FINISH_REASON_CANCELLED:
        assert request.cancelled
        assert len(tokens) < request.max_tokens
    else:
        assert reason == types_pb2.FINISH_REASON_LENGTH
        assert len(tokens) == request.max_tokens
    if tokens and tokens != alone.generate(request.prompt, len(tokens), ignore_eos=True):
        assert model.is_greedy(request.prompt, tokens), "other tokens, and no tie explains it"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(Path(tmp_path_factory.mktemp("model")))


def test_five_hundred_iterations_of_everything_end_with_the_right_tokens(model: TinyModel) -> None:
    soak(model, 500, seed=1)


def test_three_hundred_iterations_end_so_with_the_cuda_back_end(model: TinyModel) -> None:
    """On a GPU that runs late: what the engine must not do before the device has done its part."""
    soak(model, 300, seed=3, worker="support.simulated_worker")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_iterations_of_everything_end_with_the_right_tokens(model: TinyModel) -> None:
    soak(model, 10_000, seed=2)
