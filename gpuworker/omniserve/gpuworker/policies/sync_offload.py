"""NEO: decode attention of some requests on the CPUs, in step with the device.

Models: rows whose KV is at a server go through all stages of one pass, as two sub-batches: while
the servers compute the attention of one, the device runs the dense part of the other, and each
stage waits for the answers of the rows that it takes. How many are taken is what the predicted
times of both allow, none at all if that does not pay within the pass's budget.

Leaves out: NEO's unequal sub-batches (LS rows and device-resident BE rows are in the first) and
its splitting of prefill attention. NEO knows no classes; here LS rows come first and the budget
is theirs, which is kinder to LS. A stage waits 100 ms at most, so that a stopped server does not
stop LS for ever.
"""

from __future__ import annotations

from dataclasses import replace

from omniserve.gpuworker import be_stages, scheduler
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Policy

_SUB_BATCHES = 2


class SyncOffload(Policy):
    """Passes wait for the servers."""

    name = "sync-offload"

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        most = self.options.prefill_tokens_max
        ls = scheduler.ls_work(state, model, now_ns, most)
        if ls:
            plan = scheduler.beside_ls(state, model, now_ns, ls, device_share=1.0, boards=False)
            limit = state.limits.be_rows_per_stage
        else:
            alone = be_stages.best_effort_only(state, model, now_ns, most, boards=False)
            plan = alone or Plan(range(state.stages), regime=Regime.BE_PASS)
            plan = replace(plan, budget_ns=float("inf"))
            limit = len(state.be_host)
        plan = _with_offloaded(plan, state, model, limit)
        idle = not ls and not plan.be and not plan.allowances
        return None if idle else replace(plan, preemptible=False)


def _with_offloaded(plan: Plan, state: EngineState, model: LatencyModel, limit: int) -> Plan:
    """Adds as many rows of the parking lot as the plan's budget allows."""
    parked = int((state.parked.ready + state.parked.away).sum())
    regime = Regime.BOARDING if plan.regime is Regime.LS_DECODE else plan.regime
    factor = model.factor(regime, plan.rows) / model.factor(plan.regime, plan.rows)

    def predicted(rows: int) -> float:
        """Both sub-batches of `rows`; the second's dense work hides the first's attention."""
        if rows == 0:
            return plan.predicted_ns
        own_ns = model.pass_ns(Load(rows=rows, sampled=rows))
        more_ns = model.middle[plan.rows + rows] - model.middle[plan.rows]
        wait_ns = max(0.0, state.parked.answer_ns - own_ns / state.stages)
        return (plan.predicted_ns + own_ns) * factor + state.stages * (more_ns + wait_ns)

    most = min(limit, -(-parked // _SUB_BATCHES))
    rows = scheduler.largest(most, lambda n: predicted(n) <= plan.budget_ns)
    if rows == 0:
        return plan
    return replace(
        plan,
        stages=[stage for stage in range(state.stages) for _ in range(_SUB_BATCHES)],
        allowances=(rows,) * state.stages,
        boarding_most=rows,
        lockstep=True,
        regime=regime,
        predicted_ns=predicted(rows),
    )
