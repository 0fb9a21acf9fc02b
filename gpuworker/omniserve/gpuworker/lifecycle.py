"""What happens to a request between arrival and end: queues, memory, moves, tokens.

Called by the engine's loop only. The policies say which moves to make; this carries them out and
keeps requests, pages, parked rows and the servers' sequences consistent.
"""

from __future__ import annotations

import enum
import logging
import pathlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np

from omniserve.attnkernel import STATUS_OK, WorkerLink
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.host_kv import HostKv
from omniserve.gpuworker.kv.device_blocks import DeviceBlocks
from omniserve.gpuworker.outbox import Outbox
from omniserve.gpuworker.parking import ParkingLot, Rows
from omniserve.gpuworker.placement import Moves, Placement
from omniserve.gpuworker.queues import ByArrival, FairQueue
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.gpuworker.telemetry import Counters
from omniserve.internal.v1 import attention_pb2
from omniserve.v1 import types_pb2

_log = logging.getLogger(__name__)
_arrival = attrgetter("arrival_ns")
# A BE request that leaves the device is mirrored, and one that returns is back, an iteration or two
# later, unless its server has stopped.
_LEAVING_NS = 250_000_000


class Path(enum.Enum):
    """How an output token came about, for the figures."""

    LS = enum.auto()
    DEVICE_RESIDENT = enum.auto()
    BOARDED = enum.auto()
    BE_ONLY = enum.auto()


