"""Python mirror of layout.h: the segment that one worker and one attention server share.

Used by the attention server to check geometry, by operators to size an arena, and by tests. The
hot paths use layout.h; tests/contract compares every offset of the two.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from omniserve.errors import InvalidArgumentError

MAGIC = 0x314745534E4D4F  # "OMNSEG1"
LAYOUT_VERSION = 4
PAGE_ALIGN_BYTES = 4096
LINE_BYTES = 64

Dtype = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["float32", "bfloat16", "float16", "int8"]
DTYPE_CODE: dict[str, int] = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

KIND_ATTEND = 1
KIND_CHECKPOINT = 2
KIND_RESTORE = 3
KIND_FREE = 4

STATUS_OK = 0
STATUS_BAD_KIND = 1
STATUS_BAD_LAYER = 2
STATUS_BAD_SEQUENCE = 3
STATUS_BAD_POSITION = 4
STATUS_NO_PAGE = 5
STATUS_FREED = 6
STATUS_BAD_COUNT = 7

_U8, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64


class CGeometry(ctypes.LittleEndianStructure):
    _fields_ = (
        ("layers", _U32),
        ("heads", _U32),
        ("kv_heads", _U32),
        ("head_dim", _U32),
        ("dtype", _U32),
        ("kv_dtype", _U32),
        ("page_tokens", _U32),
        ("max_sequences", _U32),
        ("max_sequence_tokens", _U32),
        ("slots", _U32),
        ("pages", _U32),
    )


class CRegions(ctypes.LittleEndianStructure):
    _fields_ = (
        ("sequence_state", _U64),
        ("written_len", _U64),
        ("page_table", _U64),
        ("layer_options", _U64),
        ("sinks", _U64),
        ("request_ring", _U64),
        ("low_ring", _U64),
        ("response_ring", _U64),
        ("slot_headers", _U64),
        ("slab", _U64),
        ("kv", _U64),
        ("end", _U64),
    )


class CLayerOptions(ctypes.LittleEndianStructure):
    _fields_ = (("window", _U32), ("softcap", ctypes.c_float))


class CDoorbell(ctypes.LittleEndianStructure):
    _fields_ = (("value", _U32), ("sleeping", _U32), ("reserved", _U8 * 56))


class CHeader(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", _U64),
        ("layout_version", _U32),
        ("ready", _U32),
        ("epoch", _U64),
        ("segment_id", _U64),
        ("arena_bytes", _U64),
        ("geometry", CGeometry),
        ("ring_capacity", _U32),
        ("max_pages_per_sequence", _U32),
        ("padding", _U32),
        ("regions", CRegions),
        ("worker_id", ctypes.c_char * 64),
        ("bell_path", ctypes.c_char * 256),
        ("doorbell", CDoorbell),
    )


class CRingHeader(ctypes.LittleEndianStructure):
    _fields_ = (
        ("head", _U64),
        ("head_reserved", _U8 * 56),
        ("tail", _U64),
        ("tail_reserved", _U8 * 56),
    )


class CSlotHeader(ctypes.LittleEndianStructure):
    _fields_ = (
        ("kind", _U32),
        ("layer", _U32),
        ("sequence", _U32),
        ("position", _U32),
        ("count", _U32),
        ("request_generation", _U32),
        ("status", _U32),
        ("done_generation", _U32),
        ("reserved", _U8 * 32),
    )


def field_offsets(struct: type[ctypes.Structure]) -> dict[str, int]:
    """Byte offset of each field of `struct`, and its size under the key `sizeof`."""
    fields = cast("list[tuple[str, Any]]", list(struct._fields_))
    offsets = {name: int(getattr(struct, name).offset) for name, _ in fields}
    return {**offsets, "sizeof": ctypes.sizeof(struct)}


@dataclass(frozen=True)
class Geometry:
    """Shapes that a worker and its attention servers agree on; see layout.h."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Dtype
    kv_dtype: KvDtype
    page_tokens: int
    max_sequences: int
    max_sequence_tokens: int
    slots: int

    @property
    def max_pages_per_sequence(self) -> int:
        return -(-self.max_sequence_tokens // self.page_tokens)

    @property
    def slot_elems(self) -> int:
        """Elements of a slot's row: q | k | v | out."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim

    @property
    def transfer_tokens(self) -> int:
        """Tokens of one layer whose K and V a slot has room for."""
        return (self.heads + self.kv_heads) // self.kv_heads

    @property
    def block_bytes(self) -> int:
        """K and V of one (layer, page, kv head), and their scales if `kv_dtype` is int8."""
        scales = 8 * self.page_tokens if self.kv_dtype == "int8" else 0
        return 2 * self.head_dim * self.page_tokens * DTYPE_BYTES[self.kv_dtype] + scales

    @property
    def page_bytes(self) -> int:
        """One page id: its blocks in all layers and heads."""
        return self.block_bytes * self.kv_heads * self.layers

    def check(self) -> None:
        """Raises InvalidArgumentError that names the field which the kernels cannot serve."""
        if self.dtype not in get_args(Dtype):
            raise _bad("dtype", f"must be one of {get_args(Dtype)}, not {self.dtype!r}")
        if self.kv_dtype not in (self.dtype, "int8"):
            raise _bad("kv_dtype", f"must be {self.dtype} or int8, not {self.kv_dtype!r}")
        for name, low, high, multiple in _LIMITS:
            value = getattr(self, name)
            if not low <= value <= high or value % multiple:
                of = f", a multiple of {multiple}" if multiple > 1 else ""
                raise _bad(name, f"must be {low} to {high}{of}, not {value}")
        if self.heads % self.kv_heads or self.heads // self.kv_heads > MAX_GROUP:
            raise _bad("heads", f"must be 1 to {MAX_GROUP} times kv_heads, not {self.heads}")


MAX_GROUP = 16
# (field, least, most, multiple of); layout.h's arithmetic stays far inside 64 bits below these.
_LIMITS = (
    ("layers", 1, 1024, 1),
    ("kv_heads", 1, 1024, 1),
    ("heads", 1, 4096, 1),
    ("head_dim", 16, 256, 16),
    ("page_tokens", 16, 64, 16),
    ("max_sequences", 1, 1 << 20, 1),
    ("max_sequence_tokens", 1, 1 << 24, 1),
    ("slots", 1, 1 << 20, 1),
)


def _bad(field: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"geometry.{field} {message}", field=f"geometry.{field}")


def ring_capacity(slots: int) -> int:
    """Entries of each ring: the power of two above two per slot."""
    return 1 << (2 * slots).bit_length()


def regions(geometry: Geometry, pages: int) -> dict[str, int]:
    """Byte offset of every region, in file order; `end` is the size of the segment."""
    g = geometry
    ring_bytes = ctypes.sizeof(CRingHeader) + 8 * ring_capacity(g.slots)
    r: dict[str, int] = {"sequence_state": PAGE_ALIGN_BYTES}
    r["written_len"] = _align(r["sequence_state"] + 4 * g.max_sequences, LINE_BYTES)
    r["page_table"] = _align(r["written_len"] + 4 * g.max_sequences * g.layers, LINE_BYTES)
    table_bytes = 4 * g.max_sequences * g.max_pages_per_sequence
    r["layer_options"] = _align(r["page_table"] + table_bytes, LINE_BYTES)
    options_bytes = ctypes.sizeof(CLayerOptions) * g.layers
    r["sinks"] = _align(r["layer_options"] + options_bytes, LINE_BYTES)
    r["request_ring"] = _align(r["sinks"] + 4 * g.layers * g.heads, LINE_BYTES)
    r["low_ring"] = _align(r["request_ring"] + ring_bytes, LINE_BYTES)
    r["response_ring"] = _align(r["low_ring"] + ring_bytes, LINE_BYTES)
    r["slot_headers"] = _align(r["response_ring"] + ring_bytes, LINE_BYTES)
    headers_bytes = ctypes.sizeof(CSlotHeader) * g.slots
    r["slab"] = _align(r["slot_headers"] + headers_bytes, PAGE_ALIGN_BYTES)
    slab_bytes = g.slot_elems * DTYPE_BYTES[g.dtype] * g.slots
    r["kv"] = _align(r["slab"] + slab_bytes, PAGE_ALIGN_BYTES)
    r["end"] = r["kv"] + g.page_bytes * pages
    return r


def arena_bytes(geometry: Geometry, pages: int) -> int:
    """Size of `--arena-bytes` so that a server has `pages` pages: bookkeeping + KV."""
    return regions(geometry, pages)["end"]


def pages_in(geometry: Geometry, size_bytes: int) -> int:
    """Pages that an arena of `size_bytes` holds; the inverse of `arena_bytes`."""
    return max(0, (size_bytes - regions(geometry, 0)["end"]) // geometry.page_bytes)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
