"""Reads a Llama model from a GGUF file and dequantises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.config import ModelConfig


class GgufModel:
    """One GGUF file: `config` and tensors by GGUF name, float32, each read when asked for.

    Raises ModelFileError if the file is missing, truncated, or not of the Llama architecture.
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
        self._check_complete()
        self.config = self._read_config()

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Returns tensor `name` as float32, [out, in] for matrices.

        Raises ModelFileError if it is missing or not of `shape`.
        """
        entry = self._tensors.get(name)
        if entry is None:
            raise ModelFileError(f"{self._path}: tensor {name} is missing")
        found = tuple(int(n) for n in reversed(entry.shape))
        if found != shape:
            raise ModelFileError(
                f"{self._path}: tensor {name} has shape {found} where the metadata says {shape}"
            )
        values = dequantize(entry.data, entry.tensor_type).astype(np.float32, copy=False)
        return torch.from_numpy(np.array(values).reshape(shape))

    def has(self, name: str) -> bool:
        return name in self._tensors

    def _check_complete(self) -> None:
        """A truncated file maps fewer bytes than its tensors claim."""
        size = self._path.stat().st_size
        for tensor in self._tensors.values():
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise ModelFileError(
                    f"{self._path}: truncated: tensor {tensor.name} ends at byte {end} of {size}"
                )

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise ModelFileError(f"{self._path}: metadata field {key} is missing")
        try:
            return field.contents()
        except (ValueError, IndexError) as error:  # among them UnicodeDecodeError
            raise ModelFileError(f"{self._path}: metadata field {key}: {error}") from error

    def _read_config(self) -> ModelConfig:
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ModelFileError(
                f"{self._path}: architecture {architecture!r} is not supported, only 'llama'"
            )
        heads = int(self._field("llama.attention.head_count"))
        hidden = int(self._field("llama.embedding_length"))
        if heads == 0 or hidden % heads:
            raise ModelFileError(f"{self._path}: {heads} heads do not divide {hidden} elements")
        return ModelConfig(
            layers=int(self._field("llama.block_count")),
            hidden=hidden,
            heads=heads,
            kv_heads=int(self._field("llama.attention.head_count_kv")),
            head_dim=hidden // heads,
            intermediate=int(self._field("llama.feed_forward_length")),
            vocabulary=int(self._field("llama.vocab_size")),
            context_tokens=int(self._field("llama.context_length")),
            rope_theta=float(self._field("llama.rope.freq_base")),
            norm_epsilon=float(self._field("llama.attention.layer_norm_rms_epsilon")),
            eos_token_ids=(int(self._field("tokenizer.ggml.eos_token_id")),),
        )
