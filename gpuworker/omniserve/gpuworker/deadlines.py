"""How much time there is: the slack of LS requests, and what BE work in flight may take of it.

Pure. Deadlines are those of an SLO tightened by the safety margin: a stream held to its last
millisecond misses by any hiccup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.gpuworker.cohort import Chunk, load_of
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.ls_view import LsView
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.prompt_order import Prompt

# Streams need not be faster than this part of their TPOT while BE rows could run in between. The
# rest is time in hand for when a burst of prompts takes more than its turn.
_PACE = 0.5
# Nor do they wait for longer than so many passes of their own would take: those cost little then.
_PAUSE_PASSES = 10
# BE work in flight may take this part of what a newcomer can spare: others may follow it.
_NEWCOMER_SHARE = 0.02


@dataclass(frozen=True)
class Arrival:
    """An LS request that came in the middle of a pass."""

    arrival_ns: int
    prompt_tokens: int
    ttft_slo_ns: int


def must_yield(
    plan: Plan,
    stages_left: int,
    arrivals: Sequence[Arrival],
    state: EngineState,
    model: LatencyModel,
    now_ns: int,
) -> bool:
    """Whether BE work in flight would cost one of `arrivals` too much of its TTFT."""
    if not plan.preemptible:
        return False
    left_ns = (plan.predicted_ns - plan.ls_ns) * stages_left / len(plan.stages)
    aim = 1.0 - state.limits.safety_margin
    queued_ns = 0.0
    for arrival in arrivals:
        prefill = Load.prefill(0, arrival.prompt_tokens, last=True)
        queued_ns += model.pass_ns(prefill) * model.factor(Regime.LS_PREFILL, prefill.rows)
        spare = arrival.arrival_ns + aim * arrival.ttft_slo_ns - now_ns - queued_ns
        if left_ns > _NEWCOMER_SHARE * spare:
            return True
    return False


def must_call_off(state: EngineState, model: LatencyModel, now_ns: int) -> bool:
    """Whether the BE cohort that rests must go, because LS waits for memory that it keeps.

    It is worth waiting for as long as its remaining stages fit before the waiting request's TTFT.
    """
    if not state.ls_lacks_memory or state.be_cohort_stage < 0:
        return False
    waiting = state.ls_waiting[0]
    aim = 1.0 - state.limits.safety_margin
    streams = [Chunk(r, r.computed, 1) for r in state.ls_running if r.generated > 0]
    left = (state.stages - state.be_cohort_stage) / state.stages
    left_ns = left * model.pass_ns(state.be_cohort + load_of(streams))
    prefill_ns = model.pass_ns(Load.prefill(0, waiting.known - waiting.computed, last=True))
    return waiting.next_deadline_ns(aim) - now_ns < left_ns + prefill_ns


def budget_ns(ls: LsView, prompts: Sequence[Prompt], now_ns: int) -> float:
    """Least slack over LS requests: what the next pass may take.

    A running stream's slack is never more than what keeps its
    next gap within 2 x TPOT. A prompt's slack is what its TTFT leaves after the prefill of all
    prompts that are due before it and its own, but one TPOT at most: the passes after this one
    have streams to serve that do not run yet.

    prompts: all of them by deadline, also those that hold no memory yet.
    """
    slack = ls.due_ns - now_ns
    prefill_ns = 0.0
    for request, left_ns in prompts:
        prefill_ns += left_ns
        spare = request.next_deadline_ns(ls.aim) - now_ns - prefill_ns
        slack = min(slack, spare, request.tpot_slo_ns * ls.aim)
    return slack


def pause_ns(ls: LsView, pass_ns: float, now_ns: int) -> float:
    """How long a pass of the decode rows of all streams, which takes `pass_ns`, may wait.

    Nothing while a prompt waits.
    """
    if ls.waiting or ls.prompts:
        return 0.0
    gap_ns = min(_PACE * ls.aim * ls.tpot_slo_ns, _PAUSE_PASSES * pass_ns)
    return min(ls.last_token_ns + gap_ns, ls.due_ns) - now_ns - pass_ns
