"""Best-effort load: a backlog of durable jobs, topped up as items end."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from omniserve.client import Client, JobCounts, JobItem, OmniServeError, SamplingParams
from omniserve.client.bench.settings import BenchSettings

POLL_S = 0.25


@dataclass
class BacklogLoad:
    """Keeps at least `be_backlog` items outstanding. One thread; others read the counts."""

    client: Client
    settings: BenchSettings
    problems: Sequence[str]
    submitted: int = 0
    _counts: dict[str, JobCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._texts = itertools.cycle(self.problems)

    @property
    def completed(self) -> int:
        """Items that ended with a result."""
        return sum(c.completed for c in list(self._counts.values()))

    @property
    def failed(self) -> int:
        """Items that ended with an error."""
        return sum(c.failed for c in list(self._counts.values()))

    def start(self) -> None:
        """Starts submitting, if there is to be a backlog."""
        if self.settings.be_backlog:
            self._thread.start()

    def finish(self) -> None:
        """Stops submitting and cancels what is outstanding; counts stay as they are."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for job_id in self._open_jobs():
            try:
                self.client.cancel_job(job_id)
            except OmniServeError:
                return  # the store or the control plane is gone; so is the backlog

    def _run(self) -> None:
        # A little over the backlog is outstanding, so that it is never under it between polls.
        step = max(1, self.settings.be_backlog // 8)
        while not self._stopping.is_set():
            with contextlib.suppress(OmniServeError):  # refused or failed: tried again
                self._poll()
                if self.submitted - self.completed - self.failed <= self.settings.be_backlog:
                    missing = self.settings.be_backlog + self.completed + self.failed
                    self._submit(missing + step - self.submitted)
            self._stopping.wait(POLL_S)

    def _poll(self) -> None:
        for job_id in self._open_jobs():
            self._counts[job_id] = self.client.get_job(job_id).counts

    def _open_jobs(self) -> list[str]:
        return [j for j, c in self._counts.items() if c.completed + c.failed < c.total]

    def _submit(self, items: int) -> None:
        job_id = uuid.uuid4().hex
        s = self.settings
        batch = [
            JobItem(
                custom_id=f"{self.submitted + i}",
                prompt=next(self._texts),
                sampling=SamplingParams(max_tokens=s.be_max_tokens, seed=s.seed),
            )
            for i in range(items)
        ]
        self.client.submit_job(batch, job_id=job_id)
        self._counts[job_id] = JobCounts(items, 0, 0)
        self.submitted += items
