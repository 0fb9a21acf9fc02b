"""Made-up requests and engine states for tests of the policies, under a virtual clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from omniserve.gpuworker import deadlines
from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import LatencyModel, Load
from omniserve.gpuworker.ls_view import look
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies import POLICIES, Options
from omniserve.gpuworker.prompt_order import by_deadline
from omniserve.gpuworker.requests import Place, Request
from omniserve.latency import LatencyProfile

MS = 1_000_000
LAYERS = 4
STAGES = LAYERS + 1
PAGE_TOKENS = 16
NOW_NS = 1_000 * MS
PREFILL_MAX = 128

PROFILE = LatencyProfile(
    hardware="none",
    model="none",
    dtype="float32",
    rows=(1, 2, 4, 16, 64, 256),
    first_stage_ns=(1e5, 1e5, 1.2e5, 2e5, 6e5, 2e6),
    middle_stage_ns=(1e6, 1.1e6, 1.3e6, 2e6, 5e6, 1.6e7),
    last_stage_ns=(2e6, 2.1e6, 2.4e6, 5e6, 1.4e7, 5e7),
    attend_row_ns=1e4,
    attend_kv_token_ns=50.0,
    attend_pair_ns=10.0,
)


def request(
    name: str,
    place: Place,
    *,
    prompt: int,
    max_tokens: int = 32,
    generated: int = 0,
    computed: int | None = None,
    latency_sensitive: bool = False,
    blocks: int | None = None,
    **fields: Any,
) -> Request:
    """A request as the engine would hold it; `blocks` pages, else those of its place.

    LS holds the pages of prompt + max_tokens, BE those of the tokens it knows and one more.
    """
    known = prompt + generated
    made = Request(
        name,
        latency_sensitive,
        np.zeros(prompt + max_tokens, np.int64),
        prompt,
        fields.pop("arrival_ns", 0),
        known=known,
        place=place,
        **fields,
    )
    made.computed = (known - 1 if generated else 0) if computed is None else computed
    on_device = place in (Place.PREFILLING, Place.DEVICE, Place.RESTORING)
    if blocks is None:
        tokens = made.limit if latency_sensitive else known + 1
        blocks = -(-tokens // PAGE_TOKENS) if on_device else 0
    made.blocks = [-1] * blocks
    return made


@st.composite
def ls_requests(draw: st.DrawFn, index: int) -> Request:
    """A running LS request: in prefill, or a stream that is early, on time or late."""
    generated = draw(st.integers(0, 8))
    prompt = draw(st.integers(1, 300))
    computed = draw(st.integers(0, prompt - 1)) if generated == 0 else None
    arrival = NOW_NS - draw(st.integers(0, 1500)) * MS
    last = NOW_NS - draw(st.integers(0, 150)) * MS
    return request(
        f"ls{index}",
        Place.PREFILLING,
        prompt=prompt,
        generated=generated,
        computed=computed,
        latency_sensitive=True,
        arrival_ns=arrival,
        ttft_slo_ns=draw(st.sampled_from([200, 1000])) * MS,
        tpot_slo_ns=draw(st.sampled_from([20, 50, 100])) * MS,
        first_token_ns=last - generated * 30 * MS if generated else 0,
        last_token_ns=last if generated else 0,
    )


@st.composite
def stage_counts(draw: st.DrawFn) -> StageCounts:
    """Parked rows of any stages, ready for anything up to 20 ms, or away."""
    counts = st.lists(st.integers(0, 4), min_size=STAGES, max_size=STAGES)
    ready = np.asarray(draw(counts), dtype=np.int64)
    ages = draw(st.lists(st.integers(0, 20), min_size=STAGES, max_size=STAGES))
    oldest = NOW_NS - np.asarray(ages, dtype=np.int64) * MS
    oldest[ready == 0] = np.iinfo(np.int64).max
    starved = draw(st.lists(st.sampled_from(range(STAGES)), max_size=2, unique=True))
    return StageCounts(
        ready,
        np.asarray(draw(counts), dtype=np.int64),
        oldest,
        overdue=tuple(stage for stage in starved if ready[stage]),
        answer_ns=draw(st.sampled_from([0.0, 0.2, 5.0])) * MS,
        in_time=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@st.composite
def states(draw: st.DrawFn, *, ls_max: int = 6, be_max: int = 6) -> EngineState:
    """An engine in mid traffic whose memory adds up; `blocks_free` may be zero."""
    state = EngineState(0, PAGE_TOKENS, STAGES)
    state.limits = Limits(
        ls_running_max=draw(st.integers(1, 8)),
        be_rows_per_stage=draw(st.integers(0, 16)),
        be_prefill_tokens=draw(st.integers(0, 64)),
        be_device_kv_share=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        safety_margin=draw(st.sampled_from([0.0, 0.2, 0.9])),
    )
    for index in range(draw(st.integers(0, ls_max))):
        running: Request = draw(ls_requests(index))
        state.ls_running.append(running)
    for index in range(draw(st.integers(0, be_max))):
        first = index == 0 and draw(st.booleans())
        prompt = draw(st.integers(1, 120))
        if first:
            made = request(f"be{index}", Place.PREFILLING, prompt=prompt, server=0)
        else:
            generated = draw(st.integers(1, 8))
            server = draw(st.sampled_from([0, 0, 0, -1]))  # -1: its arena was lost meanwhile
            made = request(
                f"be{index}", Place.DEVICE, prompt=prompt, generated=generated, server=server
            )
            made.leaving = draw(st.booleans())
            made.in_cohort = draw(st.booleans())
            if draw(st.booleans()):  # its last page is full
                made.blocks = made.blocks[: made.computed // PAGE_TOKENS]
                made.computed = len(made.blocks) * PAGE_TOKENS
        state.be_device.append(made)
    for index in range(draw(st.integers(0, be_max))):
        place = draw(st.sampled_from([Place.HOST, Place.HOST, Place.RESTORING]))
        parked = request(f"host{index}", place, prompt=draw(st.integers(1, 60)), generated=1)
        state.be_host.append(parked)
        if place is Place.RESTORING:
            state.be_restoring.append(parked)
    for index in range(draw(st.integers(0, 3))):
        waiting = request(
            f"wait{index}", Place.WAITING, prompt=draw(st.integers(1, 200)), latency_sensitive=True
        )
        waiting.tpot_slo_ns = waiting.ttft_slo_ns = 100 * MS
        state.ls_waiting.append(waiting)
    for index in range(draw(st.integers(0, 3))):
        prompt = draw(st.integers(1, 100))
        state.be_waiting.append(request(f"queued{index}", Place.WAITING, prompt=prompt))
    held = sum(len(r.blocks) for r in [*state.ls_running, *state.be_device, *state.be_host])
    state.blocks_free = draw(st.integers(0, 40))
    state.blocks_total = held + state.blocks_free
    state.parked = draw(stage_counts())
    under_way = draw(st.booleans())
    if state.be_device and under_way:
        state.be_cohort_stage = draw(st.integers(0, LAYERS))
        rows = draw(st.integers(1, 80))
        state.be_cohort = Load.decode(50) + Load.prefill(draw(st.integers(0, 90)), rows, last=True)
    return state


def model(*, padded: bool = False) -> LatencyModel:
    return LatencyModel(dataclasses.replace(PROFILE, padded=padded), LAYERS)


def plan_for(state: EngineState, latency: LatencyModel | None = None) -> Plan | None:
    policy = POLICIES["omniserve"](Options(PREFILL_MAX, "auto"))
    return policy.plan(state, latency or model(), NOW_NS)


def stream(name: str = "stream", *, slack_ms: int = 50, context: int = 100) -> Request:
    """A running LS stream whose next token is due in `slack_ms`."""
    tpot = 100 * MS
    last = NOW_NS + slack_ms * MS - tpot
    return request(
        name,
        Place.PREFILLING,
        prompt=context - 1,
        generated=1,
        latency_sensitive=True,
        ttft_slo_ns=1000 * MS,
        tpot_slo_ns=tpot,
        first_token_ns=last,
        last_token_ns=last,
    )


def state_with(*ls: Request, be: tuple[Request, ...] = ()) -> EngineState:
    state = EngineState(1000, PAGE_TOKENS, STAGES, blocks_free=500)
    state.limits = Limits(safety_margin=0.0)
    state.parked = StageCounts.empty(STAGES)
    state.ls_running.extend(ls)
    state.be_device.extend(be)
    return state


def budget_ns(state: EngineState, latency: LatencyModel, now_ns: int) -> float:
    """What the next pass may take for LS's sake."""
    view = look(state)
    return deadlines.budget_ns(view, by_deadline(view, latency, waiting=True), now_ns)
