"""Live view of a run: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from omniserve.client.bench import metrics
from omniserve.client.bench.backlog_load import BacklogLoad
from omniserve.client.bench.chat_load import Answer, ChatLoad
from omniserve.client.bench.report import number
from omniserve.client.bench.samples import BE_PATHS, Sample, be_rates
from omniserve.client.bench.settings import BenchSettings

PLAIN_EVERY_S = 2.0
# Rates are means over this many samples: single ones jump.
RATE_SAMPLES = 6


@dataclass
class Progress:
    """Shows `chat`, `backlog` and the samples. As a context manager it owns the terminal."""

    console: Console
    settings: BenchSettings
    chat: ChatLoad
    backlog: BacklogLoad

    def __post_init__(self) -> None:
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._shown = 0
        self._next_plain_s = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._print_ended_answers()
        if self.console.is_terminal:
            self._live.stop()

    def update(self, at_s: float, samples: Sequence[Sample]) -> None:
        """Shows the state at `at_s` of the interval."""
        self._print_ended_answers()
        lines = self._lines(at_s, samples)
        if self.console.is_terminal:
            growing = [_answer(a) for a in self.chat.answers[self._shown :]]
            self._live.update(Group(*growing, *(Text(line) for line in lines)), refresh=True)
        elif at_s >= self._next_plain_s:
            self._next_plain_s = at_s + PLAIN_EVERY_S
            self.console.print(Text(" | ".join(lines)), soft_wrap=True)

    def _print_ended_answers(self) -> None:
        """Moves answers that have ended above the live view, in the order of their requests."""
        while self._shown < len(self.chat.answers) and self.chat.answers[self._shown].ended:
            self.console.print(_answer(self.chat.answers[self._shown]))
            self._shown += 1

    def _lines(self, at_s: float, samples: Sequence[Sample]) -> list[str]:
        s, records = self.settings, list(self.chat.records)
        ended = [r for r in records if r.outcome is not metrics.Outcome.UNFINISHED]
        share = metrics.attainment(ended, s.slo_ttft_ms, s.slo_tpot_ms)
        lines = [
            f"{at_s:5.1f} s of {s.duration_s:g} s",
            f"LS {len(ended)} of {len(records)} ended, attainment {number(share, '.2f')}, "
            f"TTFT {_p50_p99(metrics.ttfts_ms(records))} ms, "
            f"TPOT {_p50_p99(metrics.tpots_ms(records))} ms",
        ]
        if samples:
            recent = be_rates(samples[-RATE_SAMPLES:])
            device, boarded, be_only = (
                sum(by_path[p] for _, by_path in recent) / max(1, len(recent)) for p in BE_PATHS
            )
            workers = samples[-1].status.workers
            parked = sum(w.telemetry.rows_parked for w in workers)
            rows = sum(w.telemetry.boarded_rows for w in workers)
            lines.append(
                f"BE {self.backlog.completed} of {self.backlog.submitted} ended, tokens/s: "
                f"device {device:.0f}, boarded {boarded:.0f}, BE-only {be_only:.0f}; "
                f"rows parked {parked}, boarded so far {rows}"
            )
        return lines


def _p50_p99(values: Sequence[float]) -> str:
    p50, p99 = (metrics.percentile(values, p) for p in (50, 99))
    return f"p50 {number(p50, '.0f')} p99 {number(p99, '.0f')}"


def _answer(answer: Answer) -> Text:
    return Text.assemble(
        ("user: ", "bold cyan"), answer.question, "\n", ("assistant: ", "bold green"), answer.text
    )