class Lifecycle:
    """Owns all requests, the device pages, the parking lot and the servers' links."""

    def __init__(
        self,
        settings: WorkerSettings,
        device: Device,
        afterwards: Afterwards,
        outbox: Outbox,
        placement: Placement,
        clock_ns: Callable[[], int],
    ) -> None:
        config = device.config
        pages = settings.device_kv_tokens // settings.page_tokens
        self.counters = Counters()
        self.blocks = DeviceBlocks(
            pages,
            settings.page_tokens,
            settings.dtype,
            prefix_cache=settings.prefix_cache,
            exact_host=settings.kv_dtype == "auto",
        )
        self._clock_ns = clock_ns
        self.state = EngineState(pages, settings.page_tokens, config.layers + 1)
        self.parking = ParkingLot(settings.parked_rows, config.layers + 1, clock_ns)
        self.host = HostKv(
            device.transfers, afterwards, config.layers, settings.page_tokens, clock_ns
        )
        self._device = device
        self.servers = self.host.servers
        self.placement = placement
        self._eos = frozenset(config.eos_token_ids)
        self._outbox = outbox
        self._requests: dict[str, Request] = {}
        self._doomed: list[Request] = []
        self._move_chance = settings.fault_moves_per_pass
        self._random = random.Random(settings.fault_seed)

    # --- arrivals and ends ---------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """The front has checked it; an id that is in use is its error to report."""
        self._requests[request.request_id] = request
        queue = self.state.ls_waiting if request.latency_sensitive else self.state.be_waiting
        queue.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request as soon as none of its rows is on its way."""
        request = self._requests.get(request_id)
        if request is not None:
            self._doom(request)

    def accept(self, request: Request, token: int, path: Path, now_ns: int) -> None:
        """Takes the sampled `token`; ends the request if it is its last."""
        if request.generated == 0:
            request.first_token_ns = now_ns
        request.last_token_ns = now_ns
        request.tokens[request.known] = token
        request.known += 1
        self._count(path)
        self._outbox.token(request, token)

    def accept_parked(self, rows: Rows, tokens: Sequence[int], now_ns: int) -> None:
        """As `accept`, for rows of the parking lot, which then wait at stage 0 again."""
        requests = self.parking.requests_of(rows)
        beside_ls = 2 * self.parking.ls_stages[rows] > self.state.stages
        for request, token, boarded in zip(requests, tokens, beside_ls.tolist(), strict=True):
            self.accept(request, token, Path.BOARDED if boarded else Path.BE_ONLY, now_ns)
            self.blocks.hosted_to(request, request.computed + 1)
        self.parking.next_tokens(rows, tokens, [request.computed for request in requests])
        for request in requests:
            self._end_if_finished(request)

    def set_out(self, cohort: Cohort) -> None:
        """A cohort starts: its requests keep their pages until it has arrived."""
        for chunk in cohort.chunks:
            chunk.request.in_cohort = True

    def arrived(self, cohort: Cohort) -> None:
        """A cohort has run its last stage and its tokens were accepted."""
        for chunk in cohort.chunks:
            request = chunk.request
            self.blocks.computed_to(request, chunk.end)
            request.in_cohort = False
            if request.generated > 0 and request.known == chunk.end + 1:
                if request.place is Place.PREFILLING:
                    request.place = Place.DEVICE
                self._end_if_finished(request)

    def called_off(self, cohort: Cohort) -> None:
        """A cohort that rested between two stages goes no further: its rows will run again."""
        for chunk in cohort.chunks:
            chunk.request.in_cohort = False
        self.counters.recomputed_tokens += cohort.rows

    def _end_if_finished(self, request: Request) -> None:
        if not request.ignore_eos and int(request.tokens[request.known - 1]) in self._eos:
            self._end(request, types_pb2.FINISH_REASON_STOP)
        elif request.known == request.limit:
            self._end(request, types_pb2.FINISH_REASON_LENGTH)

    def _end(self, request: Request, reason: types_pb2.FinishReason, error: str = "") -> None:
        """Gives back all that `request` holds and says so to the front."""
        self._queue_of(request).remove(request)
        if not request.latency_sensitive and request.place is not Place.WAITING:
            self.state.be_waiting.settle(request)
        if request.place is Place.RESTORING:
            self.state.be_restoring.remove(request)
        if request.row >= 0:
            self.parking.remove(request)
        self.blocks.release(request)
        self.host.release(request)
        request.place = Place.ENDED
        if request.doomed:
            self._doomed.remove(request)
        del self._requests[request.request_id]
        self._outbox.ended(request, reason, error)

    def _queue_of(self, request: Request) -> deque[Request] | list[Request] | FairQueue | ByArrival:
        state = self.state
        if request.latency_sensitive:
            return state.ls_waiting if request.place is Place.WAITING else state.ls_running
        if request.place is Place.WAITING:
            return state.be_waiting
        device = request.place in (Place.PREFILLING, Place.DEVICE)
        return state.be_device if device else state.be_host

    def _doom(self, request: Request, error: str = "") -> None:
        if not request.doomed and request.place is not Place.ENDED:
            request.doomed, request.error = True, error
            self._doomed.append(request)

    def _reap(self) -> None:
        for request in list(self._doomed):
            away = request.row >= 0 and self.parking.is_away(request.row)
            if not request.in_cohort and not away and not request.imports:
                failed, cancelled = types_pb2.FINISH_REASON_ERROR, types_pb2.FINISH_REASON_CANCELLED
                self._end(request, failed if request.error else cancelled, request.error)

    # --- servers -------------------------------------------------------------------------

    def attach(self, index: int, segment: attention_pb2.AttachResponse) -> None:
        """Maps a server's segment.

        If the server lost its arena, requests that were parked there start over, and those on the
        device are mirrored anew.
        """
        server = self.host.server(index)
        if server is not None and server.link.segment_id == segment.segment_id:
            return
        try:
            link = WorkerLink(segment.segment_path)
        except RuntimeError as error:
            if server is None or pathlib.Path(segment.segment_path).exists():
                raise
            _log.warning("attention server %d: %s", index, error)
            return  # it has ended since, and will be attached when it is back
        lost = [r for r in self._requests.values() if r.server == index]
        lost.sort(key=_arrival, reverse=True)  # each goes back to the head of its queue
        for request in lost:
            parked = request.row >= 0
            if parked:
                self.parking.evict(request)
            self.host.forget(request)
            if parked:
                self._requeue(request)
                if self.state.pages_for(request.known + 1) > self.state.blocks_total:
                    self._doom(request)  # too long by now to start over here: ends as cancelled
        self.host.attach(index, link, segment.pages)
        self._device.serve([server.link for server in self.servers])
        for request in lost:
            if request.place is not Place.WAITING:
                request.leaving = False  # decodes on here until it is mirrored
                self.blocks.lost_by_server(request)
                if self.host.can_reserve(request):
                    self.host.reserve(request)

    def take_answers(self) -> None:
        """Takes what the servers have answered since; never blocks.

        A refused message ends its request and nothing else.
        """
        for server in self.host.servers:
            sequences, statuses = self.host.poll(server)
            rows = self.parking.answered(server.index, sequences)
            for at in np.flatnonzero(statuses != STATUS_OK):
                request = self.parking.requests[rows[at]]
                if request is not None:
                    self._doom(request, f"attention refused by its server: status {statuses[at]}")
        for request, status in self.host.refused:
            self._doom(request, f"KV transfer refused by its server: status {status}")
        self.host.refused.clear()
        self._reap()

    # --- moves ---------------------------------------------------------------------------

    def is_mirrored(self, request: Request) -> bool:
        """Whether giving up the device pages of `request` costs nothing."""
        if request.mirrored_sent < request.computed or not self.parking.has_room():
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
        if not self.host.is_silent(request):
            return False
        return not (
            request.imports if request.place is Place.RESTORING else self.is_mirrored(request)
        )

    def waits_at_start(self, request: Request) -> bool:
        here = request.place is Place.HOST and self.parking.at_start(request.row)
        return here and not self.host.is_silent(request)

    def can_reserve(self, request: Request) -> bool:
        return self.placement == "device" or self.host.can_reserve(request)

    def carry_out(self, moves: Moves) -> None:
        """Makes the moves of a placement decision, in its order.

        A demotion gives back less than was expected where pages are shared: then what would take
        them waits for the next decision, which knows better.
        """
        # Each goes back to the head of its queue.
        for request in sorted(moves.abandon, key=_arrival, reverse=True):
            self._requeue(request)
        for request in moves.leave:
            self._leave(request)
        for request in moves.demote:
            self._demote(request)
        for request in moves.admit_ls:
            if not self.blocks.fits(request.limit):
                return
            self.state.ls_waiting.remove(request)
            self._start(request, request.limit)
            self.state.ls_running.append(request)
        for request in moves.grow:
            # The same decision may have demoted it for a request that starts.
            if request.place is Place.DEVICE and self.blocks.free:
                self.blocks.grow(request)
        for request in moves.start_be:
            self._start_be(request)
        for request in moves.promote:
            if self._may_promote(request):
                self._promote(request)

    def move_at_random(self) -> None:
        """The test switch: forces demotions and promotions, seeded, and looks over all pools."""
        if self._move_chance == 0.0 or self.placement == "device":
            return
        self.check_integrity()
        for request in [*self.state.be_device, *self.state.be_host]:
            if self._random.random() >= self._move_chance:
                continue
            if request.place is Place.DEVICE and request.server >= 0:
                self._leave(request)
            elif self._may_promote(request):
                self._promote(request)

    def transfer(self) -> None:
        """Checkpoints what was computed, goes on with restores, ends those that are complete."""
        for request in self.state.be_device:
            if request.server >= 0:
                if request.mirrored < request.mirrored_sent:
                    self._look_at_mirror(request)
                tokens = self.host.checkpoint(request)
                self.blocks.sent_to(request, request.mirrored_sent + tokens)
                self.counters.checkpointed_tokens += tokens
        for request in list(self.state.be_restoring):
            self.host.restore(request)
            if request.restored == request.computed and request.transfers == 0:
                self.parking.remove(request)
                self.state.be_restoring.remove(request)
                self.state.be_host.remove(request)
                self.state.be_device.append(request)
                self.blocks.promoted(request)
                request.place = Place.DEVICE
        self.host.start_transfers()

    def _look_at_mirror(self, request: Request) -> None:
        # The arena may already have tokens beyond those of which this was asked.
        self.blocks.mirrored_to(request, min(self.host.mirrored(request), request.mirrored_sent))

    def _may_promote(self, request: Request) -> bool:
        return self.waits_at_start(request) and self.blocks.fits(request.known + 1)

    def _start(self, request: Request, tokens: int) -> None:
        """`request` begins on the device, in pages for `tokens` tokens."""
        self.blocks.start(request, tokens)
        request.place = Place.PREFILLING
        self.counters.prefix_cache_query_tokens += request.known
        self.counters.prefix_cache_hit_tokens += request.computed
        if request.dropped == 0:
            request.cached_tokens = min(request.computed, request.prompt_tokens)
        self.counters.recomputed_tokens += max(0, request.dropped - request.computed)

    def _start_be(self, request: Request) -> None:
        reserve = self.placement != "device"
        tokens = request.known + 1 if reserve else request.limit
        if not self.blocks.fits(tokens):
            return
        if reserve:
            self.host.reserve(request)
        self.state.be_waiting.start(request)
        self._start(request, tokens)
        self.state.be_device.append(request)

    def _leave(self, request: Request) -> None:
        if not request.leaving:
            request.leaving, request.left_ns = True, self._clock_ns()

    def _demote(self, request: Request) -> None:
        self.state.be_device.remove(request)
        self.blocks.demote(request)
        request.place = Place.HOST
        request.leaving = False
        self.parking.park(request)
        self.state.be_host.append(request)
        self.counters.demotions += 1

    def _promote(self, request: Request) -> None:
        self.parking.hold(request.row)
        self.blocks.promote(request)
        request.place = Place.RESTORING
        request.left_ns = self._clock_ns()
        self.state.be_restoring.append(request)
        self.counters.promotions += 1

    def _requeue(self, request: Request) -> None:
        """Back to the head of the queue; what it does not find cached is computed again."""
        self._queue_of(request).remove(request)
        if request.place is Place.RESTORING:
            self.state.be_restoring.remove(request)
        if request.row >= 0:
            self.parking.remove(request)
        request.dropped = request.computed
        self.blocks.release(request)
        self.host.release(request)
        request.computed = 0
        request.leaving = False
        request.place = Place.WAITING
        self.state.be_waiting.appendleft(request)

    # --- bookkeeping ---------------------------------------------------------------------

    def is_empty(self) -> bool:
        return not self._requests and not self.host.busy()

    def check_integrity(self) -> None:
        """Raises RuntimeError if a page, row, sequence or slot leaked."""
        requests = list(self._requests.values())
        self.blocks.check_integrity(requests)
        self.parking.check_integrity()
        self.host.check_integrity(requests)

    def _count(self, path: Path) -> None:
        if path is Path.LS:
            self.counters.ls_output_tokens += 1
        elif path is Path.DEVICE_RESIDENT:
            self.counters.device_resident_tokens += 1
        elif path is Path.BOARDED:
            self.counters.boarded_tokens += 1
        else:
            self.counters.be_only_tokens += 1
