"""What is left of a worker's messages when its attention server dies, stops or changes hands."""

from __future__ import annotations

import signal

import numpy as np
from support.attention_process import GEOMETRY, PAGES, ServerProcess, Worker

from omniserve.attnkernel import KIND_ATTEND, KIND_CHECKPOINT, KIND_FREE, STATUS_OK, WorkerLink

pytest_plugins = ["support.attention_fixtures"]


def test_a_server_killed_in_mid_traffic_answers_everything_after_its_restart(
    server: ServerProcess, worker: Worker
) -> None:
    segment_id = worker.attached.segment_id
    for sequence in range(6):
        worker.prefill(sequence, 7)
    position = {s: 7 for s in range(6)}
    for _ in range(6):
        # Rows in the rings, some answered, some half done, when the server dies.
        sent = worker.send(KIND_ATTEND, [(la, s, position[s]) for s in range(6) for la in (0, 1)])
        prompt = worker.link.written_len[7, 0]
        chunk = worker.send(KIND_CHECKPOINT, [(0, 7, int(prompt) + i) for i in range(16)])
        server.kill()
        server.start()
        assert set(worker.wait(sent + chunk)) == {STATUS_OK}
        for slot in sent:
            worker.assert_attended(slot)
        worker.release(sent + chunk)
        position = {s: p + 1 for s, p in position.items()}
    assert worker.link.written_len[7, 0] == 96
    assert f"adopted segment {segment_id} of worker w0" in server.log.read_text()
    assert server.attach().segment_id == segment_id
    assert server.stats().pages_free == PAGES - 6 - 6
    worker.free_sequence(7)
    assert server.stats().pages_free == PAGES - 6


def test_requests_sent_while_the_server_is_down_wait_for_it(
    server: ServerProcess, worker: Worker
) -> None:
    server.kill()
    slots = worker.send(KIND_CHECKPOINT, [(0, 0, p) for p in range(20)])
    worker.poll()
    assert worker.link.outstanding == 20
    server.start()
    assert set(worker.wait(slots)) == {STATUS_OK}


def test_a_sequence_gets_the_pages_of_one_that_was_freed_while_the_server_was_down(
    server: ServerProcess, worker: Worker
) -> None:
    worker.prefill(0, 192)
    worker.prefill(1, 192)
    server.kill()
    freed = worker.send(KIND_FREE, [(0, 1, 0)])
    slots = worker.send(KIND_CHECKPOINT, [(la, 2, p) for la in (0, 1) for p in range(20)])
    server.start()
    assert set(worker.wait(freed + slots)) == {STATUS_OK}


def test_a_restarted_server_rings_for_answers_that_the_dead_one_may_not_have_rung_for(
    server: ServerProcess, worker: Worker
) -> None:
    unrung = worker.bell.value()
    slots = worker.send(KIND_ATTEND, [(0, 0, 0)])
    assert worker.bell.wait(unrung, 10_000_000)
    server.kill()
    seen = worker.bell.value()
    server.start()
    assert worker.bell.value() != seen
    assert worker.wait(slots) == [STATUS_OK]


def test_a_stopped_server_blocks_nobody_and_answers_when_it_goes_on(
    server: ServerProcess, worker: Worker
) -> None:
    server.signal(signal.SIGSTOP)
    slots = worker.send(KIND_CHECKPOINT, [(0, 0, p) for p in range(GEOMETRY.slots)])
    worker.poll()
    assert (worker.link.outstanding, worker.link.ring_waits) == (GEOMETRY.slots, 0)
    server.signal(signal.SIGCONT)
    assert set(worker.wait(slots)) == {STATUS_OK}


def test_a_new_epoch_starts_empty_and_the_old_link_gets_no_answers(
    server: ServerProcess, worker: Worker
) -> None:
    worker.prefill(0, 40)
    old = WorkerLink(worker.attached.segment_path)
    again = Worker(server, epoch=2)
    assert again.attached.segment_id != worker.attached.segment_id
    assert server.stats().pages_free == PAGES
    row = np.zeros(1, np.int32)
    old.submit(KIND_ATTEND, row, row, row, row)
    again.decode(0, 0)
    assert (old.current, old.outstanding, len(old.poll()[0])) == (False, 1, 0)
    old.check_integrity()
    worker.link = again.link
