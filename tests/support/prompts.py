"""Real prompts as token ids: dialogues and programming problems."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import asdict

from support.stack import MODEL_PATH

from omniserve.client.bench.texts import dialogues, problems
from omniserve.controlplane import tokenizer

LONG_TOKENS = (600, 800, 1000, 1200)


@functools.cache
def real_prompts() -> list[list[int]]:
    """Returns 32 prompts, alternating in kind: every eight hold a long one and short ones."""
    tokens = tokenizer.load(MODEL_PATH)

    async def encode() -> list[list[int]]:
        chats = [dialogue for dialogue in dialogues()[::60] if dialogue][:16]
        texts = problems()
        chat = [await tokens.encode_chat([asdict(m) for m in messages]) for messages in chats]
        code = [await tokens.encode(text) for text in texts[:12]]
        long = [(await tokens.encode("\n\n".join(texts[12:])))[:n] for n in LONG_TOKENS]
        eights = zip(long, _split(chat, 4), _split(code, 3), strict=True)
        return [prompt for first, some, more in eights for prompt in [first, *some, *more]]

    return asyncio.run(encode())


def _split(prompts: list[list[int]], size: int) -> list[list[list[int]]]:
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]
