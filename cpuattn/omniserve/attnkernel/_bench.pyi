"""What benchmarks time in native code. Nothing else imports it."""

import numpy as np
from numpy.typing import NDArray

from omniserve.attnkernel import Geometry

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
