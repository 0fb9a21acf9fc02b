"""What a server and a worker make of a segment whose header somebody damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from omniserve.attnkernel import WorkerLink, _core
from omniserve.attnkernel._core import ServerLoop
from omniserve.shm import layout

# Within all bounds, and 2^64 bytes of KV.
VAST = _core.Geometry(
    layers=1024,
    heads=128,
    kv_heads=128,
    head_dim=256,
    dtype="float32",
    kv_dtype="float32",
    page_tokens=64,
    max_sequences=1,
    max_sequence_tokens=64,
    slots=1,
    pages=1 << 30,
)


def test_a_segment_whose_size_wraps_around_does_not_fit_any_file(tmp_path: Path) -> None:
    arena = tmp_path / "a0.arena"
    regions = _core.region_offsets(VAST)
    assert regions["end"] == regions["kv"]  # it wraps to this
    fields = [name for name, _ in layout.CGeometry._fields_ if "dtype" not in name]
    header = layout.CHeader(
        magic=layout.MAGIC,
        layout_version=layout.LAYOUT_VERSION,
        ready=1,
        geometry=layout.CGeometry(
            **{name: getattr(VAST, name) for name in fields},
            dtype=layout.DTYPE_CODE["float32"],
            kv_dtype=layout.DTYPE_CODE["float32"],
        ),
        ring_capacity=layout.ring_capacity(1),
        max_pages_per_sequence=1,
        regions=layout.CRegions(**regions),
        worker_id=b"w0",
    )
    arena.write_bytes(bytes(header).ljust(regions["kv"] + 4096, b"\0"))
    with pytest.raises(RuntimeError, match="the segment is truncated"):
        WorkerLink(str(arena))
    loop = ServerLoop(str(arena))
    assert loop.not_adopted == "its offsets do not fit its geometry"
    _core.Bell(str(tmp_path / "w0.bell"), create=True)
    with pytest.raises(ValueError, match="the arena is too small"):
        loop.format("w0", 1, 1, VAST, str(tmp_path / "w0.bell"))
