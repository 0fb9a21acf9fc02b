"""The engine: a loop over stages. Receive, decide, run the stages, publish.

Runs in its own process, single-threaded; nothing in the loop blocks except waiting for the bell
when there is nothing to do. See `lifecycle` for what requests go through, `policies` for who
decides.
"""

from __future__ import annotations

from collections.abc import Callable

from omniserve.attnkernel import Bell
from omniserve.gpuworker import be_stages, boarding, deadlines
from omniserve.gpuworker.channel import EngineChannel
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.port import Device
from omniserve.gpuworker.inbox import Inbox
from omniserve.gpuworker.iteration_log import IterationLog
from omniserve.gpuworker.latency_model import LatencyModel, Load
from omniserve.gpuworker.lifecycle import Lifecycle, Path
from omniserve.gpuworker.outbox import Outbox
from omniserve.gpuworker.parking import Rows
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies import Policy
from omniserve.gpuworker.sampling import logprobs, sample
from omniserve.gpuworker.settings import WorkerSettings
from omniserve.gpuworker.stages import Finished, StageRunner

_IDLE_WAIT_US = 50_000
# Ready rows may wait for others of their stage, but not for long (boarding.PATIENCE_NS).
_WAIT_US = boarding.PATIENCE_NS // 1000
# How long a stage of a lockstep plan waits for answers: a stopped server must not stop LS.
_LOCKSTEP_NS = 100_000_000


