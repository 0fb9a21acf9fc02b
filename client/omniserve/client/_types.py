"""What callers of the SDK pass in and get back. Plain values; the wire form is in `_wire`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class ServiceClass(StrEnum):
    """How a request is treated when work competes."""

    LATENCY_SENSITIVE = "latency_sensitive"
    """Has a latency objective; an interactive turn."""
    BEST_EFFORT = "best_effort"
    """No deadline; only throughput counts."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence token was sampled, or the text reached a stop string."""
    LENGTH = "length"
    """`max_tokens` was reached."""
    CANCELLED = "cancelled"
    """The caller, or an operator, asked for it."""
    ERROR = "error"
    """It could not be completed; the error says why."""
    UNSPECIFIED = "unspecified"
    """The server is newer than this client."""


class JobState(StrEnum):
    """Where a job stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    UNSPECIFIED = "unspecified"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    max_tokens: int = 0
    """Tokens to generate; 0 is the server's default."""
    temperature: float = 0.0
    """0 is greedy; otherwise in (0, 100]."""
    seed: int = 0
    """Key of the counter-based sampler: equal seeds give equal draws."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens up to `max_tokens`."""
    top_k: int = 0
    """Draw from the so many most probable tokens only; 0 is all."""
    top_p: float = 0.0
    """Draw from the most probable tokens that have this much probability together; 0 is all."""
    min_p: float = 0.0
    """Draw from tokens with at least this part of the most probable one's probability."""
    repetition_penalty: float = 0.0
    """Makes tokens of prompt and output less probable if over 1; 0 is off."""
    presence_penalty: float = 0.0
    """Makes tokens of the output less probable; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """The same for every time that they are there; in [-2, 2]."""
    stop: str | Sequence[str] = ()
    """The answer ends before the first of these strings."""
    logprobs: int = 0
    """Report log probabilities of each token and of so many most probable ones; at most 20."""


@dataclass(frozen=True)
class Slo:
    """Latency objective of one latency-sensitive request; 0 is the server's default."""

    ttft_ms: float = 0.0
    """Time from sending the request to its first token."""
    tpot_ms: float = 0.0
    """Mean time per token after the first."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """Its text."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token that might have come, and how probable it was."""

    token_id: int
    """The token."""
    logprob: float
    """Natural logarithm of its probability."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable a generated token was, before penalties and temperature."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[TokenLogprob, ...]
    """The most probable tokens at its place, best first."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that arrived together."""

    offset: int
    """Index of the first of them among the generated tokens."""
    token_ids: tuple[int, ...]
    """At least one id."""
    text: str
    """What they add to the text; empty inside a character of several tokens."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token if asked for, else none."""


@dataclass(frozen=True)
class Usage:
    """What a request used."""

    prompt_tokens: int
    """Tokens of the prompt, chat template included."""
    completion_tokens: int
    """Tokens generated."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again, as the prefix cache had them."""


@dataclass(frozen=True)
class Model:
    """A model that the deployment serves."""

    id: str
    """Name to pass as `model`."""
    context_tokens: int
    """Prompt plus generated tokens of one request."""
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    device: str
    """Kind of device it runs on."""


@dataclass(frozen=True)
class JobItem:
    """One request of a job. Exactly one of `prompt`, `messages`, `token_ids` is given."""

    custom_id: str
    """The caller's name for it, unique within the job."""
    prompt: str | None = None
    """Plain text to continue."""
    messages: Sequence[Message] | None = None
    """Chat turns, formatted with the model's template."""
    token_ids: Sequence[int] | None = None
    """A prompt that is tokenised already."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How its tokens are drawn."""


@dataclass(frozen=True)
class JobCounts:
    """Items of a job."""

    total: int
    """All of them."""
    completed: int
    """Ended with a result."""
    failed: int
    """Ended with an error."""


@dataclass(frozen=True)
class Job:
    """A durable best-effort job."""

    id: str
    """As given to, or made by, `submit_job`."""
    state: JobState
    """Where it stands."""
    counts: JobCounts
    """How many items have ended."""


@dataclass(frozen=True)
class JobResult:
    """What became of one item."""

    custom_id: str
    """The item's name."""
    finish_reason: FinishReason
    """Why it ended."""
    text: str
    """The generated text."""
    token_ids: tuple[int, ...]
    """The generated tokens."""
    usage: Usage
    """What it used."""
    error: str
    """Why it failed; empty otherwise."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token if asked for, else none."""
