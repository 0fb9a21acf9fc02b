"""The inner loop's policy: which rows run in the next pass, and how many may board each stage.

`decide` is pure: the same state, model and time give the same plan. The order of claims is
LS decode > LS prefill chunks > BE prefill chunks > BE decode (OmniServe's online policy); what
fits is found by binary search over the latency model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.requests import Place, Request

# BE work that attends on the device takes budget that boarding rows could use later in the pass:
# it gets this part of what is left (OmniServe's stricter margin).
_DEVICE_BE_SHARE = 0.7
# An LS prompt advances by at least this much in every pass, or its own TTFT would starve.
_LS_CHUNK_MIN = 16
# How long parked rows wait for others of their stage.
PATIENCE_NS = 5_000_000
_COHORTS = 2


@dataclass(frozen=True)
class Plan:
    """One iteration. `stages` are run in order; BE leaves at any stage boundary if LS arrives."""

    stages: range
    ls: tuple[Chunk, ...] = ()
    be: tuple[Chunk, ...] = ()
    """Rows of a new BE cohort; empty if one is under way or none fits."""
    be_until: int = 0
    """The BE cohort, under way or new, runs the stages below this one that the pass meets."""
    allowance: int = 0
    """Parked rows that may board each stage."""
    budget_ns: float = 0.0
    predicted_ns: float = 0.0

    def without_best_effort(self) -> Plan:
        """The rest of the same pass with LS rows alone."""
        return replace(self, be_until=0, allowance=0)


def decide(
    state: EngineState, model: LatencyModel, now_ns: int, prefill_tokens_max: int
) -> Plan | None:
    """Returns the next iteration, or None if nothing can run."""
    ls = _ls_chunks(state, model, now_ns, prefill_tokens_max)
    if ls:
        return _beside_ls(state, model, now_ns, ls)
    return _best_effort_only(state, model, now_ns, prefill_tokens_max)


def budget_ns(state: EngineState, model: LatencyModel, now_ns: int) -> float:
    """Least slack over LS requests: what the next pass may take.

    Deadlines are those of an SLO tightened by the safety margin: a stream held to its last
    millisecond misses by any hiccup. A running stream's slack is never more than what keeps its
    next gap within 2 x TPOT. A waiting prompt's slack is what its TTFT leaves after its own
    remaining prefill, but one TPOT at most: the passes after this one have streams to serve that
    do not run yet.
    """
    aim = 1.0 - state.limits.safety_margin
    slack = float("inf")
    for request in state.ls_running:
        if request.generated > 0:
            slack = min(slack, _stream_slack_ns(request, aim, now_ns))
        else:
            left = Load.prefill(request.computed, request.known - request.computed, last=True)
            spare = request.next_deadline_ns(aim) - now_ns - model.pass_ns(left)
            slack = min(slack, spare, request.tpot_slo_ns * aim)
    return slack


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest n in 0..limit for which `fits(n)`, which must be monotone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _ls_chunks(
    state: EngineState, model: LatencyModel, now_ns: int, prefill_tokens_max: int
) -> list[Chunk]:
    """All LS decode rows, and as many prompt tokens as the running streams' slack allows."""
    decoding = [r for r in state.ls_running if r.generated > 0]
    chunks = [_decode(r) for r in decoding]
    load = sum((_load(c) for c in chunks), Load())
    aim = 1.0 - state.limits.safety_margin
    slack = min((_stream_slack_ns(r, aim, now_ns) for r in decoding), default=float("inf"))
    left = prefill_tokens_max
    prompts = (r for r in state.ls_running if r.generated == 0)
    for request in sorted(prompts, key=Request.next_deadline_ns):
        rest = request.known - request.computed
        least = min(rest, _LS_CHUNK_MIN)
        size = min(max(_largest_chunk(model, load, request, min(rest, left), slack), least), left)
        if size == 0:
            break
        chunks.append(Chunk(request, request.computed, size))
        load += _prefill_load(request, size)
        left -= size
    return chunks


def _largest_chunk(
    model: LatencyModel, load: Load, request: Request, limit: int, budget: float
) -> int:
    """Returns the largest prefill chunk of `request` that fits `budget` beside `load`."""
    return largest(limit, lambda n: model.pass_ns(load + _prefill_load(request, n)) <= budget)


