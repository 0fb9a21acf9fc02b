"""Prompt and output lengths of requests: drawn from a trace, or from a log-normal."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class LogNormal:
    """Log-normal with this mean before it is capped, in tokens; `sigma` is that of its log."""

    mean: float
    cap: int
    sigma: float

    def draw(self, rng: np.random.Generator) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return int(np.clip(round(rng.lognormal(mu, self.sigma)), 1, self.cap))


@dataclass(frozen=True)
class Lengths:
    """Yields (prompt, output) tokens of one request after the other."""

    source: str
    """Where they come from, for the report."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Of a trace."""
    prompt: LogNormal | None = None
    output: LogNormal | None = None

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        if self.pairs:
            while True:
                yield self.pairs[int(rng.integers(len(self.pairs)))]
        assert self.prompt is not None
        assert self.output is not None
        while True:
            yield self.prompt.draw(rng), self.output.draw(rng)


# Fitted to the logarithms of azure2023_conv (Azure LLM inference traces, CC-BY 4.0).
_CONV_PROMPT = LogNormal(mean=1234.7, cap=14050, sigma=0.985)
_CONV_OUTPUT = LogNormal(mean=218.8, cap=1000, sigma=0.859)


def conversation(path: Path, scale: float, output_cap: int) -> Lengths:
    """The lengths of azure2023_conv, both times `scale`, outputs at most `output_cap`.

    A log-normal fitted to that trace where the file is absent.
    """
    if path.is_file():
        with gzip.open(path, "rt") as lines:
            rows = [
                (int(r["input_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(lines)
            ]
        pairs = [
            (max(1, round(p * scale)), min(max(1, round(o * scale)), output_cap)) for p, o in rows
        ]
        return Lengths(path.name, pairs=tuple(pairs))
    prompt, output = (
        LogNormal(of.mean * scale, max(1, round(of.cap * scale)), of.sigma)
        for of in (_CONV_PROMPT, _CONV_OUTPUT)
    )
    capped = LogNormal(output.mean, min(output.cap, output_cap), output.sigma)
    return Lengths("log-normal fitted to azure2023_conv", prompt=prompt, output=capped)
