"""What a server makes of the segment that it finds at start, and a worker of its server's."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.attention_process import GEOMETRY, PAGES

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


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    """A formatted segment, whose server is gone."""
    path = tmp_path / "a0.arena"
    path.write_bytes(bytes(layout.arena_bytes(GEOMETRY, PAGES)))
    bell = str(tmp_path / "w0.bell")
    _core.Bell(bell, create=True)
    loop = ServerLoop(str(path))
    loop.format("w0", 1, 7, _core.Geometry(**vars(GEOMETRY), pages=PAGES), bell)
    loop.stop()
    return path


@pytest.mark.parametrize("name", [b"", b"w\xff", b"w\n", b"\xc3\xb6", b"w" * 64], ids=str)
def test_a_segment_whose_worker_s_name_is_damaged_is_not_adopted(arena: Path, name: bytes) -> None:
    adopted = ServerLoop(str(arena))
    assert (adopted.not_adopted, adopted.worker_id, adopted.segment_id) == ("", "w0", 7)
    adopted.stop()
    with arena.open("r+b") as file:
        file.seek(layout.CHeader.worker_id.offset)
        file.write(name.ljust(64, b"\0"))
    loop = ServerLoop(str(arena))
    assert loop.not_adopted == "its worker's name is damaged"
    assert (loop.worker_id, loop.attached) == ("", False)


def test_a_worker_maps_all_of_a_segment_but_its_kv(arena: Path) -> None:
    kv = layout.regions(GEOMETRY, PAGES)["kv"]
    link = WorkerLink(str(arena))
    places = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(arena))
    ]
    assert [int(end, 16) - int(start, 16) for start, end in places] == [kv]
    link.slab[:] = 1  # up to its last byte
    with arena.open("r+b") as file:
        file.truncate(layout.arena_bytes(GEOMETRY, PAGES) - 1)
    with pytest.raises(RuntimeError, match="the segment is truncated"):
        WorkerLink(str(arena))


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
