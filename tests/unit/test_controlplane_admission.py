from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from omniserve.controlplane.admission import RETRY_MIN_S, Load, admit, predict_ttft_ms

IDLE = Load(
    ls_requests=0,
    ls_prefill_tokens_waiting=0,
    prefill_token_ms=1.0,
    decode_pass_ms=20.0,
    ls_running_max=4,
)
loads = st.builds(
    Load,
    ls_requests=st.integers(0, 500),
    ls_prefill_tokens_waiting=st.integers(0, 100_000),
    prefill_token_ms=st.floats(0, 100),
    decode_pass_ms=st.floats(0, 1000),
    ls_running_max=st.integers(1, 256),
)


def test_an_idle_worker_takes_a_prompt_that_it_can_prefill_in_time() -> None:
    assert admit(IDLE, prompt_tokens=100, slo_ttft_ms=1000, ls_waiting_max=4).admitted


def test_the_prediction_counts_prefills_ahead_and_a_pass() -> None:
    busy = replace(IDLE, ls_prefill_tokens_waiting=300)
    assert predict_ttft_ms(busy, prompt_tokens=100) == 420.0


def test_a_request_that_would_be_late_is_told_to_come_back_when_it_is_not() -> None:
    busy = replace(IDLE, ls_prefill_tokens_waiting=2880)
    verdict = admit(busy, prompt_tokens=100, slo_ttft_ms=1000, ls_waiting_max=4)
    assert not verdict.admitted
    assert verdict.predicted_ttft_ms == 3000.0
    assert verdict.retry_after_s == 2.0
    assert "3000 ms" in verdict.reason


def test_a_full_queue_refuses_however_fast_the_worker_is() -> None:
    full = replace(IDLE, ls_requests=8)
    assert not admit(full, 1, slo_ttft_ms=1e6, ls_waiting_max=4).admitted
    assert admit(replace(full, ls_requests=7), 1, slo_ttft_ms=1e6, ls_waiting_max=4).admitted


@given(loads, st.integers(1, 8192), st.floats(1, 10_000), st.integers(0, 64))
def test_a_looser_slo_never_turns_admission_into_refusal(
    load: Load, prompt_tokens: int, slo_ms: float, waiting_max: int
) -> None:
    tight = admit(load, prompt_tokens, slo_ms, waiting_max)
    loose = admit(load, prompt_tokens, slo_ms * 2, waiting_max)
    assert loose.admitted or not tight.admitted


@given(loads, st.integers(1, 8192), st.floats(1, 10_000), st.integers(0, 64))
def test_a_refusal_says_why_and_when_to_retry(
    load: Load, prompt_tokens: int, slo_ms: float, waiting_max: int
) -> None:
    verdict = admit(load, prompt_tokens, slo_ms, waiting_max)
    if not verdict.admitted:
        assert verdict.reason
        assert verdict.retry_after_s >= RETRY_MIN_S
