"""Wires the control plane: one process, its servicers, and the loops that feed them."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from omniserve import redis_access
from omniserve.controlplane import access, store, tokenizer
from omniserve.controlplane.dispatcher import Dispatcher
from omniserve.controlplane.inference import InferenceServicer
from omniserve.controlplane.job_store import JobStore
from omniserve.controlplane.jobs import JobServicer
from omniserve.controlplane.limits_loop import LimitsLoop, LimitsView
from omniserve.controlplane.placements import Placements
from omniserve.controlplane.router import Router
from omniserve.controlplane.settings import Settings
from omniserve.controlplane.slo_state import SloState
from omniserve.controlplane.status import StatusServicer
from omniserve.controlplane.validator import Capacity, Validator
from omniserve.rpc import SERVER_OPTIONS, add_reflection, bind
from omniserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

log = logging.getLogger(__name__)

HEALTH_S = 0.2
SERVICES = [
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    jobs_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
    status_pb2.DESCRIPTOR.services_by_name["StatusService"].full_name,
]


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT, then drains. Raises typed errors if it cannot start."""
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=access.interceptors(settings))
    redis = redis_access.connect(
        settings.redis_url,
        settings.redis_password_file,
        settings.redis_ca_file,
        answer_s=store.ANSWER_S,
    )
    words = tokenizer.load(Path(settings.model_path))
    router = Router(redis, settings.model)
    slo_state = SloState(redis, settings.slo_window_s)
    view = LimitsView()
    limits_loop = LimitsLoop(
        redis,
        router,
        slo_state,
        view,
        target=settings.slo_target,
        interval_s=settings.limits_interval_s,
    )
    job_store = JobStore(redis, settings.job_queue_items_max, settings.job_retention_s)
    dispatcher = Dispatcher(
        job_store,
        router,
        words,
        window_items=settings.job_window_items,
        stream_interval_s=settings.job_stream_interval_s,
        renew_s=settings.job_renew_s,
        reclaim_s=settings.job_reclaim_s,
    )

    def capacity() -> Capacity:
        reports = [worker.report for worker in router.workers]
        context = min([words.context_tokens, *(r.context_tokens or 1 << 30 for r in reports)])
        return Capacity(
            context_tokens=context,
            ls_tokens_max=min([context, *(r.ls_tokens_max or context for r in reports)]),
            be_prompt_tokens_max=min(
                [context, *(r.be_prompt_tokens_max or context for r in reports)]
            ),
        )

    validator = Validator(settings, words, capacity)
    inference = InferenceServicer(settings, validator, router, Placements(redis), slo_state, view)
    health = HealthServicer()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    jobs_pb2_grpc.add_JobServiceServicer_to_server(
        JobServicer(validator, job_store, dispatcher), server
    )
    status_pb2_grpc.add_StatusServiceServicer_to_server(StatusServicer(router, view), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection(server, SERVICES)

    await router.scan()  # so that the first request finds the workers
    # After the slow steps: a bound port takes connections, and who has one that nobody answers
    # takes the server for dead.
    bind(server, settings.listen, access.credentials(settings))
    routing = asyncio.create_task(router.run())
    working = [
        asyncio.create_task(loop)
        for loop in (limits_loop.run(), dispatcher.run(), report_health(health, router))
    ]
    loops = [routing, *working]
    await server.start()
    log.info("listening on %s", settings.listen)
    stopped = asyncio.create_task(stopping.wait())
    # A loop ends only by a bug; going on without it would be a silent half-failure.
    await asyncio.wait([stopped, *loops], return_when=asyncio.FIRST_COMPLETED)
    failed = [loop for loop in loops if loop.done()]
    await health.enter_graceful_shutdown()
    # Limits and jobs go to another control plane now; streams here may still need a worker.
    await end(working)
    await server.stop(settings.drain_s)
    await end([routing])
    await router.close()
    await redis.aclose()
    for loop in failed:
        loop.result()


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def report_health(health: Any, router: Router) -> None:
    """SERVING means that a request sent now could be answered and recorded.

    Workers without heartbeats leave the router, and a loop that ends, ends the process.
    """
    while True:
        able = router.current and bool(router.workers)
        state = health_pb2.HealthCheckResponse
        for name in ("", *SERVICES):
            await health.set(name, state.SERVING if able else state.NOT_SERVING)
        await asyncio.sleep(HEALTH_S)
