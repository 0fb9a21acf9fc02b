"""Latency-sensitive load: dialogues sent at their arrival times, a thread for each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import grpc

from omniserve.client import (
    Client,
    FinishReason,
    Generation,
    Message,
    OmniServeError,
    SamplingParams,
    Slo,
)
from omniserve.client.bench.arrivals import arrival_times_s
from omniserve.client.bench.metrics import Outcome, RequestRecord
from omniserve.client.bench.settings import BenchSettings


@dataclass
class Answer:
    """A chat turn shown to the reader while it grows."""

    question: str
    """The user's last turn."""
    text: str = ""
    """The answer so far."""
    ended: bool = False
    """Whether more may come."""


@dataclass
class ChatLoad:
    """Sends the requests of a run. Start it once; records grow while it runs."""

    client: Client
    settings: BenchSettings
    dialogues: Sequence[Sequence[Message]]
    records: list[RequestRecord] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """The first `show_answers` of the run."""

    def __post_init__(self) -> None:
        self._order = random.Random(self.settings.seed)
        self._threads: list[threading.Thread] = []
        self._running: set[Generation] = set()
        self._lock = threading.Lock()
        bound = self.settings.max_concurrency
        self._slots = threading.BoundedSemaphore(bound) if bound else nullcontext()
        self._stopping = threading.Event()

    def warm_up(self) -> None:
        """Sends a few requests one after the other, so that first-use costs are paid."""
        for _ in range(self.settings.num_warmups):
            self._send(RequestRecord(time.perf_counter()), self._next_dialogue(), None)

    def start(self) -> None:
        """Starts sending; time 0 of the arrivals is now."""
        self._spawn(self._dispatch, time.perf_counter())

    def finish(self, drain_s: float) -> None:
        """Waits for answers up to `drain_s`, then ends what is still running."""
        deadline = time.perf_counter() + drain_s
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.perf_counter()))
        self._stopping.set()
        with self._lock:
            running = list(self._running)
        for generation in running:
            generation.cancel()

    def _dispatch(self, start_s: float) -> None:
        s = self.settings
        for at_s in arrival_times_s(s.request_rate, s.burstiness, s.duration_s, s.seed):
            due_s = start_s + at_s
            time.sleep(max(0.0, due_s - time.perf_counter()))
            record = RequestRecord(due_s)
            self.records.append(record)
            dialogue = self._next_dialogue()
            answer = None
            if len(self.answers) < s.show_answers:
                answer = Answer(dialogue[-1].content)
                self.answers.append(answer)
            self._spawn(self._send_in_turn, record, dialogue, answer)

    def _send_in_turn(
        self, record: RequestRecord, dialogue: Sequence[Message], answer: Answer | None
    ) -> None:
        with self._slots:
            if not self._stopping.is_set():
                self._send(record, dialogue, answer)

    def _send(
        self, record: RequestRecord, dialogue: Sequence[Message], answer: Answer | None
    ) -> None:
        s = self.settings
        try:
            generation = self.client.generate(
                messages=dialogue,
                sampling=SamplingParams(max_tokens=s.ls_max_tokens, seed=s.seed),
                slo=Slo(s.slo_ttft_ms, s.slo_tpot_ms),
            )
            with self._lock:
                self._running.add(generation)
            try:
                self._receive(generation, record, answer)
            finally:
                with self._lock:
                    self._running.discard(generation)
            if generation.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                record.outcome = Outcome.COMPLETED
            elif not self._stopping.is_set():
                record.outcome = Outcome.FAILED
        except OmniServeError as error:
            if not self._stopping.is_set():
                refused = error.grpc_code is grpc.StatusCode.RESOURCE_EXHAUSTED
                record.outcome = Outcome.REFUSED if refused else Outcome.FAILED
        finally:
            if answer is not None:
                answer.ended = True

    def _receive(
        self, generation: Generation, record: RequestRecord, answer: Answer | None
    ) -> None:
        for chunk in generation:
            record.token_times_s += [time.perf_counter()] * len(chunk.token_ids)
            if answer is not None:
                answer.text += chunk.text

    def _next_dialogue(self) -> Sequence[Message]:
        return self._order.choice(self.dialogues)

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
