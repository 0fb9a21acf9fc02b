"""Reads a model from a GGUF file and dequantises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.config import ARCHITECTURES, ModelConfig

_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attention_out": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
"""GGUF's name of each part; those of layers follow `blk.<index>.`."""
_SUPPORTED = ("llama", "qwen2", "qwen3")
"""Mistral's files call themselves llama."""
_ROPE_FACTORS = "rope_freqs.weight"
_ABSENT = object()


class GgufModel:
    """One GGUF file as a WeightSource: tensors are float32, each read when asked for.

    Raises ModelFileError if the file is missing, truncated, or of an architecture that is not
    supported.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelFileError(f"{path}: no such model file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise ModelFileError(f"{path}: not a readable GGUF file: {error}") from error
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._unread = set(self._tensors)
        self._check_complete()
        self._architecture = ""
        self._architecture = str(self._field("general.architecture"))
        if self._architecture not in _SUPPORTED:
            raise ModelFileError(
                f"{path}: architecture {self._architecture!r} is not supported, only "
                f"{', '.join(_SUPPORTED)}"
            )
        self.config = self._read_config()

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Returns tensor `name` (see WeightSource) as float32."""
        *prefix, part = name.split(".")
        file_name = ("blk." + prefix[-1] + "." if prefix else "") + _NAMES[part]
        values = self._read(file_name, *shape)
        # llama.cpp orders the rows of this architecture for RoPE over neighbouring pairs.
        if self._architecture == "llama" and part in ("q", "k"):
            pairs = values.view(-1, self.config.head_dim // 2, 2, shape[-1])
            values = pairs.transpose(1, 2).reshape(shape).contiguous()
        return values

    def check_all_read(self) -> None:
        if self._unread:
            raise ModelFileError(
                f"{self._path}: tensor {min(self._unread)} belongs to no supported part of "
                f"a {self._architecture!r} model"
            )

    def _read(self, name: str, *shape: int) -> torch.Tensor:
        entry = self._tensors.get(name)
        if entry is None:
            raise ModelFileError(f"{self._path}: tensor {name} is missing")
        found = tuple(int(n) for n in reversed(entry.shape))
        if found != shape:
            raise ModelFileError(
                f"{self._path}: tensor {name} has shape {found} where the metadata says {shape}"
            )
        self._unread.discard(name)
        try:
            values = dequantize(entry.data, entry.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ModelFileError(f"{self._path}: tensor {name}: {error}") from error
        return torch.from_numpy(np.array(values).reshape(shape))

    def _check_complete(self) -> None:
        """A truncated file maps fewer bytes than its tensors claim."""
        size = self._path.stat().st_size
        for tensor in self._tensors.values():
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise ModelFileError(
                    f"{self._path}: truncated: tensor {tensor.name} ends at byte {end} of {size}"
                )

    def _field(self, key: str, default: Any = _ABSENT) -> Any:
        """Metadata field `key`, in which `{}` stands for the architecture."""
        key = key.format(self._architecture)
        field = self._reader.get_field(key)
        if field is None:
            if default is _ABSENT:
                raise ModelFileError(f"{self._path}: metadata field {key} is missing")
            return default
        try:
            return field.contents()
        except (ValueError, IndexError) as error:  # among them UnicodeDecodeError
            raise ModelFileError(f"{self._path}: metadata field {key}: {error}") from error

    def _number(self, key: str, default: Any = _ABSENT) -> float:
        value = self._field(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"{self._path}: metadata field {key} is no number: {value!r:.60}")
        return value

    def _read_config(self) -> ModelConfig:
        heads = int(self._number("{}.attention.head_count"))
        hidden = int(self._number("{}.embedding_length"))
        head_dim = int(self._number("{}.attention.key_length", 0))
        if not head_dim:
            if heads == 0 or hidden % heads:
                raise ModelFileError(f"{self._path}: {heads} heads do not divide {hidden} elements")
            head_dim = hidden // heads
        for key in ("{}.attention.value_length", "{}.rope.dimension_count"):
            if int(self._number(key, head_dim)) != head_dim:
                raise ModelFileError(
                    f"{self._path}: metadata field {key.format(self._architecture)} differs from "
                    f"the heads' {head_dim} elements, which is not supported"
                )
        layers = int(self._number("{}.block_count"))
        window = int(self._number("{}.attention.sliding_window", 0))
        eos = int(self._number("tokenizer.ggml.eos_token_id"))
        end_of_turn = int(self._number("tokenizer.ggml.eot_token_id", eos))
        config = ModelConfig(
            architecture=ARCHITECTURES[self._architecture],
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=int(self._number("{}.attention.head_count_kv", heads)),
            head_dim=head_dim,
            intermediate=int(self._number("{}.feed_forward_length")),
            vocabulary=self._vocabulary(),
            context_tokens=int(self._number("{}.context_length")),
            rope_theta=float(self._number("{}.rope.freq_base", 10000.0)),
            norm_epsilon=float(self._number("{}.attention.layer_norm_rms_epsilon")),
            eos_token_ids=(eos,) if end_of_turn == eos else (eos, end_of_turn),
            tied_head=_NAMES["head"] not in self._tensors,
            rope_divisors=self._rope_divisors(head_dim),
            windows_tokens=(window,) * layers if window else (),
        )
        if flaw := config.flaw():
            raise ModelFileError(f"{self._path}: {flaw}")
        return config

    def _vocabulary(self) -> int:
        """Not every converter writes the field."""
        embedding = self._tensors.get(_NAMES["embedding"])
        rows = int(embedding.shape[-1]) if embedding is not None else 0
        return int(self._number("{}.vocab_size", rows))

    def _rope_divisors(self, head_dim: int) -> tuple[float, ...]:
        kind = self._field("{}.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ModelFileError(f"{self._path}: RoPE scaling {kind!r} is not supported")
        if _ROPE_FACTORS in self._tensors:  # how llama.cpp writes Llama 3's scaling
            return tuple(self._read(_ROPE_FACTORS, head_dim // 2).tolist())
        factor = float(self._number("{}.rope.scaling.factor", 1.0)) if kind == "linear" else 1.0
        return (factor,) * (head_dim // 2) if factor != 1.0 else ()
