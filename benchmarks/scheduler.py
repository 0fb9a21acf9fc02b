"""What one decision costs the engine: placement, the state's gauges, and the plan.

A made-up engine in mid traffic: 64 LS requests, in every other decision a few of them still
prompts, and 2,000 BE requests: most of them parked at all stages, some on the device, the rest
waiting in the queues of several tenants. Between two decisions rows board and come back, as they
do between two passes, outside the time that is measured. No model runs: the profile is made up.

    python benchmarks/scheduler.py --json

The last line is one JSON object: `decision_us` (`p50`, `p99`), its parts `placement_us` and
`plan_us` (placement includes the gauges), and `be` (BE requests by place).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import numpy as np

from omniserve.gpuworker.engine_state import EngineState, Limits
from omniserve.gpuworker.latency_model import LatencyModel
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.policies import POLICIES, Options, Policy
from omniserve.gpuworker.requests import Place, Request
from omniserve.latency import LatencyProfile

LAYERS = 30
PAGE_TOKENS = 32
PREFILL_TOKENS_MAX = 512
MS = 1_000_000
LS, PROMPTS, DEVICE, PARKED, WAITING = 64, 4, 64, 1500, 436
TENANTS = 8


def main() -> int:
    options = _options()
    report = _measure(options.policy, options.decisions)
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:14} {value}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--decisions", type=int, default=3000, help="measured (default 3000)")
    parser.add_argument("--policy", choices=list(POLICIES), default="omniserve")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last")
    return parser.parse_args()


def _measure(policy_name: str, decisions: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    lot = ParkingLot(PARKED, LAYERS + 1, time.monotonic_ns)
    state, host = _state(lot, random)
    policy = POLICIES[policy_name](Options(PREFILL_TOKENS_MAX, "auto"))
    model = LatencyModel(_profile(), LAYERS)
    gc.collect()
    gc.freeze()
    with_prompts, streams = state.ls_running[:LS], state.ls_running[-LS:]
    times = np.empty((decisions, 2))
    for number in range(decisions):
        state.ls_running = streams if number % 2 else with_prompts
        times[number] = _decide(policy, model, state, host, lot, random)
    placement_us, plan_us = times[decisions // 10 :].T / 1e3
    return {
        "decision_us": _percentiles(placement_us + plan_us),
        "placement_us": _percentiles(placement_us),
        "plan_us": _percentiles(plan_us),
        "be": {"device": DEVICE, "parked": PARKED, "waiting": WAITING},
    }


def _decide(
    policy: Policy,
    model: LatencyModel,
    state: EngineState,
    host: _Host,
    lot: ParkingLot,
    random: np.random.Generator,
) -> tuple[int, int]:
    """Returns the time of placement with the gauges, and of the plan, in ns."""
    _advance(lot, random)
    start = time.perf_counter_ns()
    policy.moves(state, host)
    state.parked = lot.by_stage()
    placed = time.perf_counter_ns()
    plan = policy.plan(state, model, time.monotonic_ns())
    end = time.perf_counter_ns()
    assert plan is not None
    now_ns = time.monotonic_ns()
    for request in state.ls_running:  # every stream stays a bit ahead of its deadlines
        request.last_token_ns = now_ns - 10 * MS
        request.first_token_ns = now_ns - request.generated * 50 * MS
        request.arrival_ns = now_ns - 100 * MS if not request.generated else 0
    return placed - start, end - placed


def _advance(lot: ParkingLot, random: np.random.Generator) -> None:
    """Some rows board three stages; the same come back at the next ones."""
    for stage in random.integers(0, LAYERS, size=3).tolist():
        rows = lot.board(stage, 8)
        lot.send_away(rows, stage + 1)
        lot.answered(0, lot.sequence[rows])


class _Host:
    """All is mirrored, and a server has room for everybody."""

    def is_mirrored(self, request: Request) -> bool:
        return request.server >= 0

    def is_overdue(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def is_stranded(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def waits_at_start(self, request: Request) -> bool:
        return request.place is Place.HOST

    def can_reserve(self, request: Request) -> bool:
        return request.place is Place.WAITING


def _state(lot: ParkingLot, random: np.random.Generator) -> tuple[EngineState, _Host]:
    state = EngineState(4096, PAGE_TOKENS, LAYERS + 1, blocks_free=2048)
    state.limits = Limits(ls_running_max=128)
    now_ns = time.monotonic_ns()
    for index in range(LS + PROMPTS):
        stream = _request(f"ls{index}", Place.PREFILLING, 0 if index < PROMPTS else 40)
        stream.latency_sensitive = True
        stream.arrival_ns = stream.last_token_ns = now_ns
        stream.ttft_slo_ns, stream.tpot_slo_ns = 1000 * MS, 100 * MS
        state.ls_running.append(stream)
    for index in range(DEVICE):
        state.be_device.append(_request(f"device{index}", Place.DEVICE, 10))
    for index in range(PARKED):
        parked = _request(f"parked{index}", Place.HOST, 10)
        parked.sequence, parked.blocks = index, []
        state.be_host.append(parked)
        lot.park(parked)
    for stage in range(LAYERS):  # spread over the stages
        rows = lot.board(stage, PARKED * (LAYERS - stage) // (LAYERS + 1))
        lot.send_away(rows, stage + 1)
        lot.answered(0, lot.sequence[rows])
    for index in range(WAITING):
        waiting = _request(f"job:{index % 16}:{index}", Place.WAITING, 0)
        waiting.tenant, waiting.blocks = f"tenant{index % TENANTS}", []
        waiting.arrival_ns = int(random.integers(0, now_ns))
        state.be_waiting.append(waiting)
    return state, _Host()


def _request(name: str, place: Place, generated: int) -> Request:
    made = Request(name, False, np.zeros(512, np.int64), 256, 0, known=256 + generated)
    made.place, made.server = place, 0
    made.computed = made.known - 1 if generated else 0
    made.blocks = list(range(10))
    return made


def _profile() -> LatencyProfile:
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    middle = tuple(1.5e5 + 1.6e4 * count for count in rows)
    return LatencyProfile(
        hardware="made up",
        model="made up",
        dtype="bfloat16",
        rows=rows,
        first_stage_ns=middle,
        middle_stage_ns=middle,
        last_stage_ns=tuple(10 * ns for ns in middle),
        attend_row_ns=2e3,
        attend_kv_token_ns=10.0,
        attend_pair_ns=1.0,
    )


def _percentiles(times_us: np.ndarray[Any, Any]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(times_us, p)), 1) for p in (50, 99)}


if __name__ == "__main__":
    raise SystemExit(main())
