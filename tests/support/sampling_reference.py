"""Sampling as a textbook has it: `transformers`' processors in vLLM's order, all in float64."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.generation import logits_process as hf

from omniserve.gpuworker.sampling import uniform
from omniserve.gpuworker.sampling_params import SamplingParams


def probabilities(
    logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> torch.Tensor:
    """Returns [vocabulary] float64; all of it on one token if greedy. logits: [vocabulary]."""
    scores = logits.double()[None].clone()
    ids = torch.tensor([[*prompt, *output]])
    if params.repetition_penalty:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in collections.Counter(output).items():
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    if params.temperature == 0:
        return torch.nn.functional.one_hot(scores[0].argmax(), scores.shape[1]).double()
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if 0 < params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    return torch.softmax(scores[0], dim=-1)


def next_token(
    logits: torch.Tensor,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    shift: float = 0.0,
) -> int:
    """The first token whose cumulative probability is over the draw, moved by `shift`."""
    draw = uniform(params.seed, len(prompt) + len(output)) + shift
    cumulative = 0.0
    expected = probabilities(logits, prompt, output, params)
    for token, probability in enumerate(expected.tolist()):
        cumulative += probability
        if cumulative > draw:
            return token
    return int(expected.nonzero()[-1])


def nearly_tied(
    logits: torch.Tensor,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    slack: float,
) -> set[int]:
    """Tokens that logits, draws or cuts would yield that differ by `slack` at most."""
    if params.temperature == 0:
        best = next_token(logits, prompt, output, params)
        lower = logits.clone()
        lower[best] -= slack
        return {best, next_token(lower, prompt, output, params)}
    return {
        next_token(
            logits,
            prompt,
            output,
            replace(params, top_p=params.top_p * cut, min_p=params.min_p * cut),
            shift,
        )
        for shift in (-slack, 0.0, slack)
        for cut in (1 - slack, 1.0, 1 + slack)
    }
