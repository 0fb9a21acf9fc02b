"""Which prompts come first when not all can be in time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import MS, NOW_NS, model, request, state_with, states, stream

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import Load
from omniserve.gpuworker.ls_view import look
from omniserve.gpuworker.prompt_order import Prompt, by_deadline, in_order
from omniserve.gpuworker.requests import Place, Request


def prompt(name: str, left_ms: float, arrived_ms: int = 0, ttft_ms: int = 100) -> Prompt:
    """One that came `arrived_ms` ago."""
    made = request(
        name,
        Place.PREFILLING,
        prompt=10,
        latency_sensitive=True,
        arrival_ns=NOW_NS - arrived_ms * MS,
        ttft_slo_ns=ttft_ms * MS,
        tpot_slo_ns=100 * MS,
    )
    return Prompt(made, left_ms * MS)


def names(order: Sequence[Prompt]) -> list[str]:
    return [prompt.request.request_id for prompt in order]


def in_time(order: Sequence[Prompt]) -> int:
    """How many are done before their TTFT ends, one after the other."""
    done = itertools.accumulate((prompt.left_ns for prompt in order), initial=NOW_NS)
    ends = (prompt.request.next_deadline_ns() for prompt in order)
    return sum(at <= end for at, end in zip(itertools.islice(done, 1, None), ends, strict=True))


@st.composite
def bursts(draw: st.DrawFn) -> list[Prompt]:
    """By deadline; nobody has waited for so long that he comes first."""
    drawn = draw(
        st.lists(
            st.tuples(st.integers(1, 80), st.integers(0, 99), st.integers(50, 150)), max_size=6
        )
    )
    burst = [prompt(str(i), *values) for i, values in enumerate(drawn)]
    return sorted(burst, key=lambda one: one.request.next_deadline_ns())


def test_while_all_can_be_in_time_the_first_due_comes_first() -> None:
    burst = [prompt("long", 60, arrived_ms=20), prompt("short", 10), prompt("new", 20)]
    assert names(in_order(burst, 1.0, NOW_NS)) == ["long", "short", "new"]


def test_the_longest_steps_back_for_those_that_it_would_make_late() -> None:
    burst = [prompt("a", 30, 5), prompt("long", 60, 4), prompt("b", 30, 3), prompt("c", 30, 2)]
    assert names(in_order(burst, 1.0, NOW_NS)) == ["a", "b", "c", "long"]


def test_a_prompt_of_which_little_is_left_does_not_step_back() -> None:
    burst = [prompt("long, begun", 10, 5), prompt("a", 50, 3), prompt("b", 60, 2)]
    assert names(in_order(burst, 1.0, NOW_NS)) == ["long, begun", "a", "b"]


def test_of_two_that_are_as_long_the_newer_steps_back() -> None:
    burst = [prompt("old", 60, 5), prompt("new", 60, 4), prompt("short", 30, 3)]
    assert names(in_order(burst, 1.0, NOW_NS)) == ["old", "short", "new"]


def test_nobody_waits_for_others_after_twice_his_ttft() -> None:
    burst = [prompt("late", 150, 150), prompt("later", 150, 201), prompt("a", 30)]
    burst.sort(key=lambda one: one.request.next_deadline_ns())
    assert names(in_order(burst, 1.0, NOW_NS)) == ["later", "late", "a"]
    assert names(in_order(burst[1:], 1.0, NOW_NS)) == ["a", "late"]


def test_deadlines_are_those_of_a_tightened_slo() -> None:
    burst = [prompt("long", 50), prompt("a", 40)]
    assert names(in_order(burst, 1.0, NOW_NS)) == ["long", "a"]
    assert names(in_order(burst, 0.8, NOW_NS)) == ["a", "long"]


@given(burst=bursts())
def test_no_order_has_more_of_them_in_time(burst: list[Prompt]) -> None:
    order = in_order(burst, 1.0, NOW_NS)
    assert sorted(names(order)) == sorted(names(burst))
    assert in_time(order) == max(map(in_time, itertools.permutations(burst)))


def test_prompts_take_longer_beside_streams() -> None:
    waiting = prompt("waiting", 0).request
    alone = by_deadline(look(state_with(waiting)), model())
    beside = by_deadline(look(state_with(waiting, stream())), model())
    pass_ns = model().pass_ns(Load.decode(100))
    assert beside[0].left_ns == pytest.approx(alone[0].left_ns / (1 - pass_ns / (100 * MS)))
    many = [stream(str(index)) for index in range(500)]
    crowded = by_deadline(look(state_with(waiting, *many)), model())
    assert crowded[0].left_ns == pytest.approx(2 * alone[0].left_ns)


@given(state=states())
def test_every_prompt_of_a_state_has_its_place(state: EngineState) -> None:
    latency = model()
    held = [r for r in state.ls_running if r.generated == 0]
    assert same(in_order(by_deadline(look(state), latency), 0.8, NOW_NS), held)
    everyone = in_order(by_deadline(look(state), latency, waiting=True), 0.8, NOW_NS)
    assert same(everyone, [*held, *state.ls_waiting])


def same(order: Sequence[Prompt], requests: Sequence[Request]) -> bool:
    return sorted(names(order)) == sorted(r.request_id for r in requests)
