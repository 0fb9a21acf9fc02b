"""A GPU that executes late, and in any order that its streams and events allow.

The twin of `TorchGpu` for tests: an order that nothing enforces happens sooner or later, and a
wait that is missing shows as wrong numbers. Work runs on tensors of the CPU.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from omniserve.gpuworker.device.cuda.gpu import Work
from omniserve.gpuworker.device.port import Event

_STALL = 0.02
_GIVES_WAY = 0.95
"""How often a stream waits while one that goes first can go on."""


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self.reached = False
        self.reached_ns = 0

    def done(self) -> bool:
        """Time passes while the host looks."""
        self._gpu.advance()
        return self.reached

    def ns_since(self, earlier: Self) -> int:
        assert self.reached, "the time of what is still to come"
        assert earlier.reached, "the time of what is still to come"
        return self.reached_ns - earlier.reached_ns


class SimulatedStream:
    def __init__(self, gpu: SimulatedGpu, priority: int) -> None:
        self.priority = priority
        self._gpu = gpu
        self._queue: deque[tuple[str, Any]] = deque()

    def launch(self, work: Work) -> None:
        self._queue.append(("work", work))

    def record(self) -> SimulatedEvent:
        event = SimulatedEvent(self._gpu)
        self._queue.append(("record", event))
        return event

    mark = record

    def wait(self, event: Event) -> None:
        self._queue.append(("wait", event))

    def capture(self, work: Work) -> Work:
        return self._gpu.capture(work)

    def can_go_on(self) -> bool:
        if not self._queue:
            return False
        kind, what = self._queue[0]
        return kind != "wait" or getattr(what, "reached", True)

    def go_on(self) -> None:
        kind, what = self._queue.popleft()
        if kind == "work":
            with _Copies(self._gpu):
                what()
        elif kind == "record":
            what.reached = True
            what.reached_ns = self._gpu.now_ns


class SimulatedGpu:
    """Streams go on when the host looks at an event, and no sooner."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._streams: list[SimulatedStream] = []
        self._memory: list[torch.Tensor] = []
        self._pinned: dict[int, torch.Tensor] = {}
        """By address; kept, so that no other tensor ever has it."""
        self._stalled: SimulatedStream | None = None
        self.captured = 0
        self.uploads = 0
        """Copies of pinned memory to the device."""
        self.now_ns = 0
        """Grows by one for each time the host looks."""

    def stream(self, priority: int = 0) -> SimulatedStream:
        self._streams.append(SimulatedStream(self, priority))
        return self._streams[-1]

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self._memory.append(torch.zeros(shape, dtype=dtype))
        return self._memory[-1]

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(shape, dtype=dtype)
        self._pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def map_host(self, memory: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(memory).view(dtype)

    def unmap_host(self, memory: npt.NDArray[Any]) -> None:
        """The memory of the host is the device's anyway."""

    def advance(self) -> None:
        """Executes one step of any stream that can go on; one of them falls far behind."""
        self.now_ns += 1
        if self._random.random() < _STALL:
            self._stalled = self._random.choice(self._streams)
        able = [stream for stream in self._streams if stream.can_go_on()]
        if not able:
            return
        others = [stream for stream in able if stream is not self._stalled] or able
        first = min(stream.priority for stream in others)
        if self._random.random() < _GIVES_WAY:
            others = [stream for stream in others if stream.priority == first]
        self._random.choice(others).go_on()

    def stall(self, stream: SimulatedStream) -> None:
        """Others go first, until another one falls behind."""
        self._stalled = stream

    def wait(self) -> None:
        """Fails if streams wait for one another."""
        while able := [stream for stream in self._streams if stream.can_go_on()]:
            self._random.choice(able).go_on()
        assert not any(stream._queue for stream in self._streams), "streams wait for ever"

    def capture(self, work: Work) -> Work:
        """As a graph has it: the operations and the memory of now, whatever Python says later."""
        self.captured += 1
        kept = [tensor.clone() for tensor in self._memory]
        with _Recording() as recording:
            work()
        for tensor, before in zip(self._memory, kept, strict=True):
            tensor.copy_(before)
        return recording.replay


class _Copies(TorchDispatchMode):
    """Fails where a copy between the host and the device would make the host wait."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            sides = args[:2]
            pinned = [self._gpu.is_pinned(side) for side in sides]
            if any(pinned):
                assert all(side.is_contiguous() for side in sides), "a copy through pageable memory"
                assert args[2:] == (True,), "a copy that the host waits for"
            self._gpu.uploads += pinned[1]
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        found: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return found.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, recorded in self._operations:
            out = func(*tree_map(current, args), **tree_map(current, kwargs))
            pairs = zip(_tensors(recorded), _tensors(out), strict=True)
            found.update({id(before): now for before, now in pairs})


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [item for item in values if isinstance(item, torch.Tensor)]
