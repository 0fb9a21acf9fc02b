"""Random weights for a shape that only a config.json states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.local_stages import LocalStages
from support.random_models import KINDS, Kind, make

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.weights import load_weights, open_model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_shape_is_enough_for_a_model_with_finite_logits(kind: Kind, tmp_path: Path) -> None:
    make(kind).config.save_pretrained(tmp_path)
    model = open_model(tmp_path, "dummy")
    tokens = list(range(20))
    logits = LocalStages(model, torch.float32, len(tokens)).logits(tokens, 10, 7)
    assert torch.isfinite(logits).all()
    assert (logits.std(-1) > 0).all()


def test_the_same_shape_has_the_same_weights_and_layers_differ(tmp_path: Path) -> None:
    make(KINDS[0]).config.save_pretrained(tmp_path)
    one, again = (load_weights(open_model(tmp_path, "dummy"), torch.bfloat16) for _ in range(2))
    assert torch.equal(one.layers[1].down, again.layers[1].down)
    assert not torch.equal(one.layers[0].down, one.layers[1].down)


def test_a_folder_without_a_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_model(tmp_path, "dummy")
