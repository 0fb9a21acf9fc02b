"""Reads what a tokenizer is made of from a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from omniserve.errors import ModelFileError

# transformers' names of the parts of a GGUF tokenizer -> their keys in the file.
_PARTS = {
    "tokenizer_type": "tokenizer.ggml.model",
    "tokens": "tokenizer.ggml.tokens",
    "token_type": "tokenizer.ggml.token_type",
}
# Those that only one kind has.
_PARTS_OF = {
    "gpt2": {"pre_tokenizer_type": "tokenizer.ggml.pre", "merges": "tokenizer.ggml.merges"},
    "llama": {"scores": "tokenizer.ggml.scores"},
}


@dataclass(frozen=True)
class TokenizerParts:
    """What both kinds of files yield."""

    backend: Any
    """transformers' tokenizer."""
    context_tokens: int
    stop_tokens: frozenset[int]
    """End-of-sequence tokens."""
    vocabulary_tokens: int
    """What the model can yield at least: some have more tokens than their tokenizer."""


def read_gguf(path: Path) -> TokenizerParts:
    """Raises ModelFileError."""
    metadata = _read_metadata(path)
    try:
        architecture = metadata["general.architecture"]
        parts = {name: metadata[key] for name, key in _PARTS.items()}
        kind = parts["tokenizer_type"]
        if kind not in _PARTS_OF:
            raise ModelFileError(
                f"{path}: tokenizer {kind!r} is not supported, only {', '.join(_PARTS_OF)}"
            )
        parts |= {name: metadata[key] for name, key in _PARTS_OF[kind].items()}
        context_tokens = int(metadata[f"{architecture}.context_length"])
        eos = int(metadata["tokenizer.ggml.eos_token_id"])
    except KeyError as error:
        raise ModelFileError(f"{path}: no {error.args[0]} in its metadata") from error
    end_of_turn = int(metadata.get("tokenizer.ggml.eot_token_id", eos))
    backend_tokenizer, _ = convert_gguf_tokenizer(architecture, parts)
    backend = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend_tokenizer, chat_template=metadata.get("tokenizer.chat_template")
    )
    stop_tokens = frozenset({eos, end_of_turn})
    return TokenizerParts(backend, context_tokens, stop_tokens, len(parts["tokens"]))


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        # Also lays out every tensor, which fails if the file ends before its last one.
        fields = GGUFReader(path).fields
        return {name: field.contents() for name, field in fields.items()}
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader has no error of its own: a short or garbled file breaks it anywhere.
        raise ModelFileError(f"{path}: not a whole GGUF file ({error})") from error


def read_folder(folder: Path) -> TokenizerParts:
    """Raises ModelFileError."""
    config = _read_json(folder / "config.json")
    if not (folder / "tokenizer.json").is_file():
        raise ModelFileError(f"{folder / 'tokenizer.json'}: no such file")
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelFileError(f"{folder}: no readable tokenizer: {error}") from error
    return TokenizerParts(
        backend,
        _integer(folder, config, "max_position_embeddings"),
        _stop_tokens(folder, config),
        _integer(folder, config, "vocab_size"),
    )


def _integer(folder: Path, config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise ModelFileError(f"{folder / 'config.json'}: no {name}, or no integer")
    return value


def _stop_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """generation_config.json, where there is one, knows all of them."""
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    for values in (generation, config):
        found = values.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and ids and all(isinstance(token, int) for token in ids):
            return frozenset(ids)
    raise ModelFileError(f"{folder / 'config.json'}: no eos_token_id, or not token ids")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return value
