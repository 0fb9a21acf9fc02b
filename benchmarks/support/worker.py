"""The stack that the end-to-end benchmarks load: a worker in bfloat16 and its attention servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from support.worker_stack import MODEL, WorkerStack

from omniserve.shm import layout

THREADS = 2
PAGE_TOKENS = 64
LAYER_PARAMETERS = 106_203_456
"""Of SmolLM2-135M: the matrices of its layers; every token of a prompt goes through these."""
PARAMETERS = LAYER_PARAMETERS + 49152 * 576
"""With the LM head, which is the embedding: all that a decode pass reads."""
KV_BYTES_PER_TOKEN = 2 * 2 * MODEL.layers * MODEL.kv_heads * MODEL.head_dim


def pages_for(tokens: int) -> int:
    """KV pages that hold `tokens`."""
    return -(-tokens // PAGE_TOKENS)


def serve(
    *,
    device_kv_tokens: int,
    servers: int = 0,
    sequences: int = 64,
    pages: int = 64,
    model: layout.Geometry = MODEL,
    server_flags: Mapping[str, Any] = MappingProxyType({}),
    **flags: Any,
) -> WorkerStack:
    """Starts `servers` attention servers and a worker with `flags`; use it as a context.

    sequences, pages: KV sequences and pages of `PAGE_TOKENS` tokens that each server has room for,
    at least; it always has room for one sequence of the model's length. Of `model`, its shape and
    length count.
    """
    geometry = dataclasses.replace(
        model,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_tokens=PAGE_TOKENS,
        max_sequences=sequences,
        slots=sequences + MODEL.slots - MODEL.max_sequences,
    )
    worker_flags = {
        "dtype": "bfloat16",
        "threads": THREADS,
        "page-tokens": PAGE_TOKENS,
        "device-kv-tokens": device_kv_tokens,
        "be-sequences-max": sequences,
        "be-stream-interval-s": 1.0,  # as it is by default
    }
    return WorkerStack(
        servers=servers,
        server_flags={"background": True} | dict(server_flags),  # as it is by default
        worker_flags=worker_flags
        | {name.replace("_", "-"): value for name, value in flags.items()},
        arena_bytes=layout.arena_bytes(geometry, max(pages, geometry.max_pages_per_sequence)),
    )
