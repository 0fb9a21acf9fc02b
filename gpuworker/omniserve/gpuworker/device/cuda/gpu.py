"""What the back end asks of the CUDA runtime: streams, events, graphs, memory of both sides.

A port: tests run the back end on a twin that executes late, and in any order that streams and
events allow. `TorchGpu` is the real one; no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy.typing as npt
import torch

from omniserve.gpuworker.device.port import Event

Work = Callable[[], object]
"""Enqueues operations on tensors of the device; runs when it is launched, not when it is done."""


class Mark(Event, Protocol):
    """An event with the device's time."""

    def ns_since(self, earlier: Self) -> int:
        """Time from `earlier`, of the same device; both must be done."""
        ...


class Stream(Protocol):
    """Work in its order. Two streams know of one another through events alone."""

    def launch(self, work: Work) -> None: ...

    def record(self) -> Event: ...

    def mark(self) -> Mark:
        """A `record` that also keeps the time."""
        ...

    def wait(self, event: Event) -> None:
        """What is launched from now on runs after `event`; the host does not wait."""
        ...

    def capture(self, work: Work) -> Work:
        """Returns a graph of `work`, to be launched on this stream; does not run it.

        `work` must have run before, and may only read and write tensors that stay.
        """
        ...


class Gpu(Protocol):
    """One device."""

    device: torch.device

    def stream(self, priority: int = 0) -> Stream:
        """Lower numbers go first."""
        ...

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device copies from and to while the host goes on."""
        ...

    def map_host(self, memory: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        """Returns memory of the host as a tensor that the device reads and writes in place.

        memory: contiguous, of elements as large as those of `dtype`. It must outlive the tensor.
        """
        ...

    def unmap_host(self, memory: npt.NDArray[Any]) -> None:
        """Ends that; nothing may be under way to or from it."""
        ...

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        ...


class TorchEvent:
    """A point of a stream; done when the stream has come past it."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())


class TorchMark(TorchEvent):
    """See Mark."""

    def ns_since(self, earlier: Self) -> int:
        return int(earlier.event.elapsed_time(self.event) * 1e6)


class TorchStream:
    """See Stream."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._stream = stream
        self._pool = pool

    def launch(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> TorchEvent:
        event = torch.cuda.Event()
        event.record(self._stream)
        return TorchEvent(event)

    def mark(self) -> TorchMark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return TorchMark(event)

    def wait(self, event: Event) -> None:
        if isinstance(event, TorchEvent):  # else one that was done before there was anything to do
            self._stream.wait_event(event.event)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads and streams may use the device meanwhile. Graphs of one stream never run at
        # the same time and keep nothing between two runs: they share their intermediate memory.
        # The context manager `torch.cuda.graph` would wait for the device, and empty its cache.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


class TorchGpu:
    """See Gpu; one for each process and device."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._pool = torch.cuda.graph_pool_handle()

    def stream(self, priority: int = 0) -> TorchStream:
        return TorchStream(torch.cuda.Stream(self.device, priority=priority), self._pool)

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def map_host(self, memory: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        # With unified addresses the device calls registered memory as the host does.
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        return torch.as_tensor(_Mapped(memory), device=self.device).view(dtype)

    def unmap_host(self, memory: npt.NDArray[Any]) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


class _Mapped:
    """Registered memory as CUDA libraries hand arrays to one another."""

    def __init__(self, memory: npt.NDArray[Any]) -> None:
        # There is no name for bfloat16: signed integers of its size instead.
        self.__cuda_array_interface__ = {
            "shape": memory.shape,
            "typestr": f"<i{memory.itemsize}",
            "data": (memory.ctypes.data, False),
            "version": 3,
        }
