"""The latency model's arithmetic, on a made-up profile."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import engine_states
from support.engine_states import LAYERS, PROFILE

from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.latency import LatencyProfile

rows = st.integers(0, 600)
loads = st.builds(Load, rows, rows, rows, st.integers(0, 10_000), st.integers(0, 10_000))


@pytest.fixture
def model() -> LatencyModel:
    return LatencyModel(PROFILE, LAYERS)


def test_a_measured_row_count_costs_what_was_measured(model: LatencyModel) -> None:
    for rows, middle_ns in zip(PROFILE.rows, PROFILE.middle_stage_ns, strict=True):
        assert model.stage_ns(1, rows) == middle_ns


def test_between_measured_row_counts_cost_is_interpolated(model: LatencyModel) -> None:
    (low, high), (low_ns, high_ns) = PROFILE.rows[1:3], PROFILE.middle_stage_ns[1:3]
    assert model.stage_ns(1, (low + high) // 2) == pytest.approx((low_ns + high_ns) / 2)


def test_what_a_bucket_has_left_is_free_where_rows_are_padded() -> None:
    padded = engine_states.model(padded=True)
    assert PROFILE.rows[3:5] == (16, 64)
    assert [padded.middle[rows] for rows in (0, 16, 17, 64)] == [0.0, 2e6, 5e6, 5e6]
    assert padded.middle.most_rows(0.0, 17, 100) == 64 - 17
    assert padded.middle.most_rows(0.0, 64, 100) == 0


def test_beyond_the_profile_cost_grows_with_rows(model: LatencyModel) -> None:
    last, last_ns = PROFILE.rows[-1], PROFILE.middle_stage_ns[-1]
    assert model.stage_ns(1, 3 * last) == pytest.approx(3 * last_ns)


def test_nothing_costs_nothing(model: LatencyModel) -> None:
    assert model.pass_ns(Load()) == 0.0
    assert all(model.stage_ns(stage, 0) == 0.0 for stage in range(LAYERS + 1))


def test_a_pass_is_the_sum_of_its_stages_and_its_attention(model: LatencyModel) -> None:
    load = Load.decode(100) + Load.prefill(10, 3, last=False)
    dense = (
        PROFILE.first_stage_ns[2]  # four rows
        + (LAYERS - 1) * PROFILE.middle_stage_ns[2]
        + PROFILE.last_stage_ns[0]  # only the decode row is sampled
    )
    attention = PROFILE.attend_row_ns + 100 * PROFILE.attend_kv_token_ns
    attention += (3 * (2 * 10 + 3) // 2) * PROFILE.attend_pair_ns
    assert model.pass_ns(load) == pytest.approx(dense + LAYERS * attention)


@given(load=loads, more=loads, padded=st.booleans())
def test_more_work_never_costs_less(load: Load, more: Load, padded: bool) -> None:
    model = engine_states.model(padded=padded)
    assert model.pass_ns(load) <= model.pass_ns(load + more)


def test_the_factor_converges_to_a_machine_that_is_slower_than_measured(
    model: LatencyModel,
) -> None:
    for _ in range(100):
        predicted = 1e6 * model.factor(Regime.LS_DECODE, 4)
        model.observe(Regime.LS_DECODE, 4, predicted, 1.5e6)
    assert model.factor(Regime.LS_DECODE, 4) == pytest.approx(1.5, rel=0.01)


def test_an_error_in_one_regime_says_nothing_of_another(model: LatencyModel) -> None:
    for _ in range(20):
        model.observe(Regime.BE_STAGE, 4, 1e6, 3e6)
    assert model.factor(Regime.BE_STAGE, 4) > 1.5
    assert all(model.factor(r, 4) == 1.0 for r in Regime if r is not Regime.BE_STAGE)


def test_sizes_not_met_yet_follow_the_nearest_that_was(model: LatencyModel) -> None:
    model.observe(Regime.LS_DECODE, 4, 1e6, 1.4e6)
    first = model.factor(Regime.LS_DECODE, 4)
    assert first > 1.0
    assert model.factor(Regime.LS_DECODE, 300) == first
    model.observe(Regime.LS_DECODE, 300, 1e6, 1e6)
    model.observe(Regime.LS_DECODE, 4, 1e6, 1e6 / 1.4)
    assert model.factor(Regime.LS_DECODE, 300) == first, "its own by now"
    assert model.factor(Regime.LS_DECODE, 4) < first


@given(measured=st.lists(st.sampled_from([1e-9, 1.0, 1e18, math.inf]), min_size=30, max_size=40))
def test_outliers_move_little(measured: list[float]) -> None:
    model = LatencyModel(PROFILE, LAYERS)
    for _ in range(20):
        model.observe(Regime.LS_DECODE, 1, 1e6, 1e6)
    for measured_ns in measured:
        before = model.factor(Regime.LS_DECODE, 1)
        model.observe(Regime.LS_DECODE, 1, 1e6, measured_ns)
        assert before * 0.95 <= model.factor(Regime.LS_DECODE, 1) <= before * 1.05


@pytest.mark.parametrize(("predicted", "measured"), [(0.0, 1e6), (1e6, 0.0), (1e6, -5.0)])
def test_nonsense_moves_nothing(model: LatencyModel, predicted: float, measured: float) -> None:
    model.observe(Regime.LS_DECODE, 1, predicted, measured)
    assert model.factor(Regime.LS_DECODE, 1) == 1.0


@given(
    fixed=st.integers(0, 300),
    limit=st.integers(0, 300),
    budget=st.floats(-1e6, 1e8),
    padded=st.booleans(),
)
def test_the_most_rows_within_a_budget_cost_no_more_than_it(
    fixed: int, limit: int, budget: float, padded: bool
) -> None:
    stairs = engine_states.model(padded=padded).middle
    rows = stairs.most_rows(budget, fixed, limit)
    assert rows == 0 or stairs[fixed + rows] - stairs[fixed] <= budget
    more = rows + 1
    assert rows == limit or stairs[fixed + more] - stairs[fixed] > budget


@given(rows=st.integers(1, 600), part=st.floats(0.1, 1.0), padded=st.booleans())
def test_fewest_rows_for_a_rate_reach_it(rows: int, part: float, padded: bool) -> None:
    model = engine_states.model(padded=padded)
    stairs = model.middle
    fewest = model.rows_for_rate(rows, part)
    assert 1 <= fewest <= rows
    assert fewest / stairs[fewest] >= part * rows / stairs[rows] * (1 - 1e-9)
    assert model.reaches_rate(fewest, rows, part * (1 - 1e-9))
    assert not model.reaches_rate(0, rows, part)


def test_stages_that_cost_more_than_their_rows_wait_for_more_of_them(model: LatencyModel) -> None:
    before = model.rows_for_rate(256, 0.9)
    for _ in range(100):
        for rows in (1, 2, 4, 8, 16, 32, 64):
            model.observe(Regime.BE_STAGE, rows, 1e6, 1e6 * (1 + 64 / rows))
    assert model.rows_for_rate(256, 0.9) > before


def test_a_step_between_two_sizes_is_not_the_price_of_a_row(model: LatencyModel) -> None:
    # 64 to 127 rows share a factor, and 128 to 255: between 127 and 128 rows nothing happens.
    for _ in range(200):
        for rows, factor in ((64, 1.3), (127, 1.3), (128, 1.1), (255, 1.1)):
            predicted = 1e6 * model.factor(Regime.BE_STAGE, rows)
            model.observe(Regime.BE_STAGE, rows, predicted, 1e6 * factor)
    below, above = model.rows_for_rate(120, 0.9), model.rows_for_rate(136, 0.9)
    assert below < 120
    assert above < 128
    assert abs(above - below) < 24


def test_a_profile_survives_json() -> None:
    assert LatencyProfile.from_json(PROFILE.to_json()) == PROFILE
    for broken in ("{}", "[]", "nonsense", '{"rows": 3}'):
        with pytest.raises(ValueError, match=r".+"):
            LatencyProfile.from_json(broken)
