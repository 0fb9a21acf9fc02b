"""A request's tokens as the public stream has them: chunks of text, then how it ended."""

from __future__ import annotations

from typing import Any

from omniserve.controlplane.detokenizer import Detokenizer, Piece
from omniserve.controlplane.token_stream import Tokens
from omniserve.v1 import inference_pb2, types_pb2


class ResponseWriter:
    """Writes one Generate call's responses. `offset` counts generated tokens written."""

    def __init__(
        self,
        context: Any,
        detokenizer: Detokenizer,
        request_id: str,
        prompt_tokens: int,
        offset: int,
    ) -> None:
        self._context = context
        self._detokenizer = detokenizer
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._offset = offset

    async def write(self, tokens: Tokens) -> None:
        await self._write_piece(self._detokenizer.push(tokens.token_ids))
        if tokens.finish_reason:
            await self._write_piece(self._detokenizer.flush())
            usage = types_pb2.Usage(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._offset,
                # A worker that took over counts what it found of the tokens sent before as well.
                cached_tokens=min(tokens.cached_tokens, self._prompt_tokens),
            )
            finished = inference_pb2.Finished(reason=tokens.finish_reason, usage=usage)
            await self._write(finished=finished)

    async def _write_piece(self, piece: Piece) -> None:
        if piece.token_ids:
            chunk = inference_pb2.Chunk(
                offset=self._offset, token_ids=piece.token_ids, text=piece.text
            )
            self._offset += len(piece.token_ids)
            await self._write(chunk=chunk)

    async def _write(self, **event: Any) -> None:
        response = inference_pb2.GenerateResponse(request_id=self._request_id, **event)
        await self._context.write(response)
