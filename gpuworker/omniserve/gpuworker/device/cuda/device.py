"""The `cuda` back end: stages as graphs, rows of attention servers copied beside them.

Three streams. The model's has dense work and local attention; it waits for copies, never for a
server. `inbound` uploads a stage's index arrays and fetches the attention of boarded rows while
earlier stages run; `outbound` writes boarded rows' q, k and v into their servers' slots, which the
device sees as its own memory. The host is at most `RUN_AHEAD` stages ahead, so that an LS arrival
finds few of them launched.

No GPU has run it yet: tests run it on a simulated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import WorkerLink
from omniserve.gpuworker.cohort import Cohort, has_ls
from omniserve.gpuworker.device.bubbles import Bubbles
from omniserve.gpuworker.device.cuda.attention import LANES
from omniserve.gpuworker.device.cuda.batch import (
    Batch,
    Boarded,
    CudaPart,
    Index,
    rows_of,
    slots_of,
)
from omniserve.gpuworker.device.cuda.dense import DenseStages
from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.device.cuda.graphs import StageGraphs
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.cuda.kv import DevicePages
from omniserve.gpuworker.device.cuda.rows import CudaCohortRows, RowStore
from omniserve.gpuworker.device.cuda.slabs import Slabs
from omniserve.gpuworker.device.cuda.transfers import CudaTransfers
from omniserve.gpuworker.device.port import DONE, Event, ParkedRows
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import DecoderWeights
from omniserve.gpuworker.settings import WorkerSettings

RUN_AHEAD = 2
# Stages in turn leave q, k and v in one of these: one is copied out while the next is written.
_QKV_BUFFERS = 2
# More rows of a last stage than this go through it one part after the other: logits are large.
_SAMPLED_ROWS = 256
# The profiler's largest batch.
_COHORT_ROWS_LEAST = 512


class Sizes(NamedTuple):
    """Of the memory that a device allocates when it is made."""

    pages: int
    page_tokens: int
    parked_rows: int
    cohort_rows: int
    """Of one cohort, at most."""
    sampled_rows: int
    """That go through the last stage at once."""
    transfer_tokens: int
    """That all slots for transfers hold, counting each layer's."""

    @staticmethod
    def of(settings: WorkerSettings, config: ModelConfig) -> Sizes:
        pages = settings.device_kv_tokens // settings.page_tokens
        # A cohort has chunks of prompts, and a row of each sequence that decodes in its pages.
        cohort_rows = settings.prefill_chunk_tokens_max + pages
        slots = settings.transfer_slots * len(settings.attention_server_addresses)
        return Sizes(
            pages,
            settings.page_tokens,
            settings.parked_rows,
            max(cohort_rows, _COHORT_ROWS_LEAST),
            _SAMPLED_ROWS,
            max(1, slots * (config.heads + config.kv_heads) // config.kv_heads),
        )


class CudaDevice:
    """See Device."""

    # A graph is made, and launched, when its stage is met for the second time.
    untypical_runs = 2

    def __init__(
        self,
        gpu: Gpu,
        config: ModelConfig,
        weights: DecoderWeights,
        kernels: Kernels,
        sizes: Sizes,
    ) -> None:
        """Allocates all memory but that of graphs."""
        torch.set_grad_enabled(False)
        self.config = config
        self.dtype = dtype = weights.embedding.dtype
        self._sizes = sizes
        self._attention = kernels.attention
        self._dense = DenseStages(config, weights, kernels.elementwise, gpu.device)
        self._store = RowStore(gpu, config, dtype, sizes.parked_rows, sizes.cohort_rows)
        rows_max = sizes.parked_rows + LANES * sizes.cohort_rows
        self._model = gpu.stream(priority=-1)
        self._inbound = gpu.stream(priority=-1)
        self._outbound = gpu.stream(priority=-1)
        self._graphs = StageGraphs(self._model, self._stage, rows_max)
        self.padded_counts: Sequence[int] = self._graphs.counts
        self._bubbles = Bubbles(self._model.mark, lambda since, until: until.ns_since(since))
        self._kv = DevicePages(gpu, config, sizes.pages, sizes.page_tokens, dtype)
        self._index = Index(gpu, rows_max)
        scratch = self._store.scratch_row, self._kv.scratch_page
        self._batches = [Batch(gpu, rows_max, *scratch) for _ in range(RUN_AHEAD + 1)]
        qkv = config.q_size + 2 * config.kv_size
        self._qkv = [gpu.zeros(rows_max, qkv, dtype=dtype) for _ in range(_QKV_BUFFERS)]
        self._qkv_sent: list[Event] = [DONE] * _QKV_BUFFERS
        sampled = self._graphs.padded(sizes.sampled_rows)
        self._best = gpu.zeros(sampled, dtype=torch.int64)
        self._logits = gpu.zeros(sampled, config.vocabulary, dtype=torch.float32)
        self._best_host = gpu.pinned(sampled, dtype=torch.int64)
        self._logits_host = gpu.pinned(sampled, config.vocabulary, dtype=torch.float32)
        self._entered: list[Event] = [DONE] * LANES
        self._slabs = Slabs(gpu, dtype, 2 * config.kv_size)
        self.transfers = CudaTransfers(
            gpu, self._model, self._kv, self._slabs, sizes.transfer_tokens
        )
        gpu.wait()  # weights and zeros were written by another stream

    @property
    def bubble_ns(self) -> int:
        return self._bubbles.total_ns

    def serve(self, links: Sequence[WorkerLink]) -> None:
        # One that is replaced takes its slots with it, and pages of its requests are somebody
        # else's from now on.
        self.transfers.wait()
        for batch in self._batches:
            while not batch.is_free():
                pass
        self._slabs.map(links)

    def has_room(self) -> bool:
        return self._batches[0].is_free()

    def run(self, stage: int, cohorts: Sequence[Cohort], parked: ParkedRows | None) -> Event:
        parts, at = [], 0
        for cohort in cohorts:
            held = self._held(cohort)
            held.batch_first, at = at, at + held.rows
            parts.append(held.all)
        batch = self._launch(stage, parts + self._boarding(parked), has_ls(cohorts))
        if not batch.boarded:
            return batch.computed
        self._outbound.wait(batch.computed)
        buffer = stage % _QKV_BUFFERS
        for boarded in batch.boarded:
            words = self._qkv[buffer].view(torch.int64)[boarded.first : boarded.end]
            slab = self._slabs[boarded.server]
            self._outbound.launch(partial(slab.qkv.index_copy_, 0, slots_of(batch, boarded), words))
        batch.sent = self._qkv_sent[buffer] = self._outbound.record()
        return batch.sent

    def attend(self, layer: int, cohort: Cohort) -> None:
        held = self._held(cohort)
        self._model.launch(partial(self._attend, layer, held, held.batch_first))
        self._bubbles.end()

    def finish(
        self,
        cohorts: Sequence[Cohort],
        parked: ParkedRows | None,
        wanted: npt.NDArray[np.bool_],
        meanwhile: Callable[[], None],
    ) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        parts = [self._held(cohort).sampled for cohort in cohorts] + self._boarding(parked)
        most, in_pass = self._sizes.sampled_rows, has_ls(cohorts)
        if len(wanted) <= most:
            return self._sample(parts, in_pass, wanted, meanwhile)
        best = np.empty(len(wanted), np.int64)
        logits = torch.empty(len(wanted), self.config.vocabulary)  # touched where wanted
        for first in range(0, len(wanted), most):
            rows = slice(first, first + most)
            best[rows], found = self._sample(_sliced(parts, rows), in_pass, wanted[rows], meanwhile)
            for row in np.flatnonzero(wanted[rows]).tolist():
                logits[first + row] = found[row]
        return best, logits

    def wait(self, meanwhile: Callable[[], None]) -> None:
        self._until(self._model.record(), meanwhile)
        self._bubbles.settle()

    def _held(self, cohort: Cohort) -> CudaCohortRows:
        if cohort.held is None:
            cohort.held = self._enter(cohort)
        held: CudaCohortRows = cohort.held
        return held

    def _boarding(self, parked: ParkedRows | None) -> list[CudaPart]:
        if parked is None:
            return []
        rows, servers, slots, positions, tokens = parked
        page = self._kv.scratch_page
        return [CudaPart.boarding(rows, positions, tokens, slots, servers, page)]

    def _enter(self, cohort: Cohort) -> CudaCohortRows:
        """Gives the rows of `cohort`, which is to run stage 0, their places."""
        assert cohort.rows <= self._sizes.cohort_rows, "a cohort that has no room"
        lane = int(not has_ls([cohort]))
        # The last one of its kind may have been called off before the device began with it: it has
        # the plan's memory until then.
        self._until(self._entered[lane], _nothing)
        held = CudaCohortRows(cohort, self._store.first_of(lane))

        def plan() -> None:
            held.attention = self._attention.plan(cohort, lane)

        self._model.launch(plan)
        self._entered[lane] = self._model.record()
        return held

    def _launch(self, stage: int, parts: Sequence[CudaPart], in_pass: bool) -> Batch:
        batch, before = self._batches.pop(0), self._batches[-1]
        assert batch.is_free(), "a stage further ahead than the host may be"
        self._batches.append(batch)
        if same_rows := before.has(parts):  # as most passes without boarding have: it is loaded
            batch.repeat(before)
        else:
            batch.fill(parts, self._graphs.padded)
            self._inbound.launch(batch.upload)
            if stage:
                for boarded in batch.boarded:
                    out = self._slabs[boarded.server].out
                    self._inbound.launch(partial(self._fetch, batch, boarded, out))
            self._model.wait(self._inbound.record())
        self._model.wait(self._qkv_sent[stage % _QKV_BUFFERS])
        self._bubbles.begin(stage, in_pass)
        if not same_rows:
            self._model.launch(partial(self._index.load, batch))
        self._graphs.launch(stage, batch.padded)
        batch.computed = batch.sent = self._model.record()
        return batch

    def _sample(
        self,
        parts: Sequence[CudaPart],
        in_pass: bool,
        wanted: npt.NDArray[np.bool_],
        meanwhile: Callable[[], None],
    ) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        while not self.has_room():
            meanwhile()
        batch = self._launch(self.config.layers, parts, in_pass)
        copied = [(at, row) for at, row in enumerate(batch.order.tolist()) if wanted[row]]
        self._model.launch(partial(self._download, batch.rows, copied))
        self.wait(meanwhile)
        best = np.empty(batch.rows, np.int64)
        best[batch.order] = self._best_host[: batch.rows].numpy()
        return best, self._logits_host[: batch.rows]

    def _until(self, event: Event, meanwhile: Callable[[], None]) -> None:
        while not event.done():
            meanwhile()

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
        qkv = self._qkv[stage % _QKV_BUFFERS][:rows]
        dense.enter(stage, x, index.positions(rows), qkv)
        self._kv.append(stage, qkv[:, self.config.q_size :], *index.kv_places(rows))
        store.residual.index_copy_(0, places, x)

    def _fetch(self, batch: Batch, boarded: Boarded, out: torch.Tensor) -> None:
        self._store.attention.view(torch.int64).index_copy_(
            0, rows_of(batch, boarded), out.index_select(0, slots_of(batch, boarded))
        )

    def _attend(self, layer: int, held: CudaCohortRows, first: int) -> None:
        assert held.attention is not None, "attention before it was planned"
        rows = self._qkv[layer % _QKV_BUFFERS][first : first + held.rows]
        q = rows[:, : self.config.q_size].unflatten(1, (-1, self.config.head_dim))
        out = self._store.attention[held.first : held.first + held.rows]
        held.attention.run(
            layer, q, self._kv.layers[layer], out.unflatten(1, (-1, self.config.head_dim))
        )

    def _download(self, rows: int, copied: Sequence[tuple[int, int]]) -> None:
        self._best_host[:rows].copy_(self._best[:rows], non_blocking=True)
        for at, row in copied:
            self._logits_host[row].copy_(self._logits[at], non_blocking=True)


def _sliced(parts: Sequence[CudaPart], wanted: slice) -> list[CudaPart]:
    """The `wanted` ones of the rows of all parts, one after the other."""
    sliced, at = [], 0
    for part in parts:
        sliced.append(part.only(slice(max(wanted.start - at, 0), max(wanted.stop - at, 0))))
        at += part.columns.shape[1]
    return sliced


def _nothing() -> None:
    """There is nothing to do meanwhile."""
