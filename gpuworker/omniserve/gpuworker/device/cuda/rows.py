"""What rows keep between two stages, on the device: residuals and attention outputs.

Parked rows have places 0 .. parked - 1, those of the parking lot. Behind them lie those of the LS
cohort and of the BE cohort, and one that padding of a batch goes to.
"""

from __future__ import annotations

import numpy as np
import torch

from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.cuda.attention import LANES, PlannedAttention
from omniserve.gpuworker.device.cuda.batch import CudaPart
from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.model.config import ModelConfig


class RowStore:
    """Memory that graphs read and write: always the same."""

    def __init__(
        self, gpu: Gpu, config: ModelConfig, dtype: torch.dtype, parked: int, cohort_rows: int
    ) -> None:
        self._cohorts = parked
        self.cohort_rows = cohort_rows
        self.scratch_row = parked + LANES * cohort_rows
        places = self.scratch_row + 1
        self.residual = gpu.zeros(places, config.hidden, dtype=dtype)
        self.attention = gpu.zeros(places, config.q_size, dtype=dtype)

    def first_of(self, lane: int) -> int:
        """The first place of a lane's cohort."""
        return self._cohorts + lane * self.cohort_rows


class CudaCohortRows:
    """What a cohort keeps between its stages."""

    def __init__(self, cohort: Cohort, first: int) -> None:
        """first: of its places in the row store."""
        rows = first + np.arange(cohort.rows)
        positions, tokens = cohort.positions.numpy(), cohort.tokens.numpy()
        self.first = first
        self.rows = cohort.rows
        self.attention: PlannedAttention | None = None
        self.all = CudaPart.local(rows, positions, tokens, cohort.pages, cohort.offsets)
        self.sampled = self.all.only(cohort.sampled_rows.numpy())
        """The rows that go through the last stage."""
        self.batch_first = 0
        """Where they were in the batch of the last stage."""
