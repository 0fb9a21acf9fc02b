"""Index arrays on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from omniserve.gpuworker.device.cuda.gpu import Gpu, Stream


class Upload:
    """Arrays of one kind, in the same memory each time: one is used up before the next comes."""

    def __init__(self, gpu: Gpu, fields: int, columns_max: int) -> None:
        self._host = gpu.pinned(fields, columns_max, dtype=torch.int64)
        self._arrays = self._host.numpy()
        self._device = gpu.zeros(fields, columns_max, dtype=torch.int64)

    def enqueue(self, stream: Stream, array: npt.NDArray[Any]) -> torch.Tensor:
        """array: [fields, columns] of integers. Returns it as int64 on the device."""
        columns = array.shape[1]
        self._arrays[:, :columns] = array
        host, device = self._host[:, :columns], self._device[:, :columns]
        stream.launch(lambda: device.copy_(host, non_blocking=True))
        return device
