"""Data of the latency model: measured once per hardware, model and dtype, shared as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class LatencyProfile:
    """Times of a worker's stages against rows, and of its local attention. All in nanoseconds.

    `rows` are the measured row counts, ascending; the three lists have one time for each.
    """

    hardware: str
    model: str
    dtype: str
    rows: tuple[int, ...]
    first_stage_ns: tuple[float, ...]
    middle_stage_ns: tuple[float, ...]
    last_stage_ns: tuple[float, ...]
    attend_row_ns: float
    """One decode row in one layer, whatever its context."""
    attend_kv_token_ns: float
    """One KV token that a decode row reads in one layer."""
    attend_pair_ns: float
    """One query x KV token pair of a prefill chunk in one layer."""
    padded: bool = False
    """Whether a stage with other row counts runs as the next larger one of `rows`."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> LatencyProfile:
        """Raises ValueError if `text` is not a profile."""
        try:
            fields: dict[str, Any] = json.loads(text)
            for name in ("rows", "first_stage_ns", "middle_stage_ns", "last_stage_ns"):
                fields[name] = tuple(fields[name])
            return LatencyProfile(**fields)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"not a latency profile: {error}") from error
