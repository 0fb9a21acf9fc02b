"""LS alone: best-effort requests are queued and never run. The yardstick of all the others.

Models: a system that serves nothing but LS. Leaves out nothing: what the other policies cost LS
is the difference to this one.
"""

from __future__ import annotations

from dataclasses import replace

from omniserve.gpuworker import scheduler
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Options, Policy


class LsOnly(Policy):
    """Starts no best-effort request."""

    name = "ls-only"
    uses_servers = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.rules = replace(self.rules, starts_be=False)

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        ls = scheduler.ls_work(state, model, now_ns, self.options.prefill_tokens_max)
        return scheduler.beside_ls(state, model, now_ns, ls) if ls else None
