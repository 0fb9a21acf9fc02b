"""How much of the bare kernel's speed an attention server keeps.

A server process with one thread on one core is fed through its rings from another core; the bare
kernel, with one thread of this process on the server's core, attends the same rows where they lie
in the server's arena while the server sleeps. Turns of both alternate. Each call reads other KV
than the one before, and all KV together is far more than the caches hold.

    python benchmarks/attention_server.py --json

The last line is one JSON object: `cases` (per `geometry`, `context` and `batch`: `server_gbs`,
`kernel_gbs`, KV read per second in 1e9 bytes, and `fraction`, the median over rounds of the first
over the second) and `fraction_of_kernel`, the least fraction.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.attention_process import PATIENCE_S, ServerProcess

from omniserve.attnkernel import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    STATUS_OK,
    WorkerLink,
)
from omniserve.attnkernel._bench import ArenaProbe
from omniserve.shm import layout

COHORTS = 4
"""Messages in flight: the server works on one while the producer sends others again. A worker has
a cohort per stage, that is, many more."""
POLL_S = 50e-6
KV_BYTES = 256 << 20
"""Layers are what tells one call's KV from the next one's."""


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    batch: int

    @property
    def call_bytes(self) -> int:
        """KV that one call reads."""
        return 2 * 2 * self.kv_heads * self.head_dim * self.context * self.batch

    @property
    def layers(self) -> int:
        return max(COHORTS, -(-KV_BYTES // self.call_bytes))

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}"


CASES = (Case(32, 8, 128, 4096, 8), Case(32, 8, 128, 4096, 1), Case(9, 3, 64, 4096, 8))


def main() -> int:
    options = _options()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("attention_server: SETTINGS: two cores are needed", file=sys.stderr)
        return 2
    cases = [_measure(case, cores[:2], options.rounds, options.turn_ms) for case in CASES]
    report = {
        "cases": cases,
        "fraction_of_kernel": min(case["fraction"] for case in cases),
        "rounds": options.rounds,
    }
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(str(case) for case in cases))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each kind (default 15)")
    parser.add_argument("--turn-ms", type=int, default=150, help="length of a turn (default 150)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(case: Case, cores: list[int], rounds: int, turn_ms: int) -> dict[str, Any]:
    worker_core, server_core = cores
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="omniserve-bench-") as folder:
        os.sched_setaffinity(0, {server_core})  # inherited by the server, which pins itself to it
        server = FedServer(Path(folder), case)
        os.sched_setaffinity(0, cores)
        try:
            gbs: dict[str, list[float]] = {"server": [], "kernel": []}
            for _ in range(rounds):
                os.sched_setaffinity(0, {worker_core})
                gbs["server"].append(server.server_turn(turn_ms))
                os.sched_setaffinity(0, {server_core})
                gbs["kernel"].append(server.kernel_turn(turn_ms))
        finally:
            os.sched_setaffinity(0, cores)
            server.close()
    fractions = [s / k for s, k in zip(gbs["server"], gbs["kernel"], strict=True)]
    result = {
        "geometry": case.name,
        "context": case.context,
        "batch": case.batch,
        "server_gbs": round(statistics.median(gbs["server"]), 2),
        "kernel_gbs": round(statistics.median(gbs["kernel"]), 2),
        "fraction": round(statistics.median(fractions), 4),
        "huge_pages": server.huge_bytes > 0,
    }
    print(result, file=sys.stderr)
    return result


class FedServer:
    """A server process, and a producer that keeps `COHORTS` messages in its rings."""

    def __init__(self, shm_dir: Path, case: Case) -> None:
        self.case = case
        geometry = layout.Geometry(
            layers=case.layers,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            dtype="bfloat16",
            kv_dtype="bfloat16",
            page_tokens=64,
            max_sequences=case.batch,
            max_sequence_tokens=case.context,
            slots=max(COHORTS * case.batch, 512),
        )
        size = layout.arena_bytes(geometry, case.batch * geometry.max_pages_per_sequence)
        self.process = ServerProcess(shm_dir, "--cores", "exclusive", arena_bytes=size)
        # As the server says at its start.
        said = re.search(r"(\d+) of them in huge pages", self.process.log.read_text())
        self.huge_bytes = int(said[1]) if said else 0
        try:
            segment = self.process.attach(geometry).segment_path
            self.link = WorkerLink(segment)
            self.kernel = ArenaProbe(segment, threads=1)
            self.layer = 0
            self._fill(geometry.slots)
        except BaseException:
            self.process.close()
            raise

    def close(self) -> None:
        self.process.terminate()

    def _fill(self, slots: int) -> None:
        """Checkpoints every position but the last in every layer and sequence, one a message."""
        link, case = self.link, self.case
        link.slab[:] = _random_rows(slots, link.slot_elems)
        places = np.stack(
            np.meshgrid(np.arange(case.context - 1), np.arange(case.batch), np.arange(case.layers)),
            axis=-1,
        )
        places = places.transpose(1, 0, 2, 3).reshape(-1, 3).astype(np.int32)
        for first in range(0, len(places), slots):
            position, sequence, layer = places[first : first + slots].T.copy()
            link.submit(
                KIND_CHECKPOINT, layer, sequence, position, np.arange(len(layer), dtype=np.int32)
            )
            self._wait(len(layer))

    def kernel_turn(self, turn_ms: int) -> float:
        """KV that the bare kernel reads in 1e9 bytes per second."""
        calls = 0
        busy_s = 0.0
        while busy_s < turn_ms / 1e3:
            busy_s += self.kernel.run(self._next_layer())
            calls += 1
        return calls * self.case.call_bytes / busy_s / 1e9

    def server_turn(self, turn_ms: int) -> float:
        """KV that the server reads, likewise; begins with an idle server and ends with one."""
        waiting = [0] * COHORTS
        calls = 0
        begin = time.perf_counter()
        for cohort in range(COHORTS):
            waiting[cohort] = self._send(cohort)
        while any(waiting):
            for slot in self._take():
                cohort = slot // self.case.batch
                waiting[cohort] -= 1
                if waiting[cohort] == 0:
                    calls += 1
                    if time.perf_counter() - begin < turn_ms / 1e3:
                        waiting[cohort] = self._send(cohort)
        return calls * self.case.call_bytes / (time.perf_counter() - begin) / 1e9

    def _send(self, cohort: int) -> int:
        """One row per sequence in the next layer: its last token, again and again."""
        case = self.case
        rows = np.arange(case.batch, dtype=np.int32)
        layers = np.full(case.batch, self._next_layer(), np.int32)
        positions = np.full(case.batch, case.context - 1, np.int32)
        self.link.submit(KIND_ATTEND, layers, rows, positions, cohort * case.batch + rows)
        return case.batch

    def _next_layer(self) -> int:
        self.layer = (self.layer + 1) % self.case.layers
        return self.layer

    def _take(self) -> list[int]:
        """Slots of answers, at least one. Looks for them every now and then, as a worker between
        its stages does: it is not on its bell, whose ringing would be the server's work, and does
        not spin, for the cores may be two threads of one."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            slots, statuses = self.link.poll()
            if len(slots):
                assert (statuses == STATUS_OK).all(), statuses
                return [int(slot) for slot in slots]
            time.sleep(POLL_S)
        raise TimeoutError("the server does not answer")

    def _wait(self, answers: int) -> None:
        while answers:
            answers -= len(self._take())


def _random_rows(rows: int, columns: int) -> NDArray[np.uint16]:
    """[rows, columns] of bfloat16 bits, normally distributed."""
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


if __name__ == "__main__":
    sys.exit(main())
