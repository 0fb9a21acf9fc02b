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
    """What a cohort keeps between its stages. Made when it enters stage 0.

    Arrays are [rows, width] float32, or uint16 that holds the bits of bfloat16.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        tokens: _Int64s,
        positions: _Int64s,
        sampled_rows: _Int64s,
    ) -> None:
        rows, q_end, k_end = len(tokens), config.q_size, config.q_size + config.kv_size
        # Numpy's arrays reach native code in a tenth of the time that torch's tensors take.
        elem = np.float32 if dtype == torch.float32 else np.uint16
        residual = np.empty((rows, config.hidden), elem)
        self.attention = np.zeros((rows, q_end), elem)  # read before it is written by profiles
        self.qkv = np.empty((rows, k_end + config.kv_size), elem)
        """q, k and v of each row side by side, as the last stage left them."""
        self.q, self.k, self.v = self.qkv[:, :q_end], self.qkv[:, q_end:k_end], self.qkv[:, k_end:]
        owner = StageRows(residual, [Slots(self.attention, self.qkv)])
        self.all = Part(owner, positions=positions, tokens=tokens)
        self.sampled = Part(owner, rows=sampled_rows)
        """The rows that go through the last stage."""
