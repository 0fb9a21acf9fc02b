"""The inner loop's decision: which rows run in the next iteration, and how many may board.

Pure: the same state, model and time give the same plan. The order of claims is
LS decode > LS prefill chunks > BE prefill chunks > BE decode (OmniServe's online policy); what
fits is found by binary search over the latency model. The policies (`policies/`) put their plans
together from the parts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from omniserve.gpuworker import boarding
from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.deadlines import budget_ns
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.ls_view import LsView, look
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.prompt_order import Prompt, by_deadline, in_order
from omniserve.gpuworker.requests import Place, Request

# BE work that attends on the device takes budget that boarding rows could use later in the pass:
# it gets this part of what is left (OmniServe's stricter margin).
DEVICE_BE_SHARE = 0.7
# A chunk that is sure to run is at least this large: the most urgent LS prompt would starve.
CHUNK_MIN = 16


class LsWork(NamedTuple):
    """What LS does in the next pass: a step of every stream, and prompt chunks behind these."""

    chunks: list[Chunk]
    load: Load
    view: LsView
    prompts: list[Prompt]
    """Those that hold memory, by deadline."""

    @property
    def regime(self) -> Regime:
        """Of a pass with this alone."""
        return Regime.LS_PREFILL if self.prompts else Regime.LS_DECODE


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest n in 0..limit for which `fits(n)`, which should be monotone.

    Where it is not, n is some number that fits.
    """
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def ls_work(
    state: EngineState, model: LatencyModel, now_ns: int, prefill_tokens_max: int
) -> LsWork | None:
    """All LS decode rows, and as many prompt tokens as the running streams' slack allows.

    None if no LS request holds memory.
    """
    if not state.ls_running:
        return None
    view = look(state)
    if not view.prompts:
        return LsWork(view.streams, view.load, view, [])
    prompts = by_deadline(view, model)
    chunks, load = view.streams.copy(), view.load
    slack = view.due_ns - now_ns
    left = prefill_tokens_max
    least = CHUNK_MIN
    for request, _ in in_order(prompts, view.aim, now_ns):
        limit = min(request.known - request.computed, left)
        fitting = largest_chunk(model, load, request, limit, slack, Regime.LS_PREFILL)
        size = max(fitting, min(limit, least))
        if size == 0:
            break
        chunks.append(Chunk(request, request.computed, size))
        load += prefill_load(request, size)
        if size < limit:  # the slack is used up
            break
        left -= size
        least = 0
    return LsWork(chunks, load, view, prompts)


def be_chunks(
    state: EngineState,
    model: LatencyModel,
    load: Load,
    budget: float,
    prefill_tokens: int,
    regime: Regime,
) -> tuple[list[Chunk], Load]:
    """BE prefill first (it feeds both decode paths), then device-resident decode rows.

    Returns their chunks and what these add to `load`: with it they cost at most `budget`.
    """
    alone = load
    chunks: list[Chunk] = []
    decoding: list[Request] = []
    on_device, page_tokens = Place.DEVICE, state.page_tokens
    for request in state.be_device:
        if request.place is on_device:
            if not request.leaving and len(request.blocks) * page_tokens > request.computed:
                decoding.append(request)
        elif not chunks:
            rest = min(request.known - request.computed, prefill_tokens)
            size = largest_chunk(model, load, request, rest, budget, regime) if rest else 0
            if size:
                chunks.append(Chunk(request, request.computed, size))
                load += prefill_load(request, size)
    contexts = list(accumulate([r.known for r in decoding], initial=0))

    def beside(n: int) -> Load:
        return load + Load(n, n, n, contexts[n], 0)

    fitting = largest(len(decoding), lambda n: cost_ns(model, beside(n), regime) <= budget)
    chunks.extend([Chunk(r, r.computed, 1) for r in decoding[:fitting]])
    return chunks, beside(fitting) - alone


def largest_chunk(
    model: LatencyModel, load: Load, request: Request, limit: int, budget: float, regime: Regime
) -> int:
    """Returns the largest prefill chunk of `request` that fits `budget` beside `load`."""
    return largest(
        limit, lambda n: cost_ns(model, load + prefill_load(request, n), regime) <= budget
    )


