"""Who gets device memory: admission of waiting requests, demotion, promotion, growth.

`decide` is pure and returns moves for the engine to carry out before the pass. LS takes the
pages of prompt + max_tokens when it starts, so a running LS request never runs out; BE takes
what it needs now, and gives its pages back at once when they are mirrored in an arena.

Victims are the newest BE requests by arrival, and no more than it takes; who returns is the
oldest. One order for both, so that nobody who came back is the next to go.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.requests import Place, Request

# Only so many of the oldest are asked whether they could return: a decision must stay short.
_RETURNING = 8
Placement = Literal["auto", "device", "host"]


@dataclass(frozen=True)
class Rules:
    """In what the policies differ."""

    placement: Placement = "auto"
    be_share: float | None = None
    """Part of the device KV that BE may hold; None leaves it to the limits."""
    starts_be: bool = True
    recomputes: bool = False
    """LS takes the pages of BE requests that are mirrored nowhere: they start over."""
    resumes_first: bool = False
    """Parked requests return to the device before new ones start, and into all of BE's share."""


@dataclass
class Moves:
    """In this order: what gives memory back, then what takes it."""

    abandon: list[Request] = field(default_factory=list)
    """BE requests whose KV is dropped and recomputed later."""
    leave: list[Request] = field(default_factory=list)
    """BE decodes that stop on the device, to be demoted once they are mirrored."""
    demote: list[Request] = field(default_factory=list)
    admit_ls: list[Request] = field(default_factory=list)
    grow: list[Request] = field(default_factory=list)
    """BE decodes that take one more page."""
    start_be: list[Request] = field(default_factory=list)
    promote: list[Request] = field(default_factory=list)


class HostView(Protocol):
    """What a decision needs to know of the servers and the parking lot."""

    def is_mirrored(self, request: Request) -> bool:
        """Whether an arena has every computed token, so that the device pages can go at once."""

    def is_overdue(self, request: Request) -> bool:
        """Whether a request that leaves, or comes back, has waited for its server for so long that
        LS may not."""

    def is_stranded(self, request: Request) -> bool:
        """Whether its server has stopped, and so will not mirror, or bring back, what it lacks."""

    def waits_at_start(self, request: Request) -> bool:
        """Whether a parked request is ready at stage 0, where alone it can be held."""

    def can_reserve(self, request: Request) -> bool:
        """Whether a server has room for all of a waiting request."""


def decide(state: EngineState, host: HostView, rules: Rules) -> Moves:
    """Returns the moves of this iteration."""
    return _Decision(state, host, rules).moves()


