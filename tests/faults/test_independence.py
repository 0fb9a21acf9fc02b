"""The worker never waits for a CPU: stopped, killed and emptied servers cost LS nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import grpc
import pytest
from support.prompts import real_prompts
from support.signals import send
from support.stack import wait_for
from support.worker_stack import Stream, WorkerStack

from omniserve.errors import NoWorkerError, from_rpc_error
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2, types_pb2

TOKENS = 64
BEGUN = 6
"""Tokens after which a request certainly decodes through its server."""
LEASE_S = 3.0


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[WorkerStack]:
    with WorkerStack(worker_flags={"be-placement": "host", "orphan-lease-s": LEASE_S}) as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: WorkerStack) -> Iterator[WorkerStack]:
    """Afterwards nothing may be held and, the engine having looked itself over, all must live."""
    yield shared_stack
    shared_stack.wait_until("everything given back", is_empty)
    assert shared_stack.telemetry().ring_waits == 0
    wait_for("health", shared_stack.is_serving)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt for prompt in real_prompts() if len(prompt) < 200][:8]


@pytest.fixture(scope="module")
def expected(shared_stack: WorkerStack, prompts: list[list[int]]) -> list[list[int]]:
    """What eight BE requests answer when nothing goes wrong."""
    return [s.finish() for s in start(shared_stack, prompts)]


def start(stack: WorkerStack, prompts: list[list[int]]) -> list[Stream]:
    return stack.start_all(prompts, TOKENS, best_effort=True, ignore_eos=True)


def start_and_decode(stack: WorkerStack, prompts: list[list[int]]) -> list[Stream]:
    streams = start(stack, prompts)
    for stream in streams:
        stream.read(BEGUN)
    return streams


def is_empty(status: status_pb2.WorkerStatus) -> bool:
    telemetry = status.telemetry
    idle = telemetry.device_blocks_free == telemetry.device_blocks_total
    idle = idle and telemetry.rows_parked == telemetry.be_waiting == 0
    servers = status.attention_servers
    return idle and all(s.pages_free == s.pages_total > 0 for s in servers)


def assert_ls_answers_while_all_rows_are_away(
    stack: WorkerStack, streams: list[Stream], prompt: list[int]
) -> None:
    stack.wait_until("rows away", lambda status: status.telemetry.rows_away == len(streams))
    assert len(stack.generate(prompt, 32, ignore_eos=True)) == 32
    telemetry = stack.telemetry()
    assert telemetry.ring_waits == 0
    assert telemetry.rows_away == len(streams)


def test_stopped_servers_hold_up_best_effort_only(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    streams = start_and_decode(stack, prompts)
    stack.signal_servers(signal.SIGSTOP)
    assert_ls_answers_while_all_rows_are_away(stack, streams, prompts[0])
    stack.signal_servers(signal.SIGCONT)
    assert [s.finish() for s in streams] == expected


def test_killed_servers_come_back_to_their_arenas_and_lose_nothing(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    recomputed = stack.telemetry().recomputed_tokens
    streams = start_and_decode(stack, prompts)
    for server in stack.servers:
        server.kill()
    assert_ls_answers_while_all_rows_are_away(stack, streams, prompts[0])
    for server in stack.servers:
        server.restart()
    assert [s.finish() for s in streams] == expected
    assert stack.telemetry().recomputed_tokens == recomputed


def test_requests_whose_arena_is_lost_are_computed_again(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    recomputed = stack.telemetry().recomputed_tokens
    streams = start_and_decode(stack, prompts)
    for server in stack.servers:
        server.kill()
    for arena in stack.folder.glob("*.arena"):
        arena.unlink()
    for server in stack.servers:
        server.restart()
    assert [s.finish() for s in streams] == expected
    stack.wait_until("recomputed", lambda s: s.telemetry.recomputed_tokens > recomputed)


def test_servers_that_cannot_read_their_arenas_any_more_cost_ls_nothing(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    recomputed = stack.telemetry().recomputed_tokens
    streams = start_and_decode(stack, prompts[:4])
    for server in stack.servers:
        server.kill()
    # Their checkpoints are under way while the servers are not yet attached again.
    streams += start(stack, prompts[4:])
    for arena in stack.folder.glob("*.arena"):
        with arena.open("r+b") as segment:
            segment.write(bytes(8))  # the magic number
    for server in stack.servers:
        server.restart()
    assert len(stack.generate(prompts[0], 32, ignore_eos=True)) == 32
    assert [s.finish() for s in streams] == expected
    stack.wait_until("recomputed", lambda s: s.telemetry.recomputed_tokens > recomputed)


def test_a_server_that_stays_away_keeps_no_best_effort_from_the_others(
    prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with WorkerStack(worker_flags={"device-kv-tokens": 1024}) as stack:
        stack.servers[0].kill()
        assert [s.finish() for s in start(stack, prompts)] == expected


def test_best_effort_that_moves_while_a_server_stops_gets_its_tokens(
    prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with WorkerStack(worker_flags={"fault-moves-per-pass": 0.3}) as stack:  # all pools looked over
        streams = start_and_decode(stack, prompts)
        send(stack.servers[0].process, signal.SIGSTOP)
        time.sleep(7.0)  # its requests are rescued, but for rows that are away
        send(stack.servers[0].process, signal.SIGCONT)
        assert [s.finish() for s in streams] == expected
        stack.wait_until_idle()


def test_a_server_that_comes_back_empty_unseen_is_attached_again(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    streams = start_and_decode(stack, prompts)
    send(stack.worker.process, signal.SIGSTOP)  # the front; the engine goes on
    server, arena = stack.servers[0], stack.folder / "a0.arena"
    server.kill()
    arena.unlink()
    server.restart()
    wait_for("the new arena", lambda: server.log.read_text().endswith("no segment in it\n"))
    send(stack.worker.process, signal.SIGCONT)
    assert [s.finish() for s in streams] == expected


def test_one_stopped_server_holds_up_its_own_requests_only(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    streams = start_and_decode(stack, prompts)
    send(stack.servers[0].process, signal.SIGSTOP)
    stack.wait_until("the other's are done", lambda s: 0 < s.telemetry.rows_parked < len(streams))
    stack.wait_until("only its own are left", lambda s: _only_away(s.telemetry))
    send(stack.servers[0].process, signal.SIGCONT)
    assert [s.finish() for s in streams] == expected


def test_an_id_is_free_again_once_its_last_request_has_ended(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    stream = stack.start(prompts[0], 2000, best_effort=True, ignore_eos=True, request_id="again")
    stream.read(BEGUN)
    stack.signal_servers(signal.SIGSTOP)
    stack.wait_until("its row away", lambda status: status.telemetry.rows_away == 1)
    stream.call.cancel()
    time.sleep(2 * LEASE_S)  # the engine cannot let go of it yet
    with pytest.raises(grpc.RpcError) as refused:
        stack.start(prompts[0], TOKENS, request_id="again", ignore_eos=True).finish()
    assert isinstance(from_rpc_error(refused.value), NoWorkerError)
    stack.signal_servers(signal.SIGCONT)
    stack.wait_until("its end", is_empty)
    options = {"best_effort": True, "ignore_eos": True, "request_id": "again"}
    assert stack.start(prompts[0], TOKENS, **options).finish() == expected[0]


def test_a_log_of_other_tokens_is_not_taken_for_the_request(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    moved = [*prompts[0], *expected[0][:10]]  # as if another worker had generated ten
    options = {"best_effort": True, "ignore_eos": True, "request_id": "moved"}
    stream = stack.start(moved, 2000, generated_tokens=10, **options)
    stream.read(BEGUN)
    stream.call.cancel()

    def from_the_start() -> Stream | None:
        again = stack.start(prompts[0], 2000, **options)
        try:
            again.read(TOKENS)
        except grpc.RpcError as error:
            if isinstance(from_rpc_error(error), NoWorkerError):
                return None
            raise
        return again

    again = wait_for("the id", from_the_start)
    assert again.tokens[:TOKENS] == expected[0]
    time.sleep(LEASE_S)  # that of the first log is over: it must not take this one with it
    again.call.cancel()
    rest = stack.start(prompts[0], 2000, resume_offset=len(again.tokens), **options)
    rest.read(1)
    assert stack.cancel(rest)


def _only_away(telemetry: status_pb2.Telemetry) -> bool:
    return 0 < telemetry.rows_away == telemetry.rows_parked


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_cancelled_request_ends_and_gives_everything_back(
    stack: WorkerStack, prompts: list[list[int]], best_effort: bool
) -> None:
    stream = stack.start(prompts[0], 2000, best_effort=best_effort, ignore_eos=True)
    stream.read(BEGUN)
    request = worker_pb2.WorkerServiceCancelRequest(request_id=stream.request_id)
    assert stack.stub.Cancel(request).cancelled
    stream.finish()
    assert stream.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert len(stream.tokens) < 2000
    assert not stack.stub.Cancel(request).cancelled


@pytest.mark.parametrize("best_effort", [False, True])
def test_a_broken_stream_is_resumed_by_id_and_offset(
    stack: WorkerStack, prompts: list[list[int]], expected: list[list[int]], best_effort: bool
) -> None:
    def broken_and_resumed() -> tuple[Stream, Stream] | None:
        with grpc.insecure_channel(stack.worker.address) as channel:
            broken = stack.start(
                prompts[1], TOKENS, best_effort=best_effort, ignore_eos=True, channel=channel
            )
            broken.read(BEGUN)
        resumed = stack.rest(broken, prompts[1], TOKENS)
        return (broken, resumed) if resumed is not None else None

    broken, resumed = wait_for("a stream that is resumed in time", broken_and_resumed)
    assert broken.tokens + resumed.tokens == expected[1]
    assert resumed.finish_reason == types_pb2.FINISH_REASON_LENGTH


def test_an_orphan_whose_lease_is_over_is_gone(
    stack: WorkerStack, prompts: list[list[int]]
) -> None:
    with grpc.insecure_channel(stack.worker.address) as channel:
        orphan = stack.start(prompts[0], 4000, ignore_eos=True, channel=channel)
        orphan.read(BEGUN)
    stack.wait_until("the lease's end", is_empty)
    late = stack.start(prompts[0], 4000, request_id=orphan.request_id, resume_offset=BEGUN)
    with pytest.raises(grpc.RpcError) as refused:
        late.finish()
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
