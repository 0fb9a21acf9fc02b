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
    PROFILE,
    STAGES,
    request,
    stage_counts,
    states,
)

from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import LatencyModel, Load
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.scheduler import PATIENCE_NS, Plan, budget_ns, decide, largest, pick_stage

PREFILL_MAX = 128


def model() -> LatencyModel:
    return LatencyModel(PROFILE, LAYERS)


def plan_for(state: EngineState) -> Plan | None:
    return decide(state, model(), NOW_NS, PREFILL_MAX)


def load_of(chunks: tuple[Chunk, ...]) -> Load:
    loads = [
        Load.decode(c.end)
        if c.tokens == 1
        else Load.prefill(c.start, c.tokens, last=c.end == c.request.known)
        for c in chunks
    ]
    return sum(loads, Load())


def be_cost_ns(state: EngineState, plan: Plan) -> float:
    """What the model says of a BE cohort that was under way before this plan."""
    if state.be_cohort_stage < 0:
        return 0.0
    alone = load_of(plan.ls)
    added = model().pass_ns(alone + Load(rows=state.be_cohort_rows)) - model().pass_ns(alone)
    return added * (plan.be_until - state.be_cohort_stage) / STAGES


def stream(name: str = "stream", *, slack_ms: int = 50, context: int = 100) -> Request:
    """A running LS stream whose next token is due in `slack_ms`."""
    tpot = 100 * MS
    last = NOW_NS + slack_ms * MS - tpot
    return request(
        name,
        Place.PREFILLING,
        prompt=context - 1,
        generated=1,
        latency_sensitive=True,
        ttft_slo_ns=1000 * MS,
        tpot_slo_ns=tpot,
        first_token_ns=last,
        last_token_ns=last,
    )


def state_with(*ls: Request, be: tuple[Request, ...] = ()) -> EngineState:
    state = EngineState(1000, PAGE_TOKENS, STAGES, blocks_free=500)
    state.limits = Limits(safety_margin=0.0)
    state.parked = StageCounts.empty(STAGES)
    state.ls_running.extend(ls)
    state.be_device.extend(be)
    return state


@given(states())
def test_every_running_stream_decodes_in_every_pass(state: EngineState) -> None:
    plan = plan_for(state)
    decoding = [r for r in state.ls_running if r.generated > 0]
    assert plan is not None or not decoding
    planned = {c.request.request_id: c for c in plan.ls} if plan else {}
    for running in decoding:
        chunk = planned[running.request_id]
        assert (chunk.start, chunk.tokens) == (running.computed, 1)


@given(states())
def test_best_effort_never_takes_a_pass_over_its_budget(state: EngineState) -> None:
    plan = plan_for(state)
    if plan is None or not plan.ls:
        return
    ls = model().pass_ns(load_of(plan.ls))
    # LS requests that wait for memory wait for the cohort under way: one stage is always run.
    forced = bool(state.ls_waiting) and state.be_cohort_stage >= 0
    whole = model().pass_ns(load_of(plan.ls + plan.be), plan.allowance) + be_cost_ns(state, plan)
    if plan.allowance or plan.be or (plan.be_until and not forced):
        assert whole <= plan.budget_ns * (1 + 1e-9) or (forced and not plan.allowance)
    assert plan.budget_ns == max(budget_ns(state, model(), NOW_NS), ls)
    assert plan.stages == range(STAGES)


@given(states())
def test_limits_bound_what_best_effort_gets(state: EngineState) -> None:
    plan = plan_for(state)
    if plan is None:
        return
    prefill = [c for c in plan.be if c.request.place is Place.PREFILLING]
    assert len(prefill) <= 1
    if plan.ls:  # alone, best effort may fill a pass
        assert sum(c.tokens for c in prefill) <= state.limits.be_prefill_tokens
        assert plan.allowance <= state.limits.be_rows_per_stage
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
        return chunks, plan.stages, plan.be_until, plan.allowance, plan.predicted_ns

    twin = copy.deepcopy(state)
    before = repr(state)
    assert facts(plan_for(state)) == facts(plan_for(twin))
    assert repr(state) == before


@given(states(ls_max=0, be_max=0))
def test_without_rows_there_is_no_plan(state: EngineState) -> None:
    state.parked = StageCounts.empty(STAGES)
    state.be_cohort_stage = -1
    assert plan_for(state) is None


def test_more_slack_never_means_less_best_effort() -> None:
    allowances = []
    for slack_ms in (1, 5, 10, 20, 40, 80):
        plan = plan_for(state_with(stream(slack_ms=slack_ms)))
        assert plan is not None
        allowances.append(plan.allowance)
    assert allowances == sorted(allowances)
    assert allowances[0] == 0 < allowances[-1]


def test_a_late_stream_runs_alone() -> None:
    resident = request("be", Place.DEVICE, prompt=20, generated=2, server=0)
    plan = plan_for(state_with(stream(slack_ms=-10), be=(resident,)))
    assert plan is not None
    assert (len(plan.ls), plan.be, plan.be_until, plan.allowance) == (1, (), 0, 0)


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


@given(stage_counts())
def test_parked_rows_wait_for_their_stage_but_not_for_a_stopped_server(
    parked: StageCounts,
) -> None:
    stage = pick_stage(parked, NOW_NS)
    waited = (parked.oldest_ready_ns < NOW_NS - PATIENCE_NS) & (parked.ready > 0)
    complete = (parked.ready > 0) & (parked.away == 0)
    if stage is None:
        assert not waited.any()
        assert not complete.any()
    else:
        assert waited[stage] or complete[stage]


@pytest.mark.parametrize("rows", [1, 12])
def test_alone_best_effort_boards_everything_that_waits(rows: int) -> None:
    state = state_with()
    state.be_host.extend(request(f"h{i}", Place.HOST, prompt=5, generated=1) for i in range(rows))
    ready = np.array([0, 0, rows, 0, 0])
    state.parked = StageCounts(ready, np.zeros(STAGES, np.int64), np.where(ready, 0, NOW_NS))
    plan = plan_for(state)
    assert plan is not None
    assert (plan.stages, plan.allowance) == (range(2, 3), rows)
