"""KV formats and layer options go through Attach: the server attends as a worker does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.attention_process import GEOMETRY, ServerProcess, Worker

from omniserve.attnkernel import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    KIND_RESTORE,
    STATUS_OK,
    PagedKv,
)
from omniserve.errors import InvalidArgumentError, from_rpc_error
from omniserve.internal.v1.attention_pb2 import LayerOptions

pytest_plugins = ["support.attention_fixtures"]

TOKENS = 100
SINKS = [0.5 * head for head in range(GEOMETRY.heads)]
OPTIONS = [LayerOptions(window=40, softcap=8.0), LayerOptions(sinks=SINKS)]


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("layers", [(), OPTIONS], ids=["plain", "options"])
def test_a_server_answers_what_the_same_kernel_answers_here(
    server: ServerProcess, kv_dtype: str, layers: list[LayerOptions]
) -> None:
    worker = Worker(server, geometry=replace(GEOMETRY, kv_dtype=kv_dtype), layers=layers)
    worker.prefill(0, TOKENS)
    for layer in range(GEOMETRY.layers):
        slots = worker.send(KIND_ATTEND, [(layer, 0, TOKENS)])
        assert worker.wait(slots) == [STATUS_OK]
        out = worker.link.slab[slots[0], worker.link.out_offset :].copy()
        options = layers[layer] if layers else LayerOptions()
        np.testing.assert_array_equal(out, attended_here(worker, slots[0], kv_dtype, options))
        worker.release(slots)


def attended_here(
    worker: Worker, slot: int, kv_dtype: str, options: LayerOptions
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What a pool of this process answers for the row in `slot`."""
    _, layer, sequence, position = worker.sent[slot]
    g = GEOMETRY
    pages = -(-(position + 1) // g.page_tokens)
    pool = PagedKv(1, g.kv_heads, g.head_dim, g.page_tokens, pages, "float32", 1, kv_dtype)
    known = worker.kv[sequence, layer]
    kv = np.stack([known[p] for p in range(position + 1)])
    columns = g.kv_heads * g.head_dim
    places = np.arange(position + 1, dtype=np.int32)
    pool.append(
        0,
        kv[:, :columns].copy(),
        kv[:, columns:].copy(),
        places // g.page_tokens,
        places % g.page_tokens,
    )
    q = worker.link.slab[slot : slot + 1, : worker.link.k_offset].copy()
    out = np.zeros_like(q)
    one = np.array([1], np.int32)
    table = np.arange(pages, dtype=np.int32).reshape(1, -1)
    first = np.array([position], np.int32)
    sinks = list(options.sinks)
    pool.attend(0, q, out, table, 0 * one, one, first, options.window, options.softcap, sinks)
    return out[0]


def test_int8_kv_comes_back_within_half_a_step(server: ServerProcess) -> None:
    worker = Worker(server, geometry=replace(GEOMETRY, kv_dtype="int8"))
    worker.run(KIND_CHECKPOINT, [(0, 1, 0)])
    slots = worker.send(KIND_RESTORE, [(0, 1, 0)])
    assert worker.wait(slots) == [STATUS_OK]
    got = worker.link.slab[slots[0], worker.kv_columns(KIND_RESTORE)]
    sent = worker.kv[1, 0][0]
    heads = (-1, GEOMETRY.head_dim)
    step = np.abs(sent.reshape(heads)).max(axis=1, keepdims=True) / 127
    assert (np.abs(got.reshape(heads) - sent.reshape(heads)) <= 0.5001 * step).all()


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ([LayerOptions()], "layers"),
        ([LayerOptions(sinks=[1.0]), LayerOptions()], "layers[0].sinks"),
        ([LayerOptions(), LayerOptions(softcap=-1.0)], "layers[1].softcap"),
        ([LayerOptions(), LayerOptions(softcap=float("nan"))], "layers[1].softcap"),
    ],
)
def test_options_that_do_not_fit_the_geometry_are_refused_by_name(
    server: ServerProcess, layers: list[LayerOptions], field: str
) -> None:
    with pytest.raises(Exception, match=r"layers") as refused:
        server.attach(layers=layers)
    error = from_rpc_error(refused.value)
    assert isinstance(error, InvalidArgumentError)
    assert error.field == field
