"""What is measured at the client, and how it is added up. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How a chat request ended, as its sender saw it."""

    UNFINISHED = "unfinished"
    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass
class RequestRecord:
    """One chat request. Its thread writes, others may read while it runs."""

    due_s: float
    """When the arrival process sent it. Latency counts from here, late senders included."""
    token_times_s: list[float] = field(default_factory=list)
    """When each token reached the client."""
    outcome: Outcome = Outcome.UNFINISHED
    """How it ended so far."""

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return (self.token_times_s[0] - self.due_s) * 1e3 if self.token_times_s else None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None

    def itl_ms(self) -> list[float]:
        """Times between tokens."""
        times = self.token_times_s
        return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]

    def meets(self, slo_ttft_ms: float, slo_tpot_ms: float) -> bool:
        """Whether it completed within both objectives; one token is judged by TTFT alone."""
        if self.outcome is not Outcome.COMPLETED or self.ttft_ms is None:
            return False
        return self.ttft_ms <= slo_ttft_ms and (self.tpot_ms or 0.0) <= slo_tpot_ms


def attainment(
    records: Sequence[RequestRecord], slo_ttft_ms: float, slo_tpot_ms: float
) -> float | None:
    """Share of all requests sent that met both objectives; None if none was sent."""
    if not records:
        return None
    return sum(r.meets(slo_ttft_ms, slo_tpot_ms) for r in records) / len(records)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the nearest ranks; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def ttfts_ms(records: Sequence[RequestRecord]) -> list[float]:
    return [r.ttft_ms for r in records if r.ttft_ms is not None]


def tpots_ms(records: Sequence[RequestRecord]) -> list[float]:
    return [r.tpot_ms for r in records if r.tpot_ms is not None]


def counted(start: int, end: int) -> int:
    """Growth of a counter; one that fell was reset by a restart and counts from 0."""
    return end - start if end >= start else end
