"""The `cpu` back end: dense stages and attention in native kernels.

Called by the engine's loop only. Owns the weights and the device KV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import DenseModel, PagedKv, Threads
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.rows import CohortRows, Part
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.rope import rope_tables
from omniserve.gpuworker.model.weights import DecoderWeights

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Between two native calls of a pass: a helper that sleeps meanwhile would come too late.
_SPIN_US = 50


class CpuDevice:
    """Runs dense stages and local attention. Shapes: rows are tokens of any requests."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        pages: int,
        page_tokens: int,
        threads: int,
    ) -> None:
        # What is left to torch is small, and its threads would take the cores from ours.
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.config = config
        self.dtype = weights.embedding.dtype
        pool = Threads(threads, spin_us=_SPIN_US)
        self._dense = _pack(config, weights, pool)
        self._logits = torch.empty(0, config.vocabulary)
        self.kv = PagedKv(
            config.layers,
            config.kv_heads,
            config.head_dim,
            page_tokens,
            pages,
            _DTYPE_NAMES[self.dtype],
            pool,
        )

    def enter(self, cohort: Cohort) -> CohortRows:
        """Returns memory for the rows of `cohort`, which is to run stage 0."""
        return CohortRows(
            self.config,
            self.dtype,
            cohort.tokens.numpy(),
            cohort.positions.numpy(),
            cohort.sampled_rows.numpy(),
        )

    def run(self, stage: int, parts: Sequence[Part]) -> None:
        """Runs the dense work of a stage that is not the last over all rows of `parts`."""
        self._dense.run(stage, parts)

    def finish(
        self, parts: Sequence[Part], wanted: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        """Runs the last stage over `parts`.

        wanted: [rows], whose logits are. Returns the token with the largest logit of each row,
        [rows], and [rows, vocabulary] float32, valid until the next call and only where wanted;
        the latter is empty if none are.
        """
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

    def attend(self, layer: int, cohort: Cohort, rows: CohortRows) -> None:
        """Appends k and v of a cohort's rows to the device KV, then attends, causally."""
        self.kv.append(layer, rows.k, rows.v, cohort.pages, cohort.offsets)
        self.kv.attend(
            layer,
            rows.q,
            rows.attention,
            cohort.tables,
            cohort.first_row,
            cohort.n_rows,
            cohort.first_position,
            self.config.window_tokens(layer),
        )


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