class _Decision:
    """One decision: the moves so far, and the memory that they leave."""

    def __init__(self, state: EngineState, host: HostView, rules: Rules) -> None:
        self._state = state
        self._host = host
        self._rules = rules
        self._moves = Moves()
        self._free = state.blocks_free
        self._held = state.be_blocks
        share = state.limits.be_device_kv_share if rules.be_share is None else rules.be_share
        self._held_max = int(state.blocks_total * share)
        on_device = Place.DEVICE
        self._residents = [r for r in state.be_device if r.place is on_device]
        """Oldest first."""
        self._prefilling = len(self._residents) < len(state.be_device)

    def moves(self) -> Moves:
        self._rescue()
        if self._moves.abandon:
            return self._moves  # the next decision comes at once, and has their memory
        self._leave()
        if self._admit_ls():
            self._grow()
            if self._rules.resumes_first:
                self._promote(self._held_max)
            if self._rules.starts_be:
                self._start_be()
            if not self._rules.resumes_first and not self._state.be_waiting:
                self._promote(self._held_max // 2)
        return self._moves

    def _leave(self) -> None:
        host_only = self._rules.placement == "host"
        residents = self._residents[::-1]
        for request in residents if host_only else [r for r in residents if r.leaving]:
            if request.leaving:
                if not request.in_cohort and self._host.is_mirrored(request):
                    self._demote(request)
            elif host_only and request.server >= 0:
                self._moves.leave.append(request)

    def _admit_ls(self) -> bool:
        """Admits waiting LS requests in order; False if one lacks memory."""
        state = self._state
        room = state.limits.ls_running_max - len(state.ls_running)
        for request in state.ls_waiting:
            if room <= 0:
                break
            pages = state.pages_for(request.limit)
            if not self._make_room(pages):
                self._abandon(pages)
                return False
            self._free -= pages
            room -= 1
            self._moves.admit_ls.append(request)
        return True

    def _make_room(self, pages: int, younger_than: Request | None = None) -> bool:
        """Demotes the fewest, newest BE requests until `pages` are free.

        If those that are mirrored do not suffice, demotes none and lets as many as it takes
        leave: their room is there when their last token is mirrored, an iteration or two later.
        Spares `younger_than` and those that are older.
        """
        reach = self._free
        if reach >= pages:
            return True
        victims = []
        for request in reversed(self._residents):
            if request is younger_than:
                break
            victims.append(request)
        chosen: list[Request] = []
        for request in victims:
            if reach < pages and not request.in_cohort and self._host.is_mirrored(request):
                chosen.append(request)
                reach += len(request.blocks)
        if reach >= pages:
            for request in chosen:
                self._demote(request)
            return True
        for request in victims:
            if reach < pages and request.server >= 0 and request not in chosen:
                self._moves.leave.append(request)
                reach += len(request.blocks)
        return False

    def _abandon(self, pages: int) -> None:
        """Nobody can be demoted at once: drops what need not wait to be mirrored."""
        if self._rules.recomputes:
            reach = self._free
            for request in reversed(self._state.be_device):
                if reach < pages and not request.in_cohort:
                    self._moves.abandon.append(request)
                    reach += len(request.blocks)
            return
        # A server that has stopped, or is gone, must not keep LS from the memory.
        reach = self._free
        reach += sum(len(r.blocks) for r in self._residents if self._host.is_mirrored(r))
        for request in [*self._state.be_restoring, *reversed(self._residents)]:
            overdue = self._host.is_overdue(request) or self._host.is_stranded(request)
            if reach < pages and not request.in_cohort and overdue:
                self._moves.abandon.append(request)
                reach += len(request.blocks)
        self._moves.leave = [r for r in self._moves.leave if r not in self._moves.abandon]
        if not (self._moves.abandon or self._moves.leave) and not any(
            r.leaving for r in self._residents
        ):
            self._moves.abandon = [
                r for r in self._state.be_device if r.place is Place.PREFILLING and not r.in_cohort
            ]

    def _rescue(self) -> None:
        """Who waits for a server that has stopped starts over, if another one has room for any."""
        waiting = [r for r in self._residents if r.leaving and not r.in_cohort]
        for request in waiting + self._state.be_restoring:
            if self._host.is_stranded(request) and self._host.can_reserve(request):
                self._moves.abandon.append(request)

    def _grow(self) -> None:
        """Residents on a full last page take one more; if there is none, the newest makes way."""
        page_tokens = self._state.page_tokens
        full = [
            r
            for r in self._residents
            if len(r.blocks) * page_tokens <= r.computed and not r.in_cohort and not r.leaving
        ]
        for request in full:
            if request not in self._residents:
                continue
            # Without a server it cannot be demoted: stopping it would stop it for good.
            over = self._held >= self._held_max and request.server >= 0
            over = over and not self._host.is_stranded(request)
            if self._rules.resumes_first and self._held == len(request.blocks):
                over = False  # alone, and it could not decode anywhere else
            if self._make_room(self._free + 1 if over else 1, younger_than=request):
                self._moves.grow.append(request)
                self._free, self._held = self._free - 1, self._held + 1
            elif not self._moves.leave and self._host.is_mirrored(request):
                self._demote(request)

    def _start_be(self) -> None:
        state = self._state
        parked = len(state.be_host) - len(state.be_restoring)
        if self._prefilling or not state.be_waiting or (self._rules.resumes_first and parked):
            return
        request = state.be_waiting.first()
        if not self._host.can_reserve(request):
            return
        device_only = self._rules.placement == "device"
        pages = state.pages_for(request.limit if device_only else request.known + 1)
        # However small the share has become, one BE request at a time may use the device.
        share = max(self._held_max, pages)
        over = max(0, self._held + pages - share)
        if self._make_room(max(pages, self._free + over)) and self._held + pages <= share:
            self._moves.start_be.append(request)
            self._free -= pages
            self._held += pages

    def _promote(self, held_max: int) -> None:
        """Brings back the oldest that can come, one at a time, if BE holds `held_max` at most."""
        state = self._state
        if self._rules.placement == "host" or state.be_restoring or state.ls_waiting:
            return
        if self._rules.resumes_first and not self._held:
            held_max = self._free  # it could not decode anywhere else
        room = min(self._free, held_max - self._held)
        if room <= 0:
            return
        for request in islice(state.be_host, _RETURNING):
            pages = state.pages_for(request.known + 1)
            if pages > room:
                if self._rules.resumes_first:
                    return
                continue
            if self._host.waits_at_start(request):
                self._moves.promote.append(request)
                self._free -= pages
                self._held += pages
                return

    def _demote(self, request: Request) -> None:
        self._residents.remove(request)
        self._moves.demote.append(request)
        self._free += len(request.blocks)
        self._held -= len(request.blocks)
