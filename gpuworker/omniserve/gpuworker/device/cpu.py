"""The `cpu` back end: dense stages and attention in native kernels, done when a call returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import DenseModel, PagedKv, Slots, StageRows, Threads, WorkerLink
from omniserve.gpuworker.cohort import Cohort, has_ls
from omniserve.gpuworker.device.bubbles import Bubbles
from omniserve.gpuworker.device.port import DONE, Event, KvPlaces, ParkedRows
from omniserve.gpuworker.device.rows import CohortRows, Part
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.rope import rope_tables
from omniserve.gpuworker.model.weights import DecoderWeights

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Between two native calls of a pass: a helper that sleeps meanwhile would come too late.
_SPIN_US = 50


class CpuDevice:
    """See Device."""

    padded_counts: Sequence[int] = ()
    untypical_runs = 1

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        pages: int,
        page_tokens: int,
        threads: int,
        *,
        parked_rows: int = 0,
        kv_dtype: str = "",
    ) -> None:
        """kv_dtype: of the device KV; that of the weights if empty."""
        # What is left to torch is small, and its threads would take the cores from ours.
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.config = config
        self.dtype = weights.embedding.dtype
        pool = Threads(threads, spin_us=_SPIN_US)
        self._dense = _pack(config, weights, pool)
        self._logits = torch.empty(0, config.vocabulary)
        self._residual = torch.zeros(parked_rows, config.hidden, dtype=self.dtype)
        self._parked = StageRows(self._residual, [])
        self._kv = PagedKv(
            config.layers,
            config.kv_heads,
            config.head_dim,
            page_tokens,
            pages,
            _DTYPE_NAMES[self.dtype],
            pool,
            kv_dtype,
        )
        self._bubbles = Bubbles(time.perf_counter_ns, lambda since, until: until - since)
        self.transfers = CpuTransfers(self._kv)

    @property
    def bubble_ns(self) -> int:
        return self._bubbles.total_ns

    def serve(self, links: Sequence[WorkerLink]) -> None:
        self._parked = StageRows(self._residual, [_slots(link) for link in links])

    def has_room(self) -> bool:
        return True

    def run(self, stage: int, cohorts: Sequence[Cohort], parked: ParkedRows | None) -> Event:
        self._bubbles.begin(stage, has_ls(cohorts))
        parts = [self._held(cohort).all for cohort in cohorts]
        self._dense.run(stage, parts + self._parts(parked))
        return DONE

    def attend(self, layer: int, cohort: Cohort) -> None:
        rows = self._held(cohort)
        self._kv.append(layer, rows.k, rows.v, cohort.pages, cohort.offsets)
        self._kv.attend(
            layer,
            rows.q,
            rows.attention,
            cohort.tables,
            cohort.first_row,
            cohort.n_rows,
            cohort.first_position,
            self.config.window_tokens(layer),
        )
        self._bubbles.end()

    def finish(
        self,
        cohorts: Sequence[Cohort],
        parked: ParkedRows | None,
        wanted: npt.NDArray[np.bool_],
        meanwhile: Callable[[], None],  # noqa: ARG002
    ) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        self._bubbles.begin(self.config.layers, has_ls(cohorts))
        parts = [self._held(cohort).sampled for cohort in cohorts] + self._parts(parked)
        rows = len(wanted)
        best = np.empty(rows, dtype=np.int64)
        if not wanted.any():
            self._dense.finish(parts, best)
            return best, self._logits[:0]
        if rows > len(self._logits):
            self._logits = torch.empty(rows, self.config.vocabulary)
        logits = self._logits[:rows]
        self._dense.finish(parts, best, logits, wanted)
        return best, logits

    def wait(self, meanwhile: Callable[[], None]) -> None:  # noqa: ARG002
        """Nothing is ever under way."""
        self._bubbles.settle()

    def _held(self, cohort: Cohort) -> CohortRows:
        if cohort.held is None:
            cohort.held = CohortRows(
                self.config,
                self.dtype,
                cohort.tokens.numpy(),
                cohort.positions.numpy(),
                cohort.sampled_rows.numpy(),
            )
        held: CohortRows = cohort.held
        return held

    def _parts(self, parked: ParkedRows | None) -> list[Part]:
        """Rows of the parking lot, whose attention outputs and q, k, v are in servers' slots."""
        return [] if parked is None else [Part(self._parked, *parked)]


class CpuTransfers:
    """See KvTransfers."""

    def __init__(self, kv: PagedKv) -> None:
        self._kv = kv

    def export_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        self._kv.export_tokens(link, *places)
        return DONE

    def import_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        self._kv.import_tokens(link, *places)
        return DONE

    def start(self) -> None:
        """Everything was done when it was asked for."""


def _slots(link: WorkerLink) -> Slots:
    slab = torch.from_numpy(link.slab.view(np.int16)) if link.slab.dtype == np.uint16 else None
    rows = slab.view(torch.bfloat16) if slab is not None else torch.from_numpy(link.slab)
    return Slots(attention=rows[:, link.out_offset :], qkv=rows[:, : link.out_offset])


def _pack(config: ModelConfig, weights: DecoderWeights, threads: Threads) -> DenseModel:
    cos, sin = rope_tables(config)
    model = DenseModel(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate,
        vocabulary=config.vocabulary,
        context_tokens=config.context_tokens,
        norm_epsilon=config.norm_epsilon,
        dtype=_DTYPE_NAMES[weights.embedding.dtype],
        threads=threads,
        cos=cos,
        sin=sin,
    )
    for index, layer in enumerate(weights.layers):
        model.set_layer(
            index,
            attention_norm=layer.attention_norm,
            qkv=layer.qkv,
            attention_out=layer.attention_out,
            mlp_norm=layer.mlp_norm,
            gate_up=layer.gate_up,
            down=layer.down,
            qkv_bias=layer.qkv_bias,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
    model.set_ends(embedding=weights.embedding, final_norm=weights.final_norm, head=weights.head)
    return model
