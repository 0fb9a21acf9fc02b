"""A request's tokens as the public stream has them: chunks of text, then how it ended."""

from __future__ import annotations

from typing import Any

from omniserve.controlplane.answer import AnswerText
from omniserve.controlplane.detokenizer import Piece
from omniserve.controlplane.token_stream import Tokens
from omniserve.v1 import inference_pb2, types_pb2


class ResponseWriter:
    """Writes one Generate call's responses. `offset` counts generated tokens written."""

    def __init__(
        self,
        context: Any,
        answer: AnswerText,
        request_id: str,
        prompt_tokens: int,
        offset: int,
    ) -> None:
        self._context = context
        self._answer = answer
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._offset = offset
        self._cached_tokens = 0
        self._logprobs: list[types_pb2.TokenLogprobs] = []
        """Of tokens that were not written yet, if the request asked for them."""

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string: `finish` is then due."""
        return self._answer.stopped

    async def write(self, tokens: Tokens) -> None:
        """Writes the text that `tokens` add."""
        self._cached_tokens = tokens.cached_tokens
        self._logprobs += tokens.logprobs
        await self._write_piece(self._answer.push(tokens.token_ids))

    async def finish(self, reason: types_pb2.FinishReason) -> None:
        """Writes what was held back, and the end: the worker's, or a stop string's."""
        await self._write_piece(self._answer.flush())
        if self._answer.stopped:
            reason = types_pb2.FINISH_REASON_STOP
        usage = types_pb2.Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._offset,
            # A worker that took over counts what it found of the tokens sent before as well.
            cached_tokens=min(self._cached_tokens, self._prompt_tokens),
        )
        await self._write(finished=inference_pb2.Finished(reason=reason, usage=usage))

    async def _write_piece(self, piece: Piece) -> None:
        count = len(piece.token_ids)
        if not count:
            return
        chunk = inference_pb2.Chunk(
            offset=self._offset,
            token_ids=piece.token_ids,
            text=piece.text,
            logprobs=self._logprobs[:count],
        )
        del self._logprobs[:count]
        self._offset += count
        await self._write(chunk=chunk)

    async def _write(self, **event: Any) -> None:
        response = inference_pb2.GenerateResponse(request_id=self._request_id, **event)
        await self._context.write(response)
