"""Rows on their way through the stages, as the device takes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import Slots, StageRows
from omniserve.gpuworker.model.config import ModelConfig

_Int64s = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


class Part(NamedTuple):
    """Rows of one owner in the batch of a stage; all arrays [rows]. See `DenseModel.run`."""

    owner: StageRows
    rows: _Int64s | None = None
    """Which of the owner's residuals; None for all, in order."""
    owners: _Int32s | None = None
    """Which of the owner's slots arrays each row's slot is in; None for the first."""
    slots: _Int32s | None = None
    """Attention output and q, k, v of each row; None if they are numbered as its residual."""
    positions: _Int64s | None = None
    tokens: _Int64s | None = None


class CohortRows:
    """What a cohort keeps between its stages. Made when it enters stage 0."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        tokens: _Int64s,
        positions: _Int64s,
        sampled_rows: _Int64s,
    ) -> None:
        rows = len(tokens)
        residual = torch.empty(rows, config.hidden, dtype=dtype)
        self.attention = torch.empty(rows, config.q_size, dtype=dtype)
        self.qkv = torch.empty(rows, config.q_size + 2 * config.kv_size, dtype=dtype)
        """q, k and v of each row side by side, as the last stage left them."""
        self.q, self.k, self.v = self.qkv.split(
            (config.q_size, config.kv_size, config.kv_size), dim=1
        )
        owner = StageRows(residual, [Slots(self.attention, self.qkv)])
        self.all = Part(owner, positions=positions, tokens=tokens)
        self.sampled = Part(owner, rows=sampled_rows)
        """The rows that go through the last stage."""
