"""The native core. Arrays may be numpy arrays or CPU torch tensors; 2-D ones may be row-strided."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# numpy array or CPU torch tensor. In bfloat16, numpy arrays hold the bits as uint16.
Array = Any
Int32s = Any

MAGIC: int
LAYOUT_VERSION: int
KIND_ATTEND: int
KIND_CHECKPOINT: int
KIND_RESTORE: int
KIND_FREE: int
STATUS_OK: int
STATUS_BAD_KIND: int
STATUS_BAD_LAYER: int
STATUS_BAD_SEQUENCE: int
STATUS_BAD_POSITION: int
STATUS_NO_PAGE: int
STATUS_FREED: int
STATUS_BAD_COUNT: int

class Geometry:
    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        kv_dtype: str,
        page_tokens: int,
        max_sequences: int,
        max_sequence_tokens: int,
        slots: int,
        pages: int,
    ) -> None: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def max_sequences(self) -> int: ...
    @property
    def max_sequence_tokens(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def pages(self) -> int: ...

def struct_offsets() -> dict[str, dict[str, int]]: ...
def region_offsets(geometry: Geometry) -> dict[str, int]: ...
def ring_capacity(slots: int) -> int: ...
def kernel_name() -> str:
    """Instruction set of the kernel in use; the fastest that this CPU runs unless replaced."""

def kernel_names() -> list[str]:
    """Those that run on this CPU, the fastest first; last, what is made for another CPU."""

def use_kernel(name: str) -> None:
    """Replaces the kernels in this process. ValueError names those that run on this CPU."""

class Threads:
    """`count` threads with the caller, who calls one object at a time that they work for.

    The others look for work for `spin_us` before they sleep.
    """

    def __init__(self, count: int, spin_us: int = 0) -> None: ...
    @property
    def count(self) -> int: ...

class PagedKv:
    """A pool of KV pages in this process. A token's place is (page, offset), in every layer.

    `dtype` is that of rows: float32, bfloat16 or float16. `kv_dtype` is that of KV: the same
    (the default), or int8. `threads` may be shared with others that this thread calls.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        pages: int,
        dtype: str = "float32",
        threads: int | Threads = 1,
        kv_dtype: str = "",
    ) -> None: ...
    def append(self, layer: int, k: Array, v: Array, pages: Int32s, offsets: Int32s) -> None:
        """Writes k, v: [n, kv_heads * head_dim] at places pages, offsets: i32[n]."""

    def attend(
        self,
        layer: int,
        q: Array,
        out: Array,
        tables: Int32s,
        first_row: Int32s,
        n_rows: Int32s,
        first_position: Int32s,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Sequence[float] = (),
    ) -> None:
        """Causal attention of segments of rows, scaled by head_dim ** -0.5.

        q, out: [rows, heads * head_dim] of the pool's dtype; tables: i32[segments, max_pages];
        the others i32[segments]. Row first_row[s] + r sees tokens 0 .. first_position[s] + r.
        A row's result does not depend on the other rows of the call.

        window: tokens that a row sees at most, itself among them, 0 = all. softcap: scores become
        softcap * tanh(score / softcap), 0 = not. sinks: a logit per head that takes part in the
        softmax and adds nothing.
        """

    def export_tokens(
        self,
        link: WorkerLink,
        layers: Int32s,
        pages: Int32s,
        offsets: Int32s,
        slots: Int32s,
        indices: Int32s,
    ) -> None:
        """Copies k, v of places (all i32[n]) into the link's slab.

        indices: which of a slot's transfer_tokens each is.
        """

    def import_tokens(
        self,
        link: WorkerLink,
        layers: Int32s,
        pages: Int32s,
        offsets: Int32s,
        slots: Int32s,
        indices: Int32s,
    ) -> None:
        """Copies k, v from the link's slab to places (all i32[n]); see export_tokens."""

    def read(
        self, layer: int, page: int, offset: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """k, v of one place, each [kv_heads * head_dim]."""

class Slots:
    """Rows of a device or a server: attention [n, q_size], and qkv [n, q_size + 2 kv_size]."""

    def __init__(self, attention: Array, qkv: Array) -> None: ...

class StageRows:
    """Residuals [n, hidden] of one owner's rows, and the slots that they may be in."""

    def __init__(self, residual: Array, slots: Sequence[Slots]) -> None: ...

# Owner; rows: i64[n], which of its residuals (None: all); owners: i32[n], which of its slots
# arrays (None: the first); slots: i32[n], rows of that (None: as `rows`); positions, tokens:
# i64[n].
StagePart = tuple[StageRows, Array | None, Array | None, Array | None, Array | None, Array | None]

class DenseModel:
    """The dense part of a model, a stage at a time. One caller at a time.

    Stage l leaves layer l - 1 (output projection, residual, MLP) and enters layer l (norm, QKV,
    norm of heads, RoPE); stage 0 begins with the embedding. Sums are float32, and a row's results
    depend neither on the other rows of the call nor on the number of threads.
    """

    def __init__(
        self,
        *,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        vocabulary: int,
        context_tokens: int,
        norm_epsilon: float,
        dtype: str,
        threads: Threads,
        cos: Array,
        sin: Array,
    ) -> None:
        """dtype: float32 or bfloat16, of weights and rows. cos, sin: f32[context, head_dim / 2].

        RoPE turns the halves of a head.
        """

    def set_layer(
        self,
        layer: int,
        *,
        attention_norm: Array,
        qkv: Array,
        attention_out: Array,
        mlp_norm: Array,
        gate_up: Array,
        down: Array,
        qkv_bias: Array | None = None,
        q_norm: Array | None = None,
        k_norm: Array | None = None,
    ) -> None:
        """Copies a layer's weights; matrices are [out, in], gate_up is all of gate, then of up.

        q_norm, k_norm: [head_dim], of an RMS norm of each head before RoPE.
        """

    def set_ends(self, *, embedding: Array, final_norm: Array, head: Array) -> None:
        """Copies all but the embedding, which must not change: [vocabulary, hidden]."""

    def run(self, stage: int, parts: Sequence[StagePart]) -> None:
        """Runs `stage` < layers: reads residuals and attention (tokens in stage 0).

        Writes residuals and qkv. Raises IndexError for an index, position or token out of range,
        before it writes anything.
        """

    def finish(
        self,
        parts: Sequence[StagePart],
        best: Array,
        logits: Array | None = None,
        wanted: Array | None = None,
    ) -> None:
        """Runs stage `layers`; all arrays are in the order of `parts`.

        best: i64[rows or more], the token with the largest logit, of equals the first.
        logits: f32[rows or more, vocabulary], written where `wanted`, bool[rows], says so.
        """

class WorkerLink:
    """The worker's side of a segment. One per (epoch, server); not thread-safe; never blocks.

    A slot is the worker's from the poll that returns it until it is submitted again. Send FREE
    when no message of the sequence is outstanding, and use the sequence again after its answer.
    """

    def __init__(self, segment_path: str) -> None: ...
    @property
    def slab(self) -> NDArray[Any]:
        """Writable [slots, slot_elems], float32, or uint16 for 16-bit types: q | k | v | out."""

    @property
    def written_len(self) -> NDArray[np.uint32]:
        """Live, read-only [max_sequences, layers]."""

    @property
    def q_offset(self) -> int: ...
    @property
    def k_offset(self) -> int: ...
    @property
    def v_offset(self) -> int: ...
    @property
    def out_offset(self) -> int: ...
    @property
    def slot_elems(self) -> int: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def segment_id(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def current(self) -> bool:
        """Whether the segment is still the one that was opened; if not, nothing is answered."""

    @property
    def ring_waits(self) -> int: ...
    @property
    def transfer_tokens(self) -> int:
        """Tokens that one CHECKPOINT or RESTORE message has room for."""

    def submit(
        self,
        kind: int,
        layers: Int32s,
        sequences: Int32s,
        positions: Int32s,
        slots: Int32s,
        counts: Int32s | None = None,
    ) -> None:
        """Sends one message per row (all i32[n]) with one publication.

        counts: tokens from the position on, of CHECKPOINT and RESTORE; 1 each if None.
        Raises RuntimeError for a slot with an outstanding message, IndexError for one that does
        not exist; nothing is sent then.
        """

    def poll(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Slots whose messages were answered since the last call, and their statuses."""

    def check_integrity(self) -> None:
        """Raises RuntimeError that names the inconsistency."""

class Bell:
    """A file with a futex word that wakes one sleeper."""

    def __init__(self, path: str, create: bool) -> None: ...
    def ring(self) -> None: ...
    def value(self) -> int: ...
    def wait(self, seen: int, timeout_us: int) -> bool:
        """Sleeps until the value is not `seen`; False on timeout."""

class ServerLoop:
    """The attention server's hot loop, in threads of its own, on the arena file at `path`."""

    def __init__(
        self,
        path: str,
        threads: int = 1,
        spin_us: int = 0,
        background: bool = False,
        cpus: list[int] = ...,
        fault_delay_us: int = 0,
        fault_seed: int = 0,
    ) -> None: ...
    @property
    def not_adopted(self) -> str:
        """Why the segment in the file was not adopted; empty if it was."""

    @property
    def not_locked(self) -> str:
        """Why the file could not be kept from being swapped out; empty if it was."""

    @property
    def not_in_background(self) -> str:
        """Why the loop competes for cores in spite of `background`; empty if it does not."""

    @property
    def attached(self) -> bool: ...
    @property
    def worker_id(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def segment_id(self) -> int: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def progress(self) -> int:
        """Grows at least ten times a second while the loop is alive and gets a core."""

    def format(
        self,
        worker_id: str,
        epoch: int,
        segment_id: int,
        geometry: Geometry,
        bell_path: str,
        layers: Sequence[tuple[int, float, Sequence[float]]] = (),
    ) -> None:
        """Gives the segment to a new epoch; what it held is lost.

        layers: (window, softcap, sinks) of each, or none; see PagedKv.attend.
        """

    def rebell(self, bell_path: str) -> None: ...
    def drain(self, timeout_ms: int) -> bool:
        """Waits until nothing is left in the rings; False on timeout."""

    def stop(self) -> None: ...
    def pages_free(self) -> int: ...
    def stats(self) -> tuple[int, int, int]:
        """Answered ATTEND rows, KV bytes read, errors."""
