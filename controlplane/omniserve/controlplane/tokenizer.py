"""The model's tokenizer and chat template. Never imports torch."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers.convert_slow_tokenizer import bytes_to_unicode

from omniserve.controlplane.detokenizer import Detokenizer
from omniserve.controlplane.tokenizer_files import read_folder, read_gguf

# Text longer than this is tokenised in a thread (the library releases the interpreter lock);
# shorter text takes less time than a thread switch is worth.
INLINE_CHARS = 4096

_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, equal to `transformers.AutoTokenizer` on the same file.

    But a space that a vocabulary of SentencePiece puts before a text's first word stays in what is
    decoded: an answer goes on from its prompt.
    """

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
    """Reads the tokenizer of a GGUF file or a Hugging Face folder. Raises ModelFileError."""
    parts = read_folder(path) if path.is_dir() else read_gguf(path)
    token_bytes = _token_bytes(parts.backend.backend_tokenizer)
    token_bytes += [b""] * (parts.vocabulary_tokens - len(token_bytes))
    return Tokenizer(parts.context_tokens, token_bytes, parts.stop_tokens, parts.backend)


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """Bytes of every token: of a byte-level vocabulary, or of SentencePiece's with byte tokens."""
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    bytes_of = _byte_level_speller() if byte_level else _sentencepiece_bytes
    added = tokenizer.get_added_tokens_decoder()
    table = []
    for token_id in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(token_id)
        if token is None or (token_id in added and added[token_id].special):
            table.append(b"")
        elif token_id in added:
            table.append(token.encode())
        else:
            table.append(bytes_of(token))
    return table


def _byte_level_speller() -> Callable[[str], bytes]:
    spelling = bytes_to_unicode()  # type: ignore[no-untyped-call]
    byte_of = {char: byte for byte, char in spelling.items()}

    def bytes_of(token: str) -> bytes:
        if all(char in byte_of for char in token):
            return bytes(byte_of[char] for char in token)
        return token.encode()

    return bytes_of


def _sentencepiece_bytes(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


async def _off_loop(function: Callable[[Any], _T], argument: Any, *, chars: int) -> _T:
    if chars <= INLINE_CHARS:
        return function(argument)
    return await asyncio.to_thread(function, argument)
