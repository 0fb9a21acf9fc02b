"""The allocator of device KV pages."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.gpuworker.kv.block_pool import BlockPool


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


def test_a_lost_or_shared_page_fails_the_integrity_check() -> None:
    pool = BlockPool(4, 16)
    held = pool.take(2)
    with pytest.raises(RuntimeError, match="leaked or shared"):
        pool.check_integrity([held[:1]])
    with pytest.raises(RuntimeError, match="leaked or shared"):
        pool.check_integrity([held, held[:1]])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_cover_the_tokens(tokens: int, pages: int) -> None:
    assert BlockPool(4, 16).pages_for(tokens) == pages
