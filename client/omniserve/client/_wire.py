"""Conversion between the SDK's values and protobuf messages. Called by `_client` only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TypeVar

from google.protobuf.message import Message as ProtoMessage

from omniserve.client import _status as st
from omniserve.client._types import (
    Chunk,
    FinishReason,
    JobCounts,
    JobItem,
    JobResult,
    JobState,
    Message,
    SamplingParams,
    ServiceClass,
    Slo,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from omniserve.errors import InvalidArgumentError
from omniserve.v1 import inference_pb2, jobs_pb2, status_pb2, types_pb2

T = TypeVar("T")


def service_class(value: ServiceClass | str) -> str:
    """Raises InvalidArgumentError on a name that is not a service class."""
    try:
        name = ServiceClass(value).name
    except ValueError as error:
        known = ", ".join(c.value for c in ServiceClass)
        raise InvalidArgumentError(
            f"service_class {value!r} is none of {known}", field="service_class"
        ) from error
    return f"SERVICE_CLASS_{name}"


def sampling(value: SamplingParams) -> types_pb2.SamplingParams:
    """Raises InvalidArgumentError where a number has no wire form."""
    try:
        return types_pb2.SamplingParams(
            max_tokens=value.max_tokens,
            temperature=value.temperature,
            seed=value.seed,
            ignore_eos=value.ignore_eos,
            top_k=value.top_k,
            top_p=value.top_p,
            min_p=value.min_p,
            repetition_penalty=value.repetition_penalty,
            presence_penalty=value.presence_penalty,
            frequency_penalty=value.frequency_penalty,
            stop=[value.stop] if isinstance(value.stop, str) else value.stop,
            logprobs=value.logprobs,
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"sampling: {error}", field="sampling") from error


def slo(value: Slo | None) -> types_pb2.Slo | None:
    return None if value is None else types_pb2.Slo(ttft_ms=value.ttft_ms, tpot_ms=value.tpot_ms)


def set_prompt(
    request: inference_pb2.GenerateRequest | jobs_pb2.JobItem,
    text: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
) -> None:
    """Fills the `prompt` oneof. Raises InvalidArgumentError unless exactly one is given."""
    if sum(p is not None for p in (text, messages, token_ids)) != 1:
        raise InvalidArgumentError(
            "exactly one of prompt, messages and token_ids must be given", field="prompt"
        )
    if text is not None:
        request.text = text
    elif messages is not None:
        turns = [types_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
        request.chat.CopyFrom(types_pb2.Chat(messages=turns))
    elif token_ids is not None:
        try:
            request.token_ids.CopyFrom(types_pb2.TokenIds(ids=token_ids))
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(f"token_ids: {error}", field="token_ids") from error


def job_item(item: JobItem) -> jobs_pb2.JobItem:
    message = jobs_pb2.JobItem(custom_id=item.custom_id, sampling=sampling(item.sampling))
    set_prompt(message, item.prompt, item.messages, item.token_ids)
    return message


def chunk(message: inference_pb2.Chunk) -> Chunk:
    return Chunk(message.offset, tuple(message.token_ids), message.text, logprobs(message.logprobs))


def logprobs(messages: Iterable[types_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(m.logprob, tuple(TokenLogprob(t.token_id, t.logprob) for t in m.top))
        for m in messages
    )


def usage(message: types_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def finish_reason(value: types_pb2.FinishReason) -> FinishReason:
    try:
        return FinishReason[types_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_")]
    except (ValueError, KeyError):
        return FinishReason.UNSPECIFIED


def job_state(value: jobs_pb2.JobState) -> JobState:
    try:
        return JobState[jobs_pb2.JobState.Name(value).removeprefix("JOB_STATE_")]
    except (ValueError, KeyError):
        return JobState.UNSPECIFIED


def job_counts(message: jobs_pb2.JobCounts) -> JobCounts:
    return JobCounts(message.total, message.completed, message.failed)


def job_result(message: jobs_pb2.JobResult) -> JobResult:
    return JobResult(
        custom_id=message.custom_id,
        finish_reason=finish_reason(message.reason),
        text=message.text,
        token_ids=tuple(message.token_ids),
        usage=usage(message.usage),
        error=message.error,
        logprobs=logprobs(message.logprobs),
    )


def status(message: status_pb2.GetStatusResponse) -> st.Status:
    return st.Status(
        workers=tuple(_worker(w) for w in message.workers),
        ls_attainment=message.ls_attainment,
        ls_window_requests=message.ls_window_requests,
        limits=_mirror(st.Limits, message.limits),
    )


def _worker(message: status_pb2.WorkerStatus) -> st.WorkerStatus:
    by_path = _mirror(st.TokensByPath, message.telemetry.be_tokens_by_path)
    return st.WorkerStatus(
        worker_id=message.worker_id,
        model=message.model,
        device=message.device,
        policy=message.policy,
        telemetry=_mirror(st.Telemetry, message.telemetry, be_tokens_by_path=by_path),
        attention_servers=tuple(
            _mirror(st.AttentionServerStatus, s) for s in message.attention_servers
        ),
    )


def _mirror(kind: type[T], message: ProtoMessage, **converted: object) -> T:
    """Builds dataclass `kind` from the fields of the same names; `converted` ones are given."""
    plain = {
        f.name: getattr(message, f.name)
        for f in fields(kind)  # type: ignore[arg-type]
        if f.name not in converted
    }
    return kind(**plain, **converted)