def cost_ns(model: LatencyModel, load: Load, regime: Regime) -> float:
    """The prediction for a pass with `load`."""
    return model.pass_ns(load) * model.factor(regime, load.rows)


def prefill_load(request: Request, tokens: int) -> Load:
    last = request.computed + tokens == request.known
    return Load.prefill(request.computed, tokens, last=last)


def beside_ls(
    state: EngineState,
    model: LatencyModel,
    now_ns: int,
    ls: LsWork,
    *,
    device_share: float = DEVICE_BE_SHARE,
    boards: bool = True,
) -> Plan:
    """Fits BE work into what the LS rows leave of the budget.

    `device_share` of it is for BE rows that attend on the device, the rest for boarding ones.
    """
    load, alone_regime = ls.load, ls.regime
    alone = cost_ns(model, load, alone_regime)
    prompts = by_deadline(ls.view, model, waiting=True) if ls.view.waiting else ls.prompts
    budget = max(budget_ns(ls.view, prompts, now_ns), alone)
    device_budget = alone + (budget - alone) * device_share
    be: list[Chunk] = []
    be_until = 0
    be_ns = 0.0  # uncorrected, of a cohort that runs a part of its stages
    regime = alone_regime
    if state.be_cohort_stage >= 0:
        stages, be_ns = _resumed(state, model, load, device_budget)
        if stages:
            regime, be_until = Regime.BE_COHORT, state.be_cohort_stage + stages
    else:
        prefill_tokens = state.limits.be_prefill_tokens
        be, be_load = be_chunks(state, model, load, device_budget, prefill_tokens, Regime.BE_COHORT)
        if be:
            regime, be_until = Regime.BE_COHORT, state.stages
            load += be_load
    boards = boards and bool(state.be_host)
    if boards and regime is Regime.LS_DECODE:
        regime = Regime.BOARDING
    factor = model.factor(regime, load.rows)
    fixed_ns = model.pass_ns(load) + be_ns
    most = state.limits.be_rows_per_stage if boards else 0
    allowed = boarding.allowances(state.parked, model, load, budget / factor - fixed_ns, most)
    boarded_ns = 0.0
    if any(allowed):
        stage_ns = fixed_ns * factor / state.stages
        rows = boarding.expected(state.parked, allowed, stage_ns)
        boarded_ns = added_ns(model, load, rows)
    elif regime is Regime.BOARDING:
        regime, factor = alone_regime, model.factor(alone_regime, load.rows)
    return Plan(
        range(state.stages),
        tuple(ls.chunks),
        tuple(be),
        be_until,
        allowed,
        most if any(allowed) else 0,
        budget_ns=budget,
        regime=regime,
        rows=load.rows,
        ls_ns=alone,
        predicted_ns=(fixed_ns + boarded_ns) * factor,
    )


def _resumed(
    state: EngineState, model: LatencyModel, load: Load, budget: float
) -> tuple[int, float]:
    """How many stages the cohort under way gets within `budget`, and their cost, uncorrected.

    It need not finish in this pass: it goes as far as the budget lasts.
    """
    factor = model.factor(Regime.BE_COHORT, load.rows)
    added = model.pass_ns(load + state.be_cohort) - model.pass_ns(load)
    room = budget / factor - model.pass_ns(load)
    stages = 0
    if room > 0 and added > 0:
        stages = min(int(room * state.stages / added), state.stages - state.be_cohort_stage)
    # LS requests that wait for memory wait for this cohort's end.
    stages = max(stages, 1) if state.ls_lacks_memory else stages
    return stages, added * stages / state.stages


def added_ns(model: LatencyModel, load: Load, rows: Sequence[float], first_stage: int = 0) -> float:
    """What boarding adds to a pass with `load`; `rows` from `first_stage` on."""
    total = 0.0
    for stage, boarded in enumerate(rows, first_stage):
        fixed = load.sampled if stage == model.layers else load.rows
        stairs = model.staircase(stage)
        total += stairs[fixed + round(boarded)] - stairs[fixed]
    return total
