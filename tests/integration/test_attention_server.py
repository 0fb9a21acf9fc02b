"""The attention server as a process: every message, every rule of lengths, bad input, crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from support.attention_process import GEOMETRY, PAGES, PATIENCE_S, ServerProcess, Worker

from omniserve.attnkernel import (
    KIND_ATTEND,
    KIND_CHECKPOINT,
    KIND_FREE,
    KIND_RESTORE,
    STATUS_BAD_COUNT,
    STATUS_BAD_KIND,
    STATUS_BAD_LAYER,
    STATUS_BAD_POSITION,
    STATUS_BAD_SEQUENCE,
    STATUS_FREED,
    STATUS_NO_PAGE,
    STATUS_OK,
    kernel_names,
)
from omniserve.cpuattn.topology import numa_nodes
from omniserve.errors import (
    GeometryError,
    InvalidArgumentError,
    OmniServeError,
    SharedMemoryError,
    from_rpc_error,
)
from omniserve.internal.v1 import attention_pb2
from omniserve.shm import layout

pytest_plugins = ["support.attention_fixtures"]


def test_attend_appends_and_answers_with_attention_over_the_whole_sequence(
    server: ServerProcess, worker: Worker
) -> None:
    for position in range(40):
        worker.decode(3, position)
    assert worker.link.written_len[3].tolist() == [40, 40]
    stats = server.stats()
    assert (stats.server_id, stats.pid) == ("a0", server.process.pid)
    assert stats.rows == 80
    assert stats.kv_bytes_read == 2 * sum(range(1, 41)) * GEOMETRY.kv_heads * 32 * 2 * 4
    assert (stats.pages_total, stats.pages_free, stats.errors) == (PAGES, PAGES - 3, 0)


def test_pages_of_a_sequence_follow_one_another_while_others_grow_too(worker: Worker) -> None:
    for tokens in (16, 32, 48, 64):
        for sequence in (0, 1, 2):
            rows = [(la, sequence, p) for p in range(tokens - 16, tokens) for la in (0, 1)]
            assert set(worker.run(KIND_CHECKPOINT, rows)) == {STATUS_OK}
    at = layout.regions(GEOMETRY, PAGES)["page_table"]
    shape = (GEOMETRY.max_sequences, GEOMETRY.max_pages_per_sequence)
    tables = np.memmap(worker.attached.segment_path, np.int32, "r", at, shape)
    for sequence in (0, 1, 2):
        assert np.diff(tables[sequence, :4]).tolist() == [1, 1, 1]


def test_rows_of_several_sequences_and_layers_share_one_message(worker: Worker) -> None:
    for sequence, tokens in ((0, 5), (1, 33), (2, 16)):
        worker.prefill(sequence, tokens)
    rows = [(la, s, n) for s, n in ((0, 5), (1, 33), (2, 16)) for la in range(GEOMETRY.layers)]
    slots = worker.send(KIND_ATTEND, rows)
    assert set(worker.wait(slots)) == {STATUS_OK}
    for slot in slots:
        worker.assert_attended(slot)


def test_the_last_row_may_be_sent_again_and_changes_nothing(worker: Worker) -> None:
    worker.prefill(0, 20)
    first = worker.send(KIND_ATTEND, [(0, 0, 20)])
    worker.wait(first)
    again = worker.send(KIND_ATTEND, [(0, 0, 20)], fresh=False)
    assert worker.wait(again) == [STATUS_OK]
    worker.assert_attended(again[0])
    assert worker.link.written_len[0].tolist() == [21, 20]


def test_a_row_that_comes_early_waits_for_the_ones_before_it(worker: Worker) -> None:
    worker.prefill(0, 4)
    early = worker.send(KIND_ATTEND, [(0, 0, 6)])
    restore = worker.send(KIND_RESTORE, [(0, 0, 5)])
    worker.decode(1, 0)  # the server has seen them by now
    assert not worker.statuses
    worker.send(KIND_CHECKPOINT, [(0, 0, 5), (0, 0, 4)])
    assert worker.wait(early + restore) == [STATUS_OK, STATUS_OK]
    worker.assert_attended(early[0])


def test_a_row_sent_in_every_slot_is_answered_in_each(worker: Worker) -> None:
    first = worker.send(KIND_ATTEND, [(0, 0, 0)])
    again = worker.send(KIND_ATTEND, [(0, 0, 0)] * (GEOMETRY.slots - 1), fresh=False)
    assert set(worker.wait(first + again)) == {STATUS_OK}
    for slot in again:
        worker.assert_attended(slot)


def test_a_checkpointed_prompt_is_attended_and_restored_byte_for_byte(worker: Worker) -> None:
    worker.prefill(5, 30)
    worker.decode(5, 30)
    rows = [(la, 5, p) for la in range(GEOMETRY.layers) for p in range(31)]
    slots = worker.send(KIND_RESTORE, rows)
    assert set(worker.wait(slots)) == {STATUS_OK}
    for slot, (layer, sequence, position) in zip(slots, rows, strict=True):
        got = worker.link.slab[slot, worker.kv_columns(KIND_RESTORE)]
        np.testing.assert_array_equal(got, worker.kv[sequence, layer][position])


def test_free_gives_the_pages_back_and_the_sequence_starts_anew(
    server: ServerProcess, worker: Worker
) -> None:
    worker.prefill(0, 100)
    worker.prefill(1, 17)
    assert server.stats().pages_free == PAGES - 7 - 2
    worker.free_sequence(0)
    assert server.stats().pages_free == PAGES - 2
    assert worker.link.written_len[0].tolist() == [0, 0]
    worker.decode(0, 0)
    worker.decode(1, 17)


def test_free_answers_what_waited_for_its_sequence(worker: Worker) -> None:
    waiting = worker.send(KIND_ATTEND, [(0, 0, 9)])
    assert worker.run(KIND_FREE, [(0, 0, 0)]) == [STATUS_OK]
    assert worker.wait(waiting) == [STATUS_FREED]


def test_bad_messages_get_an_error_status_and_touch_nothing(
    server: ServerProcess, worker: Worker
) -> None:
    worker.prefill(0, 10)
    kv_offset = layout.regions(GEOMETRY, PAGES)["kv"]
    before = server.arena.read_bytes()[kv_offset:]
    assert worker.run(9, [(0, 0, 10)]) == [STATUS_BAD_KIND]
    assert worker.run(0, [(0, 0, 10)]) == [STATUS_BAD_KIND]
    for kind in (KIND_ATTEND, KIND_CHECKPOINT, KIND_RESTORE):
        assert worker.run(kind, [(GEOMETRY.layers, 0, 10)]) == [STATUS_BAD_LAYER]
        assert worker.run(kind, [(-1, 0, 10)]) == [STATUS_BAD_LAYER]
        assert worker.run(kind, [(0, GEOMETRY.max_sequences, 0)]) == [STATUS_BAD_SEQUENCE]
        beyond = GEOMETRY.max_sequence_tokens
        assert worker.run(kind, [(0, 0, beyond), (0, 0, -1)]) == [STATUS_BAD_POSITION] * 2
    for kind in (KIND_ATTEND, KIND_CHECKPOINT):
        assert worker.run(kind, [(0, 0, 3)]) == [STATUS_BAD_POSITION]
    assert worker.run(KIND_FREE, [(0, 99, 0)]) == [STATUS_BAD_SEQUENCE]
    assert server.stats().errors == 2 + 3 * 5 + 2 + 1
    assert server.arena.read_bytes()[kv_offset:] == before


def test_a_row_without_a_free_page_is_refused_and_others_go_on(worker: Worker) -> None:
    worker.prefill(0, 192)
    worker.prefill(1, 192)
    assert worker.run(KIND_ATTEND, [(0, 2, 0)]) == [STATUS_NO_PAGE]
    worker.kv.pop((2, 0))
    worker.free_sequence(1)
    worker.decode(2, 0)


def test_what_comes_behind_a_token_without_a_page_is_answered_too(worker: Worker) -> None:
    worker.prefill(0, 192)
    worker.prefill(1, 192)
    early = worker.send(KIND_CHECKPOINT, [(0, 2, 1), (0, 2, 2)]) + worker.send(
        KIND_RESTORE, [(0, 2, 0)]
    )
    assert worker.run(KIND_CHECKPOINT, [(0, 2, 0)]) == [STATUS_NO_PAGE]
    assert worker.wait(early) == [STATUS_NO_PAGE] * 3
    for kind in (KIND_ATTEND, KIND_CHECKPOINT, KIND_RESTORE):
        assert worker.run(kind, [(0, 2, 3)]) == [STATUS_NO_PAGE]
    worker.free_sequence(2)
    worker.free_sequence(1)
    # The sequence waits for what is missing again.
    early = worker.send(KIND_CHECKPOINT, [(0, 2, 1)])
    assert worker.run(KIND_CHECKPOINT, [(0, 2, 0)]) == [STATUS_OK]
    assert worker.wait(early) == [STATUS_OK]


def test_a_slot_takes_one_message_at_a_time(worker: Worker) -> None:
    slot = worker.send(KIND_ATTEND, [(0, 0, 5)])[0]  # waits
    row = np.zeros(1, np.int32)
    with pytest.raises(RuntimeError, match=f"slot {slot} has an outstanding message"):
        worker.link.submit(KIND_ATTEND, row, row, row, np.array([slot], np.int32))
    with pytest.raises(IndexError, match="slot 96"):
        worker.link.submit(KIND_ATTEND, row, row, row, np.array([96], np.int32))
    two = np.zeros(2, np.int32)
    with pytest.raises(RuntimeError, match="slot 1 has"):
        worker.link.submit(KIND_ATTEND, two, two, two, np.array([1, 1], np.int32))
    assert worker.link.outstanding == 1
    worker.run(KIND_FREE, [(0, 0, 0)])


def test_delayed_and_reordered_answers_are_still_right(shm_dir: Path) -> None:
    server = ServerProcess(shm_dir, "--fault-delay-ms", "20", "--fault-seed", "7")
    try:
        worker = Worker(server)
        for sequence in range(6):
            worker.prefill(sequence, 3 + 5 * sequence)
        worker.order.clear()
        sent = worker.send(KIND_ATTEND, [(0, s, 3 + 5 * s) for s in range(6)])
        assert set(worker.wait(sent)) == {STATUS_OK}
        for slot in sent:
            worker.assert_attended(slot)
        assert sorted(worker.order) == sorted(sent)
        assert worker.order != sent
    finally:
        server.close()


def test_attach_refuses_what_it_cannot_serve_by_name(server: ServerProcess) -> None:
    def refusal(
        geometry: layout.Geometry = GEOMETRY, worker_id: str = "w0"
    ) -> OmniServeError | None:
        with pytest.raises(grpc.RpcError) as refused:
            server.attach(geometry, worker_id=worker_id)
        return from_rpc_error(refused.value)

    bad = refusal(replace(GEOMETRY, head_dim=24))
    assert isinstance(bad, InvalidArgumentError)
    assert bad.field == "geometry.head_dim"
    small = refusal(replace(GEOMETRY, max_sequence_tokens=1000))
    assert isinstance(small, SharedMemoryError)
    assert int(small.metadata["needed_bytes"]) > int(small.metadata["available_bytes"])
    server.attach()
    assert server.attach().segment_id == server.attach().segment_id
    other = refusal(replace(GEOMETRY, slots=95))
    assert isinstance(other, GeometryError)
    assert other.field == "geometry.slots"
    assert isinstance(refusal(worker_id="w1"), GeometryError)
    for name in ("w\n", "wörker"):
        unprintable = refusal(worker_id=name)
        assert isinstance(unprintable, InvalidArgumentError)
        assert unprintable.field == "worker_id"


def test_health_says_serving_and_sigterm_leaves_nothing_behind(
    server: ServerProcess, shm_dir: Path
) -> None:
    worker = Worker(server)
    worker.prefill(0, 10)
    health = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", "omniserve.internal.v1.AttentionService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert server.terminate() == 0
    assert not list(shm_dir.glob("*.arena"))


def test_drain_answers_what_was_sent_first(server: ServerProcess, worker: Worker) -> None:
    slots = worker.send(KIND_CHECKPOINT, [(0, 0, p) for p in range(90)])
    server.stub.Drain(attention_pb2.DrainRequest())
    assert set(worker.wait(slots)) == {STATUS_OK}
    with pytest.raises(grpc.RpcError) as refused:
        server.attach()
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def run_server(shm_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omniserve.cpuattn", "--shm-dir", str(shm_dir), *flags]
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
    )


def test_too_little_shared_memory_is_a_clear_error_at_start(shm_dir: Path) -> None:
    needed = 1 << 50
    ended = run_server(shm_dir, "--listen", "127.0.0.1:0", "--arena-bytes", str(needed))
    assert ended.returncode == 1
    assert ended.stderr.startswith("cpuattn: SHARED_MEMORY: ")
    assert f"needed {needed} bytes, available " in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not list(shm_dir.iterdir())


def test_a_port_in_use_is_a_clear_error_at_start(server: ServerProcess, shm_dir: Path) -> None:
    port = server.port
    ended = run_server(shm_dir, "--server-id", "a1", "--listen", f"127.0.0.1:{port}")
    assert ended.returncode == 1
    assert "cpuattn: ADDRESS_IN_USE: " in ended.stderr


def test_two_servers_cannot_share_an_arena(server: ServerProcess, shm_dir: Path) -> None:
    ended = run_server(shm_dir, "--listen", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "belongs to another running server" in ended.stderr
    assert server.arena.exists()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) > 64, reason="claims every core")
def test_exclusive_cores_that_other_servers_have_are_refused(shm_dir: Path) -> None:
    node = max(numa_nodes().values(), key=lambda cores: len(set(cores) & os.sched_getaffinity(0)))
    threads = str(len(set(node) & os.sched_getaffinity(0)))
    first = ServerProcess(shm_dir, "--cores", "exclusive", "--threads", threads)
    try:
        log = first.log.read_text()
        assert "attention thread(s), exclusive cores, pinned" in log
        assert f"{node[0]}*" in log
        flags = ["--server-id", "a1", "--listen", "127.0.0.1:0", "--cores", "exclusive"]
        ended = run_server(shm_dir, *flags, "--threads", threads)
        assert ended.returncode == 2
        assert ended.stderr.startswith("cpuattn: SETTINGS: threads: ")
        assert "not taken by other servers" in ended.stderr
    finally:
        first.close()


@pytest.mark.parametrize("background", [True, False])
def test_on_shared_cores_attention_is_in_the_background(shm_dir: Path, background: bool) -> None:
    flag = "--background" if background else "--no-background"
    server = ServerProcess(shm_dir, "--threads", "2", flag)
    try:
        tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
        policies = [os.sched_getscheduler(int(task.name)) for task in tasks]
        assert policies.count(os.SCHED_IDLE) == (2 if background else 0)
        assert ("shared cores, in the background" in server.log.read_text()) == background
    finally:
        server.close()


def test_an_unusable_setting_is_named(shm_dir: Path) -> None:
    ended = run_server(shm_dir, "--threads", "0")
    assert ended.returncode == 2
    assert ended.stderr.startswith("cpuattn: SETTINGS: threads: ")


def test_the_kernel_can_be_chosen_among_those_that_run_here(shm_dir: Path) -> None:
    ended = run_server(shm_dir, "--kernel", "z80")
    assert ended.returncode == 2
    assert ended.stderr.startswith("cpuattn: SETTINGS: kernel: no kernel z80")
    assert kernel_names()[-1] in ended.stderr
    server = ServerProcess(shm_dir, "--kernel", kernel_names()[-1])
    assert f"{kernel_names()[-1]} kernel" in server.log.read_text()
    server.close()


def _send_tokens(
    worker: Worker, kind: int, layer: int, first: int, kv: NDArray[np.float32]
) -> list[int]:
    """One message for all of `kv` [tokens, k | v] of sequence 3; returns its statuses."""
    slot = worker.free.pop()
    worker.sent[slot] = (kind, layer, 3, first)
    worker.link.slab[slot] = np.nan
    worker.link.slab[slot, : kv.size] = kv.ravel()
    number = [np.array([value], np.int32) for value in (layer, 3, first, slot, len(kv))]
    worker.link.submit(kind, *number)
    statuses = worker.wait([slot])
    worker.release([slot])
    return statuses


def _tokens(worker: Worker, tokens: int) -> NDArray[np.float32]:
    columns = 2 * GEOMETRY.kv_heads * GEOMETRY.head_dim
    return worker.rng.standard_normal((tokens, columns)).astype(np.float32)


def test_a_message_carries_several_tokens_and_may_be_repeated(worker: Worker) -> None:
    full = worker.link.transfer_tokens
    assert full == GEOMETRY.transfer_tokens > 1
    kv = _tokens(worker, 5 * full)
    for layer in range(GEOMETRY.layers):
        for first in range(0, len(kv), full):
            part = kv[first : first + full]
            assert _send_tokens(worker, KIND_CHECKPOINT, layer, first, part) == [STATUS_OK]
            # The last one again, as after a crash between its length and its answer.
            assert _send_tokens(worker, KIND_CHECKPOINT, layer, first, part) == [STATUS_OK]
        # From a place that is written to one that is not.
        part = kv[-1:].repeat(2, axis=0)
        assert _send_tokens(worker, KIND_CHECKPOINT, layer, len(kv) - 1, part) == [STATUS_OK]
        worker.kv[3, layer] = dict(enumerate([*kv, kv[-1]]))
    assert worker.link.written_len[3].tolist() == [len(kv) + 1] * GEOMETRY.layers
    worker.decode(3, len(kv) + 1)
    restored = worker.send(KIND_RESTORE, [(1, 3, 2)], count=full)
    assert worker.wait(restored) == [STATUS_OK]
    got = worker.link.slab[restored[0], : full * kv.shape[1]]
    np.testing.assert_array_equal(got, kv[2 : 2 + full].ravel())


def test_a_message_with_an_impossible_count_is_refused(worker: Worker) -> None:
    last = GEOMETRY.max_sequence_tokens - 1
    for kind in (KIND_CHECKPOINT, KIND_RESTORE):
        for count in (0, -1, worker.link.transfer_tokens + 1):
            slots = worker.send(kind, [(0, 0, 0)], count=count)
            assert worker.wait(slots) == [STATUS_BAD_COUNT]
            worker.release(slots)
        slots = worker.send(kind, [(0, 0, last)], count=2)
        assert worker.wait(slots) == [STATUS_BAD_POSITION]
        worker.release(slots)


def test_tokens_beyond_the_last_page_are_refused_whole(worker: Worker) -> None:
    worker.prefill(0, PAGES // 2 * GEOMETRY.page_tokens)
    worker.prefill(1, (PAGES - PAGES // 2) * GEOMETRY.page_tokens)
    assert _send_tokens(worker, KIND_CHECKPOINT, 0, 0, _tokens(worker, 2)) == [STATUS_NO_PAGE]
    assert worker.link.written_len[3].tolist() == [0, 0]
