"""Validation of prompts, sampling and SLOs: cheap checks first, every error names its field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import jinja2

from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import ContextLengthExceededError, InvalidArgumentError, ModelNotFoundError
from omniserve.sampling import check_sampling
from omniserve.v1 import types_pb2

REQUEST_ID_CHARS = 128
ROLES = ("system", "user", "assistant")
SLO_MS_MAX = 3_600_000.0
_ID = re.compile(r"[A-Za-z0-9._:-]+")


class Prompted(Protocol):
    """GenerateRequest and JobItem: messages with the oneof `prompt`."""

    @property
    def text(self) -> str: ...
    @property
    def chat(self) -> types_pb2.Chat: ...
    @property
    def token_ids(self) -> types_pb2.TokenIds: ...
    @property
    def sampling(self) -> types_pb2.SamplingParams: ...


def check_id(value: str, field: str, length_max: int) -> None:
    if len(value) > length_max or not _ID.fullmatch(value):
        raise InvalidArgumentError(
            f"must be 1 to {length_max} characters of [A-Za-z0-9._:-]", field=field
        )


def check_model(requested: str, served: str) -> None:
    """An empty name means the one model there is."""
    if requested and requested != served:
        raise ModelNotFoundError(
            f"model {requested!r} is not served, {served!r} is", metadata={"model": requested}
        )


def check_slo(slo: types_pb2.Slo) -> None:
    for field, value_ms in (("slo.ttft_ms", slo.ttft_ms), ("slo.tpot_ms", slo.tpot_ms)):
        if not 0 <= value_ms <= SLO_MS_MAX:  # also false for NaN
            raise InvalidArgumentError(f"must be in [0, {SLO_MS_MAX:.0f}]", field=field)


def resolve_sampling(
    sampling: types_pb2.SamplingParams, default_max_tokens: int, context_tokens: int, prefix: str
) -> types_pb2.SamplingParams:
    """Returns `sampling`, checked, with its default filled in."""
    check_sampling(sampling, prefix)
    resolved = types_pb2.SamplingParams()
    resolved.CopyFrom(sampling)
    resolved.max_tokens = sampling.max_tokens or default_max_tokens
    if resolved.max_tokens > context_tokens:
        raise ContextLengthExceededError(
            f"max_tokens {resolved.max_tokens} is over the context of {context_tokens} tokens",
            field=f"{prefix}sampling.max_tokens",
        )
    return resolved


async def encode_prompt(
    request: Prompted, kind: str | None, tokenizer: Tokenizer, prefix: str = ""
) -> list[int]:
    """Checks the prompt that `kind` (the set member of the oneof) names and returns its tokens."""
    if kind == "text":
        _check_text(request.text, f"{prefix}text")
        _check_bytes([request.text], tokenizer, f"{prefix}text")
        return await tokenizer.encode(request.text)
    if kind == "chat":
        messages = request.chat.messages
        _check_chat(messages, prefix)
        _check_bytes([message.content for message in messages], tokenizer, f"{prefix}chat.messages")
        try:
            return await tokenizer.encode_chat(
                [{"role": message.role, "content": message.content} for message in messages]
            )
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: the model has none
            raise InvalidArgumentError(
                f"the model's chat template refuses it: {error}", field=f"{prefix}chat.messages"
            ) from error
    if kind == "token_ids":
        return _checked_ids(request.token_ids.ids, tokenizer, f"{prefix}token_ids.ids")
    raise InvalidArgumentError(
        "one of text, chat and token_ids must be set", field=f"{prefix}prompt"
    )


def check_context(prompt_tokens: int, max_tokens: int, context_tokens: int, field: str) -> None:
    if prompt_tokens + max_tokens > context_tokens:
        raise ContextLengthExceededError(
            f"prompt of {prompt_tokens} tokens + max_tokens {max_tokens} is over the context of "
            f"{context_tokens} tokens",
            field=field,
            metadata={"prompt_tokens": str(prompt_tokens), "context_tokens": str(context_tokens)},
        )


def check_prompt(prompt_tokens: int, prompt_tokens_max: int, field: str) -> None:
    """Refuses a best-effort prompt that no worker's device share could ever hold."""
    if prompt_tokens > prompt_tokens_max:
        raise ContextLengthExceededError(
            f"prompt of {prompt_tokens} tokens is over the {prompt_tokens_max} tokens that a "
            "best-effort prompt may have on the device",
            field=field,
            metadata={
                "prompt_tokens": str(prompt_tokens),
                "be_prompt_tokens_max": str(prompt_tokens_max),
            },
        )


def _check_text(text: str, field: str) -> None:
    if not text:
        raise InvalidArgumentError("must not be empty", field=field)


def _check_chat(messages: Sequence[types_pb2.ChatMessage], prefix: str) -> None:
    if not messages:
        raise InvalidArgumentError("must not be empty", field=f"{prefix}chat.messages")
    for index, message in enumerate(messages):
        field = f"{prefix}chat.messages[{index}]"
        if message.role not in ROLES:
            raise InvalidArgumentError(
                f"{message.role!r} is none of {', '.join(ROLES)}", field=f"{field}.role"
            )
        _check_text(message.content, f"{field}.content")


def _check_bytes(texts: Sequence[str], tokenizer: Tokenizer, field: str) -> None:
    """Bounds the work of tokenising: what is refused here could not fit the context anyway."""
    size = sum(len(text.encode()) for text in texts)
    if size > tokenizer.text_bytes_max:
        raise ContextLengthExceededError(
            f"{size} bytes cannot fit the context of {tokenizer.context_tokens} tokens",
            field=field,
        )


def _checked_ids(ids: Sequence[int], tokenizer: Tokenizer, field: str) -> list[int]:
    if not ids:
        raise InvalidArgumentError("must not be empty", field=field)
    for index, token_id in enumerate(ids):
        if token_id >= tokenizer.vocabulary_tokens:
            raise InvalidArgumentError(
                f"{token_id} is not in the vocabulary of {tokenizer.vocabulary_tokens} tokens",
                field=f"{field}[{index}]",
            )
    return list(ids)
