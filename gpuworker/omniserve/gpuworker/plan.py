"""What the scheduler decides and the engine carries out: one iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.latency_model import Regime


@dataclass(frozen=True)
class Run:
    """Stages of gathered BE rows in turns, each with a decision on the parking lot alone."""

    cohorts: tuple[int, ...]
    """Stages where rows have gathered; who waits longest is first."""
    rows: int
    """Fewest that a stage of the run has."""
    until_ns: int
    """When it ends; a command or a sampled token ends it before."""


@dataclass(frozen=True)
class Plan:
    """One iteration. `stages` are run in order, as often as they are named."""

    stages: Sequence[int]
    ls: tuple[Chunk, ...] = ()
    be: tuple[Chunk, ...] = ()
    """Rows of a new BE cohort; empty if one is under way or none fits."""
    be_until: int = 0
    """The BE cohort, under way or new, runs the stages below this one that the pass meets."""
    allowances: tuple[int, ...] = ()
    """Parked rows that may board each stage, [stages]; empty if none may."""
    boarding_most: int = 0
    """Parked rows that may board any stage, with what stages before it have left unused."""
    lockstep: bool = False
    """Each stage waits for the attention of the rows that are to board it."""
    preemptible: bool = True
    """BE may leave at any stage boundary."""
    budget_ns: float = 0.0
    regime: Regime = Regime.LS_DECODE
    rows: int = 0
    """Fixed rows, LS and BE: with `regime`, the factor that `predicted_ns` was made with."""
    ls_ns: float = 0.0
    """Part of `predicted_ns` that LS rows alone would take."""
    predicted_ns: float = 0.0
    run: Run | None = None
    """Of a stage of BE rows alone: what may follow it."""

    def allowance(self, stage: int) -> int:
        return self.allowances[stage] if self.allowances else 0

    def without_best_effort(self) -> Plan:
        """The rest of the same pass with LS rows alone."""
        return replace(self, be_until=0, allowances=(), boarding_most=0, lockstep=False)
