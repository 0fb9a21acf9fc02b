"""How one request's tokens are drawn, as the engine keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Ranges and meanings are those of `omniserve.v1.SamplingParams`; 0 is off."""

    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0

    @property
    def takes_best(self) -> bool:
        """Whether the token with the largest logit is the answer."""
        return (
            self.temperature == 0.0
            and self.repetition_penalty in (0.0, 1.0)
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
        )

    @property
    def needs_logits(self) -> bool:
        """Whether it takes more than the token with the largest logit."""
        return not self.takes_best or self.logprobs > 0


GREEDY = SamplingParams()
