"""The `cuda` back end: stages as graphs, rows of attention servers copied beside them.

Three streams. The model's has dense work and local attention; it waits for copies, never for a
server. `inbound` uploads a stage's index arrays and fetches the attention of boarded rows while
earlier stages run; `outbound` writes boarded rows' q, k and v into their servers' slots, which the
device sees as its own memory. The host is at most `RUN_AHEAD` stages ahead, so that an LS arrival
finds few of them launched.

Not part of the engine yet, and no GPU has run it: tests run it on a simulated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.cuda.attention import Attention
from omniserve.gpuworker.device.cuda.batch import (
    Batch,
    Boarded,
    CudaPart,
    Index,
    rows_of,
    slots_of,
)
from omniserve.gpuworker.device.cuda.dense import DenseStages
from omniserve.gpuworker.device.cuda.gpu import Event, Gpu
from omniserve.gpuworker.device.cuda.graphs import StageGraphs
from omniserve.gpuworker.device.cuda.kv import DevicePages
from omniserve.gpuworker.device.cuda.rows import LANES, CudaCohortRows, RowStore
from omniserve.gpuworker.device.cuda.transfers import Transfers, Upload
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import DecoderWeights

RUN_AHEAD = 2
# Stages in turn leave q, k and v in one of these: one is copied out while the next is written.
_QKV_BUFFERS = 2


class CudaDevice:
    """Enqueues stages, and says when they are done. Nothing but `finish` waits for the device."""

    def __init__(
        self,
        gpu: Gpu,
        config: ModelConfig,
        weights: DecoderWeights,
        attention: Attention,
        *,
        pages: int,
        page_tokens: int,
        parked_rows: int,
        cohort_rows: int,
        sampled_rows: int,
        transfer_tokens: int,
    ) -> None:
        """Allocates all memory but that of graphs.

        cohort_rows: of one cohort, sampled_rows: of a last stage, transfer_tokens: of one copy
        between pages and slots, counting each layer's; all at most.
        """
        torch.set_grad_enabled(False)
        self.config = config
        self.dtype = dtype = weights.embedding.dtype
        self._gpu = gpu
        self._attention = attention
        self._dense = DenseStages(config, weights, gpu.device)
        self._store = RowStore(gpu, config, dtype, parked_rows, cohort_rows)
        rows_max = parked_rows + LANES * cohort_rows
        self._model = gpu.stream(priority=-1)
        self._inbound = gpu.stream(priority=-1)
        self._outbound = gpu.stream(priority=-1)
        self._graphs = StageGraphs(self._model, self._stage, rows_max)
        self._index = Index(gpu, rows_max)
        scratch = self._store.scratch_row
        self._batches = [Batch(gpu, rows_max, scratch) for _ in range(RUN_AHEAD + 1)]
        qkv = config.q_size + 2 * config.kv_size
        self._qkv = [gpu.zeros(rows_max, qkv, dtype=dtype) for _ in range(_QKV_BUFFERS)]
        self._qkv_sent: list[Event | None] = [None] * _QKV_BUFFERS
        padded = self._graphs.padded(sampled_rows)
        self._best = gpu.zeros(padded, dtype=torch.int64)
        self._logits = gpu.zeros(padded, config.vocabulary, dtype=torch.float32)
        self._best_host = gpu.pinned(padded, dtype=torch.int64)
        self._logits_host = gpu.pinned(padded, config.vocabulary, dtype=torch.float32)
        self._places = [Upload(gpu, 2, cohort_rows) for _ in range(LANES)]
        self._entered: list[Event | None] = [None] * LANES
        self.kv = DevicePages(gpu, config, pages, page_tokens, dtype)
        self._transfers = Transfers(gpu, self.kv, transfer_tokens)
        self._slabs: list[_Slab] = []

    def map_slabs(self, slabs: Sequence[tuple[npt.NDArray[Any], int]]) -> None:
        """Says which servers there are: of each its slab and where outputs begin in a slot's row.

        slabs: of each server [slots, elements of a slot], as `WorkerLink.slab`, q, k and v first.
        """
        kv_size = self.config.kv_size
        self._slabs = [
            _Slab(self._gpu.map_host(slab, self.dtype), out_offset, 2 * kv_size)
            for slab, out_offset in slabs
        ]

    def enter(self, cohort: Cohort) -> CudaCohortRows:
        """Gives the rows of `cohort`, which is to run stage 0, their places."""
        lane = int(not cohort.chunks[0].request.latency_sensitive)
        entered = self._entered[lane]
        while entered is not None and not entered.done():
            pass  # the last one was called off before the device began with it
        places = np.stack([cohort.pages, cohort.offsets])
        on_device = self._places[lane].enqueue(self._model, places)
        held = CudaCohortRows(cohort, lane, self._store.first_of(lane), on_device)

        def plan() -> None:
            held.attention = self._attention.plan(cohort, lane)

        self._model.launch(plan)
        self._entered[lane] = self._model.record()
        return held

    def has_room(self) -> bool:
        """Whether the device is near enough for another stage to be launched."""
        return self._batches[0].is_free()

    def run(
        self, stage: int, parts: Sequence[CudaPart], cohorts: Sequence[CudaCohortRows] = ()
    ) -> Event | None:
        """Launches the dense work of a stage that is not the last; needs `has_room`.

        parts: those of `cohorts` first, in their order. Returns when boarded rows' q, k and v are
        in their slots; None if there are none.
        """
        at = 0
        for held in cohorts:
            held.batch_first, at = at, at + held.rows
        batch = self._launch(stage, parts)
        if not batch.boarded:
            return None
        self._outbound.wait(batch.events[0])
        qkv = self._qkv[stage % _QKV_BUFFERS]
        for boarded in batch.boarded:
            self._outbound.launch(partial(self._send, batch, boarded, qkv))
        sent = self._outbound.record()
        batch.events.append(sent)
        self._qkv_sent[stage % _QKV_BUFFERS] = sent
        return sent

    def attend(self, layer: int, held: CudaCohortRows) -> None:
        """Launches attention of a cohort's rows, which have just run stage `layer`."""
        self._model.launch(partial(self._attend, layer, held, held.batch_first))

    def finish(
        self, parts: Sequence[CudaPart], wanted: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        """Runs the last stage over `parts` and waits for it; needs `has_room`.

        wanted: [rows], whose logits are. Returns the token with the largest logit of each row,
        [rows], and [rows, vocabulary] float32, valid until the next call and only where wanted.
        """
        batch = self._launch(self.config.layers, parts)
        copied = [(at, row) for at, row in enumerate(batch.order.tolist()) if wanted[row]]
        self._model.launch(partial(self._download, batch.rows, copied))
        done = self._model.record()
        while not done.done():
            pass
        best = np.empty(batch.rows, np.int64)
        best[batch.order] = self._best_host[: batch.rows].numpy()
        return best, self._logits_host[: batch.rows]

    def can_transfer(self) -> bool:
        """Whether the last copy between pages and slots is done: there is one at a time."""
        return self._transfers.is_free()

    def export_tokens(self, server: int, places: npt.NDArray[np.int64]) -> Event:
        """Copies KV that launched stages compute into slots of `server`; see Transfers."""
        return self._transfers.export(self._model.record(), places, self._slabs[server].tokens)

    def import_tokens(self, server: int, places: npt.NDArray[np.int64]) -> Event:
        """Copies KV from slots of `server` into pages of the device; see Transfers."""
        return self._transfers.take_in(self._model.record(), places, self._slabs[server].tokens)

    def _launch(self, stage: int, parts: Sequence[CudaPart]) -> Batch:
        """Launches a stage; the first event of the batch is its end."""
        batch = self._batches.pop(0)
        assert batch.is_free(), "a stage further ahead than the host may be"
        self._batches.append(batch)
        batch.fill(parts, self._graphs.padded)
        self._inbound.launch(batch.upload)
        if stage:
            for boarded in batch.boarded:
                self._inbound.launch(partial(self._fetch, batch, boarded))
        self._model.wait(self._inbound.record())
        sent = self._qkv_sent[stage % _QKV_BUFFERS]
        if sent is not None:
            self._model.wait(sent)
        self._model.launch(partial(self._index.load, batch))
        self._graphs.launch(stage, batch.padded)
        batch.events = [self._model.record()]
        return batch

    def _stage(self, stage: int, rows: int) -> None:
        """The work of a stage: what a graph is made of."""
        dense, store, index = self._dense, self._store, self._index
        places, layers = index.rows(rows), self.config.layers
        if stage == 0:
            x = dense.embed(index.tokens(rows))
        else:
            residual = store.residual.index_select(0, places)
            x = dense.leave(stage - 1, residual, store.attention.index_select(0, places))
        if stage == layers:
            logits = self._logits[:rows]
            logits.copy_(dense.head(x))
            torch.argmax(logits, dim=1, out=self._best[:rows])
            return
        self._qkv[stage % _QKV_BUFFERS][:rows].copy_(dense.enter(stage, x, index.positions(rows)))
        store.residual.index_copy_(0, places, x)

    def _fetch(self, batch: Batch, boarded: Boarded) -> None:
        out = self._slabs[boarded.server].out
        self._store.attention.index_copy_(
            0, rows_of(batch, boarded), out.index_select(0, slots_of(batch, boarded))
        )

    def _send(self, batch: Batch, boarded: Boarded, qkv: torch.Tensor) -> None:
        rows = qkv[boarded.first : boarded.end]
        self._slabs[boarded.server].qkv.index_copy_(0, slots_of(batch, boarded), rows)

    def _attend(self, layer: int, held: CudaCohortRows, first: int) -> None:
        assert held.attention is not None, "attention before it was planned"
        rows = self._qkv[layer % _QKV_BUFFERS][first : first + held.rows]
        self.kv.append(layer, rows[:, self.config.q_size :], held.pages, held.offsets)
        q = rows[:, : self.config.q_size].unflatten(1, (-1, self.config.head_dim))
        out = self._store.attention[held.first : held.first + held.rows]
        held.attention.run(
            layer, q, self.kv.layers[layer], out.unflatten(1, (-1, self.config.head_dim))
        )

    def _download(self, rows: int, copied: Sequence[tuple[int, int]]) -> None:
        self._best_host[:rows].copy_(self._best[:rows], non_blocking=True)
        for at, row in copied:
            self._logits_host[row].copy_(self._logits[at], non_blocking=True)


class _Slab:
    """The slots of one server as the device sees them."""

    def __init__(self, slots: torch.Tensor, out_offset: int, kv_elements: int) -> None:
        self.qkv = slots[:, :out_offset]
        self.out = slots[:, out_offset:]
        tokens = slots.shape[1] // kv_elements
        self.tokens = slots[:, : tokens * kv_elements].unflatten(1, (tokens, kv_elements))
        """As CHECKPOINT and RESTORE use them, [slots, tokens, 2 kv_size]."""
