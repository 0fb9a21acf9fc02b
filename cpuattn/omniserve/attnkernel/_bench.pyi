"""What benchmarks time: limits of this machine, and attention with nothing of Python in the time.

Threads of an object look for work for a millisecond after each call. Another object is timed fairly
only when they are asleep.
"""

import numpy as np
from numpy.typing import NDArray

from omniserve.attnkernel import Geometry

def read_loops() -> list[str]:
    """Names of the read loops, in the order of `ReadProbe.sweep`."""

def kernel_name() -> str:
    """Instruction set of the kernels that this module times; it has its own, apart from _core's."""

def use_kernel(name: str) -> None:
    """Replaces them. ValueError names those that run on this CPU."""

def bf16_flops(threads: int) -> float:
    """Floating-point operations per second of bfloat16 dot products that stay in registers.

    0 where this machine has no such instruction.
    """

class ReadProbe:
    """Memory that each of several read loops runs over."""

    def __init__(self, bytes: int, threads: int) -> None: ...
    @property
    def bytes(self) -> int: ...
    def read(self, loop: int) -> float:
        """Bytes per second of one run of the loop with this index. ValueError: there is none."""
    def sweep(self) -> list[float]:
        """Bytes per second of one run of each loop."""

class GemmProbe:
    """Products with a bfloat16 matrix of which there are `copies`, used in turn."""

    def __init__(self, *, outputs: int, inputs: int, copies: int, threads: int) -> None: ...
    def run(self, rows: int) -> float:
        """Seconds of one call."""

class AttentionProbe:
    """Sets of `batch` sequences of `context` tokens; every call attends the next set.

    One row of each sequence decodes, or `rows` > 1 of them are a chunk of a prompt that comes
    behind the context. Pages lie in the order of their tokens unless `fragmented`.
    """

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kv_dtype: str,
        page_tokens: int,
        context: int,
        rows: int,
        batch: int,
        sets: int,
        threads: int,
        fragmented: bool = False,
    ) -> None: ...
    @property
    def kv_bytes(self) -> int:
        """KV that one call reads."""

    def run(self) -> float:
        """Seconds of one call."""

class ArenaProbe:
    """The kernel on a server's arena in this process, while the server has nothing to do."""

    def __init__(self, path: str, threads: int) -> None: ...
    def run(self, layer: int) -> float:
        """Seconds of one row of every sequence over what it has in `layer`."""

class TransferProbe:
    """A worker's end and a server's executor in one process; each call returns seconds.

    A round moves `max_sequence_tokens` tokens of every layer, in slots and at places that no round
    used lately.
    """

    def __init__(self, folder: str, geometry: Geometry, threads: int) -> None: ...
    @property
    def bytes(self) -> int:
        """K and V of one round."""

    def checkpoint(self) -> float:
        """CHECKPOINT messages from the ring to their answers."""

    def restore(self) -> float:
        """RESTORE messages of what `checkpoint` has just stored."""

    def copy(self, to_arena: bool) -> float:
        """memcpy of as many rows from slots to the arena, or back, with the same threads."""

class TransportPair:
    """A worker's end of a segment in this process, and an echo in another one on `server_cpu`.

    Each call returns the time of every round trip, in ns.
    """

    def __init__(self, folder: str, geometry: Geometry, server_cpu: int) -> None: ...
    def empty_messages(self, rounds: int, sleeps: bool) -> NDArray[np.int64]:
        """One message each; `sleeps`: both sides wait on their doorbells instead of spinning."""

    def bare_futex(self, rounds: int) -> NDArray[np.int64]:
        """A word each way, with a system call to wake and one to wait."""

    def ring_rows(self, rounds: int, rows: int) -> NDArray[np.int64]:
        """q, k, v copied into `rows` slots and read there; out copied into them and read there."""

    def memcpy_rows(self, rounds: int, rows: int) -> NDArray[np.int64]:
        """The same bytes in one piece each way, and a flag instead of messages."""
