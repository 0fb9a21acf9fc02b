"""Who gets device memory: admission of waiting requests, demotion, promotion, growth.

`decide` is pure and returns moves for the engine to carry out before the pass. LS takes the
pages of prompt + max_tokens when it starts, so a running LS request never runs out; BE takes
what it needs now, and gives its pages back at once when they are mirrored in an arena.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.requests import Place, Request

Placement = Literal["auto", "device", "host"]


@dataclass
class Moves:
    """In this order: what gives memory back, then what takes it."""

    abandon: list[Request] = field(default_factory=list)
    """BE prompts whose partial KV is dropped and recomputed later."""
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

    def waits_at_start(self, request: Request) -> bool:
        """Whether a parked request is ready at stage 0, where alone it can be held."""

    def can_reserve(self, request: Request) -> bool:
        """Whether a server has room for all of a waiting request."""


def decide(state: EngineState, host: HostView, placement: Placement) -> Moves:
    """Returns the moves of this iteration."""
    mirrored = host.is_mirrored
    moves = Moves()
    free, be_blocks = state.blocks_free, state.be_blocks
    resident = [r for r in reversed(state.be_device) if r.place is Place.DEVICE]  # newest first
    if placement == "host":
        moves.leave.extend(r for r in resident if r.server >= 0 and not r.leaving)

    def demote(request: Request) -> None:
        nonlocal free, be_blocks
        resident.remove(request)
        moves.demote.append(request)
        free += len(request.blocks)
        be_blocks -= len(request.blocks)

    for request in list(resident):
        if request.leaving and not request.in_cohort and mirrored(request):
            demote(request)

    def make_room(pages: int) -> bool:
        """Demotes the fewest, newest BE requests until `pages` are free.

        If those that are mirrored do not suffice, demotes none and lets as many as it takes
        leave: their room is there when their last token is mirrored, an iteration or two later.
        """
        reach = free
        chosen: list[Request] = []
        for request in resident:
            if reach < pages and not request.in_cohort and mirrored(request):
                chosen.append(request)
                reach += len(request.blocks)
        if reach >= pages:
            for request in chosen:
                demote(request)
            return True
        for request in resident:
            if reach < pages and request.server >= 0 and request not in chosen:
                moves.leave.append(request)
                reach += len(request.blocks)
        return False

    running = len(state.ls_running)
    blocked = False
    for request in state.ls_waiting:
        if running >= state.limits.ls_running_max:
            break
        pages = state.pages_for(request.limit)
        if not make_room(pages):
            if not moves.leave and not any(r.leaving for r in resident):
                moves.abandon = [
                    r for r in state.be_device if r.place is Place.PREFILLING and not r.in_cohort
                ]
            blocked = True
            break
        free -= pages
        running += 1
        moves.admit_ls.append(request)
    if blocked:
        return moves

    for request in reversed(list(resident)):
        full = len(request.blocks) * state.page_tokens <= request.computed
        if full and not request.in_cohort:
            # Without a server it cannot be demoted: stopping it would stop it for good.
            if free > 0 and (be_blocks < state.be_blocks_max or request.server < 0):
                moves.grow.append(request)
                free, be_blocks = free - 1, be_blocks + 1
            elif mirrored(request):
                demote(request)

    prefilling = any(r.place is Place.PREFILLING for r in state.be_device)
    if state.be_waiting and not prefilling and host.can_reserve(state.be_waiting[0]):
        request = state.be_waiting[0]
        tokens = request.limit if placement == "device" else request.known + 1
        pages = state.pages_for(tokens)
        # However small the share has become, one BE request at a time may use the device.
        share = max(state.be_blocks_max, pages)
        over = be_blocks + pages - share
        if make_room(max(pages, free + over)) and be_blocks + pages <= share:
            moves.start_be.append(request)
    elif placement != "host" and not state.ls_waiting and not state.be_waiting:
        moves.promote.extend(_promotable(state, host, free, be_blocks))
    return moves


def _promotable(state: EngineState, host: HostView, free: int, be_blocks: int) -> list[Request]:
    """The oldest parked request, one at a time, while half of BE's share would stay free."""
    if any(r.place is Place.RESTORING for r in state.be_host):
        return []
    for request in state.be_host:
        pages = state.pages_for(request.known + 1)
        fits = pages <= free and 2 * (be_blocks + pages) <= state.be_blocks_max
        if fits and host.waits_at_start(request):
            return [request]
    return []
