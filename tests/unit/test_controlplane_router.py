import pytest

from omniserve.controlplane.router import TELEMETRY_AGE_S, Router, Worker
from omniserve.errors import NoWorkerError
from omniserve.internal.v1 import worker_pb2
from omniserve.v1 import status_pb2


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router(clock: Clock) -> Router:
    return Router(redis=None, model="m", clock_s=clock)


def worker(worker_id: str, reported_s: float = 100.0) -> Worker:
    telemetry = status_pb2.Telemetry(
        ls_running=2, ls_waiting=1, ls_prefill_tokens_waiting=50, prefill_token_ms=1.0
    )
    report = worker_pb2.GetWorkerStatusResponse(
        status=status_pb2.WorkerStatus(worker_id=worker_id, telemetry=telemetry)
    )
    return Worker(worker_id, "", None, None, report, reported_s, reported_s)


def test_load_counts_what_was_sent_since_the_telemetry(router: Router, clock: Clock) -> None:
    busy = worker("a")
    with router.prefilling(busy, 30):
        load = busy.load(ls_running_max=8)
        assert (load.ls_requests, load.ls_prefill_tokens_waiting) == (4, 80)
        # Once a report is younger than the submission, the report has it.
        busy.reported_s = clock.now_s + 2 * TELEMETRY_AGE_S
        load = busy.load(ls_running_max=8)
        assert (load.ls_requests, load.ls_prefill_tokens_waiting) == (3, 50)


def test_a_submission_counts_until_its_first_token_or_its_end(router: Router) -> None:
    busy = worker("a")
    with router.prefilling(busy, 30) as answered:
        answered()
        answered()
        assert busy.load(8).ls_requests == 3
    with pytest.raises(RuntimeError), router.prefilling(busy, 30):
        raise RuntimeError
    assert busy.load(8).ls_requests == 3


def test_who_is_to_be_avoided_or_about_to_end_is_picked_last(router: Router) -> None:
    router._workers = {name: worker(name) for name in "abc"}
    cost = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert router.pick(lambda w: cost[w.worker_id], avoid={"a", "b"}).worker_id == "c"
    router._workers["a"].report.draining = True
    assert router.pick(lambda w: cost[w.worker_id]).worker_id == "b"
    assert router.pick(lambda w: cost[w.worker_id], avoid={"a", "b", "c"}).worker_id == "a"


def test_without_workers_picking_is_a_typed_error(router: Router) -> None:
    with pytest.raises(NoWorkerError):
        router.pick(lambda _worker: 0.0)
