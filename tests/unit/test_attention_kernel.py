"""The paged attention kernel against a slow reference in double precision."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from omniserve.attnkernel import PagedKv
from omniserve.attnkernel._core import kernel_names, use_kernel

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

# float32: rounding of sums of up to 256 products. The others: of weights and of the output.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1.2e-2, "float16": 2e-3}
# Of a value, when it is rounded to a row's dtype.
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SUBNORMAL_HALF_ULP = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25}


def to_bits(x: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """What the kernel takes: bfloat16 as uint16, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x.astype(dtype)


def to_double(x: NDArray[np.generic]) -> F64:
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


@dataclass(frozen=True)
class Options:
    """What a layer does besides softmax(q k) v."""

    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


def reference(
    q: F64, k: F64, v: F64, first_position: int, options: Options, sinks: Sequence[float]
) -> F64:
    """q: [rows, heads, dim]; k, v: [tokens, kv_heads, dim]; causal, for each head of a group."""
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros_like(q)
    for row in range(rows):
        seen = first_position + row + 1
        tokens = slice(max(0, seen - options.window) if options.window else 0, seen)
        for head in range(heads):
            scores = k[tokens, head // group] @ q[row, head] / np.sqrt(dim)
            if options.softcap:
                scores = options.softcap * np.tanh(scores / options.softcap)
            sink = sinks[head] if options.sinks else -np.inf
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(sink - top)
            out[row, head] = weights @ v[tokens, head // group] / total
    return out


@dataclass
class Case:
    dtype: str
    kv_heads: int
    group: int
    dim: int
    page_tokens: int
    segments: list[tuple[int, int]]  # (first position, rows)
    threads: int
    seed: int
    kernel: str = kernel_names()[0]
    int8: bool = False
    options: Options = Options()
    size: float = 2.0


CASES = st.builds(
    Case,
    dtype=st.sampled_from(("float32", "bfloat16", "float16")),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 16),
    dim=st.integers(1, 16).map(lambda n: 16 * n),
    page_tokens=st.sampled_from((16, 32, 48, 64)),
    segments=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 150), st.integers(0, 2200)),
            st.one_of(st.just(1), st.integers(0, 40)),
        ),
        min_size=1,
        max_size=5,
    ),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    kernel=st.sampled_from(kernel_names()),
    int8=st.booleans(),
    options=st.builds(
        Options,
        window=st.one_of(st.just(0), st.integers(1, 700)),
        softcap=st.sampled_from((0.0, 5.0, 30.0)),
        sinks=st.booleans(),
    ),
)


def steps_of(rows: F64) -> F64:
    """Steps of int8 KV for [..., dim]: 127 are the largest magnitude; 1 for rows of nothing."""
    steps = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float32) / np.float32(127)
    return np.where(steps == 0, 1, steps).astype(np.float64)


