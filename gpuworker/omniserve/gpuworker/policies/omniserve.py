"""OmniServe's policy joined with ConServe's, as docs/architecture.md describes it.

Best effort gets what the latency model says LS requests can spare in a pass: first prefill and
decode on the device with a stricter margin, then parked rows that board the stages. Attention
of parked rows is computed by the servers, and no pass waits for it. BE work leaves at any stage
boundary, and its KV is mirrored as it is produced, so that its device memory can go at once.
"""

from __future__ import annotations

from omniserve.gpuworker import be_stages, scheduler
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Policy


class OmniServe(Policy):
    """The default."""

    name = "omniserve"

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        most = self.options.prefill_tokens_max
        ls = scheduler.ls_work(state, model, now_ns, most)
        if ls:
            between = be_stages.between_passes(state, model, now_ns, ls)
            return between or scheduler.beside_ls(state, model, now_ns, ls)
        return be_stages.best_effort_only(state, model, now_ns, most)
