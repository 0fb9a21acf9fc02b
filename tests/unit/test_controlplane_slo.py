import pytest

from omniserve.controlplane.slo_state import Timing, Window


def timing(*arrivals_ms: float) -> Timing:
    """A request that arrived at 0 with an SLO of 100 ms and 10 ms, one token per arrival."""
    request = Timing(0.0, ttft_ms_max=100, tpot_ms_max=10)
    for arrival_ms in arrivals_ms:
        request.tokens_at(arrival_ms / 1e3, 1)
    return request


def test_time_per_output_token_leaves_the_first_one_out() -> None:
    assert timing(50, 58, 66).tpot_ms == pytest.approx(8)
    assert timing(50, 58, 66).ttft_ms == pytest.approx(50)


@pytest.mark.parametrize(
    ("arrivals_ms", "met"),
    [((90, 99), True), ((110, 111), False), ((50, 75), False), ((90,), True), ((110,), False)],
)
def test_a_request_meets_its_slo_if_both_times_do(
    arrivals_ms: tuple[float, ...], met: bool
) -> None:
    assert timing(*arrivals_ms).met() is met


def test_a_request_without_tokens_or_with_an_error_has_missed() -> None:
    assert not timing().met()
    failed = timing(50)
    failed.failed = True
    assert not failed.met()


def test_a_caller_who_gives_up_has_seen_a_miss_only_after_the_slo() -> None:
    assert not timing().missed_by(0.09)
    assert timing().missed_by(0.11)
    assert not timing(50).missed_by(5.0)


def test_attainment_of_no_requests_is_one() -> None:
    assert Window().attainment == 1.0
    assert Window(4, 3).attainment == 0.75
