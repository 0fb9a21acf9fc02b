"""Model files that cannot be served: each ends in a typed error that names the file."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.stack import MODEL_PATH

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.gguf_file import GgufModel
from omniserve.gpuworker.model.weights import load_weights

HIDDEN = 8
VOCABULARY = 16


def write(
    path: Path,
    architecture: str = "llama",
    *,
    without: str = "",
    extra: str = "",
    rope_scaling: str = "",
    end_of_turn: int = 0,
    **changed: int,
) -> Path:
    """Writes a model of one layer, less one metadata field or tensor, with fields changed, or
    with an `extra` tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "block_count": 1,
        "embedding_length": HIDDEN,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "feed_forward_length": HIDDEN,
        "vocab_size": VOCABULARY,
        "context_length": 32,
    } | changed
    for name, value in fields.items():
        if name != without:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    if end_of_turn:
        writer.add_uint32("tokenizer.ggml.eot_token_id", end_of_turn)
    if rope_scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", rope_scaling)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (HIDDEN, HIDDEN),
        "blk.0.ffn_up": (HIDDEN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, HIDDEN),
    }
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    if extra:
        writer.add_tensor(extra, np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(path: Path) -> str:
    return f"^{re.escape(str(path))}: "


def test_a_whole_model_loads(tmp_path: Path) -> None:
    model = GgufModel(write(tmp_path / "m.gguf"))
    weights = load_weights(model, torch.float32)
    assert (model.config.layers, model.config.hidden, model.config.kv_heads) == (1, HIDDEN, 1)
    assert weights.embedding.shape == (VOCABULARY, HIDDEN)
    assert weights.head is weights.embedding  # no output.weight: tied


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=named(tmp_path / "no.gguf") + "no such"):
        GgufModel(tmp_path / "no.gguf")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=named(tmp_path)):
        GgufModel(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(4096), bytes(4096)])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=named(path)):
        GgufModel(path)


@pytest.mark.parametrize("kept_bytes", [3, 8, 24, 100, 5_000, 1_000_000, 50_000_000])
def test_a_truncated_model_is_refused_wherever_it_ends(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "m.gguf"
    with MODEL_PATH.open("rb") as whole:
        path.write_bytes(whole.read(kept_bytes))
    with pytest.raises(ModelFileError, match=named(path)):
        GgufModel(path)


def test_a_model_that_lacks_its_last_byte_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-33])  # behind the last tensor comes padding
    with pytest.raises(ModelFileError, match=named(path)):
        GgufModel(path)


def test_a_corrupt_file_never_ends_in_an_untyped_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    loaded = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        content = whole.copy()
        content[draw.integers(4, 1400, 3)] = draw.integers(0, 256, 3)
        path.write_bytes(content.tobytes())
        with contextlib.suppress(ModelFileError):
            load_weights(GgufModel(path), torch.float32)
            loaded += 1
    assert loaded < 150


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "gpt2")
    with pytest.raises(ModelFileError, match=named(path) + "architecture 'gpt2'"):
        GgufModel(path)


def test_a_missing_metadata_field_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", without="context_length")
    with pytest.raises(ModelFileError, match=named(path) + r".*llama\.context_length"):
        GgufModel(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", without="blk.0.ffn_up")
    with pytest.raises(ModelFileError, match=named(path) + r".*blk\.0\.ffn_up\.weight"):
        load_weights(GgufModel(path), torch.float32)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", feed_forward_length=HIDDEN + 1)
    with pytest.raises(ModelFileError, match=named(path) + r".*blk\.0\.ffn_gate\.weight"):
        load_weights(GgufModel(path), torch.float32)


def test_a_tensor_that_nothing_would_compute_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", extra="blk.0.attn_output.bias")
    with pytest.raises(ModelFileError, match=named(path) + r".*blk\.0\.attn_output\.bias"):
        load_weights(GgufModel(path), torch.float32)


def test_an_unsupported_kind_of_rope_scaling_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", rope_scaling="yarn")
    with pytest.raises(ModelFileError, match=named(path) + "RoPE scaling 'yarn'"):
        GgufModel(path)


@pytest.mark.parametrize("field", ["attention.value_length", "rope.dimension_count"])
def test_heads_of_several_sizes_are_refused(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "m.gguf", **{field: 2})
    with pytest.raises(ModelFileError, match=named(path) + rf".*llama\.{field}"):
        GgufModel(path)


def test_kv_heads_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", **{"attention.head_count_kv": 3})
    with pytest.raises(ModelFileError, match=named(path) + "3 KV heads"):
        GgufModel(path)


def test_an_end_of_turn_token_ends_a_sequence_too(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", end_of_turn=7)
    assert GgufModel(path).config.eos_token_ids == (2, 7)
