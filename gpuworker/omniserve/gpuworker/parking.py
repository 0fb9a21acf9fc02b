"""The parking lot: BE rows between two stages, and their residuals.

A row is *ready* (its attention came back, or it was just sampled and waits at stage 0), *away*
(its attention is at a server) or *held* (kept out of the stages while its KV moves). Preempting
BE means not boarding it: a parked row loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.requests import Request

_FREE, _READY, _AWAY, _HELD = 0, 1, 2, 3
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StageCounts:
    """Parked rows by the stage that they run next; each [stages]."""

    ready: npt.NDArray[np.int64]
    away: npt.NDArray[np.int64]
    oldest_ready_ns: npt.NDArray[np.int64]
    """When the oldest ready row became so; the largest int64 where none is."""

    @staticmethod
    def empty(stages: int) -> StageCounts:
        none = np.zeros(stages, dtype=np.int64)
        return StageCounts(none, none, np.full(stages, np.iinfo(np.int64).max))


class ParkingLot:
    """Arrays over rows, so that a stage boards with no Python per row. One row a request."""

    def __init__(
        self,
        rows: int,
        stages: int,
        hidden: int,
        dtype: torch.dtype,
        clock_ns: Callable[[], int],
    ) -> None:
        self.residual = torch.zeros(rows, hidden, dtype=dtype)
        """The residual store, [rows, hidden]."""
        self.server = np.zeros(rows, dtype=np.int32)
        self.sequence = np.zeros(rows, dtype=np.int32)
        self.position = np.zeros(rows, dtype=np.int64)
        self.token = np.zeros(rows, dtype=np.int64)
        self.ls_stages = np.zeros(rows, dtype=np.int32)
        """Stages since the last sampled token that carried an LS row."""
        self.requests: list[Request | None] = [None] * rows
        self._stages = stages
        self._stage = np.zeros(rows, dtype=np.int32)
        self._state = np.zeros(rows, dtype=np.int8)
        self._ready_ns = np.zeros(rows, dtype=np.int64)
        self._clock_ns = clock_ns
        self._free = list(range(rows - 1, -1, -1))
        self._row_of: dict[tuple[int, int], int] = {}

    def has_room(self) -> bool:
        return bool(self._free)

    def park(self, request: Request) -> None:
        """Adds `request`, whose next token's position is `computed`, ready at stage 0."""
        row = self._free.pop()
        request.row = row
        self.requests[row] = request
        self.server[row], self.sequence[row] = request.server, request.sequence
        self._row_of[request.server, request.sequence] = row
        self.next_token(row, int(request.tokens[request.computed]), request.computed)

    def next_token(self, row: int, token: int, position: int) -> None:
        """Makes `row` ready at stage 0 for `token`."""
        self.token[row], self.position[row] = token, position
        self.ls_stages[row] = 0
        self._set(row, 0, _READY)

    def remove(self, request: Request) -> None:
        """Takes `request` out; its row must not be away."""
        assert self._state[request.row] != _AWAY, "removing a row whose attention is away"
        self.evict(request)

    def evict(self, request: Request) -> None:
        """Takes `request` out, also while its attention is away: no answer will come."""
        row = request.row
        del self._row_of[request.server, request.sequence]
        self._state[row] = _FREE
        self.requests[row] = None
        request.row = -1
        self._free.append(row)

    def hold(self, row: int) -> None:
        """Keeps a row that is ready at stage 0 out of the stages."""
        assert self.at_start(row), "holding a row that is on its way"
        self._state[row] = _HELD

    def at_start(self, row: int) -> bool:
        return bool(self._state[row] == _READY and self._stage[row] == 0)

    def is_away(self, row: int) -> bool:
        return bool(self._state[row] == _AWAY)

    def board(self, stage: int, allowance: int) -> Rows:
        """Returns the rows that board `stage`, oldest parked first, at most `allowance`."""
        if allowance <= 0:
            return np.empty(0, dtype=np.int64)
        rows = np.flatnonzero((self._state == _READY) & (self._stage == stage))
        if len(rows) > allowance:
            rows = rows[np.argsort(self._ready_ns[rows], kind="stable")[:allowance]]
        return rows

    def send_away(self, rows: Rows, next_stage: int) -> None:
        """`rows` have run a stage; their attention is on its way to the servers."""
        self._stage[rows] = next_stage
        self._state[rows] = _AWAY

    def answered(self, server: int, sequences: npt.NDArray[np.int32]) -> list[int]:
        """Attention of `sequences` came back; returns their rows."""
        rows = [self._row_of[server, int(sequence)] for sequence in sequences]
        self._state[rows] = _READY
        self._ready_ns[rows] = self._clock_ns()
        return rows

    def by_stage(self) -> StageCounts:
        """Returns who is parked where."""
        ready, away = self._state == _READY, self._state == _AWAY
        oldest = np.full(self._stages, np.iinfo(np.int64).max, dtype=np.int64)
        np.minimum.at(oldest, self._stage[ready], self._ready_ns[ready])
        return StageCounts(
            ready=np.bincount(self._stage[ready], minlength=self._stages),
            away=np.bincount(self._stage[away], minlength=self._stages),
            oldest_ready_ns=oldest,
        )

    @property
    def parked(self) -> int:
        return len(self._row_of)

    @property
    def away(self) -> int:
        return int(np.count_nonzero(self._state == _AWAY))

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every row is either free or one request's."""
        owned = [row for row, request in enumerate(self.requests) if request is not None]
        consistent = (
            sorted([*self._free, *owned]) == list(range(len(self.requests)))
            and sorted(self._row_of.values()) == owned
            and not self._state[self._free].any()
            and all(self.requests[row].row == row for row in owned)  # type: ignore[union-attr]
        )
        if not consistent:
            raise RuntimeError("parking lot rows leaked or shared")

    def _set(self, row: int, stage: int, state: int) -> None:
        self._stage[row], self._state[row] = stage, state
        self._ready_ns[row] = self._clock_ns()