class World:
    """A case with data: each segment is a sequence of its own with pages in random order."""

    def __init__(self, case: Case) -> None:
        self.case = case
        use_kernel(case.kernel)
        self.rng = np.random.default_rng(case.seed)
        lengths = [first + rows for first, rows in case.segments]
        width = max(1, max(-(-n // case.page_tokens) for n in lengths))
        pages = width * len(lengths)
        self.tables = self.rng.permutation(pages).astype(np.int32).reshape(len(lengths), width)
        self.kv = PagedKv(
            2,
            case.kv_heads,
            case.dim,
            case.page_tokens,
            pages,
            case.dtype,
            case.threads,
            "int8" if case.int8 else case.dtype,
        )
        self.k = [self.draw(n, case.kv_heads) for n in lengths]
        self.v = [self.draw(n, case.kv_heads) for n in lengths]
        self.fill_with_nan(pages)
        for s, n in enumerate(lengths):
            position = np.arange(n)
            page = self.tables[s, position // case.page_tokens]
            offset = (position % case.page_tokens).astype(np.int32)
            self.kv.append(1, self.k[s], self.v[s], page, offset)
        rows = [rows for _, rows in case.segments]
        self.n_rows = np.array(rows, np.int32)
        self.first_row = (np.cumsum(rows) - rows).astype(np.int32)
        self.first_position = np.array([first for first, _ in case.segments], np.int32)
        self.q = self.draw(sum(rows), case.kv_heads * case.group)
        self.sinks = self.rng.uniform(-4, 4, case.kv_heads * case.group).tolist()

    def fill_with_nan(self, pages: int) -> None:
        """Places past a sequence's end hold what an earlier one left; it must not leak."""
        tokens = self.case.page_tokens
        page = np.repeat(np.arange(pages, dtype=np.int32), tokens)
        offset = np.tile(np.arange(tokens, dtype=np.int32), pages)
        shape = (pages * tokens, self.case.kv_heads * self.case.dim)
        nan = to_bits(np.full(shape, np.nan, np.float32), self.case.dtype)
        self.kv.append(1, nan, nan, page, offset)

    def draw(self, rows: int, heads: int) -> NDArray[np.generic]:
        x = self.rng.standard_normal((rows, heads * self.case.dim)).astype(np.float32)
        return to_bits(x * np.float32(self.case.size), self.case.dtype)

    def stored(self, sequence: int) -> tuple[F64, F64]:
        """K and V of a sequence as the pool holds them, [tokens, kv_heads, dim] each."""
        case = self.case
        shape = (-1, case.kv_heads, case.dim)
        k = to_double(self.k[sequence]).reshape(shape)
        v = to_double(self.v[sequence]).reshape(shape)
        return self.quantised(sequence, np.stack((k, v))) if case.int8 else (k, v)

    def quantised(self, sequence: int, sent: F64) -> tuple[F64, F64]:
        """What int8 KV makes of k and v [2, tokens, kv_heads, dim]. A value in the middle between
        two steps may become either, so the pool is asked; rounded to a row's dtype is near enough
        to tell the step."""
        position = np.arange(sent.shape[1])
        page = self.tables[sequence, position // self.case.page_tokens]
        offset = position % self.case.page_tokens
        read = [self.kv.read(1, int(p), int(o)) for p, o in zip(page, offset, strict=True)]
        got = np.array(read, np.float64).reshape(len(read), 2, *sent.shape[2:]).swapaxes(0, 1)
        step = steps_of(sent)
        stored = np.rint(got / step) * step
        assert (np.abs(stored - sent) <= 0.5001 * step).all()
        return stored[0], stored[1]

    def call(self, out: NDArray[np.generic], tables: I32, *segments: I32) -> None:
        options = self.case.options
        sinks = self.sinks if options.sinks else []
        self.kv.attend(1, self.q, out, tables, *segments, options.window, options.softcap, sinks)

    def attend(self) -> NDArray[np.generic]:
        out = np.zeros_like(self.q)
        self.call(out, self.tables, self.first_row, self.n_rows, self.first_position)
        return out


@pytest.fixture(autouse=True, scope="module")
def _fastest_kernel_afterwards() -> Iterator[None]:
    yield
    use_kernel(kernel_names()[0])


@given(CASES)
@settings(deadline=None, max_examples=60)
def test_attention_equals_the_double_precision_reference(case: Case) -> None:
    world = World(case)
    out = to_double(world.attend())
    for s, (first, rows) in enumerate(case.segments):
        at = slice(world.first_row[s], world.first_row[s] + rows)
        q = to_double(world.q[at]).reshape(rows, case.kv_heads * case.group, case.dim)
        expected = reference(q, *world.stored(s), first, case.options, world.sinks)
        # With int8 KV, queries and weights have 15 bits.
        tolerance = max(TOLERANCE[case.dtype], 3e-3 if case.int8 else 0)
        np.testing.assert_allclose(
            out[at].reshape(expected.shape), expected, rtol=tolerance, atol=tolerance
        )


def test_kernels_made_for_another_cpu_come_last() -> None:
    cpu = Path("/proc/cpuinfo").read_text()
    zen4 = re.search(r"^cpu family\s*: 25$", cpu, re.M) and "avx512_bf16" in cpu
    names = kernel_names()
    if "znver4" in names:
        assert names.index("znver4") == (0 if zen4 else len(names) - 1)


@given(CASES)
@settings(deadline=None, max_examples=30)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(case: Case) -> None:
    _compare_alone_and_together(case)


@pytest.mark.parametrize("int8", [False, True])
def test_a_sequence_has_the_same_bits_wherever_it_is_cut_for_threads(int8: bool) -> None:
    _compare_alone_and_together(
        Case("bfloat16", 4, 4, 128, 32, [(5000, 1), (2100, 1), (300, 1)], 3, 1, int8=int8)
    )


def _compare_alone_and_together(case: Case) -> None:
    world = World(case)
    together = world.attend()
    alone = np.zeros_like(together)
    for s, (first, rows) in enumerate(case.segments):
        for row in range(rows):
            world.call(
                alone,
                world.tables[s : s + 1],
                np.array([world.first_row[s] + row], np.int32),
                np.array([1], np.int32),
                np.array([first + row], np.int32),
            )
    np.testing.assert_array_equal(alone, together)


def test_rows_may_be_strided_views_of_numpy_and_torch() -> None:
    torch = pytest.importorskip("torch")
    case = Case("bfloat16", 2, 3, 64, 32, [(70, 1), (0, 33)], 1, 7)
    world = World(case)
    q = torch.from_numpy(world.q.view(np.int16)).view(torch.bfloat16)
    wide_q = torch.zeros(q.shape[0], 3 * q.shape[1], dtype=torch.bfloat16)
    wide_q[:, q.shape[1] : 2 * q.shape[1]] = q
    wide_out = torch.zeros_like(wide_q)
    world.kv.attend(
        1,
        wide_q[:, q.shape[1] : 2 * q.shape[1]],
        wide_out[:, : q.shape[1]],
        world.tables,
        world.first_row,
        world.n_rows,
        world.first_position,
    )
    got = wide_out[:, : q.shape[1]].contiguous().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, world.attend())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_appended_is_read_back_unchanged(dtype: str) -> None:
    world = World(Case(dtype, 3, 1, 48, 16, [(37, 1)], 1, 3))
    for position in range(38):
        page = int(world.tables[0, position // 16])
        k, v = world.kv.read(1, page, position % 16)
        np.testing.assert_array_equal(k, to_double(world.k[0][position]))
        np.testing.assert_array_equal(v, to_double(world.v[0][position]))


@pytest.mark.parametrize("kernel", kernel_names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_kv_is_read_back_within_half_a_step(kernel: str, dtype: str) -> None:
    use_kernel(kernel)
    heads, dim, tokens = 2, 80, 48
    kv = PagedKv(1, heads, dim, 16, 3, dtype, kv_dtype="int8")
    sizes = np.logspace(-4, 4, tokens)[:, None, None]
    sizes[7] = 0  # a row of nothing has no step
    drawn = np.random.default_rng(5).standard_normal((2, tokens, heads, dim)) * sizes
    rows = to_bits(drawn.astype(np.float32).reshape(2, tokens, -1), dtype)
    places = np.arange(tokens, dtype=np.int32)
    kv.append(0, rows[0], rows[1], places // 16, places % 16)
    for token in range(tokens):
        got = np.array(kv.read(0, token // 16, token % 16)).reshape(2, heads, dim)
        sent = to_double(rows[:, token]).reshape(2, heads, dim)
        rounding = np.maximum(HALF_ULP[dtype] * np.abs(got), SUBNORMAL_HALF_ULP[dtype])
        assert (np.abs(got - sent) <= 0.5001 * steps_of(sent) + rounding).all()


@pytest.mark.parametrize("kernel", kernel_names())
def test_int8_rows_that_have_no_usual_step(kernel: str) -> None:
    """Largest magnitudes below 127 steps of what a float can hold count as nothing; one value that
    is not finite takes its row with it, and no other."""
    use_kernel(kernel)
    kv = PagedKv(1, 1, 16, 16, 1, kv_dtype="int8")
    largest = np.array([1e-37, np.inf, np.nan, 3e38, -1.0], np.float32)
    rows = np.zeros((len(largest), 16), np.float32)
    rows[1:3] = 1.0
    rows[:, 3] = largest
    tokens = np.arange(len(rows), dtype=np.int32)
    kv.append(0, rows, rows, 0 * tokens, tokens)
    tiny, infinite, nan, huge, one = (kv.read(0, 0, int(token)) for token in tokens)
    assert not np.any(tiny)
    assert np.isnan(infinite).all()
    assert np.isnan(nan).all()
    np.testing.assert_allclose(huge, [rows[3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(one, [rows[4]] * 2, rtol=1e-6)


def one(value: int) -> I32:
    return np.array([value], np.int32)


@pytest.mark.parametrize(
    ("layer", "page", "offset", "named"),
    [(2, 0, 0, "layer"), (0, 4, 0, "page"), (0, -1, 0, "page"), (0, 0, 16, "offset")],
)
def test_appending_outside_the_pool_is_refused_by_name(
    layer: int, page: int, offset: int, named: str
) -> None:
    kv = PagedKv(2, 1, 16, 16, 4)
    row = np.zeros((1, 16), np.float32)
    with pytest.raises(IndexError, match=named):
        kv.append(layer, row, row, one(page), one(offset))


@pytest.mark.parametrize(
    ("table", "first_row", "rows", "first_position", "named"),
    [
        ([4, 0], 0, 1, 0, "page"),
        ([0, -1], 0, 1, 16, "page"),
        ([0, 1], 0, 1, 32, "first_position"),
        ([0, 1], 0, 1, -1, "first_position"),
        ([0, 1], 1, 2, 0, "first_row"),
        ([0, 1], 0, -1, 0, "n_rows"),
    ],
)
def test_attending_outside_the_pool_is_refused_by_name(
    table: list[int], first_row: int, rows: int, first_position: int, named: str
) -> None:
    kv = PagedKv(1, 1, 16, 16, 4)
    q = np.zeros((2, 16), np.float32)
    with pytest.raises(IndexError, match=named):
        kv.attend(
            0,
            q,
            q.copy(),
            np.array([table], np.int32),
            one(first_row),
            one(rows),
            one(first_position),
        )


def test_rows_of_another_dtype_are_refused() -> None:
    kv = PagedKv(1, 1, 16, 16, 4, "bfloat16")
    row = np.zeros((1, 16), np.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        kv.append(0, row, row, one(0), one(0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1, 1, 24, 16, 4), "head_dim"),
        ((1, 1, 16, 8, 4), "page_tokens"),
        ((1, 1, 16, 16, 0), "pages"),
    ],
)
def test_a_pool_that_the_kernel_cannot_serve_is_refused_by_name(
    arguments: tuple[int, int, int, int, int], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        PagedKv(*arguments)
