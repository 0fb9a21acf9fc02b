"""The parking lot: BE rows between two stages. The device keeps their residuals.

A row is *ready* (its attention came back, or it was just sampled and waits at stage 0), *away*
(its attention is at a server) or *held* (kept out of the stages while its KV moves). Preempting
BE means not boarding it: a parked row loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from omniserve.gpuworker.requests import Request

_FREE, _READY, _IN_STAGE, _AWAY, _HELD = 0, 1, 2, 3, 4
# A row passed over in this many passes goes first, and its stage is funded first.
_PATIENCE_PASSES = 4
# How fast the averages over answers follow.
_GAIN = 0.05
_NEVER = np.iinfo(np.int64).max
Rows = npt.NDArray[np.int64]
_NOBODY: Rows = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class StageCounts:
    """Parked rows by the stage that they run next; arrays are [stages]."""

    ready: npt.NDArray[np.int64]
    away: npt.NDArray[np.int64]
    oldest_ready_ns: npt.NDArray[np.int64]
    """When the oldest ready row became so; the largest int64 where none is."""
    overdue: tuple[int, ...] = ()
    """Stages whose oldest row was passed over for too many passes, longest waiting first."""
    answer_ns: float = 0.0
    """Time between a row's sending and its answer, on average; 0 if there was none yet."""
    in_time: float = 0.0
    """Part of the answers that were back before the next stage was boarded."""

    @staticmethod
    def empty(stages: int) -> StageCounts:
        none = np.zeros(stages, dtype=np.int64)
        return StageCounts(none, none, np.full(stages, _NEVER))

    @property
    def rows(self) -> int:
        return int(self.ready.sum() + self.away.sum())

    def with_ready(self, stage: int, rows: int, since_ns: int) -> StageCounts:
        """As if `rows` more had been ready at `stage` since then."""
        ready, oldest_ns = self.ready.copy(), self.oldest_ready_ns.copy()
        ready[stage] += rows
        oldest_ns[stage] = min(oldest_ns[stage], since_ns)
        return replace(self, ready=ready, oldest_ready_ns=oldest_ns)


