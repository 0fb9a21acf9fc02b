"""What a decision needs to know of the LS requests: each that holds memory is looked at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from omniserve.gpuworker.cohort import Chunk
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import Load
from omniserve.gpuworker.requests import Request

_NEVER = float("inf")


class LsView(NamedTuple):
    """Streams have a token already, prompts have none. Without streams times are infinite."""

    aim: float
    """Deadlines are those of an SLO tightened to this part of it."""
    streams: list[Chunk]
    """The next decode step of each."""
    load: Load
    """Of these steps."""
    due_ns: float
    """When the first of them has its next token due, or its gap exceeds 2 x TPOT."""
    tpot_slo_ns: float
    """The shortest."""
    last_token_ns: float
    """Of who has waited longest."""
    prompts: list[Request]
    waiting: Sequence[Request]
    """Those that hold no memory yet."""


def look(state: EngineState) -> LsView:
    """Returns the view of `state`."""
    aim = 1.0 - state.limits.safety_margin
    streams: list[Chunk] = []
    prompts: list[Request] = []
    kv_tokens = 0
    due_ns = tpot_slo_ns = last_token_ns = _NEVER
    for r in state.ls_running:
        generated = r.known - r.prompt_tokens
        if not generated:
            prompts.append(r)
            continue
        streams.append(Chunk(r, r.computed, 1))
        kv_tokens += r.computed
        if r.tpot_slo_ns < tpot_slo_ns:
            tpot_slo_ns = r.tpot_slo_ns
        if r.last_token_ns < last_token_ns:
            last_token_ns = r.last_token_ns
        tpot_ns = aim * r.tpot_slo_ns
        deadline_ns = r.first_token_ns + generated * tpot_ns
        gap_ends_ns = r.last_token_ns + 2 * tpot_ns
        if deadline_ns < due_ns:
            due_ns = deadline_ns
        if gap_ends_ns < due_ns:
            due_ns = gap_ends_ns
    rows = len(streams)
    load = Load(rows, rows, rows, kv_tokens + rows, 0)
    return LsView(aim, streams, load, due_ns, tpot_slo_ns, last_token_ns, prompts, state.ls_waiting)
