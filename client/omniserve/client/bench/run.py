"""One run of the load generator, from warm-up to report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from omniserve.client import Client, OmniServeError, Status, UnreachableError
from omniserve.client.bench.backlog_load import BacklogLoad
from omniserve.client.bench.chat_load import ChatLoad
from omniserve.client.bench.plot import write_plot
from omniserve.client.bench.progress import Progress
from omniserve.client.bench.report import BacklogCounts, build_report, report_table
from omniserve.client.bench.samples import Sample
from omniserve.client.bench.settings import BenchSettings
from omniserve.client.bench.texts import dialogues, problems

SAMPLE_EVERY_S = 0.5
STATUS_TIMEOUT_S = 2.0
FIRST_STATUS_WITHIN_S = 30.0


def run_bench(
    connect: Callable[..., Client],
    settings: BenchSettings,
    console: Console,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Loads a running stack, writes report.json and report.png, returns the report.

    `connect` returns a client of the stack, with the `timeout_s` that it is given. Failed requests
    are counted, not raised. `alive` is called twice a second and may raise to end the run. Raises
    UnreachableError if the stack never tells its status.
    """
    # A connection of its own for status, with a short timeout, so that a gap stays a gap.
    with connect() as client, connect(timeout_s=STATUS_TIMEOUT_S) as observer:
        chat = ChatLoad(client, settings, dialogues())
        backlog = BacklogLoad(client, settings, problems())
        first = _first_status(observer)
        backlog.start()
        try:
            console.print(f"warming up: {settings.num_warmups} chat requests beside the backlog")
            chat.warm_up()
            first = _status(observer) or first
            start_s = time.perf_counter()
            samples = [Sample(0.0, first)]
            chat.start()
            with Progress(console, settings, chat, backlog) as progress:
                _observe(observer, settings, start_s, samples, progress, alive)
                end_s = time.perf_counter()
                last = _status(observer)
                if last is not None:
                    samples.append(Sample(end_s - start_s, last))
                counts = BacklogCounts(backlog.submitted, backlog.completed, backlog.failed)
                chat.finish(settings.drain_s)
        finally:
            chat.finish(0.0)
            backlog.finish()
        report = build_report(
            settings, chat.records, end_s, end_s - start_s, counts, first, samples[-1].status
        )
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_plot(folder / "report.png", settings, chat.records, samples)
    console.print(report_table(report))
    console.print(f"wrote {folder / 'report.json'} and {folder / 'report.png'}")
    return report


def _observe(
    observer: Client,
    settings: BenchSettings,
    start_s: float,
    samples: list[Sample],
    progress: Progress,
    alive: Callable[[], None],
) -> None:
    """Samples the status until the interval is over."""
    next_s = SAMPLE_EVERY_S
    while next_s < settings.duration_s:
        time.sleep(max(0.0, start_s + next_s - time.perf_counter()))
        alive()
        status = _status(observer)
        at_s = time.perf_counter() - start_s
        if status is not None:
            samples.append(Sample(at_s, status))
        progress.update(at_s, samples)
        next_s = max(next_s + SAMPLE_EVERY_S, at_s)
    time.sleep(max(0.0, start_s + settings.duration_s - time.perf_counter()))


def _status(observer: Client) -> Status | None:
    """Returns the status, or None in a gap: no answer, or no worker with a fresh heartbeat."""
    with contextlib.suppress(OmniServeError):
        status = observer.status()
        return status if status.workers else None
    return None


def _first_status(observer: Client) -> Status:
    deadline_s = time.perf_counter() + FIRST_STATUS_WITHIN_S
    while (status := _status(observer)) is None:
        if time.perf_counter() > deadline_s:
            raise UnreachableError(f"no worker reported within {FIRST_STATUS_WITHIN_S:g} s")
        time.sleep(SAMPLE_EVERY_S)
    return status
