"""Commands of the front, taken without ever blocking."""

from __future__ import annotations

import numpy as np

from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.deadlines import Arrival
from omniserve.gpuworker.engine_state import Limits
from omniserve.gpuworker.lifecycle import Lifecycle
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling_params import SamplingParams
from omniserve.internal.v1 import engine_pb2, worker_pb2
from omniserve.v1 import status_pb2, types_pb2


class Inbox:
    """Applies commands to the lifecycle at pass boundaries; looks for LS arrivals in between."""

    def __init__(self, channel: EngineChannel, lifecycle: Lifecycle) -> None:
        self._channel = channel
        self._lifecycle = lifecycle
        self._pending: list[engine_pb2.EngineCommand] = []
        self.stopping = False

    def arrivals(self) -> list[Arrival]:
        """LS requests that have come since the last `drain`."""
        self._pending += self._channel.receive_if_rung()
        return [_arrival(command) for command in self._pending if _is_ls(command)]

    def is_empty(self) -> bool:
        """Whether no command has come since the last `drain`."""
        self._pending += self._channel.receive_if_rung()
        return not self._pending

    def drain(self) -> None:
        """Applies every command that has arrived."""
        commands, self._pending = [*self._pending, *self._channel.receive()], []
        for command in commands:
            kind = command.WhichOneof("command")
            if kind == "submit":
                self._lifecycle.submit(_request(command.submit, command.sent_ns))
            elif kind == "cancel":
                self._lifecycle.cancel(command.cancel)
            elif kind == "limits":
                self._lifecycle.state.limits = _limits(command.limits)
            elif kind == "attach":
                self._lifecycle.attach(command.attach.index, command.attach.segment)
            elif kind == "shutdown":
                self.stopping = True


def _is_ls(command: engine_pb2.EngineCommand) -> bool:
    return (
        command.WhichOneof("command") == "submit"
        and command.submit.service_class != types_pb2.SERVICE_CLASS_BEST_EFFORT
    )


def _arrival(command: engine_pb2.EngineCommand) -> Arrival:
    submit = command.submit
    return Arrival(command.sent_ns, len(submit.prompt_token_ids), int(submit.slo.ttft_ms * 1e6))


def _request(submit: worker_pb2.WorkerServiceGenerateRequest, arrival_ns: int) -> Request:
    prompt = np.asarray(submit.prompt_token_ids, dtype=np.int64)
    tokens = np.zeros(len(prompt) + submit.sampling.max_tokens, dtype=np.int64)
    tokens[: len(prompt)] = prompt
    return Request(
        request_id=submit.request_id,
        latency_sensitive=submit.service_class != types_pb2.SERVICE_CLASS_BEST_EFFORT,
        tokens=tokens,
        prompt_tokens=len(prompt),
        known=len(prompt),
        arrival_ns=arrival_ns,
        tenant=submit.tenant,
        sampling=_sampling(submit.sampling),
        generated_before=submit.generated_tokens,
        ignore_eos=submit.sampling.ignore_eos,
        ttft_slo_ns=int(submit.slo.ttft_ms * 1e6),
        tpot_slo_ns=int(submit.slo.tpot_ms * 1e6),
    )


def _sampling(wire: types_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=wire.temperature,
        seed=wire.seed,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logprobs=wire.logprobs,
    )


def _limits(wire: status_pb2.Limits) -> Limits:
    return Limits(
        ls_running_max=wire.ls_running_max,
        be_rows_per_stage=wire.be_rows_per_stage,
        be_prefill_tokens=wire.be_prefill_tokens_per_iteration,
        be_device_kv_share=wire.be_device_kv_share,
        safety_margin=wire.safety_margin,
    )
