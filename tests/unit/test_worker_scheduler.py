"""The inner loop's policy, on made-up states under a virtual clock."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import (
    LAYERS,
    MS,
    NOW_NS,
    PAGE_TOKENS,
    PREFILL_MAX,
    STAGES,
    budget_ns,
    model,
    plan_for,
    request,
    state_with,
    states,
    stream,
)

from omniserve.gpuworker.cohort import Chunk, load_of
from omniserve.gpuworker.deadlines import Arrival, must_call_off, must_yield
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.scheduler import largest


@st.composite
def models(draw: st.DrawFn) -> LatencyModel:
    """A model that has met some regimes and is off in each of them by another factor."""
    made = model(padded=draw(st.booleans()))
    factors = st.floats(0.5, 2.0)
    for regime in draw(st.sets(st.sampled_from(list(Regime)))):
        for rows in draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)):
            made.observe(regime, rows, 1e6, 1e6 * draw(factors))
    return made


def cost_ns(state: EngineState, plan: Plan, latency: LatencyModel) -> float:
    """What the model says of a plan whose allowances are used to the full, stage by stage."""
    load = load_of(plan.ls + plan.be)
    total = latency.pass_ns(load)
    for stage in range(STAGES):
        rows = load.sampled if stage == LAYERS else load.rows
        stairs = latency.staircase(stage)
        total += stairs[rows + plan.allowance(stage)] - stairs[rows]
    if state.be_cohort_stage >= 0:
        added = latency.pass_ns(load + state.be_cohort) - latency.pass_ns(load)
        total += added * max(0, plan.be_until - state.be_cohort_stage) / STAGES
    return total * latency.factor(plan.regime, plan.rows)


@given(states(), models())
def test_every_running_stream_decodes_in_every_pass_and_between_them_all_can_wait(
    state: EngineState, latency: LatencyModel
) -> None:
    plan = plan_for(state, latency)
    decoding = [r for r in state.ls_running if r.generated > 0]
    assert plan is not None or not decoding
    if plan is not None and plan.regime >= Regime.BE_STAGE and decoding:
        assert not plan.ls
        alone = latency.pass_ns(load_of([Chunk(r, r.computed, 1) for r in decoding]))
        alone *= latency.factor(Regime.LS_DECODE, len(decoding))
        assert plan.predicted_ns + alone <= budget_ns(state, latency, NOW_NS) * (1 + 1e-9)
        return
    planned = {c.request.request_id: c for c in plan.ls} if plan else {}
    for running in decoding:
        chunk = planned[running.request_id]
        assert (chunk.start, chunk.tokens) == (running.computed, 1)


@given(states(), models())
def test_best_effort_never_takes_a_pass_over_its_budget(
    state: EngineState, latency: LatencyModel
) -> None:
    plan = plan_for(state, latency)
    if plan is None or not plan.ls:
        return
    # LS requests that wait for memory wait for the cohort under way: one stage is always run.
    forced = bool(state.ls_waiting) and state.be_cohort_stage >= 0
    if any(plan.allowances) or plan.be or (plan.be_until and not forced):
        assert cost_ns(state, plan, latency) <= plan.budget_ns * (1 + 1e-9) or (
            forced and not any(plan.allowances)
        )
    assert plan.budget_ns >= max(budget_ns(state, latency, NOW_NS), plan.ls_ns)
    assert list(plan.stages) == list(range(STAGES))


@given(states(), models())
def test_no_plan_lets_a_streams_gap_grow_over_two_tpot_for_best_effort(
    state: EngineState, latency: LatencyModel
) -> None:
    plan = plan_for(state, latency)
    if plan is None or not plan.ls or not (any(plan.allowances) or plan.be):
        return
    for running in state.ls_running:
        if running.generated:
            gap_ns = NOW_NS - running.last_token_ns + cost_ns(state, plan, latency)
            alone = plan.budget_ns <= plan.ls_ns
            assert gap_ns <= 2 * running.tpot_slo_ns * (1 + 1e-9) or alone


@given(states())
def test_limits_bound_what_best_effort_gets(state: EngineState) -> None:
    plan = plan_for(state)
    if plan is None:
        return
    prefill = [c for c in plan.be if c.request.place is Place.PREFILLING]
    assert len(prefill) <= 1
    if plan.ls:  # alone, best effort may fill a pass
        assert sum(c.tokens for c in prefill) <= state.limits.be_prefill_tokens
        assert max(plan.allowances) <= state.limits.be_rows_per_stage
        assert plan.boarding_most <= state.limits.be_rows_per_stage
    assert sum(c.tokens for c in plan.ls if c.request.generated == 0) <= PREFILL_MAX


@given(states())
def test_chunks_follow_what_is_computed_and_stay_on_pages_that_are_held(
    state: EngineState,
) -> None:
    plan = plan_for(state)
    if plan is None:
        return
    chunks = plan.ls + plan.be
    assert len({c.request.request_id for c in chunks}) == len(chunks)
    for chunk in chunks:
        asked = chunk.request
        assert chunk.start == asked.computed
        assert 1 <= chunk.tokens <= asked.known - asked.computed
        assert chunk.end <= len(asked.blocks) * PAGE_TOKENS
    for chunk in plan.be:
        assert not chunk.request.leaving
    assert not (plan.be and state.be_cohort_stage >= 0), "two BE cohorts at once"


@given(states())
def test_equal_states_give_equal_plans_and_stay_as_they_were(state: EngineState) -> None:
    def facts(plan: Plan | None) -> object:
        if plan is None:
            return None
        chunks = [(c.request.request_id, c.start, c.tokens) for c in plan.ls + plan.be]
        return chunks, plan.stages, plan.be_until, plan.allowances, plan.predicted_ns

    twin = copy.deepcopy(state)
    before = repr(state)
    assert facts(plan_for(state)) == facts(plan_for(twin))
    assert repr(state) == before


@given(states(ls_max=0, be_max=0))
def test_without_rows_there_is_no_plan(state: EngineState) -> None:
    state.parked = StageCounts.empty(STAGES)
    state.be_cohort_stage = -1
    assert plan_for(state) is None


def parked_state(
    *ls: Request, ready: tuple[int, ...], overdue: tuple[int, ...] = ()
) -> EngineState:
    """Streams beside parked rows that are ready at each stage."""
    state = state_with(*ls)
    for index in range(sum(ready)):
        state.be_host.append(request(f"h{index}", Place.HOST, prompt=5, generated=1))
    counts = np.array(ready)
    oldest = np.where(counts, NOW_NS - 1, np.iinfo(np.int64).max)
    state.parked = StageCounts(counts, np.zeros(STAGES, np.int64), oldest, overdue)
    return state


def test_more_slack_never_means_less_best_effort() -> None:
    boarding = []
    for slack_ms in (1, 5, 6, 7, 10, 20, 40, 80):
        plan = plan_for(parked_state(stream(slack_ms=slack_ms), ready=(8, 8, 8, 8, 8)))
        assert plan is not None
        boarding.append(sum(plan.allowances))
    assert boarding == sorted(boarding)
    assert boarding[0] == 0 < boarding[-1]


def test_stages_are_funded_from_the_lowest_up_until_the_budget_is_used() -> None:
    plan = plan_for(parked_state(stream(slack_ms=7), ready=(8, 8, 8, 8, 8)))
    assert plan is not None
    assert plan.allowances[0] == 8
    assert list(plan.allowances) == sorted(plan.allowances, reverse=True)
    assert plan.allowances[-1] == 0


def test_a_stage_whose_rows_were_passed_over_too_often_is_funded_first() -> None:
    plan = plan_for(parked_state(stream(slack_ms=7), ready=(8, 8, 8, 8, 8), overdue=(4,)))
    assert plan is not None
    assert plan.allowances[4] == 8
    assert plan.allowances[1] < 8


def test_what_ready_rows_leave_is_for_those_that_come_back_in_the_pass() -> None:
    plan = plan_for(parked_state(stream(slack_ms=9), ready=(0, 6, 0, 0, 0)))
    assert plan is not None
    assert plan.allowances[1] >= 6
    assert min(plan.allowances) > 0
    assert len(set(plan.allowances)) <= 2


def test_a_late_stream_runs_alone() -> None:
    resident = request("be", Place.DEVICE, prompt=20, generated=2, server=0)
    plan = plan_for(state_with(stream(slack_ms=-10), be=(resident,)))
    assert plan is not None
    assert (len(plan.ls), plan.be, plan.be_until, any(plan.allowances)) == (1, (), 0, False)


def waiting_prompt(name: str, *, arrival_ms: int = 0, ttft_ms: int = 1000) -> Request:
    return request(
        name,
        Place.PREFILLING,
        prompt=128,
        latency_sensitive=True,
        arrival_ns=NOW_NS - arrival_ms * MS,
        ttft_slo_ns=ttft_ms * MS,
        tpot_slo_ns=10_000 * MS,
    )


def test_the_slack_of_prompts_counts_what_is_prefilled_before_them() -> None:
    one, two = waiting_prompt("one"), waiting_prompt("two")
    prefill_ns = model().pass_ns(Load.prefill(0, 128, last=True))
    assert budget_ns(state_with(one), model(), NOW_NS) == 1000 * MS - prefill_ns
    assert budget_ns(state_with(one, two), model(), NOW_NS) == 1000 * MS - 2 * prefill_ns


def test_only_the_most_urgent_prompt_is_sure_to_advance() -> None:
    late = stream(slack_ms=-10)
    plan = plan_for(state_with(late, *(waiting_prompt(str(i), arrival_ms=i) for i in range(5))))
    assert plan is not None
    assert [c.request.request_id for c in plan.ls] == ["stream", "4"]


def plan_under_way(*, ls_ns: float = 0.0, preemptible: bool = True) -> Plan:
    return Plan(range(STAGES), ls_ns=ls_ns, predicted_ns=100.0 * MS, preemptible=preemptible)


def newcomer(ttft_ms: int) -> Arrival:
    return Arrival(NOW_NS, 16, ttft_ms * MS)


@pytest.mark.parametrize(("ttft_ms", "yields"), [(100, True), (400, True), (5000, False)])
def test_best_effort_in_flight_yields_only_if_its_rest_would_cost_a_newcomer_its_ttft(
    ttft_ms: int, yields: bool
) -> None:
    state = state_with()
    arrivals = [newcomer(ttft_ms)]
    assert must_yield(plan_under_way(), 4, arrivals, state, model(), NOW_NS) is yields
    # LS rows go on in any case: what they take is no reason.
    all_ls = plan_under_way(ls_ns=100.0 * MS)
    assert not must_yield(all_ls, 4, arrivals, state, model(), NOW_NS)
    fixed = plan_under_way(preemptible=False)
    assert not must_yield(fixed, 4, arrivals, state, model(), NOW_NS)


def test_many_newcomers_can_spare_less_than_one() -> None:
    state = state_with()
    one = [newcomer(5000)]
    assert not must_yield(plan_under_way(), 4, one, state, model(), NOW_NS)
    assert must_yield(plan_under_way(), 4, one * 200, state, model(), NOW_NS)


@pytest.mark.parametrize(("ttft_ms", "called_off"), [(20, True), (1000, False)])
def test_a_resting_cohort_is_called_off_only_if_ls_cannot_wait_for_its_pages(
    ttft_ms: int, called_off: bool
) -> None:
    state = state_with()
    state.be_cohort_stage, state.be_cohort = 1, Load.prefill(0, 128, last=False)
    assert not must_call_off(state, model(), NOW_NS), "nobody waits"
    waiting = waiting_prompt("waits", ttft_ms=ttft_ms)
    waiting.place = Place.WAITING
    state.ls_waiting.append(waiting)
    assert must_call_off(state, model(), NOW_NS) is called_off


def test_a_prompt_takes_what_running_streams_can_spare_but_always_advances() -> None:
    sizes = []
    for slack_ms in (-10, 10, 30, 90):
        prompt = request(
            "prompt",
            Place.PREFILLING,
            prompt=300,
            latency_sensitive=True,
            arrival_ns=NOW_NS,
            ttft_slo_ns=1000 * MS,
            tpot_slo_ns=100 * MS,
        )
        plan = plan_for(state_with(stream(slack_ms=slack_ms), prompt))
        assert plan is not None
        sizes.append(plan.ls[1].tokens)
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < sizes[-1] <= PREFILL_MAX


def test_prompts_go_earliest_deadline_first() -> None:
    def prompt(name: str, arrival_ms: int) -> Request:
        return request(
            name,
            Place.PREFILLING,
            prompt=200,
            latency_sensitive=True,
            arrival_ns=NOW_NS - arrival_ms * MS,
            ttft_slo_ns=1000 * MS,
            tpot_slo_ns=100 * MS,
        )

    plan = plan_for(state_with(prompt("late", 0), prompt("early", 300)))
    assert plan is not None
    assert [c.request.request_id for c in plan.ls] == ["early"]
    assert plan.ls[0].tokens == PREFILL_MAX


def test_best_effort_prefill_goes_before_its_decode() -> None:
    prefill = request("prefill", Place.PREFILLING, prompt=100, server=0)
    decode = request("decode", Place.DEVICE, prompt=20, generated=2, server=0)
    plan = plan_for(state_with(stream(slack_ms=90), be=(decode, prefill)))
    assert plan is not None
    assert [c.request.request_id for c in plan.be][:1] == ["prefill"]


def test_the_budget_is_the_least_slack_and_keeps_gaps_under_two_tpot() -> None:
    near, far = stream("near", slack_ms=10), stream("far", slack_ms=60)
    assert budget_ns(state_with(near, far), model(), NOW_NS) == 10 * MS
    # A stream far ahead of its deadlines must still not pause for more than two TPOT.
    far.first_token_ns += 1000 * MS
    assert budget_ns(state_with(far), model(), NOW_NS) == far.last_token_ns + 200 * MS - NOW_NS


@given(limit=st.integers(0, 1000), threshold=st.integers(-1, 1100))
def test_the_binary_search_finds_the_largest_that_fits(limit: int, threshold: int) -> None:
    assert largest(limit, lambda n: n <= threshold) == max(0, min(limit, threshold))
