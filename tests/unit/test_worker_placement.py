"""Who gets device memory, on made-up states: every decision is carried out on paper."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import PAGE_TOKENS, STAGES, request, states

from omniserve.gpuworker import placement as policy
from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.placement import Moves, Placement, Rules
from omniserve.gpuworker.requests import Place, Request

placements: st.SearchStrategy[Placement] = st.sampled_from(["auto", "device", "host"])


@dataclass
class Host:
    """A host view that answers from sets of request ids; by default all is as wished."""

    not_mirrored: frozenset[str] = frozenset()
    not_at_start: frozenset[str] = frozenset()
    full: bool = False
    overdue: bool = False
    stopped: bool = False
    asked: list[str] = field(default_factory=list)

    def is_mirrored(self, request: Request) -> bool:
        return request.server >= 0 and request.request_id not in self.not_mirrored

    def is_overdue(self, request: Request) -> bool:
        if request.place is Place.RESTORING:
            return self.overdue
        return self.overdue and request.leaving and not self.is_mirrored(request)

    def is_stranded(self, request: Request) -> bool:
        restoring = request.place is Place.RESTORING
        return self.stopped and (restoring or not self.is_mirrored(request))

    def waits_at_start(self, request: Request) -> bool:
        return request.place is Place.HOST and request.request_id not in self.not_at_start

    def can_reserve(self, request: Request) -> bool:
        self.asked.append(request.request_id)
        return not self.full


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    names = [f"be{i}" for i in range(6)]
    parked = [f"host{i}" for i in range(6)]
    return Host(
        frozenset(draw(st.sets(st.sampled_from(names)))),
        frozenset(draw(st.sets(st.sampled_from(parked)))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def decide(state: EngineState, host: Host, placement: Placement) -> Moves:
    return policy.decide(state, host, Rules(placement))


def resident(name: str, pages: int = 2, *, leaving: bool = False, server: int = 0) -> Request:
    made = request(name, Place.DEVICE, prompt=8, generated=4, blocks=pages, server=server)
    made.leaving = leaving
    return made


def chat(name: str, pages: int) -> Request:
    tokens = pages * PAGE_TOKENS
    return request(
        name, Place.WAITING, prompt=tokens - 4, max_tokens=4, latency_sensitive=True, server=-1
    )


def state_with(free: int, *residents: Request, **queues: list[Request]) -> EngineState:
    held = sum(len(r.blocks) for r in residents)
    state = EngineState(free + held, PAGE_TOKENS, STAGES, blocks_free=free)
    state.limits = Limits(be_device_kv_share=1.0)
    state.be_device.extend(residents)
    for name, requests in queues.items():
        for waiting in requests:
            getattr(state, name).append(waiting)
    return state


def names(requests: list[Request]) -> list[str]:
    return [r.request_id for r in requests]


def free_after(state: EngineState, moves: Moves, placement: Placement) -> list[int]:
    """Free pages after each move, in the order in which they are carried out."""
    free = state.blocks_free
    seen = []
    for gone in [*moves.abandon, *moves.demote]:
        free += len(gone.blocks)
        seen.append(free)
    costs = [state.pages_for(r.limit) for r in moves.admit_ls]
    costs += [1 for _ in moves.grow]
    costs += [
        state.pages_for(r.limit if placement == "device" else r.known + 1) for r in moves.start_be
    ]
    costs += [state.pages_for(r.known + 1) for r in moves.promote]
    for cost in costs:
        free -= cost
        seen.append(free)
    return seen


@given(states(), hosts(), placements)
def test_memory_is_never_oversubscribed(
    state: EngineState, host: Host, placement: Placement
) -> None:
    moves = decide(state, host, placement)
    assert all(0 <= free <= state.blocks_total for free in free_after(state, moves, placement))


@given(states(), hosts(), placements)
def test_a_request_changes_places_once_and_only_when_it_may_be(
    state: EngineState, host: Host, placement: Placement
) -> None:
    moves = decide(state, host, placement)
    gone = names(moves.abandon + moves.demote)
    assert len(set(gone)) == len(gone)
    assert not set(gone) & set(names(moves.grow))
    assert not set(names(moves.abandon)) & set(names(moves.leave))
    for demoted in moves.demote:
        assert host.is_mirrored(demoted)
        assert not demoted.in_cohort
    for abandoned in moves.abandon:
        waits = host.is_overdue(abandoned) or host.is_stranded(abandoned)
        assert abandoned.place is Place.PREFILLING or waits
        assert not abandoned.in_cohort
    for promoted in moves.promote:
        assert host.waits_at_start(promoted)
    for left in moves.leave:
        assert left.server >= 0, "it could never be demoted"


@given(states(), hosts(), placements)
def test_ls_is_admitted_in_order_and_within_its_limit(
    state: EngineState, host: Host, placement: Placement
) -> None:
    moves = decide(state, host, placement)
    assert moves.admit_ls == list(state.ls_waiting)[: len(moves.admit_ls)]
    running = len(state.ls_running) + len(moves.admit_ls)
    assert running <= max(state.limits.ls_running_max, len(state.ls_running))
    if len(moves.admit_ls) < len(state.ls_waiting) and running < state.limits.ls_running_max:
        assert not moves.grow + moves.start_be + moves.promote, "BE took what LS waits for"


@given(states(), hosts(), placements)
def test_a_decision_changes_nothing(state: EngineState, host: Host, placement: Placement) -> None:
    before = repr(state)
    first, second = (decide(state, host, placement) for _ in range(2))
    assert first == second
    assert repr(state) == before


def test_ls_takes_the_fewest_and_newest_residents() -> None:
    state = state_with(
        1, resident("old"), resident("middle"), resident("new"), ls_waiting=[chat("chat", 4)]
    )
    moves = decide(state, Host(), "auto")
    assert names(moves.demote) == ["new", "middle"]
    assert names(moves.admit_ls) == ["chat"]


def test_nobody_is_demoted_when_the_room_is_there() -> None:
    state = state_with(4, resident("old"), ls_waiting=[chat("chat", 4)])
    moves = decide(state, Host(), "auto")
    assert (moves.demote, names(moves.admit_ls)) == ([], ["chat"])


def test_residents_that_are_not_mirrored_yet_leave_first() -> None:
    state = state_with(0, resident("old"), resident("new"), ls_waiting=[chat("chat", 2)])
    moves = decide(state, Host(not_mirrored=frozenset({"old", "new"})), "auto")
    assert (names(moves.leave), moves.demote, moves.admit_ls) == (["new"], [], [])


def test_a_server_that_stopped_does_not_keep_ls_from_memory() -> None:
    leaving = [resident(name, leaving=True) for name in ("oldest", "old", "new")]
    state = state_with(0, *leaving, ls_waiting=[chat("chat", 3)])
    stopped = frozenset({"oldest", "old", "new"})
    assert decide(state, Host(stopped), "auto").abandon == []
    moves = decide(state, Host(stopped, overdue=True), "auto")
    assert (names(moves.abandon), names(moves.leave)) == (["new", "old"], [])


def test_who_waits_for_a_server_that_stopped_starts_over_at_another() -> None:
    leaving = resident("leaving", leaving=True)
    coming = request("coming", Place.RESTORING, prompt=20, generated=1, server=0, blocks=4)
    state = state_with(4, leaving, be_host=[coming], be_restoring=[coming])
    stuck = frozenset({"leaving"})
    assert decide(state, Host(stuck, overdue=True), "auto").abandon == []
    assert decide(state, Host(stuck, full=True, stopped=True), "auto").abandon == []
    assert names(decide(state, Host(stuck, stopped=True), "auto").abandon) == ["leaving", "coming"]


def test_a_server_that_stopped_keeps_nobody_from_growing_where_there_is_room() -> None:
    full = resident("full", 1)
    full.computed = PAGE_TOKENS
    state = state_with(1, full)
    state.limits = Limits(be_device_kv_share=0.0)
    assert decide(state, Host(frozenset({"full"})), "auto").grow == []
    assert names(decide(state, Host(frozenset({"full"}), stopped=True), "auto").grow) == ["full"]


def test_a_restore_from_a_server_that_stopped_keeps_no_memory_from_ls() -> None:
    coming = request("coming", Place.RESTORING, prompt=20, generated=1, server=0, blocks=4)
    waiting = [chat("chat", 4)]
    state = state_with(0, be_host=[coming], be_restoring=[coming], ls_waiting=waiting)
    assert decide(state, Host(), "auto").abandon == []
    assert names(decide(state, Host(overdue=True), "auto").abandon) == ["coming"]


def test_a_prompt_is_abandoned_only_when_nothing_else_gives_room() -> None:
    prompt = request("prompt", Place.PREFILLING, prompt=40, computed=20, server=0)
    waiting = [chat("chat", 3)]
    both = state_with(0, resident("decode", 3), prompt, ls_waiting=waiting)
    assert decide(both, Host(), "auto").abandon == []
    slow = decide(both, Host(not_mirrored=frozenset({"decode"})), "auto")
    assert (slow.abandon, names(slow.leave)) == ([], ["decode"])
    alone = decide(state_with(0, prompt, ls_waiting=waiting), Host(), "auto")
    assert names(alone.abandon) == ["prompt"]


def test_one_best_effort_request_starts_however_small_the_share() -> None:
    queued = request("queued", Place.WAITING, prompt=60)
    state = state_with(10, be_waiting=[queued])
    state.limits = Limits(be_device_kv_share=0.0)
    assert names(decide(state, Host(), "auto").start_be) == ["queued"]


def test_a_full_arena_keeps_the_queue_waiting_and_its_order() -> None:
    queued = [request(f"queued{i}", Place.WAITING, prompt=20) for i in range(2)]
    state = state_with(10, be_waiting=queued)
    host = Host(full=True)
    assert decide(state, host, "auto").start_be == []
    assert set(host.asked) == {"queued0"}


def test_a_resident_on_its_last_page_grows_or_makes_way() -> None:
    full = resident("full", 1)
    full.computed = PAGE_TOKENS
    assert names(decide(state_with(1, full), Host(), "auto").grow) == ["full"]
    assert names(decide(state_with(0, full), Host(), "auto").demote) == ["full"]
    waits = decide(state_with(0, full), Host(not_mirrored=frozenset({"full"})), "auto")
    assert waits == Moves()


def test_a_parked_request_comes_back_only_while_half_the_share_stays_free() -> None:
    parked = request("parked", Place.HOST, prompt=20, generated=1, server=0)
    assert names(decide(state_with(8, be_host=[parked]), Host(), "auto").promote) == ["parked"]
    crowded = state_with(4, resident("r", 4), be_host=[parked])
    assert decide(crowded, Host(), "auto").promote == []
    assert decide(state_with(8, be_host=[parked]), Host(), "host").promote == []


def test_host_placement_lets_every_resident_leave_and_demotes_those_that_left() -> None:
    state = state_with(0, resident("stays"), resident("goes", leaving=True))
    moves = decide(state, Host(), "host")
    assert (names(moves.leave), names(moves.demote)) == (["stays"], ["goes"])
