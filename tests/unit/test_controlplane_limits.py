from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.controlplane import limits
from omniserve.controlplane.limits import STEP_S, Limits, State, decide
from omniserve.controlplane.slo_state import Window

TARGET = 0.95


@st.composite
def windows(draw: st.DrawFn) -> Window:
    total = draw(st.integers(1, 1000))
    return Window(total, draw(st.integers(0, total)))


bounded_limits = st.builds(
    Limits,
    ls_running_max=st.integers(1, 256),
    be_rows_per_stage=st.integers(*limits.ROWS_BOUNDS),
    be_prefill_tokens_per_iteration=st.integers(*limits.PREFILL_TOKENS_BOUNDS),
    be_device_kv_share=st.floats(*limits.KV_SHARE_BOUNDS),
    safety_margin=st.floats(*limits.MARGIN_BOUNDS),
)
states = st.builds(
    State,
    limits=bounded_limits,
    changed_s=st.just(0.0),
    target=st.just(TARGET),
    window=windows(),
    latest=windows(),
)


def be_room(of: Limits) -> tuple[float, float, float, float]:
    """More in every place means more best-effort work."""
    return (
        of.be_rows_per_stage,
        of.be_prefill_tokens_per_iteration,
        of.be_device_kv_share,
        -of.safety_margin,
    )


@given(states, st.floats(0, 1e6))
def test_limits_never_leave_their_bounds(state: State, now_s: float) -> None:
    decided = decide(state, now_s)
    for value, (low, high) in (
        (decided.be_rows_per_stage, limits.ROWS_BOUNDS),
        (decided.be_prefill_tokens_per_iteration, limits.PREFILL_TOKENS_BOUNDS),
        (decided.be_device_kv_share, limits.KV_SHARE_BOUNDS),
        (decided.safety_margin, limits.MARGIN_BOUNDS),
    ):
        assert low <= value <= high
    assert decided.ls_running_max == state.limits.ls_running_max


@given(states, st.floats(0, 1e6))
def test_a_decision_is_a_function_of_state_and_time(state: State, now_s: float) -> None:
    assert decide(state, now_s) == decide(replace(state), now_s)


@given(states, windows(), windows())
def test_better_attainment_never_leaves_best_effort_less_room(
    state: State, window: Window, latest: Window
) -> None:
    other = replace(state, window=window, latest=latest)
    if window.attainment >= state.window.attainment and (
        latest.attainment >= state.latest.attainment
    ):
        better, worse = be_room(decide(other, STEP_S)), be_room(decide(state, STEP_S))
        assert all(b >= w for b, w in zip(better, worse, strict=True))


@given(states)
def test_missing_the_target_shrinks_and_meeting_it_grows(state: State) -> None:
    before = be_room(state.limits)
    missing = replace(state, window=Window(100, 50), latest=Window(10, 5))
    meeting = replace(state, window=Window(100, 99))
    assert all(a <= b for a, b in zip(be_room(decide(missing, STEP_S)), before, strict=True))
    assert all(a >= b for a, b in zip(be_room(decide(meeting, STEP_S)), before, strict=True))


@given(states, st.floats(0, STEP_S, exclude_max=True))
def test_limits_hold_still_between_steps(state: State, now_s: float) -> None:
    assert decide(state, now_s) == state.limits


def test_old_misses_do_not_go_on_shrinking() -> None:
    state = State(Limits(), 0.0, TARGET, window=Window(100, 50), latest=Window(10, 10))
    assert decide(state, STEP_S) == Limits()


def test_sustained_misses_reach_the_floor_and_quiet_reaches_the_ceiling() -> None:
    current = Limits()
    for step in range(100):
        current = decide(State(current, step, TARGET, Window(10, 0), Window(10, 0)), step + STEP_S)
    assert current.be_rows_per_stage == limits.ROWS_BOUNDS[0]
    assert current.safety_margin == limits.MARGIN_BOUNDS[1]
    for step in range(100):
        current = decide(State(current, step, TARGET, Window(9, 9), Window()), step + STEP_S)
    assert current.be_rows_per_stage == limits.ROWS_BOUNDS[1]
    assert current.safety_margin == limits.MARGIN_BOUNDS[0]


def test_without_ls_requests_limits_recover_to_the_start_and_stay_there() -> None:
    current = Limits(64, 1, 8, 0.1, 0.6)
    for step in range(100):
        current = decide(State(current, step, TARGET, Window(), Window()), step + STEP_S)
    assert be_room(current) == pytest.approx(be_room(Limits()))
    grown = Limits(64, 40, 200, 0.7, 0.1)
    assert decide(State(grown, 0.0, TARGET, Window(), Window()), STEP_S) == grown