class ParkingLot:
    """Arrays over rows, so that a stage boards with no Python per row. One row a request.

    The ready rows of each stage are a queue, oldest first: counting, boarding and finding the
    oldest cost the same whether ten rows are parked or thousands.
    """

    def __init__(
        self,
        rows: int,
        stages: int,
        clock_ns: Callable[[], int],
    ) -> None:
        self.server = np.zeros(rows, dtype=np.int32)
        self.sequence = np.zeros(rows, dtype=np.int32)
        self.position = np.zeros(rows, dtype=np.int64)
        self.token = np.zeros(rows, dtype=np.int64)
        self.ls_stages = np.zeros(rows, dtype=np.int32)
        """Stages since the last sampled token that carried an LS row."""
        self.requests: list[Request | None] = [None] * rows
        self._rows = rows
        self._stage = np.zeros(rows, dtype=np.int32)
        self._state = np.zeros(rows, dtype=np.int8)
        self._since_ns = np.zeros(rows, dtype=np.int64)
        """When the row became ready, or was sent away."""
        self._since_pass = np.zeros(rows, dtype=np.int64)
        """`_passes` when it became ready."""
        self._since_boarding = np.zeros(rows, dtype=np.int64)
        """`_boardings` when it was sent away."""
        self._passes = 0
        self._boardings = 0
        self._answer_ns = self._in_time = 0.0
        self._queue = np.zeros((stages, rows), dtype=np.int64)
        """Ready rows of each stage: `_ready` of them from `_head` on, around the end."""
        self._head = np.zeros(stages, dtype=np.int64)
        self._ready = np.zeros(stages, dtype=np.int64)
        self._away = np.zeros(stages, dtype=np.int64)
        self._clock_ns = clock_ns
        self._free = list(range(rows - 1, -1, -1))
        self._row_of: dict[int, npt.NDArray[np.int64]] = {}
        """By server: the row of each sequence, -1 if it has none."""

    def has_room(self) -> bool:
        return bool(self._free)

    def park(self, request: Request) -> None:
        """Adds `request`, whose next token's position is `computed`, ready at stage 0."""
        row = self._free.pop()
        request.row = row
        self.requests[row] = request
        self.server[row], self.sequence[row] = request.server, request.sequence
        self._of_server(request.server, request.sequence)[request.sequence] = row
        self.next_tokens(
            np.array([row]), [int(request.tokens[request.computed])], [request.computed]
        )

    def next_tokens(self, rows: Rows, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Makes `rows` ready at stage 0, each for its token."""
        self.token[rows], self.position[rows] = tokens, positions
        self.ls_stages[rows] = 0
        self._stage[rows] = 0
        self._enqueue(0, rows, self._clock_ns())

    def requests_of(self, rows: Rows) -> list[Request]:
        """Whose rows they are; all must be somebody's."""
        requests = [self.requests[row] for row in rows.tolist()]
        assert None not in requests, "a boarded row without a request"
        return cast("list[Request]", requests)

    def remove(self, request: Request) -> None:
        """Takes `request` out; its row must not be away."""
        assert self._state[request.row] != _AWAY, "removing a row whose attention is away"
        self.evict(request)

    def evict(self, request: Request) -> None:
        """Takes `request` out, also while its attention is away: no answer will come."""
        row = request.row
        if self._state[row] == _READY:
            self._dequeue(row)
        elif self._state[row] == _AWAY:
            self._away[self._stage[row]] -= 1
        self._row_of[request.server][request.sequence] = -1
        self._state[row] = _FREE
        self.requests[row] = None
        request.row = -1
        self._free.append(row)

    def hold(self, row: int) -> None:
        """Keeps a row that is ready at stage 0 out of the stages."""
        assert self.at_start(row), "holding a row that is on its way"
        self._dequeue(row)
        self._state[row] = _HELD

    def at_start(self, row: int) -> bool:
        return bool(self._state[row] == _READY and self._stage[row] == 0)

    def is_away(self, row: int) -> bool:
        return bool(self._state[row] == _AWAY)

    @property
    def ready_by_stage(self) -> npt.NDArray[np.int64]:
        """Ready rows of each stage, [stages]; not to be changed."""
        return self._ready

    @property
    def away_by_stage(self) -> npt.NDArray[np.int64]:
        """Rows of each stage whose attention is away, [stages]; not to be changed."""
        return self._away

    def ready_at(self, stage: int) -> int:
        return int(self._ready[stage])

    def away_at(self, stage: int) -> int:
        return int(self._away[stage])

    def board(self, stage: int, allowance: int) -> Rows:
        """Takes the rows that board `stage`, oldest parked first, at most `allowance`.

        The caller runs the stage, and then `send_away` or `next_tokens` of all of them.
        """
        self._boardings += 1
        count = min(allowance, int(self._ready[stage]))
        if count <= 0:
            return _NOBODY
        rows = self._front(stage, count)
        self._head[stage] = (self._head[stage] + count) % self._rows
        self._ready[stage] -= count
        self._state[rows] = _IN_STAGE
        return rows

    def send_away(self, rows: Rows, next_stage: int) -> None:
        """`rows` have run a stage; their attention is on its way to the servers."""
        self._stage[rows] = next_stage
        self._state[rows] = _AWAY
        self._since_ns[rows] = self._clock_ns()
        self._since_boarding[rows] = self._boardings
        self._away[next_stage] += len(rows)

    def answered(self, server: int, sequences: npt.NDArray[np.int32]) -> Rows:
        """Attention of `sequences` came back; returns their rows."""
        if not len(sequences):
            return _NOBODY
        rows = self._row_of[server][sequences]
        now_ns = self._clock_ns()
        took_ns = float((now_ns - self._since_ns[rows]).mean())
        in_time = float((self._since_boarding[rows] == self._boardings).mean())
        self._answer_ns += (took_ns - self._answer_ns) * (_GAIN if self._answer_ns else 1.0)
        self._in_time += (in_time - self._in_time) * _GAIN
        stages = self._stage[rows]
        for stage in set(stages.tolist()):
            mine = rows[stages == stage]
            self._away[stage] -= len(mine)
            self._enqueue(stage, mine, now_ns)
        return rows

    def end_pass(self) -> None:
        """Every stage has been run: who is ready and did not board was passed over."""
        self._passes += 1

    def by_stage(self) -> StageCounts:
        """Returns who is parked where."""
        busy = np.flatnonzero(self._ready)
        oldest = self._queue[busy, self._head[busy]]
        oldest_ns = np.full(len(self._ready), _NEVER)
        oldest_ns[busy] = self._since_ns[oldest]
        waited = self._passes - self._since_pass[oldest]
        overdue = busy[waited >= _PATIENCE_PASSES]
        return StageCounts(
            ready=self._ready.copy(),
            away=self._away.copy(),
            oldest_ready_ns=oldest_ns,
            overdue=tuple(sorted(overdue.tolist(), key=oldest_ns.__getitem__)),
            answer_ns=self._answer_ns,
            in_time=self._in_time,
        )

    @property
    def parked(self) -> int:
        return self._rows - len(self._free)

    @property
    def away(self) -> int:
        return int(self._away.sum())

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every row is free or one request's, and queued as it says."""
        owned = [row for row, request in enumerate(self.requests) if request is not None]
        known = np.concatenate([*self._row_of.values(), _NOBODY])
        consistent = (
            sorted([*self._free, *owned]) == list(range(self._rows))
            and sorted(known[known >= 0].tolist()) == owned
            and not self._state[self._free].any()
            and all(self.requests[row].row == row for row in owned)  # type: ignore[union-attr]
            and all(self._is_consistent(stage) for stage in range(len(self._ready)))
        )
        if not consistent:
            raise RuntimeError("parking lot rows leaked or shared")

    def _is_consistent(self, stage: int) -> bool:
        here = self._stage == stage
        ready = np.flatnonzero(here & (self._state == _READY))
        away = np.count_nonzero(here & (self._state == _AWAY))
        queued = self._front(stage, int(self._ready[stage]))
        return sorted(queued.tolist()) == ready.tolist() and away == self._away[stage]

    def _front(self, stage: int, count: int) -> Rows:
        """Returns the oldest `count` ready rows of `stage`."""
        at = (int(self._head[stage]) + np.arange(count)) % self._rows
        rows: Rows = self._queue[stage, at]
        return rows

    def _enqueue(self, stage: int, rows: Rows, now_ns: int) -> None:
        """`rows`, whose `_stage` is `stage`, are ready."""
        self._state[rows] = _READY
        self._since_ns[rows] = now_ns
        self._since_pass[rows] = self._passes
        tail = int(self._head[stage] + self._ready[stage])
        self._queue[stage, (tail + np.arange(len(rows))) % self._rows] = rows
        self._ready[stage] += len(rows)

    def _dequeue(self, row: int) -> None:
        """Takes a ready row out of the middle of its stage's queue."""
        stage = int(self._stage[row])
        left = self._front(stage, int(self._ready[stage]))
        left = left[left != row]
        self._queue[stage, : len(left)] = left
        self._head[stage], self._ready[stage] = 0, len(left)

    def _of_server(self, server: int, sequence: int) -> npt.NDArray[np.int64]:
        """Returns the rows of a server's sequences, with room for `sequence`."""
        known = self._row_of.get(server, _NOBODY)
        if sequence >= len(known):
            more = np.full(max(self._rows, sequence + 1) - len(known), -1, dtype=np.int64)
            known = self._row_of[server] = np.concatenate([known, more])
        return known
