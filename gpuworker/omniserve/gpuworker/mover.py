"""Moves requests between their queue, the device and the servers' arenas.

The policies say which moves to make (`placement.decide`); this carries them out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from operator import attrgetter

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.host_kv import HostKv
from omniserve.gpuworker.kv.device_blocks import DeviceBlocks
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.placement import Moves, Placement
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.telemetry import Counters

_arrival = attrgetter("arrival_ns")
# A BE request that leaves the device is mirrored, and one that returns is back, an iteration or two
# later, unless its server has stopped.
_LEAVING_NS = 250_000_000


class Mover:
    """Called by the engine's loop only. It is the policies' `HostView`."""

    def __init__(
        self,
        placement: Placement,
        state: EngineState,
        blocks: DeviceBlocks,
        parking: ParkingLot,
        host: HostKv,
        counters: Counters,
        clock_ns: Callable[[], int],
        seed: int,
    ) -> None:
        self._placement = placement
        self._state = state
        self._blocks = blocks
        self._parking = parking
        self._host = host
        self._counters = counters
        self._clock_ns = clock_ns
        self._random = random.Random(seed)

    def is_mirrored(self, request: Request) -> bool:
        """Whether giving up the device pages of `request` costs nothing."""
        if request.mirrored_sent < request.computed or not self._parking.has_room():
            return False
        self._look_at_mirror(request)
        return request.mirrored >= request.computed

    def is_overdue(self, request: Request) -> bool:
        if self._clock_ns() - request.left_ns <= _LEAVING_NS:
            return False
        if request.place is Place.RESTORING:
            return not request.imports
        return request.leaving and not self.is_mirrored(request)

    def is_stranded(self, request: Request) -> bool:
        if not self._host.is_silent(request):
            return False
        return not (
            request.imports if request.place is Place.RESTORING else self.is_mirrored(request)
        )

    def waits_at_start(self, request: Request) -> bool:
        here = request.place is Place.HOST and self._parking.at_start(request.row)
        return here and not self._host.is_silent(request)

    def can_reserve(self, request: Request) -> bool:
        return self._placement == "device" or self._host.can_reserve(request)

    def carry_out(self, moves: Moves) -> None:
        """Makes the moves of a placement decision, in its order.

        A demotion gives back less than was expected where pages are shared: then what would take
        them waits for the next decision, which knows better.
        """
        # Each goes back to the head of its queue.
        for request in sorted(moves.abandon, key=_arrival, reverse=True):
            self.requeue(request)
        for request in moves.leave:
            self._leave(request)
        for request in moves.demote:
            self._demote(request)
        for request in moves.admit_ls:
            if not self._blocks.fits(request.limit):
                return
            self._state.ls_waiting.remove(request)
            self._start(request, request.limit)
            self._state.ls_running.append(request)
        for request in moves.grow:
            # The same decision may have demoted it for a request that starts.
            if request.place is Place.DEVICE and self._blocks.free:
                self._blocks.grow(request)
        for request in moves.start_be:
            self._start_be(request)
        for request in moves.promote:
            if self._may_promote(request):
                self._promote(request)

    def move_at_random(self, chance: float) -> None:
        """The test switch: demotes and promotes each request with `chance`, seeded."""
        if self._placement == "device":
            return
        for request in [*self._state.be_device, *self._state.be_host]:
            if self._random.random() >= chance:
                continue
            if request.place is Place.DEVICE and request.server >= 0:
                self._leave(request)
            elif self._may_promote(request):
                self._promote(request)

    def transfer(self) -> None:
        """Checkpoints what was computed, goes on with restores, ends those that are complete."""
        for request in self._state.be_device:
            if request.server >= 0:
                if request.mirrored < request.mirrored_sent:
                    self._look_at_mirror(request)
                tokens = self._host.checkpoint(request)
                self._blocks.sent_to(request, request.mirrored_sent + tokens)
                self._counters.checkpointed_tokens += tokens
        for request in list(self._state.be_restoring):
            self._host.restore(request)
            if request.restored == request.computed and request.transfers == 0:
                self._parking.remove(request)
                self._state.be_restoring.remove(request)
                self._state.be_host.remove(request)
                self._state.be_device.append(request)
                self._blocks.promoted(request)
                request.place = Place.DEVICE
        self._host.start_transfers()

    def requeue(self, request: Request) -> None:
        """Back to the head of the queue; what it does not find cached is computed again."""
        self._state.queue_of(request).remove(request)
        if request.place is Place.RESTORING:
            self._state.be_restoring.remove(request)
        if request.row >= 0:
            self._parking.remove(request)
        request.dropped = request.computed
        self._blocks.release(request)
        self._host.release(request)
        request.computed = 0
        request.leaving = False
        request.place = Place.WAITING
        self._state.be_waiting.appendleft(request)

    def _look_at_mirror(self, request: Request) -> None:
        # The arena may already have tokens beyond those of which this was asked.
        self._blocks.mirrored_to(request, min(self._host.mirrored(request), request.mirrored_sent))

    def _may_promote(self, request: Request) -> bool:
        return self.waits_at_start(request) and self._blocks.fits(request.known + 1)

    def _start(self, request: Request, tokens: int) -> None:
        """`request` begins on the device, in pages for `tokens` tokens."""
        self._blocks.start(request, tokens)
        request.place = Place.PREFILLING
        self._counters.prefix_cache_query_tokens += request.known
        self._counters.prefix_cache_hit_tokens += request.computed
        if request.dropped == 0:
            request.cached_tokens = min(request.computed, request.prompt_tokens)
        self._counters.recomputed_tokens += max(0, request.dropped - request.computed)

    def _start_be(self, request: Request) -> None:
        reserve = self._placement != "device"
        tokens = request.known + 1 if reserve else request.limit
        if not self._blocks.fits(tokens):
            return
        if reserve:
            self._host.reserve(request)
        self._state.be_waiting.start(request)
        self._start(request, tokens)
        self._state.be_device.append(request)

    def _leave(self, request: Request) -> None:
        if not request.leaving:
            request.leaving, request.left_ns = True, self._clock_ns()

    def _demote(self, request: Request) -> None:
        self._state.be_device.remove(request)
        self._blocks.demote(request)
        request.place = Place.HOST
        request.leaving = False
        self._parking.park(request)
        self._state.be_host.append(request)
        self._counters.demotions += 1

    def _promote(self, request: Request) -> None:
        self._parking.hold(request.row)
        self._blocks.promote(request)
        request.place = Place.RESTORING
        request.left_ns = self._clock_ns()
        self._state.be_restoring.append(request)
        self._counters.promotions += 1
