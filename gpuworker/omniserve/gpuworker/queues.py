"""The order of best-effort requests: who starts next, who leaves the device first, who returns.

Waiting requests: token-weighted fair shares between tenants, and between the jobs of a tenant
(virtual token counters, VTC, OSDI 2024), first in first out within a job. Started requests: by
arrival, one order for choosing victims (newest first) and for resumption (oldest first), so that
nobody who came back is the next to go.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from omniserve.gpuworker.requests import Request

# An output token takes a pass, prompt tokens share one: VTC's weights.
_OUTPUT_WEIGHT = 2.0
# Tokens of credit for a second of waiting: however much others bring, everyone's turn comes.
_AGEING_TOKENS_PER_S = 50.0
_arrival = attrgetter("arrival_ns")


class ByArrival:
    """Requests by arrival, oldest first; those that arrived together in the order they came in."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._requests = sorted(requests, key=_arrival)

    def append(self, request: Request) -> None:
        insort(self._requests, request, key=_arrival)

    def extend(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.append(request)

    def remove(self, request: Request) -> None:
        """Raises ValueError if it is not there."""
        at = bisect_left(self._requests, request.arrival_ns, key=_arrival)
        del self._requests[self._requests.index(request, at)]

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __repr__(self) -> str:
        return f"ByArrival({self._requests})"


@dataclass(eq=False)
class _Share:
    """What one tenant, or one job of it, has been served, and what waits."""

    served_tokens: float = 0.0
    running: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    """Of a job; empty in a tenant's share."""
    jobs: dict[str, _Share] = field(default_factory=dict)
    """Of a tenant."""

    @property
    def oldest_ns(self) -> int:
        if self.waiting:
            return self.waiting[0].arrival_ns
        return min(job.oldest_ns for job in self.jobs.values() if job.has_waiting)

    @property
    def has_waiting(self) -> bool:
        return bool(self.waiting) or any(job.waiting for job in self.jobs.values())

    @property
    def key(self) -> float:
        """Least first. Ageing is linear, so the order of two keys does not change with time."""
        return self.served_tokens + self.oldest_ns * (_AGEING_TOKENS_PER_S / 1e9)


class FairQueue:
    """Waiting BE requests. Who is served is charged at once for all that it may take, and gets
    back at its end what it did not."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Share] = {}
        self._length = 0
        self._first: Request | None = None
        """The answer of `first`, until something changes."""

    def append(self, request: Request) -> None:
        self._job(request).waiting.append(request)
        self._changed(1)

    def appendleft(self, request: Request) -> None:
        """Puts a started request back at the head of its job; what it lost is not charged."""
        self._job(request).waiting.appendleft(request)
        self._changed(1)
        self.settle(request)

    def first(self) -> Request:
        """Who starts next. Raises IndexError if nobody waits."""
        if self._first is None:
            if not self._length:
                raise IndexError("nobody waits")
            shares = [tenant for tenant in self._tenants.values() if tenant.has_waiting]
            jobs = min(shares, key=attrgetter("key")).jobs.values()
            job = min((job for job in jobs if job.waiting), key=attrgetter("key"))
            self._first = job.waiting[0]
        return self._first

    def start(self, request: Request) -> None:
        """Takes `request` out and charges its tenant and its job for all of it."""
        tenant, job = self._tenants[request.tenant], self._job(request)
        job.waiting.remove(request)
        for share in (tenant, job):
            share.served_tokens += _cost(request)
            share.running += 1
        self._changed(-1)

    def settle(self, request: Request) -> None:
        """A started request ended or lost its place: gives back what it was not served."""
        tenant, job = self._tenants[request.tenant], self._job(request)
        for share in (tenant, job):
            share.served_tokens -= _cost(request)
            share.running -= 1
        self._forget_idle(request)
        self._first = None

    def remove(self, request: Request) -> None:
        """Takes out `request`, which will not start."""
        self._job(request).waiting.remove(request)
        self._forget_idle(request)
        self._changed(-1)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        for tenant in self._tenants.values():
            for job in tenant.jobs.values():
                yield from job.waiting

    def __repr__(self) -> str:
        return f"FairQueue({self._tenants})"

    def _changed(self, by: int) -> None:
        self._length += by
        self._first = None

    def _job(self, request: Request) -> _Share:
        tenant = _join(self._tenants, request.tenant)
        return _join(tenant.jobs, request.job)

    def _forget_idle(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        job = tenant.jobs[request.job]
        if not job.running and not job.waiting:
            del tenant.jobs[request.job]
        if not tenant.jobs:
            del self._tenants[request.tenant]


def _join(shares: dict[str, _Share], name: str) -> _Share:
    """Returns the share called `name`. A new one starts level with the least served: who was
    away has saved up nothing."""
    if name not in shares:
        least = min((s.served_tokens for s in shares.values()), default=0.0)
        shares[name] = _Share(least)
    return shares[name]


def _cost(request: Request) -> float:
    """Of what `request` has not been served yet. A prompt serves it by its first token only."""
    prompt = 0 if request.generated else request.known
    return prompt + _OUTPUT_WEIGHT * (request.limit - request.known)
