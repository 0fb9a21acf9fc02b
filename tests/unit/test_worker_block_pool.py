"""The allocator of device KV pages, shared ones and kept ones among them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.gpuworker.kv.block_pool import BlockPool
from omniserve.gpuworker.kv.page_runs import PageRuns


@given(
    total=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 8)),
    random=st.randoms(use_true_random=False),
)
def test_no_page_is_handed_out_twice_and_none_is_lost(
    total: int, sizes: list[int], random: Random
) -> None:
    pool = BlockPool(total, 16)
    held: list[list[int]] = []
    for size in sizes:
        if size <= pool.free:
            held.append(pool.take(size))
        elif held:
            pool.give_back(held.pop(random.randrange(len(held))))
        pool.check_integrity(held)
        assert pool.free == total - sum(map(len, held))
    for pages in held:
        pool.give_back(pages)
    assert pool.free == total


@given(
    total=st.integers(4, 24),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60),
    random=st.randoms(use_true_random=False),
)
def test_sharing_and_eviction_never_touch_a_page_that_is_held(
    total: int, steps: list[tuple[int, int]], random: Random
) -> None:
    """Against a dictionary of what each page was last written with."""
    pool = BlockPool(total, 16)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for kind, number in steps:
        name = bytes([number])
        if kind == 0 and pool.free:
            (page,) = pool.take(1)
            held.append([page])
            content[page] = name
            pool.name(page, name)
        elif kind == 1:
            found = pool.share(name)
            if found is not None:
                assert content[found] == name
                held.append([found])
        elif held:
            pool.give_back(held.pop(random.randrange(len(held))))
        pool.check_integrity(held)
        assert pool.free == total - len({page for pages in held for page in pages})


def test_a_page_that_was_given_back_is_found_until_pages_are_short() -> None:
    pool = BlockPool(4, 16)
    pages = pool.take(3)
    first, second, third = pages
    for page, name in zip(pages, (b"1", b"2", b"3"), strict=True):
        pool.name(page, name)
    pool.give_back(pages)
    assert pool.free == 4
    assert pool.share(b"1") == first
    pool.take(1)  # the page that was never used
    assert pool.share(b"2") == second
    pool.take(1)
    assert pool.share(b"3") is None, "it was evicted"
    assert pool.free == 0
    assert third not in (first, second)


@pytest.mark.parametrize(
    ("short_of", "left"), [(0, "o1 o2 n1 n2"), (1, "o1 n1 n2"), (2, "n1 n2"), (3, "n1"), (4, "")]
)
def test_the_oldest_prefix_is_evicted_first_and_from_its_end(short_of: int, left: str) -> None:
    pool = BlockPool(4, 16)
    names = [b"o1", b"o2", b"n1", b"n2"]
    old, new = pool.take(2), pool.take(2)
    for page, name in zip([*old, *new], names, strict=True):
        pool.name(page, name)
    pool.give_back(old)
    pool.give_back(new)
    pool.take(short_of)
    found = [name for name in names if pool.share(name) is not None]
    assert b" ".join(found).decode() == left


def test_a_second_page_with_the_same_kv_stays_unnamed() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.take(1), pool.take(1)
    pool.name(first[0], b"same")
    pool.name(second[0], b"same")
    assert pool.share(b"same") == first[0]
    pool.give_back(second)
    pool.check_integrity([first, [first[0]]])


def test_a_lost_or_shared_page_fails_the_integrity_check() -> None:
    pool = BlockPool(4, 16)
    held = pool.take(2)
    with pytest.raises(RuntimeError, match="leaked or shared"):
        pool.check_integrity([held[:1]])
    with pytest.raises(RuntimeError, match="leaked or shared"):
        pool.check_integrity([held, held[:1]])


@given(
    total=st.integers(1, 60),
    wanted=st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=20),
    random=st.randoms(use_true_random=False),
)
def test_runs_are_the_free_pages(
    total: int, wanted: list[tuple[int, bool]], random: Random
) -> None:
    """Against a set."""
    runs, free = PageRuns(total), set(range(total))
    for pages, back in wanted:
        taken = sorted(set(range(total)) - free)
        if back and taken:
            page = random.choice(taken)
            runs.add(page)
            free.add(page)
        elif pages <= runs.count:
            got = runs.take(pages, random.choice([*taken, -1]))
            assert len(set(got)) == pages
            assert set(got) <= free
            free -= set(got)
        assert runs.pages() == sorted(free)
        assert runs.count == len(free)


def test_pages_come_in_one_run_where_there_is_one() -> None:
    runs = PageRuns(20)
    runs.take(20)
    for page in (2, 3, 4, 8, 9, 12, 13, 14, 15, 16):
        runs.add(page)
    assert runs.take(1, after=7) == [8], "the one behind the caller's last"
    assert runs.take(3, after=0) == [2, 3, 4], "the shortest run that suffices"
    assert runs.take(6) == [12, 13, 14, 15, 16, 9], "else the longest first"


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_cover_the_tokens(tokens: int, pages: int) -> None:
    assert BlockPool(4, 16).pages_for(tokens) == pages
