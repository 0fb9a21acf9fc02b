"""Index arrays on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.device.cuda.gpu import Gpu, Stream


class Upload:
    """Arrays of one kind, in the same memory each time: one is used up before the next comes.

    However many columns they have, they lie without gaps: torch copies what has gaps through
    pageable memory, and waits.
    """

    def __init__(self, gpu: Gpu, fields: int, columns_max: int) -> None:
        self._fields = fields
        self._pinned = gpu.pinned(fields * columns_max, dtype=torch.int64)
        self._device = gpu.zeros(fields * columns_max, dtype=torch.int64)

    def host(self, columns: int) -> npt.NDArray[np.int64]:
        """[fields, columns], to be filled in."""
        return self._of(self._pinned, columns).numpy()

    def device(self, columns: int) -> torch.Tensor:
        """[fields, columns], where `copy` puts them."""
        return self._of(self._device, columns)

    def copy(self, columns: int) -> None:
        """Enqueues the copy."""
        self.device(columns).copy_(self._of(self._pinned, columns), non_blocking=True)

    def enqueue(self, stream: Stream, array: npt.NDArray[Any]) -> torch.Tensor:
        """array: [fields, columns] of integers. Returns it as int64 on the device."""
        columns = array.shape[1]
        self.host(columns)[:] = array
        stream.launch(lambda: self.copy(columns))
        return self.device(columns)

    def _of(self, memory: torch.Tensor, columns: int) -> torch.Tensor:
        return memory[: self._fields * columns].view(self._fields, columns)
