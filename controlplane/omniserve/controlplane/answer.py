"""The text of one answer, up to its first stop string. For public streams and items of jobs."""

from __future__ import annotations

from collections.abc import Sequence

from omniserve.controlplane.detokenizer import Detokenizer, Piece


class AnswerText:
    """Decodes the tokens of one answer; the text of all pieces together has no stop string.

    A piece's text may turn out to be the beginning of a stop string, so its tokens are held back
    until it is clear that it is not. A stream can resume behind any piece.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._begun_max = max(map(len, stop), default=1) - 1
        self._held: list[Piece] = []
        self.stopped = False
        """Whether a stop string was reached. The last piece then ends with the token that completed
        it, and with the text before it; nothing comes behind it."""

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Returns what can be said for certain; it may be empty."""
        if not self._stop:
            return self._detokenizer.push(token_ids)
        done: list[Piece] = []
        for token_id in token_ids:
            if self.stopped:
                break
            done += self._take(self._detokenizer.push([token_id]))
        return _join(done)

    def flush(self) -> Piece:
        """Returns what was held back: no more tokens will come."""
        if self.stopped:
            return Piece([], "")
        done = self._take(self._detokenizer.flush())
        done += self._held
        self._held = []
        return _join(done)

    def _take(self, piece: Piece) -> list[Piece]:
        """Returns the pieces held so far, or this one, that can go out now."""
        self._held.append(piece)
        text = "".join(held.text for held in self._held)
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped = True
            whole = Piece([i for held in self._held for i in held.token_ids], text[: min(starts)])
            self._held = []
            return [whole]
        certain = len(text) - self._begun(text)
        done = []
        while self._held and len(self._held[0].text) <= certain:
            certain -= len(self._held[0].text)
            done.append(self._held.pop(0))
        return done

    def _begun(self, text: str) -> int:
        """Returns how many characters at the end of `text` may begin a stop string."""
        for length in range(min(len(text), self._begun_max), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0


def _join(pieces: Sequence[Piece]) -> Piece:
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    return Piece(token_ids, "".join(piece.text for piece in pieces))
