"""A worker process that never stops sending, and checks every answer. For tests that kill it."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from support.attention_process import GEOMETRY, PAGES, PATIENCE_S, WorkerEnd

from omniserve.attnkernel import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    KIND_FREE,
    KIND_RESTORE,
    STATUS_OK,
)
from omniserve.shm import layout

# Forked from a process without threads or channels, so that a worker starts in milliseconds.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["support.attention_traffic"])

# Sequences never need more pages than there are.
LONGEST_TOKENS = PAGES // GEOMETRY.max_sequences * GEOMETRY.page_tokens
CHUNK_TOKENS = 6


class TrafficProcess:
    """A worker of its own on an attached segment. `answered` and `outstanding` are live."""

    def __init__(self, shm_dir: Path, seed: int) -> None:
        self._answered = _PROCESSES.Value("q", 0)
        self._outstanding = _PROCESSES.Value("q", 0)
        self._stop = _PROCESSES.Event()
        arguments = (shm_dir, seed, self._answered, self._outstanding, self._stop)
        self.process: BaseProcess = _PROCESSES.Process(target=_send_until, args=arguments)
        self.process.start()

    @property
    def answered(self) -> int:
        """Messages answered so far, all of them checked."""
        return int(self._answered.value)

    @property
    def outstanding(self) -> int:
        return int(self._outstanding.value)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def finish(self) -> int:
        """Has it wait for what it sent, free everything and check; returns the exit status."""
        self._stop.set()
        self.process.join(PATIENCE_S)
        return -1 if self.process.exitcode is None else self.process.exitcode


@dataclass
class _Sequence:
    tokens: int = 0
    waiting: set[int] = field(default_factory=set)
    """Slots of its messages that were not answered."""


def _send_until(shm_dir: Path, seed: int, answered, outstanding, stop) -> None:  # type: ignore[no-untyped-def]
    traffic = _Traffic(shm_dir, seed)
    while not stop.is_set():
        traffic.send()
        outstanding.value = traffic.worker.link.outstanding
        answered.value += traffic.take()
    traffic.finish()


class _Traffic:
    def __init__(self, shm_dir: Path, seed: int) -> None:
        self.worker = WorkerEnd(shm_dir, seed)
        self.rng = np.random.default_rng(seed)
        self.sequences = [_Sequence() for _ in range(GEOMETRY.max_sequences)]
        self.sent = 0
        self.taken = 0
        self.answers_before = _answers_published(shm_dir)
        # A new epoch begins with an empty response ring and with slots that were never used.
        self.worker.poll()
        assert not self.worker.order
        self.worker.link.check_integrity()
        assert self.worker.link.written_len.max() == 0
        assert self.answers_before == 0

    def send(self) -> None:
        """Something for each sequence that waits for nothing."""
        for number, sequence in enumerate(self.sequences):
            if not sequence.waiting:
                kind, rows = self._choose(number, sequence)
                sequence.waiting.update(self.worker.send(kind, rows))
                self.sent += len(rows)

    def _choose(self, number: int, sequence: _Sequence) -> tuple[int, list[tuple[int, int, int]]]:
        layers = range(GEOMETRY.layers)
        tokens = sequence.tokens
        choice = self.rng.integers(8)
        if choice == 0 and tokens:
            first = int(self.rng.integers(tokens))
            places = range(first, min(tokens, first + CHUNK_TOKENS))
            return KIND_RESTORE, [(la, number, p) for p in places for la in layers]
        if tokens >= LONGEST_TOKENS - CHUNK_TOKENS:
            sequence.tokens = 0
            return KIND_FREE, [(0, number, 0)]
        if choice == 1:
            sequence.tokens += CHUNK_TOKENS
            places = range(tokens, tokens + CHUNK_TOKENS)
            return KIND_CHECKPOINT, [(la, number, p) for p in places for la in layers]
        sequence.tokens += 1
        return KIND_ATTEND, [(la, number, tokens) for la in layers]

    def take(self) -> int:
        """Waits for some answers; returns how many messages are done with."""
        worker = self.worker
        waiting = {slot for sequence in self.sequences for slot in sequence.waiting}
        seen = worker.bell.value()
        worker.poll()
        if not worker.statuses:
            assert worker.bell.wait(seen, int(PATIENCE_S * 1e6)), "an answer was lost"
            worker.poll()
        done = list(worker.statuses)
        for slot in done:
            assert slot in waiting
            self._check(slot)
        worker.release(done)
        for sequence in self.sequences:
            sequence.waiting.difference_update(done)
        self.taken += len(done)
        return len(done)

    def _check(self, slot: int) -> None:
        kind, layer, sequence, position = self.worker.sent[slot]
        assert self.worker.statuses[slot] == STATUS_OK
        if kind == KIND_ATTEND:
            self.worker.assert_attended(slot)
        elif kind == KIND_RESTORE:
            np.testing.assert_array_equal(
                self.worker.link.slab[slot, self.worker.kv_columns(kind)],
                self.worker.kv[sequence, layer][position],
            )
        elif kind == KIND_FREE:
            for la in range(GEOMETRY.layers):
                self.worker.kv.pop((sequence, la), None)

    def finish(self) -> None:
        while self.worker.link.outstanding:
            self.take()
        assert self.taken == self.sent
        for number in range(GEOMETRY.max_sequences):
            self.worker.free_sequence(number)
        self.worker.link.check_integrity()
        assert self.worker.link.ring_waits == 0


def _answers_published(shm_dir: Path) -> int:
    """The response ring's tail: answers that a server published in this epoch."""
    arena = np.memmap(shm_dir / "a0.arena", np.uint8, "r")
    at = layout.regions(GEOMETRY, PAGES)["response_ring"] + layout.CRingHeader.tail.offset
    return int(arena[at : at + 8].view(np.uint64)[0])
