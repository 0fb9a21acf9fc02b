"""The engine's policy side under a virtual clock: real policies, parking lot and queues, no model.

What the device and the servers do is time that passes: stages take what the latency model says,
times a factor that is drawn; answers come after a drawn delay. Requests, pages and arena room are
carried out on paper, in the words of `mover.py`. Every iteration checks what must always hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from support.engine_states import LAYERS, MS, PAGE_TOKENS, PROFILE, STAGES, budget_ns

from omniserve.gpuworker import be_stages, deadlines
from omniserve.gpuworker.cohort import Chunk, load_of
from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import LatencyModel, Load, Regime
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.placement import Moves
from omniserve.gpuworker.plan import Plan
from omniserve.gpuworker.policies import POLICIES, Options
from omniserve.gpuworker.requests import Place, Request

LOT_ROWS = 16


@dataclass(eq=False)
class Cohort:
    """Chunks on their way, and the next stage."""

    chunks: tuple[Chunk, ...]
    stage: int = 0


@dataclass(frozen=True)
class Weather:
    """How the host behaves: each is drawn anew for every stage or answer."""

    slowness: tuple[float, float] = (0.8, 1.3)
    answer_ms: tuple[float, float] = (0.1, 4.0)
    lost_answers: float = 0.0
    """Chance of an answer that takes a second."""


@dataclass
class Simulation:
    """One engine. `submit`, then `step` until it returns False."""

    policy_name: str
    seed: int = 0
    blocks: int = 64
    arena_pages: int = 200
    limits: Limits = field(default_factory=Limits)
    weather: Weather = field(default_factory=Weather)
    headroom: float = 0.5

    def __post_init__(self) -> None:
        self.now_ns = 0
        self.state = EngineState(self.blocks, PAGE_TOKENS, STAGES, self.blocks, self.limits)
        self.model = LatencyModel(PROFILE, LAYERS)
        self.policy = POLICIES[self.policy_name](Options(128, "auto", self.headroom))
        self.lot = ParkingLot(LOT_ROWS, STAGES, lambda: self.now_ns)
        self.arriving: list[Request] = []
        """Not here yet, by arrival."""
        self.started: list[Request] = []
        """Best-effort requests, in the order in which they got memory."""
        self.ended: list[Request] = []
        self.gaps_ns: dict[str, int] = {}
        """Longest pause of each LS stream."""
        self.recomputed_tokens = 0
        self._random = random.Random(self.seed)
        self._arena_free = self.arena_pages
        self._sequences = list(range(LOT_ROWS))
        self._mirrored: dict[Request, int] = {}
        self._away: list[tuple[float, int]] = []
        """(when it is answered, sequence)"""
        self._cohort: Cohort | None = None

    def submit(self, *requests: Request) -> None:
        """They arrive at their `arrival_ns`."""
        self.arriving.extend(requests)
        self.arriving.sort(key=lambda request: request.arrival_ns)

    def step(self) -> bool:
        """One iteration; False if nothing is left to do."""
        self._receive()
        self._take_answers()
        self._observe()
        moves = self.policy.moves(self.state, self)
        self._carry_out(moves)
        self._observe()
        if deadlines.must_call_off(self.state, self.model, self.now_ns):
            self._call_off()
            return True
        if moves.abandon:
            return True
        plan = self.policy.plan(self.state, self.model, self.now_ns)
        if plan is None:
            return self._wait()
        while plan is not None:
            self._check_plan(plan)
            self._run(plan)
            self._check_memory()
            plan = self._following(plan)
        return True

    # --- what placement asks -------------------------------------------------------------

    def is_overdue(self, request: Request) -> bool:  # noqa: ARG002
        return False  # a checkpoint takes an iteration here

    def is_stranded(self, request: Request) -> bool:  # noqa: ARG002
        return False  # and servers never stop

    def is_mirrored(self, request: Request) -> bool:
        done = self._mirrored.get(request, 0) >= request.computed
        return request.server >= 0 and done and self.lot.has_room()

    def waits_at_start(self, request: Request) -> bool:
        return request.place is Place.HOST and self.lot.at_start(request.row)

    def can_reserve(self, request: Request) -> bool:
        if not self.policy.uses_servers:
            return True
        return bool(self._sequences) and self.state.pages_for(request.limit) <= self._arena_free

    # --- what the engine does ------------------------------------------------------------

    def _following(self, plan: Plan) -> Plan | None:
        while not (self.arriving and self.arriving[0].arrival_ns <= self.now_ns):
            self._take_answers()
            self._observe()
            ready, away = self.lot.ready_by_stage, self.lot.away_by_stage
            following = be_stages.following(self.state, self.model, plan, ready, self.now_ns)
            if following is not None:
                return following
            if not be_stages.awaits(self.state, plan, away, self.now_ns):
                break
            self.now_ns = int(min(at for at, _ in self._away)) + 1
        return None

    def _run(self, plan: Plan) -> None:
        started_ns = self.now_ns
        ls = Cohort(plan.ls) if plan.ls else None
        if plan.be:
            assert self._cohort is None, "two BE cohorts at once"
            self._cohort = Cohort(plan.be)
            for chunk in plan.be:
                chunk.request.in_cohort = True
        unused = 0
        whole = True
        for ran, stage in enumerate(plan.stages, 1):
            cohorts = [ls] if ls and ls.stage == stage else []
            if self._cohort and self._cohort.stage == stage < plan.be_until:
                cohorts.append(self._cohort)
            if plan.lockstep:
                self._await_answers(stage, plan.allowance(stage))
            unused += plan.allowance(stage)
            boarded = self.lot.board(stage, min(unused, plan.boarding_most))
            unused -= len(boarded)
            self._run_stage(stage, cohorts, boarded)
            self._take_answers()
            newcomers = [
                deadlines.Arrival(r.arrival_ns, r.prompt_tokens, r.ttft_slo_ns)
                for r in self.arriving
                if r.latency_sensitive and r.arrival_ns <= self.now_ns
            ]
            left = len(plan.stages) - ran
            if (
                newcomers
                and left
                and deadlines.must_yield(plan, left, newcomers, self.state, self.model, self.now_ns)
            ):
                plan, whole = plan.without_best_effort(), False
                if ls is None:
                    break
        if ls:
            self._arrived(ls)
            self.lot.end_pass()
        if self._cohort and self._cohort.stage == STAGES:
            self._arrived(self._cohort)
            self._cohort = None
        if whole:
            took_ns = self.now_ns - started_ns
            self.model.observe(plan.regime, plan.rows, plan.predicted_ns, took_ns)

    def _await_answers(self, stage: int, allowance: int) -> None:
        wanted = min(allowance, self.lot.ready_at(stage) + self.lot.away_at(stage))
        until_ns = self.now_ns + 100 * MS
        while self.lot.ready_at(stage) < wanted and self.now_ns < until_ns:
            self.now_ns = min(until_ns, int(min(at for at, _ in self._away)) + 1)
            self._take_answers()

    def _run_stage(self, stage: int, cohorts: list[Cohort], boarded: np.ndarray) -> None:
        load = load_of([chunk for cohort in cohorts for chunk in cohort.chunks])
        rows = (load.sampled if stage == LAYERS else load.rows) + len(boarded)
        attention = self.model.pass_ns(load) - self.model.pass_ns(
            Load(rows=load.rows, sampled=load.sampled)
        )
        cost = self.model.stage_ns(stage, rows) + (attention / LAYERS if stage < LAYERS else 0.0)
        self.now_ns += int(cost * self._random.uniform(*self.weather.slowness))
        for cohort in cohorts:
            cohort.stage = stage + 1
        if stage < LAYERS:
            self.lot.send_away(boarded, stage + 1)
            for row in boarded.tolist():
                delay_ms = self._random.uniform(*self.weather.answer_ms)
                if self._random.random() < self.weather.lost_answers:
                    delay_ms = 1000.0
                self._away.append((self.now_ns + delay_ms * MS, int(self.lot.sequence[row])))
            return
        for row in boarded.tolist():
            request = self.lot.requests[row]
            assert request is not None
            request.known += 1
            request.computed += 1
            self._mirrored[request] = request.computed
            self.lot.next_tokens(np.array([row]), [0], [request.computed])
            self._end_if_finished(request)

    def _arrived(self, cohort: Cohort) -> None:
        for request, start, tokens in cohort.chunks:
            if start + tokens == request.known:
                if request.generated == 0:
                    request.first_token_ns = self.now_ns
                elif request.latency_sensitive:
                    gap = self.now_ns - request.last_token_ns
                    self.gaps_ns[request.request_id] = max(
                        gap, self.gaps_ns.get(request.request_id, 0)
                    )
                request.last_token_ns = self.now_ns
                request.known += 1
            request.computed = start + tokens
            request.in_cohort = False
            if request.generated and request.known == start + tokens + 1:
                if request.place is Place.PREFILLING:
                    request.place = Place.DEVICE
                self._end_if_finished(request)

    def _end_if_finished(self, request: Request) -> None:
        if request.known < request.limit:
            return
        state = self.state
        if request.latency_sensitive:
            state.ls_running.remove(request)
        else:
            held = state.be_host if request.place is Place.HOST else state.be_device
            held.remove(request)
            state.be_waiting.settle(request)
        if request.row >= 0:
            self.lot.remove(request)
        self._release(request)
        request.place = Place.ENDED
        self.ended.append(request)

    def _carry_out(self, moves: Moves) -> None:
        state = self.state
        for request in moves.abandon:
            assert not request.in_cohort
            state.be_device.remove(request)
            self.recomputed_tokens += request.computed
            self._release(request)
            request.computed, request.leaving, request.place = 0, False, Place.WAITING
            state.be_waiting.appendleft(request)
        for request in moves.leave:
            assert request.server >= 0, "it could never be demoted"
            request.leaving = True
        for request in moves.demote:
            assert self.is_mirrored(request)
            state.be_device.remove(request)
            self._give_back(request)
            request.leaving, request.place = False, Place.HOST
            self.lot.park(request)
            state.be_host.append(request)
        for request in moves.admit_ls:
            state.ls_waiting.remove(request)
            self._take(request, state.pages_for(request.limit))
            request.place = Place.PREFILLING
            state.ls_running.append(request)
        for request in moves.grow:
            self._take(request, 1)
        for request in moves.start_be:
            self._start_be(request)
        for request in moves.promote:
            self.lot.hold(request.row)
            self._take(request, state.pages_for(request.known + 1))
            request.place = Place.RESTORING
            state.be_restoring.append(request)
        for request in list(state.be_restoring):  # a restore takes an iteration
            if request not in moves.promote:
                self.lot.remove(request)
                state.be_restoring.remove(request)
                state.be_host.remove(request)
                request.place = Place.DEVICE
                state.be_device.append(request)
        for request in state.be_device:  # and so does a checkpoint
            self._mirrored[request] = request.computed

    def _start_be(self, request: Request) -> None:
        self.state.be_waiting.start(request)
        self.started.append(request)
        tokens = request.limit
        if self.policy.uses_servers:
            request.server, request.sequence = 0, self._sequences.pop()
            self._arena_free -= self.state.pages_for(request.limit)
            tokens = request.known + 1
        self._take(request, self.state.pages_for(tokens))
        request.place = Place.PREFILLING
        self.state.be_device.append(request)

    def _take(self, request: Request, pages: int) -> None:
        self.state.blocks_free -= pages
        assert self.state.blocks_free >= 0, "device memory oversubscribed"
        request.blocks.extend([0] * pages)

    def _give_back(self, request: Request) -> None:
        self.state.blocks_free += len(request.blocks)
        request.blocks.clear()

    def _release(self, request: Request) -> None:
        self._give_back(request)
        self._mirrored.pop(request, None)
        if request.server >= 0:
            self._sequences.append(request.sequence)
            self._arena_free += self.state.pages_for(request.limit)
            request.server = request.sequence = -1

    def _call_off(self) -> None:
        assert self._cohort is not None
        for chunk in self._cohort.chunks:
            chunk.request.in_cohort = False
            self.recomputed_tokens += chunk.tokens
        self._cohort = None

    def _receive(self) -> None:
        while self.arriving and self.arriving[0].arrival_ns <= self.now_ns:
            request = self.arriving.pop(0)
            state = self.state
            queue = state.ls_waiting if request.latency_sensitive else state.be_waiting
            queue.append(request)

    def _take_answers(self) -> None:
        come = [sequence for at, sequence in self._away if at <= self.now_ns]
        self._away = [(at, sequence) for at, sequence in self._away if at > self.now_ns]
        self.lot.answered(0, np.array(come, dtype=np.int32))

    def _observe(self) -> None:
        self.state.parked = self.lot.by_stage()
        stage = self._cohort.stage if self._cohort else -1
        if stage != self.state.be_cohort_stage:
            self.state.be_cohort_since_ns = self.now_ns
        self.state.be_cohort_stage = stage
        self.state.be_cohort = load_of(self._cohort.chunks) if self._cohort else Load()

    def _wait(self) -> bool:
        """Nothing can run: time passes until something happens. False if nothing will."""
        coming = [at for at, _ in self._away]
        coming += [request.arrival_ns for request in self.arriving[:1]]
        if self.state.parked.ready.any():
            coming.append(self.now_ns + 5 * MS)
        if self.state.be_restoring or self.state.be_device:  # transfers are on their way
            coming.append(self.now_ns + MS)
        if not coming:
            return False
        self.now_ns = max(self.now_ns + 1, int(min(coming)) + 1)
        return True

    # --- what must always hold -----------------------------------------------------------

    def _check_plan(self, plan: Plan) -> None:
        decoding = [r for r in self.state.ls_running if r.generated]
        if decoding and plan.regime >= Regime.BE_STAGE:
            slack = budget_ns(self.state, self.model, self.now_ns)
            assert not plan.ls
            assert plan.predicted_ns <= slack, "a stream cannot wait for this stage"
        else:
            assert [c.request for c in plan.ls if c.request.generated] == decoding
        for chunk in [*plan.ls, *plan.be]:
            assert chunk.end <= len(chunk.request.blocks) * PAGE_TOKENS, "beyond its pages"
        if plan.ls:
            assert plan.predicted_ns <= max(plan.budget_ns, plan.ls_ns) * (1 + 1e-9) or (
                bool(self.state.ls_waiting) and self._cohort is not None
            )

    def _check_memory(self) -> None:
        state = self.state
        holders = [*state.ls_running, *state.be_device, *state.be_host]
        held = sum(len(r.blocks) for r in holders)
        assert held + state.blocks_free == self.blocks
        assert self.lot.away == len(self._away), "a credit was lost or used twice"
        self.lot.check_integrity()
