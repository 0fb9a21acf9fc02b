"""Requests that share device KV, against a memory in which every token's KV can be told apart."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.gpuworker.kv.block_states import BlockState, BlockStateError
from omniserve.gpuworker.kv.device_blocks import DeviceBlocks
from omniserve.gpuworker.requests import Place, Request

PAGE = 4
PAGES = 12


class Kv(NamedTuple):
    """KV of the last of `tokens`; inexact if an arena of lower precision had a part in it."""

    tenant: str
    tokens: tuple[int, ...]
    exact: bool


def make(tokens: list[int], tenant: str = "", max_tokens: int = 8) -> Request:
    known = np.zeros(len(tokens) + max_tokens, np.int64)
    known[: len(tokens)] = tokens
    return Request("r", False, known, len(tokens), 0, tenant, known=len(tokens))


def blocks_of(*, prefix_cache: bool = True, exact_host: bool = True) -> DeviceBlocks:
    return DeviceBlocks(PAGES, PAGE, "float32", prefix_cache=prefix_cache, exact_host=exact_host)


class Traffic:
    """Carries out what an engine would, and keeps the KV itself: on the device and in an arena."""

    def __init__(self, random: Random, *, prefix_cache: bool, exact_host: bool) -> None:
        self.random = random
        self.blocks = blocks_of(prefix_cache=prefix_cache, exact_host=exact_host)
        self.exact_host = exact_host
        self.device: dict[tuple[int, int], Kv] = {}
        self.arena: dict[tuple[int, int], Kv] = {}
        self.requests: list[Request] = []
        self.hits = 0

    def step(self) -> None:
        waiting = len(self.requests) < 4 and self.random.random() < 0.3
        if waiting or not self.requests:
            self.start()
        else:
            request = self.random.choice(self.requests)
            actions = {
                Place.DEVICE: [self.compute, self.compute, self.send, self.mirror, self.demote],
                Place.HOST: [self.decode_on_host, self.promote],
                Place.RESTORING: [self.restore],
            }
            self.random.choice([*3 * actions[request.place], self.end])(request)
        self.check()

    def start(self) -> None:
        tokens = [self.random.randrange(2) for _ in range(self.random.randrange(1, 20))]
        request = make(tokens, self.random.choice(["a", "a", "b"]))
        if self.blocks.fits(request.known + 1):
            self.blocks.start(request, request.known + 1)
            request.place = Place.DEVICE
            assert request.computed < request.known
            self.hits += request.computed
            self.requests.append(request)

    def compute(self, request: Request) -> None:
        """A chunk of the prompt or a token, written into pages that are its own."""
        if request.computed == request.known:
            if request.known == request.limit:
                self.end(request)
                return
            request.tokens[request.known] = self.random.randrange(2)
            request.known += 1
        if request.known > len(request.blocks) * PAGE:
            if not self.blocks.free:
                return
            self.blocks.grow(request)
        end = self.random.randrange(request.computed, request.known) + 1
        for position in range(request.computed, end):
            page = request.blocks[position // PAGE]
            assert request.states[position // PAGE] is BlockState.FILLING
            holders = [r for r in self.requests if page in r.blocks]
            assert holders == [request], "a shared page is written"
            exact = all(self.at(request, i).exact for i in range(position))
            self.device[page, position % PAGE] = self.kv(request, position, exact)
        self.blocks.computed_to(request, end)

    def send(self, request: Request) -> None:
        some = self.random.randint(request.mirrored_sent, request.computed)
        self.blocks.sent_to(request, self.random.choice([some, request.computed]))

    def mirror(self, request: Request) -> None:
        some = self.random.randint(request.mirrored, request.mirrored_sent)
        written = self.random.choice([some, request.mirrored_sent])
        for position in range(request.mirrored, written):
            kv = self.at(request, position)
            exact = kv.exact and self.exact_host
            self.arena[id(request), position] = kv._replace(exact=exact)
        self.blocks.mirrored_to(request, written)

    def demote(self, request: Request) -> None:
        if request.mirrored == request.computed == request.known - 1:
            self.blocks.demote(request)
            request.place = Place.HOST

    def decode_on_host(self, request: Request) -> None:
        position = request.computed
        if request.known < request.limit:
            request.tokens[request.known] = self.random.randrange(2)
            request.known += 1
            self.arena[id(request), position] = self.kv(request, position, self.exact_host)
            self.blocks.hosted_to(request, position + 1)

    def promote(self, request: Request) -> None:
        if self.blocks.fits(request.known + 1):
            self.blocks.promote(request)
            request.place = Place.RESTORING

    def restore(self, request: Request) -> None:
        for position in range(request.restored, request.computed):
            place = request.blocks[position // PAGE], position % PAGE
            self.device[place] = self.arena[id(request), position]
        self.blocks.promoted(request)
        request.place = Place.DEVICE

    def end(self, request: Request) -> None:
        self.requests.remove(request)
        self.blocks.release(request)

    def kv(self, request: Request, position: int, exact: bool) -> Kv:
        return Kv(request.tenant, tuple(request.tokens[: position + 1].tolist()), exact)

    def at(self, request: Request, position: int) -> Kv:
        return self.device[request.blocks[position // PAGE], position % PAGE]

    def check(self) -> None:
        self.blocks.check_integrity(self.requests)
        for request in self.requests:
            if request.place is Place.DEVICE:
                for position in range(request.computed):
                    kv = self.at(request, position)
                    assert kv == self.kv(request, position, kv.exact)
                    assert kv.exact or not request.exact, "inexact KV would enter the cache"
        held = sum(len(request.blocks) for request in self.requests)
        assert PAGES - held <= self.blocks.free <= PAGES


@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_every_request_reads_its_own_kv_whatever_is_shared_moved_and_evicted(
    seed: int, prefix_cache: bool, exact_host: bool
) -> None:
    traffic = Traffic(Random(seed), prefix_cache=prefix_cache, exact_host=exact_host)
    for _ in range(120):
        traffic.step()
    assert prefix_cache or traffic.hits == 0
    for request in list(traffic.requests):
        traffic.end(request)
    assert traffic.blocks.free == PAGES
    traffic.check()


def run(blocks: DeviceBlocks, request: Request) -> int:
    """Computes all known tokens and ends; returns how many were found."""
    blocks.start(request, request.limit)
    found = request.computed
    blocks.computed_to(request, request.known)
    blocks.release(request)
    return found


def test_the_same_prompt_again_leaves_one_token_to_compute() -> None:
    blocks = blocks_of()
    assert run(blocks, make([1] * 2 * PAGE)) == 0
    assert run(blocks, make([1] * 2 * PAGE)) == PAGE, "its last block has the token that is sampled"
    assert run(blocks, make([1] * 2 * PAGE + [0])) == 2 * PAGE


def test_tenants_and_kv_types_do_not_share() -> None:
    blocks = blocks_of()
    run(blocks, make([1] * 9, "a"))
    assert run(blocks, make([1] * 9, "b")) == 0
    assert run(blocks, make([1] * 9, "a")) == 8
    first, second = make([1] * 9), make([1] * 9)
    run(blocks, first)
    run(DeviceBlocks(PAGES, PAGE, "bfloat16", prefix_cache=True, exact_host=True), second)
    assert not set(first.digests) & set(second.digests)


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    blocks = blocks_of()
    run(blocks, make([1] * 4 + [2] * 4 + [3]))
    assert run(blocks, make([0] * 4 + [2] * 4 + [3])) == 0
    assert run(blocks, make([1] * 4 + [2] * 3 + [3] * 2)) == 4


def parked(blocks: DeviceBlocks, tokens: list[int]) -> Request:
    """A request that was computed on the device, mirrored and demoted."""
    request = make([*tokens, 0])
    blocks.start(request, request.known + 1)
    blocks.computed_to(request, len(tokens))
    blocks.sent_to(request, len(tokens))
    blocks.mirrored_to(request, len(tokens))
    blocks.demote(request)
    request.place = Place.HOST
    return request


def test_a_promotion_finds_what_the_cache_still_has_and_asks_for_the_rest() -> None:
    blocks = blocks_of()
    request = parked(blocks, [1] * 10)
    blocks.promote(request)
    assert request.restored == 8
    assert [s.name for s in request.states] == ["MIRRORED", "MIRRORED", "FILLING"]


def test_kv_from_an_arena_of_lower_precision_is_never_shared() -> None:
    blocks = blocks_of(exact_host=False)
    request = parked(blocks, [1] * 8)
    other = make([0] * 4 * (PAGES - 1))
    blocks.start(other, 4 * (PAGES - 1))  # evicts the end of what the demotion left in the cache
    blocks.release(other)
    blocks.promote(request)
    assert request.restored == 4
    blocks.promoted(request)
    blocks.computed_to(request, 12)
    assert run(blocks, make([1] * 8 + [0] * 5)) == 4


def test_giving_up_pages_that_no_arena_has_is_an_error() -> None:
    blocks = blocks_of()
    request = make([1] * 9)
    blocks.start(request, 10)
    blocks.computed_to(request, 8)
    with pytest.raises(BlockStateError, match="block 0 cannot go from RESIDENT to HOST_ONLY"):
        blocks.demote(request)
    blocks.computed_to(request, 9)
    blocks.sent_to(request, 8)
    blocks.mirrored_to(request, 8)
    with pytest.raises(BlockStateError, match="block 2 cannot go from FILLING to HOST_ONLY"):
        blocks.demote(request)
    assert len(request.blocks) == 3


def test_a_block_in_a_wrong_state_fails_the_integrity_check() -> None:
    blocks = blocks_of()
    request = make([1] * 9)
    blocks.start(request, 10)
    blocks.check_integrity([request])
    request.computed = 8
    with pytest.raises(RuntimeError, match="blocks are FILLING FILLING FILLING"):
        blocks.check_integrity([request])
