"""ConServe: best effort lives on the device and gives way, layer by layer.

Models: LS first, then BE prefill and decode within the time that the latency model says LS can
spare; with no LS the largest batch; BE leaves at a stage boundary when an LS request arrives;
its KV is checkpointed to host memory as it is produced, so that LS takes its pages at once and
nothing is recomputed; preempted requests return before new ones start.

Leaves out: swapping at a finer grain than one request, and the batch sizes that ConServe
profiles for throughput. Attention servers are plain storage here: nothing decodes at them, so
what was preempted stands still until it is restored.
"""

from __future__ import annotations

from dataclasses import replace

from omniserve.gpuworker import be_stages, scheduler
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies.base import Options, Policy


class Preempt(Policy):
    """No piggybacking: parked requests only wait."""

    name = "preempt"

    def __init__(self, options: Options) -> None:
        if options.placement == "host":  # where nothing would ever decode
            options = replace(options, placement="auto")
        super().__init__(options)
        self.rules = replace(self.rules, resumes_first=True)

    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        most = self.options.prefill_tokens_max
        ls = scheduler.ls_work(state, model, now_ns, most)
        if ls:
            return scheduler.beside_ls(state, model, now_ns, ls, device_share=1.0, boards=False)
        return be_stages.best_effort_only(state, model, now_ns, most, boards=False)
