"""layout.h, as compiled into the native core, against its Python mirror."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.attnkernel import _core
from omniserve.errors import InvalidArgumentError
from omniserve.shm import layout

STRUCTS = {
    "Geometry": layout.CGeometry,
    "Regions": layout.CRegions,
    "Header": layout.CHeader,
    "LayerOptions": layout.CLayerOptions,
    "Doorbell": layout.CDoorbell,
    "RingHeader": layout.CRingHeader,
    "SlotHeader": layout.CSlotHeader,
}


@st.composite
def geometries(draw: st.DrawFn) -> layout.Geometry:
    kv_heads = draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(("float32", "bfloat16", "float16")))
    return layout.Geometry(
        layers=draw(st.integers(1, 80)),
        heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=16 * draw(st.integers(1, 16)),
        dtype=dtype,
        kv_dtype=draw(st.sampled_from((dtype, "int8"))),
        page_tokens=16 * draw(st.integers(1, 4)),
        max_sequences=draw(st.integers(1, 5000)),
        max_sequence_tokens=draw(st.integers(1, 1 << 20)),
        slots=draw(st.integers(1, 100_000)),
    )


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_of_a_struct_has_the_same_offset_on_both_sides(name: str) -> None:
    assert layout.field_offsets(STRUCTS[name]) == _core.struct_offsets()[name]


def test_no_struct_is_left_out_of_the_comparison() -> None:
    assert set(STRUCTS) == set(_core.struct_offsets())


def test_constants_are_the_same_on_both_sides() -> None:
    names = [n for n in dir(_core) if n.startswith(("KIND_", "STATUS_"))]
    assert names == [n for n in dir(layout) if n.startswith(("KIND_", "STATUS_"))]
    for name in [*names, "MAGIC", "LAYOUT_VERSION"]:
        assert getattr(layout, name) == getattr(_core, name), name


@given(geometries(), st.integers(1, 1 << 20))
def test_every_region_has_the_same_offset_on_both_sides(
    geometry: layout.Geometry, pages: int
) -> None:
    native = _core.Geometry(**vars(geometry), pages=pages)
    assert layout.regions(geometry, pages) == _core.region_offsets(native)


@given(st.integers(1, 1 << 20))
def test_a_ring_holds_more_than_two_entries_per_slot(slots: int) -> None:
    capacity = layout.ring_capacity(slots)
    assert capacity == _core.ring_capacity(slots)
    assert capacity > 2 * slots
    assert capacity & (capacity - 1) == 0


@given(geometries(), st.integers(1, 1 << 20))
def test_an_arena_sized_for_some_pages_holds_exactly_that_many(
    geometry: layout.Geometry, pages: int
) -> None:
    size = layout.arena_bytes(geometry, pages)
    assert layout.pages_in(geometry, size) == pages
    assert layout.pages_in(geometry, size - 1) == pages - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("heads", 7),
        ("heads", 51),
        ("kv_heads", 0),
        ("head_dim", 24),
        ("head_dim", 272),
        ("dtype", "float64"),
        ("dtype", "int8"),
        ("kv_dtype", "float16"),
        ("page_tokens", 8),
        ("page_tokens", 80),
        ("max_sequences", 0),
        ("max_sequence_tokens", 0),
        ("slots", 0),
    ],
)
def test_a_geometry_that_no_kernel_serves_is_refused_by_the_name_of_its_field(
    field: str, value: object
) -> None:
    good = layout.Geometry(30, 9, 3, 64, "bfloat16", "bfloat16", 32, 16, 1024, 64)
    good.check()
    with pytest.raises(InvalidArgumentError) as refused:
        layout.Geometry(**{**vars(good), field: value}).check()
    assert refused.value.field == f"geometry.{field}"
