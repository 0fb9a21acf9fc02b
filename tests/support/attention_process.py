"""A real attention server process, and a worker's end of it that knows the right answers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from support.signals import send

from omniserve.attnkernel import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    KIND_FREE,
    KIND_RESTORE,
    STATUS_OK,
    Bell,
    WorkerLink,
)
from omniserve.internal.v1 import attention_pb2, attention_pb2_grpc
from omniserve.shm import layout
from omniserve.v1 import status_pb2

# How long a test waits for something that must happen; not a claim of speed.
PATIENCE_S = 60.0

GEOMETRY = layout.Geometry(
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=32,
    dtype="float32",
    kv_dtype="float32",
    page_tokens=16,
    max_sequences=8,
    max_sequence_tokens=200,
    slots=96,
)
PAGES = 24
ARENA_BYTES = layout.arena_bytes(GEOMETRY, PAGES)


class ServerProcess:
    """`python -m omniserve.cpuattn`, restartable on the same arena and port."""

    def __init__(self, shm_dir: Path, *flags: str, arena_bytes: int = ARENA_BYTES) -> None:
        self.arena_bytes = arena_bytes
        self.shm_dir = shm_dir
        self.flags = flags
        self.log = shm_dir / "server.log"
        self.arena = shm_dir / "a0.arena"
        self.start()

    def start(self) -> None:
        """Returns when the server answers."""
        self._spawn()
        self.port = self._find_port()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        grpc.channel_ready_future(self.channel).result(timeout=PATIENCE_S)
        self.stub = attention_pb2_grpc.AttentionServiceStub(self.channel)

    def start_and_kill(self, after_s: float) -> None:
        """Kills it that long after its process was made."""
        self._spawn()
        time.sleep(after_s)
        self.process.kill()
        self.process.wait()

    def _spawn(self) -> None:
        command = [sys.executable, "-m", "omniserve.cpuattn", "--shm-dir", str(self.shm_dir)]
        command += ["--arena-bytes", str(self.arena_bytes)]
        command += ["--listen", "127.0.0.1:0", *self.flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def _find_port(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if "(port " in line:
                    return int(line.rpartition("(port ")[2].rstrip(")"))
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        send(self.process, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        status = self.process.wait(PATIENCE_S)
        self.channel.close()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()

    def stats(self) -> status_pb2.AttentionServerStatus:
        answer: attention_pb2.GetStatsResponse = self.stub.GetStats(attention_pb2.GetStatsRequest())
        return answer.stats

    def attach(
        self,
        geometry: layout.Geometry = GEOMETRY,
        *,
        worker_id: str = "w0",
        epoch: int = 1,
        layers: Sequence[attention_pb2.LayerOptions] = (),
    ) -> attention_pb2.AttachResponse:
        """Attaches with a bell of that worker's."""
        bell = self.shm_dir / f"{worker_id}.bell"
        if not bell.exists():
            Bell(str(bell), create=True)
        answer: attention_pb2.AttachResponse = self.stub.Attach(
            attention_pb2.AttachRequest(
                worker_id=worker_id,
                epoch=epoch,
                geometry=attention_pb2.Geometry(**vars(geometry)),
                bell_path=str(bell),
                layers=layers,
            )
        )
        return answer


