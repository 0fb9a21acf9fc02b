"""Sampling: greedy, and draws that depend on nothing but the seed and the position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_states import request
from support.sampling_reference import next_token

from omniserve.gpuworker import sampling
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.sampling import logprobs, uniform
from omniserve.gpuworker.sampling_params import SamplingParams

VOCABULARY = 64
SEED_MAX = 2**64 - 1


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """As the worker does, with all logits at hand."""
    return sampling.sample(logits.numpy().argmax(axis=-1), logits, requests)


def sampled_request(seed: int = 0, known: int = 1, temperature: float = 1.0) -> Request:
    """A request whose next token is at position `known`."""
    params = SamplingParams(temperature=temperature, seed=seed)
    return request("r", Place.DEVICE, prompt=known, sampling=params)


def made_up_logits(rows: int, seed: int = 0) -> torch.Tensor:
    """Returns [rows, VOCABULARY] float32."""
    return 3.0 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 5), seed=st.integers(0, 100))
def test_without_a_temperature_the_best_token_is_taken(rows: int, seed: int) -> None:
    logits = made_up_logits(rows, seed)
    requests = [sampled_request(seed=row, temperature=0.0) for row in range(rows)]
    assert sample(logits, requests) == [int(np.argmax(row)) for row in logits.numpy()]


@given(
    seed=st.integers(0, SEED_MAX),
    position=st.integers(1, 8191),
    others=st.lists(st.tuples(st.integers(0, SEED_MAX), st.sampled_from([0.0, 0.7, 2.0]))),
    data=st.data(),
)
def test_neither_the_batch_nor_the_place_in_it_changes_a_token(
    seed: int, position: int, others: list[tuple[int, float]], data: st.DataObject
) -> None:
    logits = made_up_logits(len(others) + 1, seed % 1000)
    requests = [sampled_request(other, temperature=heat) for other, heat in others]
    place = data.draw(st.integers(0, len(others)))
    requests.insert(place, sampled_request(seed, position))
    alone = sample(logits[place : place + 1], [sampled_request(seed, position)])
    assert sample(logits, requests)[place] == alone[0]


@given(seed=st.integers(0, SEED_MAX), position=st.integers(0, 8191))
def test_a_draw_repeats_and_lies_in_the_unit_interval(seed: int, position: int) -> None:
    draw = uniform(seed, position)
    assert 0.0 <= draw < 1.0
    assert uniform(seed, position) == draw


def test_a_draw_of_large_seeds_differs_from_that_of_their_neighbours() -> None:
    seeds = [0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, SEED_MAX - 1, SEED_MAX]
    assert len({uniform(seed, 7) for seed in seeds}) == len(seeds)
    assert len({uniform(SEED_MAX, position) for position in range(100)}) == 100


def test_seed_and_position_do_not_stand_for_each_other() -> None:
    assert uniform(3, 5) != uniform(5, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_over_many_positions_tokens_come_as_often_as_their_probability(temperature: float) -> None:
    """4000 draws: the bound is over four standard deviations of any token's frequency."""
    draws = 4000
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -30.0]])
    counts = np.zeros(logits.shape[1])
    for position in range(1, draws + 1):
        counts[sample(logits, [sampled_request(11, position, temperature)])[0]] += 1
    expected = torch.softmax(logits[0].double() / temperature, dim=-1).numpy()
    np.testing.assert_allclose(counts / draws, expected, atol=0.035)
    assert counts[-1] == 0


def test_seeds_at_one_position_are_as_uniform_as_positions_of_one_seed() -> None:
    by_seed = [uniform(seed, 9) for seed in range(2000)]
    by_position = [uniform(9, position) for position in range(2000)]
    for draws in (by_seed, by_position):
        tenths, _ = np.histogram(draws, bins=10, range=(0.0, 1.0))
        np.testing.assert_allclose(tenths / len(draws), 0.1, atol=0.03)


def test_a_temperature_close_to_zero_is_greedy() -> None:
    logits = made_up_logits(1)
    best = int(logits.argmax())
    for position in range(1, 50):
        assert sample(logits, [sampled_request(1, position, temperature=1e-4)]) == [best]
    assert sample(logits, [sampled_request(1, 1, temperature=1e-300)]) == [best]


def test_a_very_high_temperature_draws_from_all_tokens_alike() -> None:
    logits = made_up_logits(1)
    drawn = {sample(logits, [sampled_request(1, p, temperature=1e6)])[0] for p in range(1, 1001)}
    assert len(drawn) == VOCABULARY


