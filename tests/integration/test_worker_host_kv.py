"""KV on its way between the device and a real attention server, and what a request holds there."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.attention_process import GEOMETRY, PAGES, ServerProcess
from support.stack import wait_for

from omniserve.attnkernel import PagedKv, WorkerLink
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.cpu import CpuTransfers
from omniserve.gpuworker.host_kv import HostKv
from omniserve.gpuworker.kv.block_states import BlockState
from omniserve.gpuworker.kv.device_blocks import DeviceBlocks
from omniserve.gpuworker.requests import Place, Request

pytest_plugins = ["support.attention_fixtures"]

DEVICE_PAGES = 16
TOKENS = 100
"""More than the transfer slots take at once; the last page is filled in part."""


class Device:
    """Device KV, its blocks, and the server that they are mirrored at."""

    def __init__(self, server: ServerProcess) -> None:
        g = GEOMETRY
        self.now_ns = 0
        self.kv = PagedKv(g.layers, g.kv_heads, g.head_dim, g.page_tokens, DEVICE_PAGES, g.dtype)
        self.blocks = DeviceBlocks(
            DEVICE_PAGES, g.page_tokens, g.dtype, prefix_cache=True, exact_host=True
        )
        self.host = HostKv(
            CpuTransfers(self.kv), Afterwards(), g.layers, g.page_tokens, lambda: self.now_ns
        )
        self.host.attach(0, WorkerLink(server.attach().segment_path), PAGES)
        self.requests: list[Request] = []

    def request(self, tokens: int = TOKENS, first: int = 0) -> Request:
        ids = np.arange(first, first + tokens + 4, dtype=np.int64)
        made = Request("r", False, ids, tokens + 1, 0, known=tokens + 1)
        self.requests.append(made)
        return made

    def compute(self, request: Request) -> None:
        """As a prefill would: random KV of all but its last token, in pages of its own."""
        self.blocks.start(request, request.known + 1)
        request.place = Place.DEVICE
        rng = np.random.default_rng(int(request.tokens[0]))
        positions = np.arange(request.computed, request.known - 1)
        pages = np.asarray(request.blocks, np.int32)[positions // GEOMETRY.page_tokens]
        offsets = (positions % GEOMETRY.page_tokens).astype(np.int32)
        size = (len(positions), GEOMETRY.kv_heads * GEOMETRY.head_dim)
        for layer in range(GEOMETRY.layers):
            k, v = (rng.standard_normal(size, np.float32) for _ in "kv")
            self.kv.append(layer, k, v, pages, offsets)
        self.blocks.computed_to(request, request.known - 1)

    def read(self, request: Request) -> np.ndarray:  # type: ignore[type-arg]
        """[layers, tokens, k and v, kv_heads * head_dim]"""
        size = GEOMETRY.page_tokens
        places = [(request.blocks[p // size], p % size) for p in range(request.computed)]
        return np.array(
            [[self.kv.read(la, *place) for place in places] for la in range(GEOMETRY.layers)]
        )

    def checkpoint(self, request: Request) -> None:
        sent = self.host.checkpoint(request)
        self.blocks.sent_to(request, request.mirrored_sent + sent)

    def until(self, what: str, holds: Callable[[], bool], each: Callable[[], None]) -> None:
        def probe() -> bool:
            each()
            for server in self.host.servers:
                self.host.poll(server)
            self.check_integrity()
            return holds()

        wait_for(what, probe)

    def mirror(self, request: Request) -> None:
        self.until(
            "mirrored",
            lambda: self.host.mirrored(request) == request.computed,
            lambda: self.checkpoint(request),
        )
        self.blocks.mirrored_to(request, request.computed)

    def end(self, request: Request) -> None:
        self.blocks.release(request)
        self.host.release(request)
        self.requests.remove(request)

    def check_integrity(self) -> None:
        self.blocks.check_integrity(self.requests)
        self.host.check_integrity(self.requests)


@pytest.fixture
def device(server: ServerProcess) -> Iterator[Device]:
    """Afterwards nothing may be held."""
    device = Device(server)
    yield device
    for request in list(device.requests):
        device.end(request)
    device.until("everything given back", lambda: not device.host.busy(), lambda: None)
    assert device.blocks.free == DEVICE_PAGES
    assert server.stats().pages_free == PAGES


@pytest.mark.parametrize("evicted", [False, True], ids=["found in the cache", "evicted"])
def test_kv_that_was_demoted_comes_back_bit_by_bit(device: Device, evicted: bool) -> None:
    request = device.request()
    device.host.reserve(request)
    device.compute(request)
    computed = device.read(request)
    device.mirror(request)
    assert list(request.states) == [BlockState.MIRRORED] * 6 + [BlockState.FILLING]
    device.blocks.demote(request)
    request.place = Place.HOST
    assert list(request.states) == [BlockState.HOST_ONLY] * 7
    other = device.request(DEVICE_PAGES * GEOMETRY.page_tokens - 10 if evicted else 20, first=999)
    device.compute(other)  # writes over what was given up
    device.blocks.release(other)
    device.requests.remove(other)

    device.blocks.promote(request)
    request.place = Place.RESTORING
    assert request.restored == (0 if evicted else 96)
    device.until(
        "restored",
        lambda: request.restored == request.computed and request.transfers == 0,
        lambda: device.host.restore(request),
    )
    device.blocks.promoted(request)
    request.place = Place.DEVICE
    np.testing.assert_array_equal(device.read(request), computed)


def test_found_kv_is_sent_to_the_server_of_the_request_that_found_it(device: Device) -> None:
    first, second = device.request(), device.request()
    for request in (first, second):
        device.host.reserve(request)
        device.compute(request)
    assert second.blocks[:6] == first.blocks[:6]
    device.mirror(first)
    assert set(second.states) == {BlockState.RESIDENT, BlockState.FILLING}
    device.mirror(second)
    device.blocks.demote(second)
    second.place = Place.HOST
    assert list(first.states)[:6] == [BlockState.MIRRORED] * 6
    device.check_integrity()


def test_a_request_that_went_back_to_its_queue_starts_anew_before_its_last_transfers_end(
    device: Device, server: ServerProcess
) -> None:
    request = device.request()
    device.host.reserve(request)
    device.compute(request)
    server.signal(signal.SIGSTOP)
    device.checkpoint(request)
    first = request.sequence
    assert request.transfers > 0
    device.blocks.release(request)
    device.host.release(request)
    request.place, request.computed = Place.WAITING, 0
    assert (request.server, request.transfers) == (-1, 0)
    assert device.host.busy(), "the old sequence has its transfers still"
    assert device.host.can_reserve(request)
    device.host.reserve(request)
    assert request.sequence != first
    device.compute(request)
    device.check_integrity()
    server.signal(signal.SIGCONT)
    device.mirror(request)
    device.until("the old sequence's end", lambda: not device.host.busy(), lambda: None)


def test_a_server_that_stopped_gets_no_new_requests_until_it_answers(
    device: Device, server: ServerProcess
) -> None:
    request = device.request()
    device.host.reserve(request)
    device.compute(request)
    another = Request("another", False, np.zeros(20, np.int64), 10, 0, known=10)
    server.signal(signal.SIGSTOP)
    device.checkpoint(request)
    device.host.poll(device.host.servers[0])
    assert device.host.can_reserve(another)
    device.now_ns = 6_000_000_000
    device.host.poll(device.host.servers[0])
    assert not device.host.can_reserve(another)
    assert device.host.is_silent(request)
    server.signal(signal.SIGCONT)
    device.mirror(request)  # which the server may have done before it stopped
    device.until("heard of", lambda: device.host.can_reserve(another), lambda: None)
