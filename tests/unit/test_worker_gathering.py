"""How parked rows gather and when their stages run: without LS, and between LS passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from support.engine_states import (
    MS,
    NOW_NS,
    PREFILL_MAX,
    STAGES,
    model,
    plan_for,
    request,
    stage_counts,
    state_with,
    stream,
)

from omniserve.gpuworker.be_stages import awaits, following
from omniserve.gpuworker.boarding import PATIENCE_NS, pick_stage
from omniserve.gpuworker.cohort import Chunk, load_of
from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import Regime
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.requests import Place, Request


@given(stage_counts())
def test_parked_rows_wait_for_their_stage_but_not_for_a_stopped_server(
    parked: StageCounts,
) -> None:
    stage = pick_stage(parked, model(), NOW_NS)
    waited = (parked.oldest_ready_ns < NOW_NS - PATIENCE_NS) & (parked.ready > 0)
    complete = (parked.ready > 0) & (parked.away == 0)
    if stage is None:
        assert not waited.any()
        assert not complete.any()
        return
    rows = int(parked.ready.sum() + parked.away.sum())
    stairs, here = model().middle, int(parked.ready[stage])
    full = -(-rows // 2)
    good = here / stairs[here] >= 0.9 * full / stairs[full] * (1 - 1e-9)
    assert waited[stage] or complete[stage] or good


@given(stage_counts())
def test_without_ls_some_stage_runs_whenever_rows_are_ready_and_none_is_away(
    parked: StageCounts,
) -> None:
    parked.away[:] = 0
    assert (pick_stage(parked, model(), NOW_NS) is None) == (not parked.ready.any())


@pytest.mark.parametrize("rows", [1, 12])
def test_alone_best_effort_boards_everything_that_waits(rows: int) -> None:
    state = state_with()
    state.be_host.extend(request(f"h{i}", Place.HOST, prompt=5, generated=1) for i in range(rows))
    ready = np.array([0, 0, rows, 0, 0])
    state.parked = StageCounts(ready, np.zeros(STAGES, np.int64), np.where(ready, 0, NOW_NS))
    plan = plan_for(state)
    assert plan is not None
    assert (plan.stages, plan.allowance(2)) == (range(2, 3), rows)


@pytest.mark.parametrize(("running_max", "short"), [(8, True), (0, False)])
def test_best_effort_passes_are_short_while_ls_waits_for_memory_but_not_for_its_cap(
    running_max: int, short: bool
) -> None:
    state = state_with(be=(request("long", Place.PREFILLING, prompt=1000, server=0),))
    state.limits = Limits(ls_running_max=running_max, be_prefill_tokens=32)
    alone = plan_for(state)
    waiting = request("waits", Place.WAITING, prompt=40, latency_sensitive=True)
    state.ls_waiting.append(waiting)
    plan = plan_for(state)
    assert alone is not None
    assert plan is not None
    assert alone.be[0].tokens == PREFILL_MAX
    assert plan.be[0].tokens == (32 if short else PREFILL_MAX)


def state_with_gathered(*ls: Request, rows: int = 64, stage: int = 2) -> EngineState:
    """`rows` parked rows that are all ready at `stage`."""
    state = state_with(*ls)
    names = range(rows)
    state.be_host.extend(request(f"h{i}", Place.HOST, prompt=5, generated=1) for i in names)
    ready = np.zeros(STAGES, np.int64)
    ready[stage] = rows
    state.parked = StageCounts(ready, np.zeros(STAGES, np.int64), np.where(ready, 0, NOW_NS))
    return state


def test_while_streams_can_wait_a_full_stage_of_parked_rows_goes_before_their_pass() -> None:
    plan = plan_for(state_with_gathered(stream(slack_ms=95)))
    assert plan is not None
    assert (plan.regime, plan.stages, plan.ls) == (Regime.BE_STAGE, range(2, 3), ())


@pytest.mark.parametrize("slack_ms", [49, 20, 0])
def test_a_stream_that_has_waited_half_of_its_tpot_waits_no_more(slack_ms: int) -> None:
    plan = plan_for(state_with_gathered(stream(slack_ms=slack_ms)))
    assert plan is not None
    assert [c.request.request_id for c in plan.ls] == ["stream"]


def test_a_prompt_waits_for_no_stage_of_parked_rows() -> None:
    prompt = request(
        "prompt",
        Place.PREFILLING,
        prompt=40,
        latency_sensitive=True,
        arrival_ns=NOW_NS,
        ttft_slo_ns=1000 * MS,
        tpot_slo_ns=100 * MS,
    )
    plan = plan_for(state_with_gathered(stream(slack_ms=95), prompt))
    assert plan is not None
    assert {c.request.request_id for c in plan.ls} == {"stream", "prompt"}


@pytest.mark.parametrize(("cohort_stage", "joins"), [(2, True), (3, False)])
def test_rows_that_decode_on_the_device_join_the_parked_rows_of_their_stage(
    cohort_stage: int, joins: bool
) -> None:
    state = state_with_gathered()
    resident = request("resident", Place.DEVICE, prompt=20, generated=2, server=0)
    state.be_device.append(resident)
    state.be_cohort_stage, state.be_cohort = cohort_stage, load_of([Chunk(resident, 21, 1)])
    state.be_cohort_since_ns = NOW_NS
    plan = plan_for(state)
    assert plan is not None
    assert plan.stages == range(2, 3)
    assert plan.be_until == (3 if joins else 0)
    assert plan.rows == (65 if joins else 64)


def test_a_stream_in_no_hurry_waits_for_a_few_passes_time_at_most() -> None:
    patient = stream(slack_ms=1)
    patient.tpot_slo_ns = 3600 * 1000 * MS
    alone_ns = model().pass_ns(load_of([Chunk(patient, patient.computed, 1)]))
    patient.last_token_ns = NOW_NS - int(8 * alone_ns)
    plan = plan_for(state_with_gathered(patient))
    assert plan is not None
    assert plan.regime is Regime.BE_STAGE
    patient.last_token_ns = NOW_NS - int(10 * alone_ns)
    plan = plan_for(state_with_gathered(patient))
    assert plan is not None
    assert [c.request.request_id for c in plan.ls] == ["stream"]


def test_few_parked_rows_ride_with_the_next_pass() -> None:
    plan = plan_for(state_with_gathered(stream(slack_ms=95), rows=2))
    assert plan is not None
    assert [c.request.request_id for c in plan.ls] == ["stream"]
    assert plan.allowance(2) >= 2


def gathered_in(*stages: int, rows: int = 64) -> EngineState:
    """`rows` parked rows at each of `stages`; those of the first are ready, the others away."""
    state = state_with_gathered(rows=rows, stage=stages[0])
    names = range(rows * len(stages))
    state.be_host.extend(request(f"o{i}", Place.HOST, prompt=5, generated=1) for i in names)
    for stage in stages[1:]:
        state.parked.away[stage] = rows
    return state


def ready_at(*stages: int, rows: int = 64) -> list[int]:
    return [rows if stage in stages else 0 for stage in range(STAGES)]


def test_a_run_of_stages_takes_gathered_cohorts_in_turns_as_they_come_back() -> None:
    state = gathered_in(0, 2)
    first = plan_for(state)
    assert first is not None
    assert first.stages == range(1)
    second = following(state, model(), first, ready_at(2), NOW_NS)
    assert second is not None
    assert second.stages == range(2, 3)
    assert second.rows == 64
    third = following(state, model(), second, ready_at(1, 3), NOW_NS)
    assert third is not None
    assert third.stages == range(1, 2)


def test_a_run_takes_rows_that_decode_on_the_device_along() -> None:
    state = gathered_in(0, 2)
    first = plan_for(state)
    assert first is not None
    resident = request("resident", Place.DEVICE, prompt=20, generated=2, server=0)
    state.be_cohort_stage, state.be_cohort = 2, load_of([Chunk(resident, 21, 1)])
    second = following(state, model(), first, ready_at(2), NOW_NS)
    assert second is not None
    assert (second.rows, second.be_until) == (65, 3)


def test_a_run_ends_where_few_rows_are_back_or_its_time_is_over_or_tokens_were_sampled() -> None:
    state = gathered_in(0, 2)
    first = plan_for(state)
    assert first is not None
    assert first.run is not None
    assert following(state, model(), first, ready_at(2, rows=3), NOW_NS) is None
    assert following(state, model(), first, ready_at(2), first.run.until_ns) is None
    sampled = plan_for(gathered_in(STAGES - 1, 2))
    assert sampled is not None
    assert following(state, model(), sampled, ready_at(2), NOW_NS) is None


def test_a_run_beside_streams_ends_before_their_pass() -> None:
    state = gathered_in(0, 2)
    state.ls_running.append(stream(slack_ms=95))
    first = plan_for(state)
    assert first is not None
    assert first.run is not None
    assert first.regime is Regime.BE_FIRST_STAGE
    stage_ns = model().stage_ns(2, 64)
    in_time = first.run.until_ns - int(stage_ns) - 1
    assert following(state, model(), first, ready_at(2), in_time) is not None
    assert following(state, model(), first, ready_at(2), in_time + 2) is None


def test_nothing_follows_a_stage_of_few_rows() -> None:
    state = gathered_in(0, 2)
    state.parked.ready[:] = [0, 1, 0, 0, 0]
    state.parked.oldest_ready_ns[1] = 0
    plan = plan_for(state)
    assert plan is not None
    assert (plan.stages, plan.run) == (range(1, 2), None)


def test_a_run_waits_for_a_cohort_that_is_away_but_not_while_streams_run() -> None:
    state = gathered_in(0, 2)
    first = plan_for(state)
    assert first is not None
    assert first.run is not None
    assert awaits(state, first, ready_at(2), NOW_NS)
    assert not awaits(state, first, ready_at(3), NOW_NS)
    assert not awaits(state, first, ready_at(2), first.run.until_ns)
    state.ls_running.append(stream(slack_ms=95))
    assert not awaits(state, first, ready_at(2), NOW_NS)
