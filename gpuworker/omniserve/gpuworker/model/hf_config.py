"""Reads the shape of a model from the config.json of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omniserve.errors import ModelFileError
from omniserve.gpuworker.model.config import ARCHITECTURES, ModelConfig
from omniserve.gpuworker.model.rope import llama3_divisors

_ABSENT = object()
_MISTRAL_WINDOW_TOKENS = 4096
"""transformers' default where config.json does not say."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ModelFileError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # among them UnicodeDecodeError
        raise ModelFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return value


def read_config(folder: Path) -> ModelConfig:
    """Raises ModelFileError that names the file and the field which is wrong or not supported."""
    fields = _Fields(folder / "config.json")
    name = fields.text("model_type")
    if name not in ARCHITECTURES:
        raise fields.error(f"model_type {name!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if (activation := fields.text("hidden_act", "silu")) != "silu":
        raise fields.error(f"hidden_act {activation!r} is not supported, only 'silu'")
    if "quantization_config" in fields.values:
        raise fields.error("quantization_config: quantised safetensors are not supported")
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", 0) or (hidden // heads if heads else 0)
    layers, context_tokens = (
        fields.integer("num_hidden_layers"),
        fields.integer("max_position_embeddings"),
    )
    theta, divisors = _rope(fields, head_dim, context_tokens)
    windows = tuple(
        window if 0 < window < context_tokens else 0 for window in _windows(fields, name, layers)
    )
    config = ModelConfig(
        architecture=ARCHITECTURES[name],
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocabulary=fields.integer("vocab_size"),
        context_tokens=context_tokens,
        rope_theta=theta,
        norm_epsilon=fields.number("rms_norm_eps"),
        eos_token_ids=_eos_token_ids(folder, fields),
        tied_head=bool(fields.values.get("tie_word_embeddings", False)),
        rope_divisors=divisors,
        windows_tokens=windows if any(windows) else (),
    )
    if flaw := config.flaw():
        raise fields.error(flaw)
    return config


class _Fields:
    """A JSON object's fields by name and type; null is as good as absent."""

    def __init__(self, path: Path, within: str = "", values: dict[str, Any] | None = None) -> None:
        self._path = path
        self._within = within
        self.values = read_json(path) if values is None else values

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {message}")

    def number(self, name: str, default: Any = _ABSENT) -> float:
        return float(self._get(name, default, int | float, "a number"))

    def integer(self, name: str, default: Any = _ABSENT) -> int:
        return int(self._get(name, default, int, "an integer"))

    def text(self, name: str, default: Any = _ABSENT) -> str:
        return str(self._get(name, default, str, "a string"))

    def object(self, *names: str) -> _Fields | None:
        """The first of the named objects that is there."""
        for name in names:
            if self.values.get(name) is not None:
                values = self._get(name, _ABSENT, dict, "an object")
                return _Fields(self._path, f"{name}.", values)
        return None

    def _get(self, name: str, default: Any, kind: Any, what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _ABSENT:
                raise self.error(f"{self._within}{name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, kind):
            raise self.error(f"{self._within}{name} is not {what}: {value!r:.60}")
        return value


def _rope(fields: _Fields, head_dim: int, context_tokens: int) -> tuple[float, tuple[float, ...]]:
    """Returns the base and the divisors of the frequencies (see ModelConfig).

    transformers 5 has both in `rope_parameters`, older ones a top-level base and `rope_scaling`.
    """
    theta = fields.number("rope_theta", 10000.0)
    scaling = fields.object("rope_parameters", "rope_scaling")
    if scaling is None:
        return theta, ()
    theta = scaling.number("rope_theta", theta)
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor is not supported")
    kind = scaling.text("rope_type", scaling.values.get("type") or "default")
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (scaling.number("factor"),) * (head_dim // 2)
    if kind == "llama3":
        return theta, llama3_divisors(
            head_dim,
            theta,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_context_tokens=scaling.integer(
                "original_max_position_embeddings", context_tokens
            ),
        )
    raise fields.error(f"rope_type {kind!r} is not supported, only default, linear and llama3")


def _windows(fields: _Fields, architecture: str, layers: int) -> list[int]:
    """Sliding window of each layer, 0 where there is none."""
    if architecture == "mistral":
        default = 0 if "sliding_window" in fields.values else _MISTRAL_WINDOW_TOKENS
        return [fields.integer("sliding_window", default)] * layers
    if not architecture.startswith("qwen") or not fields.values.get("use_sliding_window"):
        return [0] * layers
    window = fields.integer("sliding_window", 0)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers")
        return [window if layer >= first else 0 for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error(f"layer_types does not name the kind of each of {layers} layers")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    """generation_config.json, where there is one, knows all of them."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    for values in (generation, fields.values):
        found = values.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and ids and all(isinstance(token, int) for token in ids):
            return tuple(ids)
    raise fields.error("eos_token_id is missing, or neither a token id nor a list of them")