class Engine:
    """Owns every request, the device and the links to the servers."""

    def __init__(
        self,
        settings: WorkerSettings,
        device: Device,
        model: LatencyModel,
        policy: Policy,
        channel: EngineChannel,
        bell: Bell,
        clock_ns: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._model = model
        self._policy = policy
        self._bell = bell
        self._clock_ns = clock_ns
        self._outbox = Outbox(channel)
        self._afterwards = Afterwards()
        self._lifecycle = Lifecycle(
            settings, device, self._afterwards, self._outbox, policy.placement, clock_ns
        )
        self._inbox = Inbox(channel, self._lifecycle)
        self._state = self._lifecycle.state
        self._counters = self._lifecycle.counters
        self._parking = self._lifecycle.parking
        servers = self._lifecycle.servers
        self._stages = StageRunner(device, self._parking, servers, self._afterwards)
        self._be_cohort: Cohort | None = None
        self._log = IterationLog(settings.iteration_log)
        self._deciding_ns = 0
        """How long the decision took, so far, of what runs next."""
        self._idle = False
        self._rung = bell.value()
        self._look_again = False

    def run(self) -> None:
        """Serves until the front says to stop."""
        while not self._inbox.stopping:
            seen = self._bell.value()
            self._inbox.drain()
            self._lifecycle.take_answers()
            gave_back = self._move()
            now = self._clock_ns()
            # Memory came free for LS: nothing else starts before it is decided who gets it.
            plan = None if gave_back else self._policy.plan(self._state, self._model, now)
            if plan is None and not gave_back:
                self._publish(now)
                self._rest(seen)
                continue
            while plan is not None:
                self._log.begin(plan, now, self._deciding_ns + self._clock_ns() - now)
                self._run_pass(plan, now)
                plan = self._following(plan)
                now = self._clock_ns()
            self._publish(now)
        self._lifecycle.check_integrity()
        self._log.write()

    def _following(self, plan: Plan) -> Plan | None:
        """The next stage of a run of BE stages; None if everything is to be looked at again."""
        run, parking = plan.run, self._parking
        while run is not None:
            seen = self._bell.value()
            self._lifecycle.take_answers()
            if not self._inbox.is_empty():
                break
            self._observe_cohort()
            now = self._clock_ns()
            ready, away = parking.ready_by_stage, parking.away_by_stage
            following = be_stages.following(self._state, self._model, plan, ready, now)
            self._deciding_ns = self._clock_ns() - now
            if following is not None:
                return following
            if not be_stages.awaits(self._state, plan, away, now):
                break
            self._wait(seen, _WAIT_US)
        return None

    def _run_pass(self, plan: Plan, decided_ns: int) -> None:
        """Runs the plan's stages; BE leaves at a stage boundary if a newcomer needs the time."""
        ls = Cohort(plan.ls, self._settings.page_tokens) if plan.ls else None
        if plan.be:
            self._be_cohort = Cohort(plan.be, self._settings.page_tokens)
            self._lifecycle.set_out(self._be_cohort)
        self._count_starts(plan)
        unused = 0
        cut_short = False
        for ran, stage in enumerate(plan.stages, 1):
            cohorts = [ls] if ls is not None and ls.stage == stage else []
            be = self._be_cohort
            if be is not None and be.stage == stage < plan.be_until:
                cohorts.append(be)
            if plan.lockstep:
                self._await_answers(stage, plan.allowance(stage))
            # Allowance that a stage leaves unused carries to later stages of the pass.
            unused += plan.allowance(stage)
            boarded = self._parking.board(stage, min(unused, plan.boarding_most))
            unused -= len(boarded)
            if cohorts or len(boarded):
                finished = self._stages.run(stage, cohorts, boarded)
                self._count(ls is not None, boarded)
                if finished is not None:
                    self._accept(finished, boarded)
            if self._was_rung():
                self._lifecycle.take_answers()
                left = len(plan.stages) - ran
                if not cut_short and left and self._must_yield(plan, left):
                    plan = plan.without_best_effort()
                    cut_short = True
                    if ls is None:
                        break
        self._finish_pass(plan, ls, decided_ns, cut_short)

    def _finish_pass(self, plan: Plan, ls: Cohort | None, decided_ns: int, cut_short: bool) -> None:
        if ls is not None:
            self._lifecycle.arrived(ls)
            self._parking.end_pass()
        if self._be_cohort is not None and self._be_cohort.stage == self._state.stages:
            self._lifecycle.arrived(self._be_cohort)
            self._be_cohort = None
        if ls is not None or self._state.ls_running:
            self._stages.wait()  # what LS streams wait for is to be known
            self._counters.bubble_ns = self._stages.bubble_ns
        elapsed = self._clock_ns() - decided_ns
        self._counters.passes += ls is not None
        self._counters.busy_ns += elapsed
        self._log.end(elapsed, cut_short)
        if not cut_short:
            self._model.observe(plan.regime, plan.rows, plan.predicted_ns, elapsed)

    def _was_rung(self) -> bool:
        """Whether a command or an answer has come since the last time: spares looking.

        A command may reach its queue a moment after the bell: it is looked for twice.
        """
        rung = self._bell.value()
        news = rung != self._rung
        self._rung = rung
        look, self._look_again = news or self._look_again, news
        return look

    def _must_yield(self, plan: Plan, stages_left: int) -> bool:
        arrivals = self._inbox.arrivals()
        return bool(arrivals) and deadlines.must_yield(
            plan, stages_left, arrivals, self._state, self._model, self._clock_ns()
        )

    def _await_answers(self, stage: int, allowance: int) -> None:
        """Waits until the rows that may board `stage` have their attention, but not for ever."""
        parking = self._parking
        wanted = min(allowance, parking.ready_at(stage) + parking.away_at(stage))
        until_ns = self._clock_ns() + _LOCKSTEP_NS
        while parking.ready_at(stage) < wanted and self._clock_ns() < until_ns:
            seen = self._bell.value()
            self._lifecycle.take_answers()
            if parking.ready_at(stage) < wanted:
                self._wait(seen, _WAIT_US)

    def _accept(self, finished: Finished, boarded: Rows) -> None:
        """Samples the rows of the last stage and hands each request its token."""
        requests, best, logits = finished
        tokens = sample(best, logits, requests)
        self._outbox.logprobs = logprobs(logits, requests, tokens)
        now = self._clock_ns()
        fixed = len(requests) - len(boarded)
        for request, token in zip(requests[:fixed], tokens, strict=False):
            path = Path.LS if request.latency_sensitive else Path.DEVICE_RESIDENT
            self._lifecycle.accept(request, token, path, now)
        if len(boarded):
            self._lifecycle.accept_parked(boarded, tokens[fixed:], now)

    def _count(self, beside_ls: bool, boarded: Rows) -> None:
        counters = self._counters
        if beside_ls:
            counters.ls_stages += 1
            counters.boarded_rows += len(boarded)
            if len(boarded):
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

    def _move(self) -> bool:
        """Frees and grants memory before the pass, and brings the state's gauges up to date.

        Returns whether memory came free that only the next decision knows of.
        """
        life, state = self._lifecycle, self._state
        state.blocks_free = life.blocks.free
        began = self._clock_ns()
        moves = self._policy.moves(state, life.mover)
        self._deciding_ns = self._clock_ns() - began
        life.mover.carry_out(moves)
        if self._settings.fault_moves_per_pass:
            life.check_integrity()
            life.mover.move_at_random(self._settings.fault_moves_per_pass)
        life.mover.transfer()
        state.blocks_free = life.blocks.free
        state.parked = self._parking.by_stage()
        self._observe_cohort()
        if moves.abandon:
            return True
        if deadlines.must_call_off(state, self._model, self._clock_ns()):
            self._call_off()
            return True
        return False

    def _call_off(self) -> None:
        """Gives up the BE cohort that rests: its rows run anew, its prompt may lose its memory."""
        cohort = self._be_cohort
        assert cohort is not None, "calling off a cohort that is not there"
        self._lifecycle.called_off(cohort)
        self._be_cohort = None
        self._observe_cohort()

    def _observe_cohort(self) -> None:
        cohort, state = self._be_cohort, self._state
        stage = cohort.stage if cohort is not None else -1
        if stage != state.be_cohort_stage:
            state.be_cohort_since_ns = self._clock_ns()
        state.be_cohort_stage = stage
        state.be_cohort = cohort.load if cohort is not None else Load()

    def _publish(self, now_ns: int) -> None:
        waits = sum(server.link.ring_waits for server in self._lifecycle.servers)
        self._outbox.publish(
            self._state, self._model, self._counters, self._parking.parked, waits, now_ns
        )

    def _rest(self, seen: int) -> None:
        """Waits for the bell; looks over the pools once each time the engine runs dry."""
        if self._lifecycle.is_empty() and not self._idle:
            self._lifecycle.check_integrity()
        self._idle = self._lifecycle.is_empty()
        self._wait(seen, _WAIT_US if self._state.parked.ready.any() else _IDLE_WAIT_US)

    def _wait(self, seen: int, most_us: int) -> None:
        """Waits for the bell, unless the device has to be watched, which does not ring it."""
        self._afterwards.look()
        if self._afterwards.is_empty():
            self._bell.wait(seen, most_us)