class WorkerEnd:
    """Sends rows and remembers the KV it sent, [position] -> k, v, per sequence and layer."""

    def __init__(self, shm_dir: Path, seed: int) -> None:
        """Of a segment that was attached to already."""
        self.log = shm_dir / "server.log"
        self.link = WorkerLink(str(shm_dir / "a0.arena"))
        self.bell = Bell(str(shm_dir / "w0.bell"), create=False)
        self.rng = np.random.default_rng(seed)
        self.free = list(range(GEOMETRY.slots))
        self.kv: dict[tuple[int, int], dict[int, NDArray[np.float32]]] = {}
        self.sent: dict[int, tuple[int, int, int, int]] = {}
        self.statuses: dict[int, int] = {}
        self.order: list[int] = []

    def send(
        self,
        kind: int,
        rows: list[tuple[int, int, int]],
        *,
        fresh: bool = True,
        count: int = 1,
    ) -> list[int]:
        """One message per (layer, sequence, position); returns their slots.

        fresh: new k, v. count: what each message says; k, v are of its first token only.
        """
        slots = [self.free.pop() for _ in rows]
        for (layer, sequence, position), slot in zip(rows, slots, strict=True):
            self.sent[slot] = (kind, layer, sequence, position)
            if kind in (KIND_ATTEND, KIND_CHECKPOINT):
                self._fill(slot, layer, sequence, position, fresh=fresh)
            elif kind == KIND_RESTORE:
                self.link.slab[slot] = np.nan
        columns = np.array(rows, np.int32).reshape(-1, 3).T.copy()
        counts = np.full(len(rows), count, np.int32)
        self.link.submit(kind, *columns, np.array(slots, np.int32), counts)
        return slots

    def _fill(self, slot: int, layer: int, sequence: int, position: int, *, fresh: bool) -> None:
        link = self.link
        row = self.rng.standard_normal(link.slot_elems).astype(np.float32)
        row[link.out_offset :] = np.nan
        known = self.kv.setdefault((sequence, layer), {})
        kv = self.kv_columns(self.sent[slot][0])
        if not fresh:
            row[kv] = known[position]
        link.slab[slot] = row
        known.setdefault(position, row[kv].copy())

    def kv_columns(self, kind: int) -> slice:
        """Where a message's slot has k and v of (its first) token."""
        start = self.link.k_offset if kind == KIND_ATTEND else 0
        return slice(start, start + self.link.out_offset - self.link.k_offset)

    def poll(self) -> None:
        """Takes what has come, without waiting."""
        for slot, status in zip(*(a.tolist() for a in self.link.poll()), strict=True):
            assert slot not in self.statuses
            self.statuses[slot] = status
            self.order.append(slot)

    def wait(self, slots: list[int]) -> list[int]:
        """Sleeps on the bell until `slots` are answered; returns their statuses in order."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            seen = self.bell.value()
            self.poll()
            if all(slot in self.statuses for slot in slots):
                return [self.statuses[slot] for slot in slots]
            if time.monotonic() > deadline:
                missing = [self.sent[s] for s in slots if s not in self.statuses]
                raise TimeoutError(f"{missing}\n{self.log.read_text()}")
            self.bell.wait(seen, 100_000)

    def release(self, slots: list[int]) -> None:
        for slot in slots:
            del self.statuses[slot], self.sent[slot]
            self.free.append(slot)

    def run(self, kind: int, rows: list[tuple[int, int, int]]) -> list[int]:
        """Sends, waits, gives the slots back; returns the statuses."""
        slots = self.send(kind, rows)
        statuses = self.wait(slots)
        self.release(slots)
        return statuses

    def prefill(self, sequence: int, tokens: int) -> None:
        """Checkpoints positions 0 .. tokens in every layer, as many at a time as slots allow."""
        rows = [(la, sequence, p) for p in range(tokens) for la in range(GEOMETRY.layers)]
        for first in range(0, len(rows), 64):
            assert set(self.run(KIND_CHECKPOINT, rows[first : first + 64])) == {STATUS_OK}

    def free_sequence(self, sequence: int) -> None:
        assert self.run(KIND_FREE, [(0, sequence, 0)]) == [STATUS_OK]
        for layer in range(GEOMETRY.layers):
            self.kv.pop((sequence, layer), None)

    def decode(self, sequence: int, position: int) -> None:
        """One token through all layers, with its answers checked."""
        for layer in range(GEOMETRY.layers):
            slots = self.send(KIND_ATTEND, [(layer, sequence, position)])
            assert self.wait(slots) == [STATUS_OK]
            self.assert_attended(slots[0])
            self.release(slots)

    def assert_attended(self, slot: int) -> None:
        """The slot's output is attention over all that was sent for its sequence and layer."""
        _, layer, sequence, position = self.sent[slot]
        row = self.link.slab[slot].astype(np.float64)
        q = row[: self.link.k_offset].reshape(GEOMETRY.heads, GEOMETRY.head_dim)
        known = self.kv[sequence, layer]
        kv = np.stack([known[p] for p in range(position + 1)]).astype(np.float64)
        k, v = kv.reshape(position + 1, 2, GEOMETRY.kv_heads, GEOMETRY.head_dim).swapaxes(0, 1)
        group = GEOMETRY.heads // GEOMETRY.kv_heads
        out = row[self.link.out_offset :].reshape(q.shape)
        for head in range(GEOMETRY.heads):
            scores = k[:, head // group] @ q[head] / np.sqrt(GEOMETRY.head_dim)
            weights = np.exp(scores - scores.max())
            expected = weights @ v[:, head // group] / weights.sum()
            np.testing.assert_allclose(out[head], expected, rtol=2e-5, atol=2e-5)


class Worker(WorkerEnd):
    """A worker that attaches itself."""

    def __init__(
        self,
        server: ServerProcess,
        seed: int = 0,
        epoch: int = 1,
        geometry: layout.Geometry = GEOMETRY,
        layers: Sequence[attention_pb2.LayerOptions] = (),
    ) -> None:
        self.server = server
        self.attached = server.attach(geometry, epoch=epoch, layers=layers)
        super().__init__(server.shm_dir, seed)
