"""The arithmetic behind report.json."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.client.bench.arrivals import arrival_times_s
from omniserve.client.bench.metrics import (
    Outcome,
    RequestRecord,
    attainment,
    counted,
    percentile,
)


def completed(due_s: float, *token_times_s: float) -> RequestRecord:
    return RequestRecord(due_s, list(token_times_s), Outcome.COMPLETED)


def test_tpot_is_the_mean_gap_after_the_first_token() -> None:
    record = completed(1.0, 1.5, 1.6, 1.9)
    assert record.ttft_ms == pytest.approx(500)
    assert record.tpot_ms == pytest.approx(200)
    assert record.itl_ms() == pytest.approx([100, 300])


def test_a_single_token_is_judged_by_ttft_alone() -> None:
    record = completed(0.0, 0.5)
    assert record.tpot_ms is None
    assert record.meets(slo_ttft_ms=600, slo_tpot_ms=1)
    assert not record.meets(slo_ttft_ms=400, slo_tpot_ms=1)


def test_attainment_counts_refused_failed_and_unfinished_as_missed() -> None:
    within = completed(0.0, 0.1, 0.15)
    slow_tokens = completed(0.0, 0.1, 0.9)
    others = [
        RequestRecord(0.0, [0.1, 0.15], outcome)
        for outcome in (Outcome.REFUSED, Outcome.FAILED, Outcome.UNFINISHED)
    ]
    assert attainment([within, slow_tokens, *others], 200, 100) == pytest.approx(1 / 5)


def test_attainment_of_no_requests_has_no_value() -> None:
    assert attainment([], 200, 100) is None


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentiles_agree_with_the_inclusive_quantiles_of_the_standard_library(
    values: list[float],
) -> None:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    got = [percentile(values, p) for p in (25, 50, 75)]
    assert got == pytest.approx(quartiles, abs=1e-6)


def test_a_counter_that_fell_was_reset_by_a_restart() -> None:
    assert counted(10, 25) == 15
    assert counted(10, 4) == 4


def test_arrivals_repeat_with_the_seed_and_keep_their_rate() -> None:
    times = list(arrival_times_s(20.0, 1.0, 500.0, seed=1))
    assert times == list(arrival_times_s(20.0, 1.0, 500.0, seed=1))
    assert times == sorted(times)
    assert times[-1] < 500
    assert len(times) == pytest.approx(10_000, rel=0.05)


def test_lower_burstiness_spreads_the_gaps() -> None:
    def gap_deviation(burstiness: float) -> float:
        times = list(arrival_times_s(10.0, burstiness, 500.0, seed=2))
        return statistics.stdev(b - a for a, b in zip(times, times[1:], strict=False))  # noqa: RUF007

    assert gap_deviation(0.2) > gap_deviation(1.0) > gap_deviation(10.0)


def test_a_rate_of_zero_sends_nothing() -> None:
    assert list(arrival_times_s(0.0, 1.0, 10.0, seed=0)) == []
