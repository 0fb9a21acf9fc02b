"""Hugging Face folders that cannot be served: each ends in a typed error that names its cause."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.random_models import KINDS, make

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.weights import load_weights, open_model

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    make(next(kind for kind in KINDS if kind.name == "qwen3")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path) -> None:
    load_weights(open_model(folder), torch.float32)


def edit(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def shard(folder: Path) -> None:
    """Cuts the one file into two."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors")
        index |= dict.fromkeys(part, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelFileError) as refusal:
        load(folder)
    assert refusal.value.message.startswith(str(folder))
    for word in words:
        assert word in refusal.value.message


def test_a_whole_folder_loads_in_one_file_and_in_shards(folder: Path) -> None:
    load(folder)
    shard(folder)
    load(folder)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape(str(tmp_path / "config.json"))):
        open_model(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_field_is_named(folder: Path, name: str) -> None:
    edit(folder / "config.json", lambda fields: fields.pop(name))
    refused(folder, "config.json", name, "missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("hidden_size", "many"),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 63),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 4.0}),
        ("rope_parameters", 3),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_an_unsupported_or_impossible_field_is_refused(
    folder: Path, name: str, value: object
) -> None:
    edit(folder / "config.json", lambda fields: fields.update({name: value}))
    refused(folder, "config.json")


def test_end_of_sequence_tokens_may_be_one_or_a_list_in_either_file(folder: Path) -> None:
    generation = folder / "generation_config.json"
    for ids, wanted in ((7, (7,)), ([7, 9], (7, 9))):
        edit(generation, lambda fields, ids=ids: fields.update(eos_token_id=ids))
        assert open_model(folder).config.eos_token_ids == wanted
    generation.unlink()
    edit(folder / "config.json", lambda fields: fields.update(eos_token_id=[3, 4]))
    assert open_model(folder).config.eos_token_ids == (3, 4)
    edit(folder / "config.json", lambda fields: fields.pop("eos_token_id"))
    refused(folder, "eos_token_id")


def test_a_window_holds_in_the_layers_that_the_config_names(folder: Path) -> None:
    config = folder / "config.json"
    edit(config, lambda fields: fields.update(use_sliding_window=True, sliding_window=16))
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    edit(config, lambda fields: fields.update(layer_types=kinds))
    assert open_model(folder).config.windows_tokens == (0, 16, 16)
    edit(config, lambda fields: (fields.pop("layer_types"), fields.update(max_window_layers=2)))
    assert open_model(folder).config.windows_tokens == (0, 0, 16)
    edit(config, lambda fields: fields.update(use_sliding_window=False))
    assert open_model(folder).config.windows_tokens == ()


def test_a_window_as_long_as_the_context_is_none(folder: Path) -> None:
    edit(folder / "config.json", lambda fields: fields.update(model_type="mistral"))
    assert open_model(folder).config.windows_tokens == ()  # transformers' default: 4096
    edit(folder / "config.json", lambda fields: fields.update(sliding_window=128))
    assert open_model(folder).config.windows_tokens == (128,) * 3


def test_a_base_beside_the_scaling_is_read_as_older_files_have_it(folder: Path) -> None:
    def older(fields: dict[str, Any]) -> None:
        del fields["rope_parameters"]
        fields.update(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})

    edit(folder / "config.json", older)
    config = open_model(folder).config
    assert (config.rope_theta, set(config.rope_divisors)) == (5e5, {2.0})


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))
    refused(folder, "model.layers.1.self_attn.q_norm.weight", "missing")


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda fields: fields.update(intermediate_size=161))
    refused(folder, "model.safetensors", "mlp.gate_proj.weight")


def test_a_tensor_of_another_type_is_named(folder: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(128, dtype=torch.int8)}))
    refused(folder, "model.safetensors", name, "int8")


def test_a_tensor_that_nothing_would_compute_is_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(128)}))
    refused(folder, "model.safetensors", name)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 10_000])
def test_truncated_weights_are_refused(folder: Path, kept_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    refused(folder, "model.safetensors", "not a whole")


def test_missing_weights_and_missing_shards_are_named(folder: Path) -> None:
    shard(folder)
    (folder / "part1.safetensors").unlink()
    refused(folder, "part1.safetensors", "no such file")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "model.safetensors", "no such file")


def test_an_index_without_a_map_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "index.json", "weight_map")
