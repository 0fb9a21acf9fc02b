"""Reads a model from a Hugging Face folder: config.json and safetensors, whole or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.hf_config import read_config, read_json

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "attention_out": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
"""The folder's name of each part; those of layers follow `model.layers.<index>.`."""
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HfFolder:
    """One folder as a WeightSource: tensors are in the file's type, each read when asked for.

    Raises ModelFileError if a file is missing, truncated, or holds what is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = read_config(folder)
        self._shards: dict[str, Any] = {}
        self._file_of = self._find_tensors()
        self._unread = {name for name in self._file_of if not name.endswith(".inv_freq")}
        if self.config.tied_head:  # some files have the embedding twice
            self._unread.discard(_NAMES["head"])

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Returns tensor `name` (see WeightSource)."""
        *prefix, part = name.split(".")
        file_name = (f"model.layers.{prefix[-1]}." if prefix else "") + _NAMES[part]
        if file_name not in self._file_of:
            raise ModelFileError(f"{self._folder}: tensor {file_name} is missing")
        path = self._folder / self._file_of[file_name]
        try:
            values: torch.Tensor = self._open(path.name).get_tensor(file_name)
        except SafetensorError as error:
            raise ModelFileError(f"{path}: tensor {file_name}: {error}") from error
        if tuple(values.shape) != shape:
            raise ModelFileError(
                f"{path}: tensor {file_name} has shape {tuple(values.shape)} where config.json "
                f"says {shape}"
            )
        if values.dtype not in _DTYPES:
            raise ModelFileError(
                f"{path}: tensor {file_name} is {values.dtype}, which is not supported"
            )
        self._unread.discard(file_name)
        return values

    def check_all_read(self) -> None:
        if self._unread:
            name = min(self._unread)
            raise ModelFileError(
                f"{self._folder / self._file_of[name]}: tensor {name} belongs to no supported part"
            )

    def _find_tensors(self) -> dict[str, str]:
        """Returns the file of each tensor."""
        index = self._folder / _INDEX
        if not index.is_file():
            return dict.fromkeys(self._open(_WHOLE).keys(), _WHOLE)
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise ModelFileError(f"{index}: weight_map does not name a file for each tensor")
        for file in sorted(set(files.values())):
            self._open(file)  # a missing or short shard shows now
        return files

    def _open(self, file: str) -> Any:
        if file not in self._shards:
            path = self._folder / file
            if not path.is_file():
                raise ModelFileError(f"{path}: no such file")
            try:
                self._shards[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from error
        return self._shards[file]
