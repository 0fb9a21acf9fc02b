"""Sampling: greedy, and draws that depend on nothing but the seed and the position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import request

from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.sampling import sample, uniform

VOCABULARY = 64
SEED_MAX = 2**64 - 1


def sampled_request(seed: int = 0, known: int = 1, temperature: float = 1.0) -> Request:
    """A request whose next token is at position `known`."""
    return request("r", Place.DEVICE, prompt=known, temperature=temperature, seed=seed)


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
