"""All policies over whole runs under a virtual clock: see support.simulated_engine for the rules
that every iteration is checked against."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_states import LAYERS, MS, NOW_NS, PROFILE, request, states
from support.simulated_engine import Simulation, Weather

from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.placement import Moves
from omniserve.gpuworker.policies import POLICIES, Options
from omniserve.gpuworker.requests import Place, Request
from omniserve.gpuworker.settings import WorkerSettings

RUNS_BE = [name for name in POLICIES if name != "ls-only"]
STEPS_MAX = 4_000


def chat(index: int, arrival_ms: int, prompt: int, output: int) -> Request:
    return request(
        f"ls{index}",
        Place.WAITING,
        prompt=prompt,
        max_tokens=output,
        latency_sensitive=True,
        arrival_ns=arrival_ms * MS,
        ttft_slo_ns=500 * MS,
        tpot_slo_ns=50 * MS,
    )


def item(index: int, prompt: int, output: int, *, arrival_ms: int = 0, tenant: str = "") -> Request:
    made = request(
        f"be{index}", Place.WAITING, prompt=prompt, max_tokens=output, arrival_ns=arrival_ms * MS
    )
    made.tenant = tenant
    return made


def finish(simulation: Simulation) -> None:
    """Runs until nothing is left to do."""
    for _ in range(STEPS_MAX):
        if not simulation.step():
            return
    raise AssertionError("it does not end")


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    """Chats that come in bursts beside a backlog of two tenants. Each fits the device alone."""
    arrivals = sorted(draw(st.lists(st.integers(0, 400), max_size=8)))
    sizes = st.integers(1, 200)
    made = [chat(i, at, draw(sizes), draw(st.integers(1, 40))) for i, at in enumerate(arrivals)]
    for index in range(draw(st.integers(0, 10))):
        tenant = draw(st.sampled_from(["a", "b"]))
        arrival = draw(st.sampled_from([0, 0, 100]))
        output = draw(st.integers(1, 40))
        made.append(item(index, draw(sizes), output, arrival_ms=arrival, tenant=tenant))
    return made


@pytest.mark.parametrize("policy", RUNS_BE)
@given(
    load=loads(),
    seed=st.integers(0, 1000),
    blocks=st.sampled_from([24, 40, 80]),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    rows=st.sampled_from([1, 4, 16]),
    lost=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=25)
def test_every_request_ends_whatever_comes_together(
    policy: str,
    load: list[Request],
    seed: int,
    blocks: int,
    share: float,
    rows: int,
    lost: float,
) -> None:
    limits = Limits(be_device_kv_share=share, be_rows_per_stage=rows, ls_running_max=4)
    simulation = Simulation(
        policy, seed, blocks=blocks, limits=limits, weather=Weather(lost_answers=lost)
    )
    simulation.submit(*load)
    finish(simulation)
    assert {r.request_id for r in simulation.ended} == {r.request_id for r in load}
    assert simulation.state.blocks_free == blocks
    assert simulation.lot.parked == 0


def test_the_yardstick_runs_latency_sensitive_requests_alone() -> None:
    simulation = Simulation("ls-only")
    simulation.submit(item(0, 50, 10), chat(0, 10, 50, 10))
    finish(simulation)
    assert [r.request_id for r in simulation.ended] == ["ls0"]
    assert len(simulation.state.be_waiting) == 1


def best_effort_tokens(policy: str, *, chats: int, blocks: int = 64) -> tuple[int, Simulation]:
    """BE output tokens by the time that the last of `chats` has ended; a backlog that lasts."""
    weather = Weather(slowness=(1.0, 1.0), answer_ms=(0.1, 0.5))
    simulation = Simulation(policy, weather=weather, blocks=blocks, arena_pages=2000)
    simulation.submit(*(chat(i, 40 * i, 60, 30) for i in range(chats)))
    backlog = [item(i, 40, 200) for i in range(60)]
    simulation.submit(*backlog)
    while sum(r.latency_sensitive for r in simulation.ended) < chats:
        assert simulation.step()
    return sum(r.generated for r in backlog), simulation


@pytest.mark.parametrize("policy", ["omniserve", "preempt", "ls-first"])
def test_streams_keep_their_pace_beside_a_backlog(policy: str) -> None:
    _, simulation = best_effort_tokens(policy, chats=10)
    assert max(simulation.gaps_ns.values()) <= 2 * 50 * MS
    for ended in simulation.ended:
        if ended.latency_sensitive:
            tpot = (ended.last_token_ns - ended.first_token_ns) / (ended.generated - 1)
            assert tpot <= ended.tpot_slo_ns
            assert ended.first_token_ns - ended.arrival_ns <= ended.ttft_slo_ns


def test_piggybacking_serves_more_best_effort_than_a_small_device_alone() -> None:
    boarding, resident = (
        best_effort_tokens(policy, chats=10, blocks=24)[0] for policy in ("omniserve", "preempt")
    )
    assert boarding > resident


def test_what_preempt_and_omniserve_take_back_is_never_recomputed() -> None:
    for policy in ("omniserve", "preempt"):
        assert best_effort_tokens(policy, chats=10)[1].recomputed_tokens == 0


def test_a_small_tenant_is_served_beside_a_large_backlog() -> None:
    simulation = Simulation("omniserve")
    simulation.submit(*(item(i, 40, 20, tenant="large") for i in range(40)))
    simulation.submit(*(item(100 + i, 40, 20, tenant="small", arrival_ms=5) for i in range(3)))
    finish(simulation)
    order = [r.tenant for r in simulation.started]
    assert order[:8].count("small") == 3


class Nothing:
    """A host view without any server."""

    def is_mirrored(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def is_overdue(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def is_stranded(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def waits_at_start(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def can_reserve(self, request: Request) -> bool:  # noqa: ARG002
        return True


@pytest.mark.parametrize("policy", list(POLICIES))
@given(state=states())
@settings(max_examples=30)
def test_policies_change_nothing_and_repeat_themselves(policy: str, state: EngineState) -> None:
    decides = POLICIES[policy](Options(128, "auto"))
    model = LatencyModel(PROFILE, LAYERS)
    before = repr(state)

    def decision() -> tuple[Moves, str]:
        return decides.moves(state, Nothing()), repr(decides.plan(state, model, NOW_NS))

    assert decision() == decision()
    assert repr(state) == before


@given(states(), st.sampled_from([0.1, 0.5, 0.9]))
def test_reserve_keeps_its_headroom_of_rows_and_pages(state: EngineState, headroom: float) -> None:
    policy = POLICIES["reserve"](Options(100, "auto", headroom))
    assert policy.placement == "device"
    assert policy.rules.be_share == 1.0 - headroom
    plan = policy.plan(state, LatencyModel(PROFILE, LAYERS), NOW_NS)
    if plan is not None:
        assert sum(c.tokens for c in plan.be) <= 100 * (1.0 - headroom) + 1
        assert not any(plan.allowances)


def test_the_setting_names_every_policy() -> None:
    annotation = WorkerSettings.model_fields["policy"].annotation
    assert set(get_args(annotation)) == set(POLICIES)
