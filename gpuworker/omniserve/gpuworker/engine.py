"""The engine: a loop over stages. Receive, decide, run the stages, publish.

Runs in its own process, single-threaded; nothing in the loop blocks except waiting for the bell
when there is nothing to do. See `lifecycle` for what requests go through, `scheduler` and
`placement` for the policies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from omniserve.attnkernel import Bell
from omniserve.gpuworker import placement, scheduler
from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.engine_state import EngineState
from omniserve.gpuworker.inbox import Inbox
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.lifecycle import Lifecycle, Path
from omniserve.gpuworker.outbox import Outbox
from omniserve.gpuworker.parking import Rows
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling import logprobs, sample
from omniserve.gpuworker.scheduler import Plan
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.gpuworker.stages import StageRunner

_IDLE_WAIT_US = 50_000
# Ready rows may wait for others of their stage, but not for long (scheduler.PATIENCE_NS).
_WAIT_US = scheduler.PATIENCE_NS // 1000


class Engine:
    """Owns every request, the device and the links to the servers."""

    def __init__(
        self,
        settings: WorkerSettings,
        device: CpuDevice,
        model: LatencyModel,
        channel: EngineChannel,
        bell: Bell,
        clock_ns: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._model = model
        self._bell = bell
        self._clock_ns = clock_ns
        self._outbox = Outbox(channel)
        self._lifecycle = Lifecycle(settings, device, self._outbox, clock_ns)
        self._inbox = Inbox(channel, self._lifecycle)
        self._state = self._lifecycle.state
        self._counters = self._lifecycle.counters
        self._parking = self._lifecycle.parking
        self._stages = StageRunner(device, self._parking, self._lifecycle.servers)
        self._be_cohort: Cohort | None = None
        self._idle = False

    def run(self) -> None:
        """Serves until the front says to stop."""
        while not self._inbox.stopping:
            seen = self._bell.value()
            self._inbox.drain()
            self._lifecycle.take_answers()
            self._move()
            now = self._clock_ns()
            plan = scheduler.decide(
                self._observed(), self._model, now, self._settings.prefill_chunk_tokens_max
            )
            if plan is not None:
                self._run_pass(plan, now)
            self._publish(now)
            if plan is None:
                self._rest(seen)
        self._lifecycle.check_integrity()

    def _run_pass(self, plan: Plan, started_ns: int) -> None:
        ls = Cohort(plan.ls, self._settings.page_tokens) if plan.ls else None
        if plan.be:
            self._be_cohort = Cohort(plan.be, self._settings.page_tokens)
            self._lifecycle.set_out(self._be_cohort)
        self._count_starts(plan)
        unused = 0
        cut_short = False
        for stage in plan.stages:
            cohorts = [ls] if ls else []
            be = self._be_cohort
            if be is not None and be.stage == stage < plan.be_until:
                cohorts.append(be)
            # Allowance that a stage leaves unused carries to later stages of the pass.
            allowance = plan.allowance + unused if plan.allowance else 0
            boarded = self._parking.board(stage, allowance)
            unused = allowance - len(boarded)
            if cohorts or len(boarded):
                logits = self._stages.run(stage, cohorts, boarded)
                self._count(ls is not None, boarded)
                if logits is not None:
                    self._accept(cohorts, boarded, logits)
            self._lifecycle.take_answers()
            if self._inbox.urgent() and stage + 1 < self._state.stages:
                plan = plan.without_best_effort()
                cut_short = True
                if ls is None:
                    break
        self._finish_pass(plan, ls, started_ns, cut_short)

    def _finish_pass(self, plan: Plan, ls: Cohort | None, started_ns: int, cut_short: bool) -> None:
        if ls is not None:
            self._lifecycle.arrived(ls)
        if self._be_cohort is not None and self._be_cohort.stage == self._state.stages:
            self._lifecycle.arrived(self._be_cohort)
            self._be_cohort = None
        elapsed = self._clock_ns() - started_ns
        self._counters.passes += ls is not None
        self._counters.busy_ns += elapsed
        if not cut_short:
            self._model.observe(plan.predicted_ns, elapsed)

    def _accept(self, cohorts: list[Cohort], boarded: Rows, logits: torch.Tensor) -> None:
        """Samples the rows of the last stage and hands each request its token."""
        fixed = [r for cohort in cohorts for r in cohort.sampled]
        parked = [self._parking.requests[row] for row in boarded.tolist()]
        requests: list[Request] = [*fixed, *(r for r in parked if r is not None)]
        assert len(requests) == logits.shape[0], "a boarded row without a request"
        tokens = sample(logits, requests)
        self._outbox.logprobs = logprobs(logits, requests, tokens)
        now = self._clock_ns()
        for request, token in zip(fixed, tokens, strict=False):
            path = Path.LS if request.latency_sensitive else Path.DEVICE_RESIDENT
            self._lifecycle.accept(request, token, path, now)
        for request, token in zip(requests[len(fixed) :], tokens[len(fixed) :], strict=True):
            self._lifecycle.accept_parked(request, token, now)

    def _count(self, beside_ls: bool, boarded: Rows) -> None:
        counters = self._counters
        if beside_ls:
            counters.ls_stages += 1
            counters.boarded_rows += len(boarded)
            self._parking.ls_stages[boarded] += 1
        else:
            counters.be_only_stages += 1
            counters.be_only_rows += len(boarded)

    def _count_starts(self, plan: Plan) -> None:
        """How long LS requests waited for their first stage."""
        now = self._clock_ns()
        for chunk in plan.ls:
            request = chunk.request
            if not request.started_ns:
                request.started_ns = now
                self._counters.ls_started += 1
                self._counters.ls_queue_ns += now - request.arrival_ns

    def _move(self) -> None:
        """Frees and grants memory before the pass."""
        life = self._lifecycle
        life.carry_out(placement.decide(self._observed(), life, life.placement))
        life.move_at_random()
        life.transfer()

    def _observed(self) -> EngineState:
        """Returns the state with its gauges brought up to date."""
        state = self._state
        state.blocks_free = self._lifecycle.blocks.free
        state.parked = self._parking.by_stage()
        cohort = self._be_cohort
        state.be_cohort_stage = cohort.stage if cohort is not None else -1
        state.be_cohort_rows = cohort.rows if cohort is not None else 0
        return state

    def _publish(self, now_ns: int) -> None:
        waits = sum(server.link.ring_waits for server in self._lifecycle.servers)
        self._outbox.publish(
            self._observed(), self._model, self._counters, self._parking.parked, waits, now_ns
        )

    def _rest(self, seen: int) -> None:
        """Waits for the bell; looks over the pools once each time the engine runs dry."""
        if self._lifecycle.is_empty() and not self._idle:
            self._lifecycle.check_integrity()
        self._idle = self._lifecycle.is_empty()
        self._bell.wait(seen, _WAIT_US if self._state.parked.ready.any() else _IDLE_WAIT_US)
