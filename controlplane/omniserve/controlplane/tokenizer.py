"""The model's tokenizer and chat template, read from its GGUF file. Never imports torch."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from omniserve.controlplane.detokenizer import Detokenizer
from omniserve.errors import ModelFileError

# Text longer than this is tokenised in a thread (the library releases the interpreter lock);
# shorter text takes less time than a thread switch is worth.
INLINE_CHARS = 4096

# transformers' names of the parts of a GGUF tokenizer -> their keys in the file.
_PARTS = {
    "tokenizer_type": "tokenizer.ggml.model",
    "pre_tokenizer_type": "tokenizer.ggml.pre",
    "tokens": "tokenizer.ggml.tokens",
    "token_type": "tokenizer.ggml.token_type",
    "merges": "tokenizer.ggml.merges",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, equal to `transformers.AutoTokenizer` on the same file."""

    context_tokens: int
    token_bytes: list[bytes]
    """Bytes of each token id; empty for special tokens."""
    stop_tokens: frozenset[int]
    """End-of-sequence tokens."""
    backend: Any
    """transformers' tokenizer."""

    @property
    def vocabulary_tokens(self) -> int:
        return len(self.token_bytes)

    @functools.cached_property
    def text_bytes_max(self) -> int:
        """No text with more UTF-8 bytes than this can fit the context."""
        return self.context_tokens * max(map(len, self.token_bytes))

    async def encode(self, text: str) -> list[int]:
        return await _off_loop(self._encode, text, chars=len(text))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Renders `messages` ({role, content}) with the model's template, up to its answer."""
        chars = sum(len(message["content"]) for message in messages)
        return await _off_loop(self._encode_chat, messages, chars=chars)

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes[i] for i in token_ids).decode("utf-8", errors="replace")

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.token_bytes)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.backend_tokenizer.encode(text).ids
        return ids

    def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = self.backend.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self.backend.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def load(path: Path) -> Tokenizer:
    """Reads the tokenizer of GGUF file `path`. Raises ModelFileError."""
    metadata = _read_metadata(path)
    try:
        architecture = metadata["general.architecture"]
        parts = {name: metadata[key] for name, key in _PARTS.items()}
        context_tokens = int(metadata[f"{architecture}.context_length"])
        stop_tokens = frozenset({int(metadata["tokenizer.ggml.eos_token_id"])})
    except KeyError as error:
        raise ModelFileError(f"{path}: no {error.args[0]} in its metadata") from error
    if parts["tokenizer_type"] != "gpt2":
        raise ModelFileError(
            f"{path}: tokenizer {parts['tokenizer_type']!r} is not known, only byte-level BPE is"
        )
    backend_tokenizer, _ = convert_gguf_tokenizer(architecture, parts)
    backend = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend_tokenizer, chat_template=metadata.get("tokenizer.chat_template")
    )
    return Tokenizer(context_tokens, _token_bytes(backend_tokenizer), stop_tokens, backend)


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


def _token_bytes(tokenizer: Any) -> list[bytes]:
    spelling = bytes_to_unicode()  # type: ignore[no-untyped-call]
    byte_of = {char: byte for byte, char in spelling.items()}
    added = tokenizer.get_added_tokens_decoder()
    table = []
    for token_id in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(token_id)
        if token is None or (token_id in added and added[token_id].special):
            table.append(b"")
        elif all(char in byte_of for char in token):
            table.append(bytes(byte_of[char] for char in token))
        else:
            table.append(token.encode())
    return table


async def _off_loop(function: Callable[[Any], _T], argument: Any, *, chars: int) -> _T:
    if chars <= INLINE_CHARS:
        return function(argument)
    return await asyncio.to_thread(function, argument)
