"""What runs where no LS row does: passes and single stages of best-effort rows.

Pure, as `scheduler`. With no LS request best effort has the device; with LS streams it has the
time that they can wait between two passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from omniserve.gpuworker import boarding, deadlines
from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.plan import Plan, Run
from omniserve.gpuworker.scheduler import CHUNK_MIN, LsWork, added_ns, be_chunks, cost_ns

# Stages of parked rows follow one another for so long before requests and memory are looked at.
_RUN_NS = 10_000_000
# Parked rows get a stage of their own between LS passes if it costs at most so many times what
# they would add to a stage with LS rows.
_ALONE_COST = 2.0


def best_effort_only(
    state: EngineState,
    model: LatencyModel,
    now_ns: int,
    prefill_tokens_max: int,
    *,
    boards: bool = True,
) -> Plan | None:
    """With no LS row: a BE cohort's pass or, where most rows are parked, a stage of them."""
    stages = range(max(state.be_cohort_stage, 0), state.stages)
    chunks: list[Chunk] = []
    load = state.be_cohort
    if state.be_cohort_stage < 0:
        # Who waits for memory gets it between two passes: then they must be short.
        most = prefill_tokens_max
        if state.ls_lacks_memory:
            most = min(most, max(state.limits.be_prefill_tokens, CHUNK_MIN))
        chunks, load = be_chunks(state, model, Load(), float("inf"), most, Regime.BE_PASS)
    if boards and load.rows == load.decode_rows and load.rows < state.parked.rows:
        until_ns = now_ns + (0 if state.ls_lacks_memory else _RUN_NS)
        return _be_stage(state, model, now_ns, chunks, load, until_ns)
    if not load.rows:
        return None
    everything = (len(state.be_host) if boards else 0,) * state.stages
    part = len(stages) / state.stages
    factor = model.factor(Regime.BE_PASS, load.rows)
    stage_ns = model.pass_ns(load) * factor / state.stages
    rows = boarding.expected(state.parked, everything, stage_ns)
    boarded_ns = added_ns(model, load, rows[stages.start :], stages.start)
    return Plan(
        stages,
        (),
        tuple(chunks),
        state.stages,
        everything,
        everything[0],
        regime=Regime.BE_PASS,
        rows=load.rows,
        predicted_ns=(model.pass_ns(load) * part + boarded_ns) * factor,
    )


def between_passes(state: EngineState, model: LatencyModel, now_ns: int, ls: LsWork) -> Plan | None:
    """A stage of BE rows alone that runs well, while all LS streams can wait for their pass.

    LS rows share their passes, and BE rows a stage, with more of their kind.
    """
    if ls.regime is not Regime.LS_DECODE or not state.parked.rows:
        return None
    ready = int(state.parked.ready.max())
    if not boarding.are_good(ready, state.parked, model) or not _pays(model, ready, ls.load.rows):
        return None
    pause = deadlines.pause_ns(ls.view, cost_ns(model, ls.load, Regime.LS_DECODE), now_ns)
    if pause <= 0:
        return None
    chunks: list[Chunk] = []
    load = state.be_cohort
    if load.decode_rows < load.rows:
        load = Load()
    if state.be_cohort_stage < 0:
        chunks, load = be_chunks(state, model, Load(), float("inf"), 0, Regime.BE_STAGE)
    return _be_stage(state, model, now_ns, chunks, load, now_ns + pause)


def following(
    state: EngineState,
    model: LatencyModel,
    plan: Plan,
    ready: Sequence[int] | npt.NDArray[np.int64],
    now_ns: int,
) -> Plan | None:
    """The next stage of the run that `plan` belongs to; None if it ends here.

    Of all that a decision looks at only the rows that are `ready`, by stage, and the BE cohort
    under way have changed since the run began.
    """
    run = _going_on(state, plan, now_ns)
    if run is None:
        return None
    cohort = state.be_cohort if state.be_cohort.decode_rows == state.be_cohort.rows else Load()
    for stage in run.cohorts:
        joins = cohort.rows > 0 and stage == state.be_cohort_stage
        rows = int(ready[stage]) + (cohort.rows if joins else 0)
        if rows >= run.rows:
            break
    else:
        return None
    predicted_ns = _stage_ns(model, stage, rows, cohort if joins else Load())
    if state.ls_running and now_ns + predicted_ns > run.until_ns:
        return None
    others = tuple([c for c in run.cohorts if c not in (stage, stage + 1)])
    return Plan(
        range(stage, stage + 1),
        be_until=stage + 1 if joins else 0,
        allowances=plan.allowances,
        boarding_most=plan.boarding_most,
        regime=model.be_stage_regime(stage),
        rows=rows,
        predicted_ns=predicted_ns,
        run=Run((*others, stage + 1), run.rows, run.until_ns),
    )


