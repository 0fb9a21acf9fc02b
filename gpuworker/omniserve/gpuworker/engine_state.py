"""What the scheduler may look at: requests by place, memory, limits, and the parking lot."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from omniserve.gpuworker.latency_model import Load
from omniserve.gpuworker.parking import StageCounts
from omniserve.gpuworker.queues import ByArrival, FairQueue
from omniserve.gpuworker.requests import Place, Request


@dataclass(frozen=True)
class Limits:
    """Set by the control plane; see omniserve.v1.Limits."""

    ls_running_max: int = 64
    be_rows_per_stage: int = 16
    be_prefill_tokens: int = 64
    be_device_kv_share: float = 0.5
    safety_margin: float = 0.2


@dataclass
class EngineState:
    """Plain data, written by the engine's loop only; policies read it and change nothing."""

    blocks_total: int
    page_tokens: int
    stages: int
    blocks_free: int = 0
    limits: Limits = field(default_factory=Limits)
    ls_waiting: deque[Request] = field(default_factory=deque)
    ls_running: list[Request] = field(default_factory=list)
    be_waiting: FairQueue = field(default_factory=FairQueue)
    be_device: ByArrival = field(default_factory=ByArrival)
    """PREFILLING or DEVICE."""
    be_host: ByArrival = field(default_factory=ByArrival)
    """HOST or RESTORING."""
    be_restoring: list[Request] = field(default_factory=list)
    """Those of `be_host` that are RESTORING."""
    be_cohort_stage: int = -1
    """Next stage of the BE cohort under way; -1 if there is none."""
    be_cohort_since_ns: int = 0
    """When the BE cohort under way came to its stage, or the last one ended."""
    be_cohort: Load = field(default_factory=Load)
    """Work of the BE cohort under way in a whole pass."""
    parked: StageCounts = field(default_factory=lambda: StageCounts.empty(0))

    @property
    def be_blocks(self) -> int:
        """Device pages that BE requests hold."""
        held = sum([len(r.blocks) for r in self.be_device])
        return held + sum([len(r.blocks) for r in self.be_restoring])

    @property
    def ls_lacks_memory(self) -> bool:
        """Whether an LS request waits that is kept from running by nothing but memory.

        Once moves are carried out: whoever else could run does.
        """
        return bool(self.ls_waiting) and len(self.ls_running) < self.limits.ls_running_max

    def queue_of(self, request: Request) -> deque[Request] | list[Request] | FairQueue | ByArrival:
        """Where `request` is; of one that comes back, `be_restoring` has it too."""
        if request.latency_sensitive:
            return self.ls_waiting if request.place is Place.WAITING else self.ls_running
        if request.place is Place.WAITING:
            return self.be_waiting
        device = request.place in (Place.PREFILLING, Place.DEVICE)
        return self.be_device if device else self.be_host

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
