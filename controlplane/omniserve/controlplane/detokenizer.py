"""Tokens to text, one stream at a time, without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Tokens whose text ends on a character's boundary, so a stream can resume behind them."""

    token_ids: list[int]
    text: str


class Detokenizer:
    """Decodes one stream. Joined pieces have every token pushed, and the text of decoding all.

    `token_bytes[id]` are a token's bytes; special tokens have none.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        # Replaces broken bytes as the tokenizers library does, at most 3 bytes late.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held_ids: list[int] = []
        self._held_text = ""

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Returns the longest piece that ends on a character's boundary; it may be empty."""
        done = 0
        ids = self._held_ids + list(token_ids)
        texts = [self._held_text]
        complete = ""
        for index, token_id in enumerate(token_ids, start=len(self._held_ids) + 1):
            texts.append(self._utf8.decode(self._token_bytes[token_id]))
            if not self._utf8.getstate()[0]:
                done = index
                complete += "".join(texts)
                texts.clear()
        self._held_ids = ids[done:]
        self._held_text = "".join(texts)
        return Piece(ids[:done], complete)

    def flush(self) -> Piece:
        """Returns what was held back, with U+FFFD for an unfinished character."""
        piece = Piece(self._held_ids, self._held_text + self._utf8.decode(b"", final=True))
        self._held_ids, self._held_text = [], ""
        self._utf8.reset()
        return piece