def awaits(
    state: EngineState, plan: Plan, away: Sequence[int] | npt.NDArray[np.int64], now_ns: int
) -> bool:
    """Whether the run that `plan` belongs to goes on when rows that are `away` have come back."""
    run = _going_on(state, plan, now_ns)
    return run is not None and not state.ls_running and any(away[s] for s in run.cohorts)


def _going_on(state: EngineState, plan: Plan, now_ns: int) -> Run | None:
    """The run of `plan`, unless its time is over or tokens were sampled."""
    run = plan.run
    if run is None or now_ns >= run.until_ns or plan.stages[0] == state.stages - 1:
        return None
    return run


def _pays(model: LatencyModel, rows: int, ls_rows: int) -> bool:
    """Whether a stage of `rows` alone costs little more than they would beside LS rows.

    Few rows ride for next to nothing, as the weights are read anyway.
    """
    stairs = model.middle
    riding_ns = stairs[ls_rows + rows] - stairs[ls_rows]
    alone_ns = stairs[rows] * model.factor(Regime.BE_STAGE, rows)
    return alone_ns <= _ALONE_COST * riding_ns


def _be_stage(
    state: EngineState,
    model: LatencyModel,
    now_ns: int,
    chunks: Sequence[Chunk],
    load: Load,
    until_ns: float,
) -> Plan | None:
    """One stage of parked rows and of the BE decode rows with `load`, where they are at it too.

    `chunks` are those of a cohort that would begin; others may follow until `until_ns`. None if no
    stage is worth running yet or, with LS streams, none would end by then.
    """
    parked, cohort_stage = state.parked, max(state.be_cohort_stage, 0)
    if load.rows:
        parked = parked.with_ready(cohort_stage, load.rows, state.be_cohort_since_ns)
    stage = boarding.pick_stage(parked, model, now_ns)
    if stage is None:
        return None
    rows = int(parked.ready[stage])
    joins = load.rows > 0 and stage == cohort_stage
    predicted_ns = _stage_ns(model, stage, rows, load if joins else Load())
    if state.ls_running and now_ns + predicted_ns > until_ns:
        return None
    everything = (len(state.be_host),) * state.stages
    return Plan(
        range(stage, stage + 1),
        be=tuple(chunks) if joins else (),
        be_until=stage + 1 if joins else 0,
        allowances=everything,
        boarding_most=everything[0],
        regime=model.be_stage_regime(stage),
        rows=rows,
        predicted_ns=predicted_ns,
        run=_run(parked, model, stage, int(until_ns)),
    )


def _run(parked: StageCounts, model: LatencyModel, stage: int, until_ns: int) -> Run | None:
    """What may follow a stage of gathered rows: they again, and those that gathered elsewhere."""
    good = boarding.good_rows(parked, model)
    if parked.ready[stage] < good:
        return None
    others = np.flatnonzero(parked.ready + parked.away >= good)
    others = others[(others != stage) & (others != stage + 1)]
    longest_first = others[parked.oldest_ready_ns[others].argsort()]
    return Run((*longest_first.tolist(), stage + 1), good, until_ns)


def _stage_ns(model: LatencyModel, stage: int, rows: int, cohort: Load) -> float:
    """The prediction for a stage of `rows` BE rows; those of `cohort` attend on the device."""
    attention_ns = model.attention_ns(cohort) if stage < model.layers else 0.0
    return (model.stage_ns(stage, rows) + attention_ns) * model.factor(
        model.be_stage_regime(stage), rows
    )
