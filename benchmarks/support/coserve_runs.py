"""The runs of `coserve.py`: a start of the stack under one policy; a file of finished ones."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from support import limits
from support.cpu_time import CpuTime
from support.lengths import Lengths
from support.load import Arrival, Load, Sent, Slo
from support.roofline import Machine
from support.telemetry import tokens_by_path
from support.worker import THREADS, pages_for, serve
from support.worker_stack import WorkerStack

from omniserve.client.bench.arrivals import arrival_times_s
from omniserve.client.bench.metrics import Outcome, RequestRecord
from omniserve.v1 import status_pb2

BE = Arrival(0.0, 256, 1024, best_effort=True)
SERVERS = 2
BURSTINESS = 1 / 9
"""Shape of the Gamma gaps: their CV is one over its root, 3."""
ATTAINED = 0.95
_STEPS = 6
_BISECTED = range(2)


@dataclass(frozen=True)
class CoserveLoad:
    """What is the same in every run."""

    lengths: Lengths
    slo: Slo
    duration_s: float
    """Of LS arrivals."""
    settle_s: float
    """Of the backlog before them."""
    device_kv_tokens: int
    sequences: int
    """BE requests in flight, in all."""
    backlog: int
    """BE requests in all; some must still wait at the end."""
    be: Arrival = BE
    servers: int = SERVERS
    serve_flags: Mapping[str, Any] = field(default_factory=dict)
    """More keywords of `serve`."""
    limits_threads: int = THREADS
    """That read memory, and multiply, where a run's limits are measured."""

    def arrivals(self, rate_per_s: float, seed: int) -> list[Arrival]:
        lengths = self.lengths.draw(np.random.default_rng(seed))
        # Hundreds of gaps are gone through first: the first of so bursty a process is not typical.
        times = arrival_times_s(rate_per_s, BURSTINESS, 2 * self.duration_s, seed)
        late = (at_s - self.duration_s for at_s in times)
        inside = itertools.dropwhile(lambda at_s: at_s < 0, late)
        return [
            Arrival(at_s + self.settle_s, *pair)
            for at_s, pair in zip(inside, lengths, strict=False)
        ]

    def seeds(self, rate_per_s: float, requests: int) -> int:
        """The first so many seeds have `requests` arrivals together."""
        total = 0
        for seed in itertools.count():
            if total >= requests:
                return seed
            total += len(self.arrivals(rate_per_s, seed))
        raise AssertionError("unreachable")


class Runs:
    """Finished runs by their keys, in a file that a later call goes on from."""

    def __init__(self, path: Path | None, more: int) -> None:
        self.done: list[dict[str, Any]] = []
        self.exhausted = False
        """Whether a run was left out because this call had made enough."""
        self._path = path
        self._more = more
        if path is not None and path.is_file():
            self.done = [json.loads(line) for line in path.read_text().splitlines()]

    def make(
        self, load: CoserveLoad, policy: str, headroom: float | None, rate_per_s: float, seed: int
    ) -> dict[str, Any] | None:
        """Returns the run: from the file, or made now; None if this call has made enough."""
        key = {"policy": policy, "headroom": headroom, "rate_per_s": rate_per_s, "seed": seed}
        for done in self.done:
            if key.items() <= done.items():
                return done
        if self._more == 0:
            self.exhausted = True
            return None
        self._more -= 1
        machine = Machine(
            limits.read_bytes_per_s(load.limits_threads), limits.gemm_flops(load.limits_threads)
        )
        made = key | asdict(machine) | _run(load, policy, headroom, rate_per_s, seed)
        self.done.append(made)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as lines:
                lines.write(json.dumps(made) + "\n")
        shown = {name: value for name, value in made.items() if name != "requests"}
        met = np.mean([request["met"] for request in made["requests"]])
        print(json.dumps(shown | {"ls_attainment": met}), file=sys.stderr, flush=True)
        return made


def saturation_per_s(load: CoserveLoad, runs: Runs, most_per_s: float) -> float | None:
    """The highest rate below `most_per_s` at which `ls-only` attains 0.95.

    None if this call may not go on. Far above it every run takes long: all requests are served.
    """
    low, high = 0.0, most_per_s
    for _ in range(_STEPS):
        rate = (low + high) / 2
        missed = _missed(load, runs, rate)
        if missed is None:
            return None
        if missed <= 1.0 - ATTAINED:
            low = rate
        else:
            high = rate
    return low


def _missed(load: CoserveLoad, runs: Runs, rate_per_s: float) -> float | None:
    """The part of the requests of two seeds that `ls-only` fails; None if the call has to end.

    Without the second seed where the first misses too many for both: less than the part then.
    """
    requests = sum(len(load.arrivals(rate_per_s, seed)) for seed in _BISECTED)
    missed = 0
    for seed in _BISECTED:
        made = runs.make(load, "ls-only", None, rate_per_s, seed)
        if made is None:
            return None
        missed += sum(not request["met"] for request in made["requests"])
        if missed / requests > 1.0 - ATTAINED:
            break
    return missed / requests