def _beside_ls(state: EngineState, model: LatencyModel, now_ns: int, ls: list[Chunk]) -> Plan:
    """Fits BE work into what the LS rows leave of the budget."""
    load = sum((_load(c) for c in ls), Load())
    alone = model.pass_ns(load)
    budget = max(budget_ns(state, model, now_ns), alone)
    device_budget = alone + (budget - alone) * _DEVICE_BE_SHARE
    be: tuple[Chunk, ...] = ()
    be_until = 0
    be_ns = 0.0
    if state.be_cohort_stage >= 0:
        # A cohort under way need not finish in this pass: it goes as far as the budget lasts.
        added = model.pass_ns(load + Load(rows=state.be_cohort_rows)) - alone
        stages = largest(
            state.stages - state.be_cohort_stage,
            lambda n: alone + added * n / state.stages <= device_budget,
        )
        # LS requests that wait for memory wait for this cohort's end.
        stages = max(stages, 1) if state.ls_waiting else stages
        be_until = state.be_cohort_stage + stages
        be_ns = added * stages / state.stages
    else:
        prefill_tokens = state.limits.be_prefill_tokens
        be = tuple(_be_chunks(state, model, load, device_budget, prefill_tokens))
        be_until = state.stages if be else 0
        load = sum((_load(c) for c in be), load)
    allowance = largest(
        state.limits.be_rows_per_stage, lambda n: model.pass_ns(load, n) + be_ns <= budget
    )
    predicted = model.pass_ns(load, _expected_boarding(state, allowance)) + be_ns
    return Plan(range(state.stages), tuple(ls), be, be_until, allowance, budget, predicted)


def _best_effort_only(
    state: EngineState, model: LatencyModel, now_ns: int, prefill_tokens_max: int
) -> Plan | None:
    """With no LS row: the BE cohort's remaining stages, else a stage of parked rows."""
    everything = len(state.be_host)
    if state.be_cohort_stage >= 0:
        stages = range(state.be_cohort_stage, state.stages)
        return Plan(stages, be_until=state.stages, allowance=everything)
    chunks = _be_chunks(state, model, Load(), float("inf"), prefill_tokens_max)
    if chunks:
        load = sum((_load(c) for c in chunks), Load())
        predicted = model.pass_ns(load, _expected_boarding(state, everything))
        stages = range(state.stages)
        return Plan(stages, (), tuple(chunks), state.stages, everything, predicted_ns=predicted)
    stage = pick_stage(state.parked, now_ns)
    if stage is None:
        return None
    predicted = model.stage_ns(stage, int(state.parked.ready[stage]))
    return Plan(range(stage, stage + 1), allowance=everything, predicted_ns=predicted)


def pick_stage(parked: StageCounts, now_ns: int) -> int | None:
    """Returns the stage of parked rows to run when there is nothing else; None to wait.

    A stage costs nearly the same for one row as for many, so rows of a stage wait for one another
    (PATIENCE_NS at most: a stopped server must not hold up the other's rows), and the rows
    furthest behind go first until those of all stages have gathered in two cohorts: one for the
    worker, one for the servers.
    """
    waited = now_ns - parked.oldest_ready_ns > PATIENCE_NS
    runnable = np.flatnonzero((parked.ready > 0) & ((parked.away == 0) | waited))
    if not len(runnable):
        return None
    occupied = np.flatnonzero(parked.ready + parked.away)
    if len(occupied) <= _COHORTS:
        return int(runnable[parked.oldest_ready_ns[runnable].argmin()])
    stages = len(parked.ready)
    following = np.append(occupied[1:], occupied[0] + stages)
    distance = (following - occupied)[np.searchsorted(occupied, runnable)]
    return int(runnable[distance.argmin()])


def _be_chunks(
    state: EngineState, model: LatencyModel, load: Load, budget: float, prefill_tokens: int
) -> list[Chunk]:
    """BE prefill first (it feeds both decode paths), then device-resident decode rows."""
    chunks: list[Chunk] = []
    prefilling = next((r for r in state.be_device if r.place is Place.PREFILLING), None)
    if prefilling is not None:
        rest = min(prefilling.known - prefilling.computed, prefill_tokens)
        size = _largest_chunk(model, load, prefilling, rest, budget)
        if size:
            chunks.append(Chunk(prefilling, prefilling.computed, size))
            load += _prefill_load(prefilling, size)
    decoding = [
        r
        for r in state.be_device
        if r.place is Place.DEVICE
        and not r.leaving
        and len(r.blocks) * state.page_tokens > r.computed
    ]
    loads = [load]
    for request in decoding:
        loads.append(loads[-1] + Load.decode(request.known))
    fitting = largest(len(decoding), lambda n: model.pass_ns(loads[n]) <= budget)
    chunks.extend(_decode(r) for r in decoding[:fitting])
    return chunks


def _expected_boarding(state: EngineState, allowance: int) -> int:
    """Rows per stage that the parked rows can supply, on average."""
    return min(allowance, len(state.be_host) // state.stages)


def _stream_slack_ns(request: Request, aim: float, now_ns: int) -> float:
    gap_ends = request.last_token_ns + 2 * aim * request.tpot_slo_ns
    return min(request.next_deadline_ns(aim), gap_ends) - now_ns


def _decode(request: Request) -> Chunk:
    return Chunk(request, request.computed, 1)


def _prefill_load(request: Request, tokens: int) -> Load:
    last = request.computed + tokens == request.known
    return Load.prefill(request.computed, tokens, last=last)


def _load(chunk: Chunk) -> Load:
    if chunk.tokens == 1:
        return Load.decode(chunk.end)
    return Load.prefill(chunk.start, chunk.tokens, last=chunk.end == chunk.request.known)
