"""The native dense stages against plain torch in double precision, and against themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.dense_stages import CONTEXT, LAYERS, Rows, Shape, Twin

from omniserve.attnkernel import Slots, StageRows
from omniserve.attnkernel._core import kernel_names, use_kernel

# Sums of up to 1536 products in float32; in bfloat16, three roundings to 8 bits of values whose
# errors add up over a sum.
TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (2e-2, 3e-2)}
SMALL = Shape(hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=160)
# Nothing is a multiple of a vector, a panel or the padding that need not be.
ODD = Shape(hidden=70, heads=3, kv_heads=1, head_dim=48, intermediate=101, vocabulary=77)
REAL = Shape(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=1000)
ROWS = (1, 2, 3, 5, 16, 17, 32, 33, 64, 100, 300)


@pytest.fixture(autouse=True)
def _fastest_kernel_afterwards() -> Iterator[None]:
    yield
    use_kernel(kernel_names()[0])


def places(n: int, shape: Shape) -> tuple[list[int], list[int]]:
    """Tokens and positions of n rows."""
    return [7 * i % shape.vocabulary for i in range(n)], [5 * i % CONTEXT for i in range(n)]


def assert_stages_match(twin: Twin, n: int, dtype: str) -> None:
    relative, absolute = TOLERANCE[dtype]
    tokens, positions = places(n, twin.shape)
    for stage in range(LAYERS + 1):
        rows = twin.rows(n)
        residual, wanted = twin.reference(stage, rows, tokens, positions)
        logits = twin.run(stage, rows, tokens, positions)
        found = logits if logits is not None else rows.qkv
        torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=absolute)
        if logits is None:
            torch.testing.assert_close(
                rows.residual.double(), residual, rtol=relative, atol=absolute
            )


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", kernel_names())
def test_stages_of_any_row_count_match_plain_torch(kernel: str, dtype: str, n: int) -> None:
    use_kernel(kernel)
    assert_stages_match(Twin(SMALL, dtype, extras=True), n, dtype)


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "biases and head norms"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", kernel_names())
@pytest.mark.parametrize("shape", [ODD, REAL], ids=["odd", "real"])
def test_stages_of_any_shape_match_plain_torch(
    shape: Shape, kernel: str, dtype: str, extras: bool
) -> None:
    use_kernel(kernel)
    twin = Twin(shape, dtype, extras=extras, threads=2)
    for n in (1, 15, 40):
        assert_stages_match(twin, n, dtype)


def run_all(twin: Twin, rows: Rows) -> list[torch.Tensor]:
    """Takes `rows` through all stages; attention outputs stay as they are."""
    n = len(rows.residual)
    tokens, positions = [3] * n, [9] * n
    found = []
    for stage in range(LAYERS + 1):
        logits = twin.run(stage, rows, tokens, positions)
        found.append(logits if logits is not None else rows.qkv.clone())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", kernel_names())
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernel: str, dtype: str) -> None:
    use_kernel(kernel)
    twin = Twin(REAL, dtype, extras=True, threads=3)
    batch = twin.rows(600)  # more than a part of a stage
    copies = {
        n: Rows(*(t[600 - n :].clone() for t in (batch.residual, batch.attention, batch.qkv)))
        for n in (1, 2, 13, 31, 65, 300)
    }
    everything = run_all(twin, batch)
    for n, rows in copies.items():
        for all_rows, some in zip(everything, run_all(twin, rows), strict=True):
            assert torch.equal(all_rows[600 - n :], some), f"{n} rows"


def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    for threads in (1, 2, 5):
        twin = Twin(REAL, "bfloat16", extras=False, threads=threads)
        results.append([run_all(twin, twin.rows(n)) for n in (1, 40)])
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_of_several_owners_are_read_and_written_where_their_indices_say() -> None:
    twin = Twin(SMALL, "bfloat16", extras=False)
    plain = twin.rows(6)
    store = torch.full((9, SMALL.hidden), 5.0, dtype=twin.dtype)
    slots = [
        Rows(store, torch.zeros(8, SMALL.q_size, dtype=twin.dtype), plain.qkv.new_full((8, 128), 5))
        for _ in range(2)
    ]
    rows = np.array([8, 0, 3, 5], np.int64)
    owners = np.array([1, 0, 0, 1], np.int32)
    at = np.array([2, 7, 4, 0], np.int32)
    for i in range(4):
        store[rows[i]] = plain.residual[2 + i]
        slots[owners[i]].attention[at[i]] = plain.attention[2 + i]
    tokens, positions = places(6, SMALL)
    kept = StageRows(
        plain.residual[:2].clone(), [Slots(plain.attention[:2], plain.qkv[:2].clone())]
    )
    lot = StageRows(store, [Slots(each.attention, each.qkv) for each in slots])
    here = np.array(positions, np.int64)
    parts = [
        (kept, None, None, None, here[:2], None),
        (lot, rows, owners, at, here[2:], None),
    ]
    twin.model.run(1, parts)
    twin.run(1, plain, tokens, positions)
    for i in range(4):
        assert torch.equal(store[rows[i]], plain.residual[2 + i])
        assert torch.equal(slots[owners[i]].qkv[at[i]], plain.qkv[2 + i])
    untouched = [r for r in range(9) if r not in rows]
    assert (store[untouched] == 5).all()
    assert sum(int((each.qkv == 5).all(dim=1).sum()) for each in slots) == 12
    logits = torch.zeros(6, SMALL.vocabulary)
    for i in range(4):
        slots[owners[i]].attention[at[i]] = plain.attention[2 + i]
    best = np.zeros(6, np.int64)
    twin.model.finish([parts[0], parts[1]], best, logits, np.ones(6, np.bool_))
    wanted = twin.run(LAYERS, plain, tokens, positions)
    assert wanted is not None
    assert torch.equal(logits, wanted)
    assert best.tolist() == wanted.argmax(dim=1).tolist()


@pytest.mark.parametrize("kernel", kernel_names())
def test_of_equal_logits_the_first_is_best_whoever_multiplies(kernel: str) -> None:
    use_kernel(kernel)
    for shape, threads in itertools.product((SMALL, ODD), (1, 3)):
        twin = Twin(shape, "bfloat16", extras=False, threads=threads)
        for different in (33, 1):  # logits, again and again
            twin.set_head(twin.head[torch.arange(shape.vocabulary) % different])
            rows = twin.rows(9)
            best = np.full(9, -1, np.int64)
            part = (StageRows(rows.residual, [Slots(rows.attention, rows.qkv)]), *[None] * 5)
            twin.model.finish([part], best)
            assert best.max() < different
            twin.run(LAYERS, rows, *places(9, shape))


@pytest.mark.parametrize("vocabulary", [5, 37, 50, 50257])
@pytest.mark.parametrize("kernel", kernel_names())
def test_a_row_without_a_number_among_its_logits_gets_token_0(kernel: str, vocabulary: int) -> None:
    use_kernel(kernel)
    for dtype, threads in itertools.product(("float32", "bfloat16"), (1, 3)):
        twin = Twin(replace(SMALL, vocabulary=vocabulary), dtype, extras=False, threads=threads)
        rows = twin.rows(9)
        rows.residual[::2] = torch.nan
        best = np.full(9, -1, np.int64)
        part = (StageRows(rows.residual, [Slots(rows.attention, rows.qkv)]), *[None] * 5)
        twin.model.finish([part], best)
        assert not best[::2].any()
        twin.run(LAYERS, rows, *places(9, twin.shape))  # the other rows


def test_the_padding_of_a_batch_does_not_leak_into_the_next() -> None:
    twin = Twin(ODD, "bfloat16", extras=True)
    tokens, positions = places(20, ODD)
    bad = twin.rows(20)
    bad.attention.fill_(torch.inf)
    bad.residual.fill_(torch.nan)
    for stage in (1, 2):
        twin.run(stage, bad, tokens, positions)
    assert_stages_match(twin, 20, "bfloat16")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("token", ([0, SMALL.vocabulary], [0, 0])),
        ("token", ([-1, 0], [0, 0])),
        ("position", ([0, 0], [0, CONTEXT])),
        ("position", ([0, 0], [-1, 0])),
    ],
)
def test_an_index_out_of_range_is_named_before_anything_is_written(
    field: str, values: tuple[list[int], list[int]]
) -> None:
    twin = Twin(SMALL, "float32", extras=False)
    rows = twin.rows(2)
    before = rows.residual.clone()
    with pytest.raises(IndexError, match=field):
        twin.run(0, rows, *values)
    assert torch.equal(rows.residual, before)
    assert rows.qkv.isnan().all()


def test_rows_and_slots_out_of_range_are_refused() -> None:
    twin = Twin(SMALL, "float32", extras=False)
    rows = twin.rows(3)
    owner = StageRows(rows.residual, [Slots(rows.attention, rows.qkv)])
    one = np.zeros(1, np.int64)
    for index, owners, slots, name in (
        (np.array([3]), None, None, "row 3"),
        (one, np.array([1], np.int32), None, "owner 1"),
        (one, None, np.array([-1], np.int32), "slot -1"),
    ):
        with pytest.raises(IndexError, match=name):
            twin.model.run(1, [(owner, index, owners, slots, one, None)])


def test_weights_of_another_shape_or_dtype_are_refused_by_name() -> None:
    twin = Twin(SMALL, "float32", extras=False)
    wrong = dict(vars(twin.layers[0]))
    wrong["down"] = twin.head
    with pytest.raises(ValueError, match="down: shape must be"):
        twin.model.set_layer(0, **wrong)
    wrong["down"] = twin.layers[0].down.bfloat16()
    with pytest.raises(ValueError, match="down: dtype must be float32"):
        twin.model.set_layer(0, **wrong)
