"""Order of best-effort requests: fair shares while they wait, by arrival once they started."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_states import request

from omniserve.gpuworker.queues import ByArrival, FairQueue
from omniserve.gpuworker.requests import Place, Request

SECOND = 1_000_000_000


def item(
    name: str, tenant: str = "t", *, prompt: int = 100, output: int = 50, arrival_ns: int = 0
) -> Request:
    made = request(name, Place.WAITING, prompt=prompt, max_tokens=output, arrival_ns=arrival_ns)
    made.tenant = tenant
    return made


def start(queue: FairQueue) -> Request:
    first = queue.first()
    queue.start(first)
    return first


def end(queue: FairQueue, request: Request, *, generated: int) -> None:
    request.known = request.prompt_tokens + generated
    queue.settle(request)


def order(queue: FairQueue) -> list[str]:
    """Starts all, each of which then generates all that it may."""
    names = []
    while len(queue):
        started = start(queue)
        end(queue, started, generated=started.limit - started.prompt_tokens)
        names.append(started.request_id)
    return names


def test_one_job_is_first_in_first_out() -> None:
    queue = FairQueue()
    for name in ("a", "b", "c"):
        queue.append(item(name))
    assert order(queue) == ["a", "b", "c"]


def test_tenants_take_turns_by_tokens_and_not_by_requests() -> None:
    queue = FairQueue()
    for index in range(8):
        queue.append(item(f"small{index}", "small", prompt=50, output=25))
    for index in range(4):
        queue.append(item(f"large{index}", "large", prompt=100, output=50))
    first_six = order(queue)[:6]
    assert sum(name.startswith("small") for name in first_six) == 4


def test_jobs_of_a_tenant_share_what_the_tenant_gets() -> None:
    queue = FairQueue()
    for index in range(6):
        queue.append(item(f"job:one:{index}", "busy"))
    for index in range(2):
        queue.append(item(f"job:two:{index}", "busy"))
    for index in range(4):
        queue.append(item(f"job:else:{index}", "other"))
    eight = order(queue)[:8]
    counts = {job: sum(f":{job}:" in name for name in eight) for job in ("one", "two", "else")}
    assert counts == {"one": 2, "two": 2, "else": 4}


def test_who_ends_early_gets_back_what_it_was_not_served() -> None:
    queue = FairQueue()
    first = item("a0", "a", output=1000)
    for waiting in (first, item("b0", "b", output=10), item("a1", "a"), item("b1", "b")):
        queue.append(waiting)
    assert start(queue) is first
    assert start(queue).request_id == "b0"
    assert queue.first().request_id == "b1", "a is charged for a thousand tokens"
    end(queue, first, generated=1)
    assert queue.first().request_id == "a1"


def test_a_newcomer_starts_level_and_has_saved_up_nothing() -> None:
    queue = FairQueue()
    for index in range(10):
        queue.append(item(f"old{index}", "old"))
    for _ in range(5):
        start(queue)
    for index in range(10):
        queue.append(item(f"new{index}", "new"))
    following = [start(queue).tenant for _ in range(6)]
    assert following.count("new") == 3


def test_long_waiting_outweighs_any_share_in_the_end() -> None:
    queue = FairQueue()
    queue.append(item("waits", "greedy", prompt=1000, output=10))
    queue.append(item("waits too", "greedy", prompt=1000, output=10))
    queue.append(item("early", "modest"))
    assert start(queue).request_id in ("waits", "early")
    for index in range(50):
        queue.append(item(f"late{index}", "modest", arrival_ns=(index + 60) * SECOND))
    names = order(queue)
    assert names.index("waits too") < 5


def test_a_request_that_lost_its_place_is_the_next_of_its_job_and_pays_once() -> None:
    queue = FairQueue()
    for name in ("a0", "a1"):
        queue.append(item(name, "a"))
    queue.append(item("b0", "b"))
    lost = start(queue)
    lost.place = Place.WAITING
    queue.appendleft(lost)
    assert order(queue)[0] == lost.request_id


def test_nobody_waits_in_an_empty_queue() -> None:
    queue = FairQueue()
    with pytest.raises(IndexError):
        queue.first()
    gone = item("gone")
    queue.append(gone)
    queue.remove(gone)
    assert len(queue) == 0
    assert list(queue) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 200), st.integers(1, 100)), max_size=30
    ),
    st.data(),
)
def test_everybody_starts_once_and_no_tenant_gets_far_ahead(
    sizes: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    queue = FairQueue()
    for index, (tenant, prompt, output) in enumerate(sizes):
        queue.append(item(f"{index}", tenant, prompt=prompt, output=output))
    served = dict.fromkeys("abc", 0.0)
    started = []
    while len(queue):
        waiting = {r.tenant for r in queue}
        first = start(queue)
        assert served[first.tenant] == min(served[t] for t in waiting)
        served[first.tenant] += first.prompt_tokens + 2 * (first.limit - first.prompt_tokens)
        started.append(first)
        assert len(set(map(id, started))) == len(started)
    assert len(started) == len(sizes)
    for ended in data.draw(st.permutations(started)):
        end(queue, ended, generated=1)


@given(st.lists(st.integers(0, 5), max_size=20), st.data())
def test_started_requests_stay_in_order_of_arrival(
    arrivals: list[int], data: st.DataObject
) -> None:
    started = ByArrival()
    requests = [item(f"{i}", arrival_ns=at) for i, at in enumerate(arrivals)]
    started.extend(requests)
    assert list(started) == sorted(requests, key=lambda r: r.arrival_ns)
    assert list(reversed(started)) == list(started)[::-1]
    for gone in data.draw(st.permutations(requests)):
        started.remove(gone)
        assert gone not in list(started)
    with pytest.raises(ValueError, match=r".*"):
        started.remove(item("never there"))
