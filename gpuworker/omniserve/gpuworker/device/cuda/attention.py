"""Attention of a cohort over device pages: FlashInfer, and plain torch to compare with."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.model.config import ModelConfig

LANES = 2
"""One for the LS cohort, one for the BE cohort: there is never a second one of a kind."""


class PlannedAttention(Protocol):
    """Attention for the rows of one cohort, planned once for all of its layers."""

    def run(self, layer: int, q: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueues causal attention.

        q, out: [rows, heads, head_dim]. pages: [pages, 2, page_tokens, kv_heads, head_dim].
        """
        ...


class Attention(Protocol):
    """Plans attention. A plan is good until the next one of the same `lane`."""

    def plan(self, cohort: Cohort, lane: int) -> PlannedAttention: ...


class TorchAttention:
    """The reference: sequence by sequence, over gathered KV, in float32."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def plan(self, cohort: Cohort, lane: int) -> PlannedAttention:  # noqa: ARG002
        return _TorchPlan(self._config, cohort)


class _TorchPlan:
    def __init__(self, config: ModelConfig, cohort: Cohort) -> None:
        self._config = config
        segments = zip(cohort.first_row, cohort.n_rows, cohort.first_position, strict=True)
        self._segments = [tuple(int(value) for value in segment) for segment in segments]
        self._tables = [torch.from_numpy(table).long() for table in cohort.tables]

    def run(self, layer: int, q: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
        window = self._config.window_tokens(layer)
        for (first, rows, start), table in zip(self._segments, self._tables, strict=True):
            tokens = start + rows
            used = table[: -(-tokens // pages.shape[2])].to(pages.device)
            k, v = pages[used].float().transpose(0, 1).flatten(1, 2)[:, :tokens]
            at = torch.arange(start, tokens, device=q.device).unsqueeze(1)
            seen = torch.arange(tokens, device=q.device)
            mask = (seen <= at) & ((seen > at - window) if window else (seen >= 0))
            found = torch.nn.functional.scaled_dot_product_attention(
                q[first : first + rows].float().transpose(0, 1),
                k.transpose(0, 1),
                v.transpose(0, 1),
                attn_mask=mask,
                enable_gqa=True,
            )
            out[first : first + rows] = found.transpose(0, 1)


def workspace_bytes(config: ModelConfig, processors: int) -> int:
    """What FlashInfer's prefill kernels need at most for the sums of split KV.

    Its planner splits KV into no more tiles than two blocks of each of the GPU's `processors` take,
    KV head by KV head. A tile has 128 rows at most for each head, and a row float32 sums: of the
    elements of a head, and of its logits.
    """
    rows = 128 * config.heads * (2 * processors // config.kv_heads)
    return rows * (config.head_dim + 1) * 4 + 32  # aligned twice


class FlashInferAttention:
    """FlashInfer's paged kernels, planned once a cohort. No GPU has run it yet.

    A plan takes the host longer than its own work: FlashInfer 0.6.3 looks for the longest sequence
    by iterating over a tensor, twice, 0.2 ms for 64 of them.
    """

    def __init__(self, config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> None:
        """Allocates all that plans will need."""
        import flashinfer  # an extra: nothing else of the worker needs it

        self._config = config
        self._page_tokens = page_tokens
        self._dtype = dtype
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        size = workspace_bytes(config, processors)

        def wrapper() -> Any:
            workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
            # Only its FlashAttention 2 kernels put all heads of a group into one tile. Those of the
            # third, which "auto" takes on Hopper, are said to need 2.5 times as long to decode.
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")

        windows = {config.window_tokens(layer) for layer in range(config.layers)}
        # One for each, as a plan lives in its workspace.
        self._wrappers = [{window: wrapper() for window in windows} for _ in range(LANES)]

    def plan(self, cohort: Cohort, lane: int) -> PlannedAttention:
        config = self._config
        ends = cohort.first_position + cohort.n_rows
        counts = -(-ends // self._page_tokens)
        used = np.arange(cohort.tables.shape[1]) < counts[:, None]
        arrays = (
            np.append(cohort.first_row, cohort.rows),
            np.append(0, np.cumsum(counts)),
            cohort.tables[used],
            ends - (counts - 1) * self._page_tokens,
        )
        tensors = [torch.from_numpy(array.astype(np.int32)) for array in arrays]
        planned = self._wrappers[lane]
        for window, wrapper in planned.items():
            wrapper.plan(
                *tensors,
                config.heads,
                config.kv_heads,
                config.head_dim,
                self._page_tokens,
                causal=True,
                window_left=window - 1 if window else -1,
                q_data_type=self._dtype,
            )
        return _FlashInferPlan(config, planned)


class _FlashInferPlan:
    def __init__(self, config: ModelConfig, planned: dict[int, Any]) -> None:
        self._config = config
        self._planned = planned

    def run(self, layer: int, q: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
        self._planned[self._config.window_tokens(layer)].run(q, pages, out=out)
