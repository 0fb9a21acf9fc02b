"""Best-effort load of durable jobs, with every result accounted for."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence

from omniserve.client import Client, FinishReason, JobItem, OmniServeError, SamplingParams

ITEMS = 16
MAX_TOKENS = 64
POLL_S = 0.5
RESULTS_WITHIN_S = 240.0


class Jobs:
    """Keeps `outstanding` items at the deployment while it runs, whatever fails meanwhile."""

    def __init__(self, texts: Sequence[str], outstanding: int) -> None:
        self._texts = itertools.cycle(texts)
        self._outstanding = outstanding
        self._ids: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._client: Client | None = None

    @property
    def submitted(self) -> int:
        """Items of jobs that were acknowledged."""
        return len(self._ids) * ITEMS

    def start(self, client: Client) -> None:
        self._client = client
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def submit(self, client: Client) -> None:
        """Hands in one job. An attempt whose answer was lost is repeated under the same id."""
        items = [
            JobItem(
                f"{i}", prompt=next(self._texts), sampling=SamplingParams(max_tokens=MAX_TOKENS)
            )
            for i in range(ITEMS)
        ]
        job_id = uuid.uuid4().hex
        while True:
            try:
                client.submit_job(items, job_id=job_id)
            except OmniServeError:
                time.sleep(POLL_S)
            else:
                self._ids.append(job_id)
                return

    def unfinished(self, client: Client) -> int:
        """Items without a result."""
        counts = [client.get_job(job_id).counts for job_id in self._ids]
        return sum(c.total - c.completed - c.failed for c in counts)

    def collect(self, client: Client) -> tuple[int, int]:
        """Waits for all results; returns items completed, and results beyond one of an item."""
        deadline_s = time.monotonic() + RESULTS_WITHIN_S
        while self.unfinished(client) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        completed = duplicates = 0
        for job_id in self._ids:
            results = list(client.job_results(job_id, follow=False))
            by_item = Counter(result.custom_id for result in results)
            duplicates += len(results) - len(by_item)
            good = (FinishReason.STOP, FinishReason.LENGTH)
            completed += len({r.custom_id for r in results if r.finish_reason in good})
        return completed, duplicates

    def _run(self) -> None:
        assert self._client is not None
        while not self._stopping.is_set():
            try:
                short = self.unfinished(self._client) < self._outstanding
            except OmniServeError:
                short = False
            if short:
                self.submit(self._client)
            else:
                self._stopping.wait(POLL_S)
