"""Sarathi-Serve with two priorities: one batch on the device, prompts in chunks, LS rows first.

Models: stall-free batching. LS decode rows always run, then LS prompt chunks, then BE prompt
chunks and decode rows, as many tokens as the TPOT of the running streams leaves. A pass that has
begun runs to its end. Under memory pressure LS takes the pages of the newest BE requests, which
start over (vLLM's preemption by recomputing).

Leaves out: a token budget that is fixed by a profile once. Here the latency model finds it for
every pass, which is kinder to BE. BE requests take the pages of prompt + max_tokens when they
start, where vLLM takes them one by one: there are fewer of them, and none of them is preempted
by another.
"""

from __future__ import annotations

from dataclasses import replace

from omniserve.gpuworker import be_stages, scheduler
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Options, Policy


class LsFirst(Policy):
    """The device only; nothing is preempted within a pass."""

    name = "ls-first"
    uses_servers = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.rules = replace(self.rules, recomputes=True)

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        most = self.options.prefill_tokens_max
        ls = scheduler.ls_work(state, model, now_ns, most)
        if ls:
            plan = scheduler.beside_ls(state, model, now_ns, ls, device_share=1.0, boards=False)
        else:
            alone = be_stages.best_effort_only(state, model, now_ns, most, boards=False)
            if alone is None:
                return None
            plan = alone
        return replace(plan, preemptible=False)
