"""In which order LS prompts are computed: so that most of them are in time.

Pure. By deadline while all can meet theirs. In a burst they cannot, and then that order makes
every one of them late, each by a little. So the longest ones step back until the others are in
time, which leaves the fewest late ones (Moore, "An n job, one machine sequencing algorithm for
minimizing the number of late jobs", 1968). They are next when the others are done, and first when
they have waited for another TTFT.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.ls_view import LsView
from omniserve.gpuworker.requests import Request

# Streams count for this part of the time at most: one pass of both costs less than one of each.
_STREAMS_MOST = 0.5
# Nobody comes before a prompt that has waited for so many times its TTFT.
_PATIENCE = 2.0


class Prompt(NamedTuple):
    """An LS request without a token yet."""

    request: Request
    left_ns: float
    """What the rest of its prompt takes, beside the streams that run."""


def by_deadline(ls: LsView, model: LatencyModel, *, waiting: bool = False) -> list[Prompt]:
    """Those that hold memory, with `waiting` also those that do not yet."""
    requests = [*ls.prompts, *ls.waiting] if waiting else ls.prompts
    if not requests:
        return []
    requests = sorted(requests, key=Request.next_deadline_ns)
    stretch = 1.0 / (1.0 - min(_streams_share(ls, model), _STREAMS_MOST))
    return [Prompt(r, stretch * _left_ns(r, model)) for r in requests]


def in_order(prompts: Sequence[Prompt], aim: float, now_ns: int) -> list[Prompt]:
    """`prompts` by deadline in the order of Moore and Hodgson's algorithm.

    `aim` scales deadlines, see Request.next_deadline_ns.
    """
    overdue: list[Prompt] = []
    rest: list[Prompt] = []
    for prompt in prompts:
        request = prompt.request
        patience_ends = request.arrival_ns + _PATIENCE * request.ttft_slo_ns
        (overdue if now_ns > patience_ends else rest).append(prompt)
    done_ns = now_ns + sum([prompt.left_ns for prompt in overdue])
    late: set[int] = set()
    longest: list[tuple[float, int]] = []
    for place, (request, left_ns) in enumerate(rest):
        done_ns += left_ns
        heapq.heappush(longest, (-left_ns, -place))
        if done_ns > request.next_deadline_ns(aim):
            # Of two that are as long, the newer one.
            negative_ns, negative_place = heapq.heappop(longest)
            done_ns += negative_ns
            late.add(-negative_place)
    in_time = [prompt for place, prompt in enumerate(rest) if place not in late]
    return overdue + in_time + [rest[place] for place in sorted(late)]


def _streams_share(ls: LsView, model: LatencyModel) -> float:
    """Part of the time that streams take while prompts are computed, at a token per TPOT."""
    if not ls.streams:
        return 0.0
    pass_ns = model.pass_ns(ls.load) * model.factor(Regime.LS_DECODE, ls.load.rows)
    return pass_ns / max(1.0, ls.tpot_slo_ns * ls.aim)


def _left_ns(request: Request, model: LatencyModel) -> float:
    left = Load.prefill(request.computed, request.known - request.computed, last=True)
    return model.pass_ns(left) * model.factor(Regime.LS_PREFILL, left.rows)
