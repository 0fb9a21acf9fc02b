"""Which parked rows run: how many may board each stage beside LS rows, and which stage without.

Pure. Times are the latency model's, before its online correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omniserve.gpuworker.latency_model import LatencyModel, Load, Staircase
from omniserve.gpuworker.parking import StageCounts

# How long parked rows wait for others of their stage.
PATIENCE_NS = 5_000_000
# Enough cohorts that servers and worker have something to do at the same time.
_COHORTS = 2
# A stage that runs this part of the rows per dense second of two full cohorts waits for no more.
_GOOD_RATE = 0.9


def allowances(
    parked: StageCounts, model: LatencyModel, load: Load, room_ns: float, most: int
) -> tuple[int, ...]:
    """How many rows may board each stage of a pass that has `load` in it, [stages].

    All of them together cost at most `room_ns` more than `load` alone, and no stage gets more
    than `most`. Rows that are ready come first, from the lowest stage up (OmniServe's online
    policy), but for stages whose rows were passed over too often. What is left then is for rows
    whose attention comes back during the pass: every stage gets as much as fits all.
    """
    stages = len(parked.ready)
    stairs = [model.middle] * stages
    stairs[0], stairs[-1] = model.first, model.last
    fixed = [load.rows] * (stages - 1) + [load.sampled]
    if room_ns <= 0 or most <= 0:
        return (0,) * stages
    if _cost(stairs, fixed, [most] * stages) <= room_ns:
        return (most,) * stages
    granted = [0] * stages
    wanted = np.minimum(parked.ready, most).tolist()
    left_ns = room_ns
    for stage in [*parked.overdue, *(s for s in range(stages) if s not in parked.overdue)]:
        if wanted[stage]:
            stairs_here, rows = stairs[stage], fixed[stage]
            granted[stage] = stairs_here.most_rows(left_ns, rows, wanted[stage])
            left_ns -= stairs_here[rows + granted[stage]] - stairs_here[rows]
            if granted[stage] < wanted[stage]:
                return tuple(granted)
    low, high = 0, most
    while high - low > 1:
        level = (low + high) // 2
        if _cost(stairs, fixed, [max(g, level) for g in granted]) <= room_ns:
            low = level
        else:
            high = level
    return tuple([max(g, low) for g in granted])


def expected(parked: StageCounts, allowed: Sequence[int], stage_ns: float) -> list[float]:
    """Rows that are likely to board each stage of a pass whose stages take `stage_ns`.

    Besides those that are ready: those that are away now, once the pass is late enough for their
    answers, and those that travel with the pass because they are answered in time.
    """
    late = parked.answer_ns / stage_ns if stage_ns > 0 else 0.0
    rows: list[float] = []
    travelling = unused = 0.0
    for stage, (ready, away, most) in enumerate(
        zip(parked.ready.tolist(), parked.away.tolist(), allowed, strict=True)
    ):
        here = ready + (away if stage >= late else 0) + travelling
        boarded = min(here, most + unused)
        unused += most - boarded
        rows.append(boarded)
        travelling = boarded * parked.in_time
    return rows


def pick_stage(parked: StageCounts, model: LatencyModel, now_ns: int) -> int | None:
    """Returns the stage of parked rows to run when there is nothing else; None to wait.

    The most rows per dense second with two cohorts, one for the worker, one for the servers. A
    stage costs nearly the same for one row as for many, so rows of a stage wait for one another
    (PATIENCE_NS at most: a stopped server must not hold up the other's rows), and the rows
    furthest behind go first until all have gathered in two cohorts. Where a part of the rows is
    enough for nearly the rate of two full cohorts, they wait for nobody.
    """
    ready = parked.ready
    waited = now_ns - parked.oldest_ready_ns > PATIENCE_NS
    rows = parked.rows
    occupied = np.flatnonzero(ready + parked.away)
    good = ready >= good_rows(parked, model) if rows else waited
    runnable = np.flatnonzero((ready > 0) & ((parked.away == 0) | waited | good))
    if not len(runnable):
        return None
    enough = runnable[good[runnable]]
    if len(enough) or len(occupied) <= _COHORTS:
        among = enough if len(enough) else runnable
        return int(among[parked.oldest_ready_ns[among].argmin()])
    following = np.append(occupied[1:], occupied[0] + len(ready))
    distance = (following - occupied)[np.searchsorted(occupied, runnable)]
    return int(runnable[distance.argmin()])


def good_rows(parked: StageCounts, model: LatencyModel) -> int:
    """Rows of a stage that wait for no more: nearly the rate of all rows in two cohorts."""
    return model.rows_for_rate(_cohort_rows(parked), _GOOD_RATE)


def are_good(rows: int, parked: StageCounts, model: LatencyModel) -> bool:
    """Whether `rows` of a stage wait for no more: cheaper than `good_rows`."""
    return model.reaches_rate(rows, _cohort_rows(parked), _GOOD_RATE)


def _cohort_rows(parked: StageCounts) -> int:
    """Of each cohort, if all parked rows had gathered."""
    return -(-parked.rows // _COHORTS)


def _cost(stairs: Sequence[Staircase], fixed: Sequence[int], rows: Sequence[int]) -> float:
    return sum([s[f + n] - s[f] for s, f, n in zip(stairs, fixed, rows, strict=True)])
