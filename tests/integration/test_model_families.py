"""Every family of models, from both kinds of files: our logits against those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.local_stages import LocalStages
from support.random_models import (
    CONTEXT_TOKENS,
    EOS_TOKEN_ID,
    KINDS,
    ORIGINAL_CONTEXT_TOKENS,
    VOCABULARY,
    WINDOW_TOKENS,
    Kind,
    make,
    save_gguf,
)

from omniserve.gpuworker.model.weights import open_model

TOLERANCE = 1e-3
"""Of the spread of a position's logits. Both sides compute in float32."""
TOKENS = 150
DECODED = 100
"""Decode begins within the longest chunk and goes on beyond windows and original contexts."""
assert DECODED > WINDOW_TOKENS
assert ORIGINAL_CONTEXT_TOKENS * 4 < TOKENS < CONTEXT_TOKENS


def save(model: Any, path: Path, format_name: str) -> Path:
    if format_name == "gguf":
        return save_gguf(model, path / "model.gguf")
    shard_size = "100KB" if format_name == "shards" else "1GB"
    model.save_pretrained(path, max_shard_size=shard_size)
    shards = len(list(path.glob("*.safetensors")))
    assert shards > 3 if format_name == "shards" else shards == 1
    return path


@pytest.mark.parametrize("format_name", ["folder", "shards", "gguf"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_transformers(kind: Kind, format_name: str, tmp_path: Path) -> None:
    reference = make(kind)
    model = open_model(save(reference, tmp_path, format_name))
    assert model.config.eos_token_ids == (EOS_TOKEN_ID,)
    assert model.config.tied_head == reference.config.tie_word_embeddings
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    with torch.inference_mode():
        wanted = reference(tokens[None], logits_to_keep=DECODED + 1).logits[0]
    found = LocalStages(model, torch.float32, TOKENS).logits(tokens.tolist(), DECODED, 37)
    assert found.shape == wanted.shape
    errors = (found - wanted).abs() / wanted.std(-1, keepdim=True)
    assert float(errors.max()) < TOLERANCE


def test_the_kinds_are_told_apart_by_their_logits() -> None:
    """Without this, a scaling or a window that both sides ignored would look right."""
    tokens = torch.arange(TOKENS)[None] % VOCABULARY
    pairs = {"llama3-rope": "llama", "linear-rope": "llama", "mistral-window": "mistral"}
    by_name = {kind.name: kind for kind in KINDS}
    for special, plain in pairs.items():
        with torch.inference_mode():
            one, other = (make(by_name[name])(tokens).logits[0, -1] for name in (special, plain))
        assert float((one - other).abs().max()) > 100 * TOLERANCE * float(other.std())
