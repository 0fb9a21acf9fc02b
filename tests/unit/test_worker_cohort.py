"""The index arrays of a cohort against one row at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import request

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.requests import Place

PAGES = 200
PAGE_TOKENS = st.sampled_from([16, 32, 48, 64])


@st.composite
def chunks(draw: st.DrawFn, page_tokens: int) -> list[Chunk]:
    """Chunks and decode steps of one to five requests, which own pages in any order."""
    free = draw(st.permutations(range(PAGES)))
    made = []
    for index in range(draw(st.integers(1, 5))):
        known = draw(st.integers(1, 5 * page_tokens))
        start = draw(st.one_of(st.just(known - 1), st.integers(0, known - 1)))
        tokens = draw(st.integers(1, known - start))
        owner = request(f"r{index}", Place.PREFILLING, prompt=known)
        owner.tokens[:known] = np.arange(known) + 1000 * index
        needed = -(-(start + tokens) // page_tokens)
        pages = needed + draw(st.integers(0, 2))  # LS holds those of its whole output
        owner.blocks, free = free[:pages], free[pages:]
        made.append(Chunk(owner, start, tokens))
    return made


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_every_row_has_the_token_position_and_place_of_its_chunk(
    data: st.DataObject, page_tokens: int
) -> None:
    parts = data.draw(chunks(page_tokens))
    cohort = Cohort(parts, page_tokens)
    rows = [(chunk, at) for chunk in parts for at in range(chunk.start, chunk.end)]
    assert cohort.rows == len(rows)
    assert cohort.positions.tolist() == [at for _, at in rows]
    assert cohort.tokens.tolist() == [chunk.request.tokens[at] for chunk, at in rows]
    assert cohort.pages.tolist() == [c.request.blocks[at // page_tokens] for c, at in rows]
    assert cohort.offsets.tolist() == [at % page_tokens for _, at in rows]


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_no_two_rows_share_a_place_in_the_device_kv(data: st.DataObject, page_tokens: int) -> None:
    cohort = Cohort(data.draw(chunks(page_tokens)), page_tokens)
    places = set(zip(cohort.pages.tolist(), cohort.offsets.tolist(), strict=True))
    assert len(places) == cohort.rows


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_every_chunk_has_its_first_row_its_length_and_the_pages_of_its_request(
    data: st.DataObject, page_tokens: int
) -> None:
    parts = data.draw(chunks(page_tokens))
    cohort = Cohort(parts, page_tokens)
    assert cohort.tables.shape == (len(parts), max(len(c.request.blocks) for c in parts))
    row = 0
    for index, chunk in enumerate(parts):
        assert cohort.first_row[index] == row
        assert cohort.n_rows[index] == chunk.tokens
        assert cohort.first_position[index] == chunk.start
        table = cohort.tables[index].tolist()
        held = len(chunk.request.blocks)
        assert table[:held] == chunk.request.blocks
        assert set(table[held:]) <= {-1}
        row += chunk.tokens


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_the_last_row_of_a_chunk_that_reaches_all_known_tokens_is_sampled(
    data: st.DataObject, page_tokens: int
) -> None:
    parts = data.draw(chunks(page_tokens))
    cohort = Cohort(parts, page_tokens)
    requests, rows = [], []
    row = 0
    for chunk in parts:
        row += chunk.tokens
        if chunk.end == chunk.request.known:
            requests.append(chunk.request)
            rows.append(row - 1)
    assert cohort.sampled == requests
    assert cohort.sampled_rows.tolist() == rows


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_the_work_of_attention_is_what_its_causal_rows_read(
    data: st.DataObject, page_tokens: int
) -> None:
    parts = data.draw(chunks(page_tokens))
    cohort = Cohort(parts, page_tokens)
    decode = [chunk for chunk in parts if chunk.tokens == 1]
    prefill = [chunk for chunk in parts if chunk.tokens > 1]
    assert (cohort.load.rows, cohort.load.decode_rows) == (cohort.rows, len(decode))
    assert cohort.load.sampled == len(cohort.sampled)
    assert cohort.load.decode_kv_tokens == sum(chunk.start + 1 for chunk in decode)
    pairs = sum(at + 1 for chunk in prefill for at in range(chunk.start, chunk.end))
    # The half of a chunk's own triangle that lies on the diagonal is left out.
    missing = sum(-(-chunk.tokens // 2) for chunk in prefill)
    assert pairs - missing <= cohort.load.prefill_kv_pairs <= pairs


@given(data=st.data(), page_tokens=PAGE_TOKENS)
def test_index_arrays_have_the_types_that_the_kernel_takes(
    data: st.DataObject, page_tokens: int
) -> None:
    cohort = Cohort(data.draw(chunks(page_tokens)), page_tokens)
    arrays = (cohort.pages, cohort.offsets, cohort.tables)
    chunk_arrays = (cohort.first_row, cohort.n_rows, cohort.first_position)
    assert {array.dtype for array in (*arrays, *chunk_arrays)} == {np.dtype(np.int32)}
    assert all(array.flags.c_contiguous for array in (*arrays, *chunk_arrays))
