"""What the engine publishes: tokens after each pass, ends of requests, telemetry ten times a
second. Sending never blocks."""

from __future__ import annotations

from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling import TokenLogprobs
from omniserve.gpuworker.telemetry import Counters, snapshot
from omniserve.internal.v1 import engine_pb2
from omniserve.v1 import types_pb2

_TELEMETRY_PERIOD_NS = 100_000_000


class Outbox:
    """Gathers a pass's tokens and sends them as one event."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self._sampled = engine_pb2.SampledTokens()
        self._next_telemetry_ns = 0
        self.logprobs: dict[str, TokenLogprobs] = {}
        """Of the tokens that come next, by request id, where asked for."""

    def token(self, request: Request, token: int) -> None:
        if found := self.logprobs.get(request.request_id):
            top = [types_pb2.TokenLogprob(token_id=i, logprob=value) for i, value in found.top]
            entry = types_pb2.TokenLogprobs(logprob=found.logprob, top=top)
            self._sampled.logprobs[len(self._sampled.token_ids)].CopyFrom(entry)
        self._sampled.request_ids.append(request.request_id)
        self._sampled.token_ids.append(token)

    def ended(self, request: Request, reason: types_pb2.FinishReason, error: str = "") -> None:
        """Tokens before the end go out before it."""
        self._flush()
        ended = engine_pb2.RequestEnded(
            request_id=request.request_id,
            reason=reason,
            error=error,
            cached_tokens=request.cached_tokens,
        )
        self._channel.send(engine_pb2.EngineEvent(ended=ended))

    def publish(
        self,
        state: EngineState,
        model: LatencyModel,
        counters: Counters,
        parked: int,
        ring_waits: int,
        now_ns: int,
    ) -> None:
        """Sends what has gathered, and telemetry if it is due."""
        self._flush()
        if now_ns >= self._next_telemetry_ns:
            self._next_telemetry_ns = now_ns + _TELEMETRY_PERIOD_NS
            telemetry = snapshot(counters, state, model, parked, ring_waits, now_ns)
            self._channel.send(engine_pb2.EngineEvent(telemetry=telemetry))

    def _flush(self) -> None:
        if self._sampled.request_ids:
            self._channel.send(engine_pb2.EngineEvent(sampled=self._sampled))
            self._sampled = engine_pb2.SampledTokens()
