"""What a policy is: it decides plans and moves; the engine carries out both alike for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from omniserve.gpuworker import placement
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.placement import HostView, Moves, Placement, Rules
from omniserve.gpuworker.plan import Plan


@dataclass(frozen=True)
class Options:
    """What a policy is told at start."""

    prefill_tokens_max: int
    """Prompt tokens in one pass."""
    placement: Placement
    """Where best-effort requests may decode; policies without servers use the device alone."""
    reserve_headroom: float = 0.0
    """Of `reserve`: part of rows and KV that BE leaves to LS, 0 to 1."""


class Policy(ABC):
    """Pure: the same state, model and time give the same answers."""

    name: ClassVar[str]
    uses_servers: ClassVar[bool] = True
    """Whether KV of BE requests goes to attention servers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.placement: Placement = options.placement if self.uses_servers else "device"
        self.rules = Rules(self.placement)

    def moves(self, state: EngineState, host: HostView) -> Moves:
        """Who gets device memory, before the next plan."""
        return placement.decide(state, host, self.rules)

    @abstractmethod
    def plan(self, state: EngineState, model: LatencyModel, now_ns: int) -> Plan | None:
        """The next iteration, or None if nothing can run."""