def test_logits_far_apart_never_yield_a_token_outside_the_vocabulary() -> None:
    logits = torch.tensor([[-1e30, 1e4, 1e30], [0.0, 0.0, 0.0]])
    for position in range(1, 50):
        requests = [sampled_request(seed, position) for seed in (1, 2)]
        first, second = sample(logits, requests)
        assert first == 2
        assert second in (0, 1, 2)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        seed=draw(st.integers(0, SEED_MAX)),
        top_k=draw(st.sampled_from([0, 1, 2, 7, VOCABULARY - 1, VOCABULARY, 1000])),
        top_p=draw(st.sampled_from([0.0, 1e-6, 0.3, 0.9, 0.999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([0.0, 0.5, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5, 2.0])),
    )


TOKEN_LISTS = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)


def request_with(prompt: list[int], output: list[int], params: SamplingParams) -> Request:
    made = request(
        f"r{params.seed}",
        Place.DEVICE,
        prompt=len(prompt),
        generated=len(output),
        max_tokens=len(output) + 1,
        sampling=params,
    )
    made.tokens[: made.known] = [*prompt, *output]
    return made


@settings(deadline=None, max_examples=300)
@given(
    params=sampling_params(),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    output=TOKEN_LISTS,
    seed=st.integers(0, 2**31),
)
def test_a_token_is_the_one_that_the_textbook_draws(
    params: SamplingParams, prompt: list[int], output: list[int], seed: int
) -> None:
    logits = made_up_logits(1, seed)
    expected = next_token(logits[0], prompt, output, params)
    before = logits.clone()
    assert sample(logits, [request_with(prompt, output, params)]) == [expected]
    assert torch.equal(logits, before)


@settings(deadline=None)
@given(batch=st.lists(st.tuples(sampling_params(), TOKEN_LISTS), min_size=1, max_size=6))
def test_no_parameter_lets_the_batch_change_a_token(
    batch: list[tuple[SamplingParams, list[int]]],
) -> None:
    logits = made_up_logits(len(batch), len(batch))
    requests = [request_with([1], output, params) for params, output in batch]
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], requests[i : i + 1])[0] for i in range(len(batch))]
    backwards = sample(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards


def test_tokens_of_another_worker_count_as_output_of_the_same_request() -> None:
    params = SamplingParams(presence_penalty=2.0, frequency_penalty=1.0)
    whole = request_with([1, 2], [3, 4, 4], params)
    moved = request_with([1, 2, 3, 4], [4], params)
    moved.generated_before = 2
    for seed in range(20):
        logits = made_up_logits(1, seed)
        assert sample(logits, [moved]) == sample(logits, [whole])
    assert moved.output.tolist() == whole.output.tolist() == [3, 4, 4]


def test_equal_tokens_stay_or_go_together() -> None:
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, -5.0]])
    for params in (
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.1),
        SamplingParams(temperature=1.0, min_p=1.0),
    ):
        drawn = set()
        for position in range(1, 200):
            drawn.add(sample(logits, [request_with([0] * position, [], params)])[0])
        assert drawn == {0, 2, 3}


@settings(deadline=None)
@given(top=st.integers(1, 20), seed=st.integers(0, 1000), token=st.integers(0, VOCABULARY - 1))
def test_logprobs_are_those_of_the_model_best_first(top: int, seed: int, token: int) -> None:
    logits = made_up_logits(2, seed)
    params = SamplingParams(temperature=0.5, top_k=3, presence_penalty=1.0, logprobs=top)
    wants, plain = request_with([1], [2], params), request_with([1], [2], SamplingParams(seed=1))
    found = logprobs(logits, [plain, wants], [0, token])
    assert set(found) == {wants.request_id}
    expected = torch.log_softmax(logits[1].double(), dim=-1)
    best = expected.topk(top)
    entry = found[wants.request_id]
    assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-12)
    assert [t for t, _ in entry.top] == best.indices.tolist()
    np.testing.assert_allclose([p for _, p in entry.top], best.values.numpy(), atol=1e-12)


def test_of_equally_probable_tokens_the_lower_id_is_reported_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0]])
    wants = request_with([1], [], SamplingParams(logprobs=4))
    entry = logprobs(logits, [wants], [1])[wants.request_id]
    assert [token for token, _ in entry.top] == [1, 3, 0, 2]