def _run(
    load: CoserveLoad, policy: str, headroom: float | None, rate_per_s: float, seed: int
) -> dict[str, Any]:
    """One start of the stack; BE tokens count from the first to the last moment of LS arrivals."""
    if policy == "ls-only":
        load = replace(load, settle_s=1.0)  # nothing is there to settle
    arrivals = load.arrivals(rate_per_s, seed)
    each = load.sequences // load.servers
    pages = each * pages_for(load.be.prompt_tokens + load.be.output_tokens)
    with serve(
        device_kv_tokens=load.device_kv_tokens,
        servers=load.servers,
        sequences=each,
        pages=pages,
        orphan_lease_s=0,
        **load.serve_flags,
        **_flags(policy, headroom),
    ) as stack:
        client = Load(stack.worker.address, load.slo, seed)
        client.run([Arrival(0.0, 64, 8)])  # warms up
        with Window(stack, load.settle_s, load.duration_s) as window:
            end_s = load.settle_s + load.duration_s
            sent, backlog = client.run_beside(arrivals, [load.be] * load.backlog, end_s)
    _check_backlog([one.record for one in backlog])
    return {
        "requests": [_judged(one, load.slo) for one in sent],
        "be_context_tokens": window.be_context_tokens(backlog),
        **window.figures(),
    }


class Window:
    """Reads the worker's counters when LS arrivals begin, and when they end."""

    def __init__(self, stack: WorkerStack, begin_s: float, duration_s: float) -> None:
        self._stack = stack
        self._begin_s = time.perf_counter() + begin_s
        self._end_s = self._begin_s + duration_s
        self._thread = threading.Thread(target=self._watch)
        self._cores: dict[str, float] = {}

    def __enter__(self) -> Window:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.join()

    def figures(self) -> dict[str, Any]:
        """What the worker did in the window."""
        first, last = self._first.telemetry, self._last.telemetry
        seconds = self._end_s - self._begin_s
        read = [_kv_bytes_read(status) for status in (self._first, self._last)]
        passes = last.passes - first.passes
        return {
            "be_tokens_per_s": (last.be_output_tokens - first.be_output_tokens) / seconds,
            "tokens_by_path": tokens_by_path(first, last),
            "busy_share": (last.busy_ns - first.busy_ns) / 1e9 / seconds,
            "passes_per_s": passes / seconds,
            "ls_tokens_per_pass": (last.ls_output_tokens - first.ls_output_tokens) / max(1, passes),
            "servers_read_bytes_per_s": (read[1] - read[0]) / seconds,
            "cores": self._cores,
        }

    def be_context_tokens(self, backlog: Sequence[Sent]) -> float:
        """Mean context of the BE tokens that came in the window; 0 without any."""
        contexts = [
            one.arrival.prompt_tokens + index
            for one in backlog
            for index, at_s in enumerate(one.record.token_times_s)
            if self._begin_s <= at_s < self._end_s
        ]
        return float(np.mean(contexts)) if contexts else 0.0

    def _watch(self) -> None:
        time.sleep(self._begin_s - time.perf_counter())
        cpu = CpuTime(self._stack)
        self._first = self._stack.status()
        time.sleep(self._end_s - time.perf_counter())
        self._last = self._stack.status()
        self._cores = cpu.cores()


def _check_backlog(records: Sequence[RequestRecord]) -> None:
    """Raises RuntimeError if BE lacked work, or had work that the worker does not do."""
    bad = {r.outcome for r in records} - {Outcome.UNFINISHED, Outcome.COMPLETED}
    if bad:
        raise RuntimeError(f"BE requests ended as {', '.join(sorted(bad))}")
    if all(record.token_times_s for record in records):
        raise RuntimeError(f"none of {len(records)} BE requests waited at the end")


def _kv_bytes_read(status: status_pb2.WorkerStatus) -> int:
    """By all servers since they started."""
    return sum(server.kv_bytes_read for server in status.attention_servers)


def _flags(policy: str, headroom: float | None) -> dict[str, Any]:
    """Flags of the worker that make it follow `policy`."""
    return {"policy": policy} | ({"reserve_headroom": headroom} if headroom is not None else {})


def _judged(sent: Sent, slo: Slo) -> dict[str, Any]:
    record = sent.record
    met = record.meets(slo.ttft_ms, slo.tpot_ms)
    completed = record.outcome is Outcome.COMPLETED
    times = {"ttft_ms": record.ttft_ms, "tpot_ms": record.tpot_ms}
    return {"met": met, "completed": completed} | times
