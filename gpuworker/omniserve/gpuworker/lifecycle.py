"""What happens to a request between arrival and end: its tokens, its servers, what it holds.

Called by the engine's loop only; keeps requests, pages, parked rows and the servers' sequences
consistent. `Mover` moves requests between queue, device and servers in the meantime.
"""

from __future__ import annotations

import enum
import logging
import pathlib
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
from omniserve.gpuworker.mover import Mover
from omniserve.gpuworker.outbox import Outbox
from omniserve.gpuworker.parking import ParkingLot, Rows
from omniserve.gpuworker.placement import Placement
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.gpuworker.telemetry import Counters
from omniserve.internal.v1 import attention_pb2
from omniserve.v1 import types_pb2

_log = logging.getLogger(__name__)
_arrival = attrgetter("arrival_ns")


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
        self.state = EngineState(pages, settings.page_tokens, config.layers + 1)
        self.parking = ParkingLot(settings.parked_rows, config.layers + 1, clock_ns)
        self.host = HostKv(
            device.transfers, afterwards, config.layers, settings.page_tokens, clock_ns
        )
        self._device = device
        self.servers = self.host.servers
        self.mover = Mover(
            placement,
            self.state,
            self.blocks,
            self.parking,
            self.host,
            self.counters,
            clock_ns,
            settings.fault_seed,
        )
        self._eos = frozenset(config.eos_token_ids)
        self._outbox = outbox
        self._requests: dict[str, Request] = {}
        self._doomed: list[Request] = []

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
        self.state.queue_of(request).remove(request)
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
                self.mover.requeue(request)
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
