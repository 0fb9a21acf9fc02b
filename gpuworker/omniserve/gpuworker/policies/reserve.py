"""Llumnix-like static headroom: a fixed share of KV and of rows is kept free for LS.

Models: BE may hold (1 - headroom) of the device KV and of the rows of a pass
(`--prefill-chunk-tokens-max`), whatever LS does at the moment: no deadline is looked at and no
latency predicted for BE work. LS rows come first in the order of claims. A pass that has begun
runs to its end. If LS needs more memory than its headroom, the newest BE requests start over.

Leaves out: migration between instances, Llumnix's main means (there is one worker), and its
dynamic adjustment of the headroom. `benchmarks/coserve.py` runs it with several headrooms and
reports the best.
"""

from __future__ import annotations

from dataclasses import replace

from omniserve.gpuworker import scheduler
from omniserve.gpuworker.cohort import load_of
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Options, Policy


class Reserve(Policy):
    """The device only; shares instead of predictions."""

    name = "reserve"
    uses_servers = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        share = 1.0 - options.reserve_headroom
        self.rules = replace(self.rules, be_share=share, recomputes=True)
        self._be_rows = max(1, int(share * options.prefill_tokens_max))

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        ls = scheduler.ls_work(state, model, now_ns, self.options.prefill_tokens_max)
        regime = Regime.BE_COHORT if ls else Regime.BE_PASS
        chunks, _ = scheduler.be_chunks(state, model, Load(), float("inf"), self._be_rows, regime)
        chunks.sort(key=lambda chunk: chunk.tokens)  # decode rows first; a prompt takes the rest
        be = []
        rows = self._be_rows
        for chunk in chunks:
            if rows > 0:
                be.append(chunk._replace(tokens=min(chunk.tokens, rows)))
                rows -= be[-1].tokens
        if not be:
            if ls is None:
                return None
            regime = ls.regime
        ls_chunks = ls.chunks if ls else []
        load = load_of([*ls_chunks, *be])
        predicted = scheduler.cost_ns(model, load, regime)
        return Plan(
            range(state.stages),
            tuple(ls_chunks),
            tuple(be),
            be_until=state.stages,
            preemptible=False,
            budget_ns=predicted,
            regime=regime,
            rows=load.rows,
            predicted_ns=predicted,
        )
