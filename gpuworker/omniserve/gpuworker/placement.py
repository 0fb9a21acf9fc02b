"""Who gets device memory: admission of waiting requests, demotion, promotion, growth.

`decide` is pure and returns moves for the engine to carry out before the pass. LS takes the
pages of prompt + max_tokens when it starts, so a running LS request never runs out; BE takes
what it needs now, and gives its pages back at once when they are mirrored in an arena.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.requests import Place, Request

Placement = Literal["auto", "device", "host"]


@dataclass
class Moves:
    """In this order: what gives memory back, then what takes it."""

    abandon: list[Request] = field(default_factory=list)
    """BE prompts whose partial KV is dropped and recomputed later."""
    demote: list[Request] = field(default_factory=list)
    admit_ls: list[Request] = field(default_factory=list)
    grow: list[Request] = field(default_factory=list)
    """BE decodes that take one more page."""
    start_be: list[Request] = field(default_factory=list)
    promote: list[Request] = field(default_factory=list)


def decide(
    state: EngineState,
    mirrored: Callable[[Request], bool],
    at_start: Callable[[Request], bool],
    placement: Placement,
) -> Moves:
    """Returns the moves of this iteration.

    `mirrored(request)` says whether every computed token of a device-resident BE request is in
    an arena, so that its pages can go at once; `at_start(request)` whether a parked one waits at
    stage 0, where alone it can be held for promotion.
    """
    moves = Moves()
    free = state.blocks_free
    victims = [r for r in state.be_device if _movable(r) and mirrored(r)]
    be_blocks = state.be_blocks
    if placement == "host":
        moves.demote.extend(victims)
        freed = sum(len(r.blocks) for r in victims)
        free, be_blocks, victims = free + freed, be_blocks - freed, []

    def make_room(pages: int) -> bool:
        """Demotes the newest BE until `pages` are free; changes nothing if that cannot be."""
        nonlocal free, be_blocks
        chosen: list[Request] = []
        reach = free
        while reach < pages and len(chosen) < len(victims):
            chosen.append(victims[-1 - len(chosen)])
            reach += len(chosen[-1].blocks)
        if reach < pages:
            return False
        for request in chosen:
            victims.remove(request)
            moves.demote.append(request)
            be_blocks -= len(request.blocks)
        free = reach
        return True

    running = len(state.ls_running)
    blocked = False
    for request in state.ls_waiting:
        if running >= state.limits.ls_running_max:
            break
        pages = state.pages_for(request.limit)
        if not make_room(pages):
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

    for request in state.be_device:
        full = len(request.blocks) * state.page_tokens <= request.computed
        if request.place is Place.DEVICE and full and not request.in_cohort:
            # Without a server it cannot be demoted: stopping it would stop it for good.
            if free > 0 and (be_blocks < state.be_blocks_max or request.server < 0):
                moves.grow.append(request)
                free, be_blocks = free - 1, be_blocks + 1
            elif request in victims:
                victims.remove(request)
                moves.demote.append(request)
                free, be_blocks = free + len(request.blocks), be_blocks - len(request.blocks)

    prefilling = any(r.place is Place.PREFILLING for r in state.be_device)
    if state.be_waiting and not prefilling:
        request = state.be_waiting[0]
        tokens = request.limit if placement == "device" else request.known + 1
        pages = state.pages_for(tokens)
        # However small the share has become, one BE request at a time may use the device.
        share = max(state.be_blocks_max, pages)
        over = be_blocks + pages - share
        if make_room(max(pages, free + over)) and be_blocks + pages <= share:
            moves.start_be.append(request)
    elif placement != "host" and not state.ls_waiting:
        moves.promote.extend(_promotable(state, at_start, free, be_blocks))
    return moves


def _movable(request: Request) -> bool:
    return request.place is Place.DEVICE and not request.in_cohort


def _promotable(
    state: EngineState, at_start: Callable[[Request], bool], free: int, be_blocks: int
) -> list[Request]:
    """The oldest parked request, one at a time, while half of BE's share would stay free."""
    if any(r.place is Place.RESTORING for r in state.be_host):
        return []
    for request in state.be_host:
        pages = state.pages_for(request.known + 1)
        if at_start(request) and pages <= free and 2 * (be_blocks + pages) <= state.be_blocks_max:
            return [request]
    return []
