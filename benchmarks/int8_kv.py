"""What int8 KV costs in quality: logits and perplexity of SmolLM2 on real text.

Runs the worker's layers over programming problems and dialogues, once with KV in the model's dtype
and once with int8 KV, everything else alike.

    python benchmarks/int8_kv.py --json

Logit errors are in units of the spread of one position's logits, after removing what shifts all of
them alike. `agreement` is the share of positions at which the best token is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from support.prompts import real_prompts
from support.stack import MODEL_PATH

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.model.gguf_file import GgufModel
from omniserve.gpuworker.model.weights import load_weights
from omniserve.gpuworker.requests import Request

PAGE_TOKENS = 64
CHUNK_TOKENS = 256
TEXT_TOKENS = 100
"""Shorter texts say little about KV."""


class Reader:
    """The worker's layers over one text at a time, with KV of `kv_dtype`."""

    def __init__(self, model: GgufModel, dtype: str, kv_dtype: str, threads: int) -> None:
        config = model.config
        pages = -(-max(map(len, real_prompts())) // PAGE_TOKENS)
        weights = load_weights(model, getattr(torch, dtype))
        self._device = CpuDevice(config, weights, pages, PAGE_TOKENS, threads, kv_dtype=kv_dtype)
        self._pages = pages

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Returns [tokens, vocabulary] float32."""
        request = Request("r", True, np.array(tokens), len(tokens), 0, known=len(tokens))
        request.blocks = list(range(self._pages))
        starts = range(0, len(tokens), CHUNK_TOKENS)
        chunks = [Chunk(request, s, min(CHUNK_TOKENS, len(tokens) - s)) for s in starts]
        return torch.cat([self._run(Cohort([chunk], PAGE_TOKENS)) for chunk in chunks])

    def _run(self, cohort: Cohort) -> torch.Tensor:
        device = self._device
        cohort.sampled_rows = torch.arange(cohort.rows)
        for layer in range(device.config.layers):
            device.run(layer, [cohort], None)
            device.attend(layer, cohort)
        return device.finish([cohort], None, np.ones(cohort.rows, np.bool_), _nothing)[1].clone()


def _nothing() -> None:
    """There is nothing to do meanwhile."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    options = parser.parse_args()
    model = GgufModel(MODEL_PATH)
    plain = Reader(model, options.dtype, options.dtype, options.threads)
    int8 = Reader(model, options.dtype, "int8", options.threads)
    texts = [tokens for tokens in real_prompts() if len(tokens) >= TEXT_TOKENS]
    losses: dict[str, float] = {"plain": 0.0, "int8": 0.0}
    means, largest, agreed = [], 0.0, 0
    for tokens in texts:
        wanted, found = plain.logits(tokens), int8.logits(tokens)
        following = torch.tensor(tokens[1:])
        for name, logits in (("plain", wanted), ("int8", found)):
            losses[name] += float(F.cross_entropy(logits[:-1], following, reduction="sum"))
        shift = (found - wanted).mean(-1, keepdim=True)
        errors = (found - wanted - shift).abs() / wanted.std(-1, keepdim=True)
        means.append(errors.mean(-1))
        largest = max(largest, float(errors.max()))
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    predicted = sum(len(tokens) - 1 for tokens in texts)
    mean_errors = torch.cat(means)
    report = {
        "dtype": options.dtype,
        "tokens": predicted,
        "perplexity": round(math.exp(losses["plain"] / predicted), 4),
        "perplexity_int8": round(math.exp(losses["int8"] / predicted), 4),
        "logit_error_mean": round(float(mean_errors.mean()), 4),
        "logit_error_largest": round(largest, 4),
        "agreement": round(agreed / len(mean_errors), 4),
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
