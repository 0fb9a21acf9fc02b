"""Counters and gauges of the engine, and their wire form."""

from __future__ import annotations

from dataclasses import dataclass

from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.v1 import status_pb2


@dataclass(slots=True)
class Counters:
    """Grow from the engine's start; see omniserve.v1.Telemetry for each."""

    passes: int = 0
    ls_stages: int = 0
    be_only_stages: int = 0
    boarded_rows: int = 0
    be_only_rows: int = 0
    recomputed_tokens: int = 0
    ls_output_tokens: int = 0
    device_resident_tokens: int = 0
    boarded_tokens: int = 0
    be_only_tokens: int = 0
    demotions: int = 0
    promotions: int = 0
    checkpointed_tokens: int = 0
    prefix_cache_query_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    busy_ns: int = 0
    bubble_ns: int = 0
    ls_started: int = 0
    ls_queue_ns: int = 0


def snapshot(
    counters: Counters,
    state: EngineState,
    model: LatencyModel,
    parked: int,
    ring_waits: int,
    now_ns: int,
) -> status_pb2.Telemetry:
    """Returns what the engine publishes about itself."""
    by_path = status_pb2.TokensByPath(
        device_resident=counters.device_resident_tokens,
        boarded=counters.boarded_tokens,
        be_only=counters.be_only_tokens,
    )
    prompts = [*state.ls_waiting, *(r for r in state.ls_running if r.generated == 0)]
    decoding = [r for r in state.ls_running if r.generated > 0]
    load = sum((Load.decode(r.known) for r in decoding), Load.decode(1))
    mirrored = [r for r in state.be_device if r.server >= 0]
    chunk = 256
    decode_ns = model.pass_ns(load) * model.factor(Regime.LS_DECODE, load.rows)
    both = load + Load.prefill(0, chunk, last=True)
    both_ns = model.pass_ns(both) * model.factor(Regime.LS_PREFILL, both.rows)
    return status_pb2.Telemetry(
        taken_monotonic_ns=now_ns,
        passes=counters.passes,
        ls_stages=counters.ls_stages,
        be_only_stages=counters.be_only_stages,
        boarded_rows=counters.boarded_rows,
        be_only_rows=counters.be_only_rows,
        ring_waits=ring_waits,
        recomputed_tokens=counters.recomputed_tokens,
        ls_output_tokens=counters.ls_output_tokens,
        be_output_tokens=by_path.device_resident + by_path.boarded + by_path.be_only,
        be_tokens_by_path=by_path,
        demotions=counters.demotions,
        promotions=counters.promotions,
        checkpointed_tokens=counters.checkpointed_tokens,
        prefix_cache_query_tokens=counters.prefix_cache_query_tokens,
        prefix_cache_hit_tokens=counters.prefix_cache_hit_tokens,
        busy_ns=counters.busy_ns,
        bubble_ns=counters.bubble_ns,
        ls_started=counters.ls_started,
        ls_queue_ns=counters.ls_queue_ns,
        ls_running=len(state.ls_running),
        ls_waiting=len(state.ls_waiting),
        be_device_resident=len(state.be_device),
        be_waiting=len(state.be_waiting),
        rows_parked=parked,
        rows_away=int(state.parked.away.sum()),
        device_blocks_total=state.blocks_total,
        device_blocks_free=state.blocks_free,
        kv_checkpoint_lag_tokens=sum(r.computed - r.mirrored for r in mirrored),
        ls_prefill_tokens_waiting=sum(r.known - r.computed for r in prompts),
        decode_pass_ms=decode_ns / 1e6,
        prefill_token_ms=max(0.0, both_ns - decode_ns) / chunk / 1e6,
    )
