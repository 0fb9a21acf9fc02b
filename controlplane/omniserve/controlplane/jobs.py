"""JobService: durable best-effort jobs, written to Redis before they are acknowledged."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from dataclasses import dataclass
from typing import Any

from omniserve.controlplane.dispatcher import Dispatcher
from omniserve.controlplane.job_store import JobStore
from omniserve.controlplane.rpc_errors import typed_errors
from omniserve.controlplane.validator import Validator
from omniserve.v1 import jobs_pb2, jobs_pb2_grpc

POLL_S = 0.1
RESULTS_PER_READ = 100


@dataclass
class JobServicer(jobs_pb2_grpc.JobServiceServicer):
    validator: Validator
    store: JobStore
    dispatcher: Dispatcher

    @typed_errors
    async def SubmitJob(  # noqa: N802
        self, request: jobs_pb2.SubmitJobRequest, _context: Any
    ) -> jobs_pb2.SubmitJobResponse:
        job_id = request.job_id or uuid.uuid4().hex
        items = await self.validator.job(request, job_id)
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        await self.store.submit(job_id, fingerprint, items)
        return jobs_pb2.SubmitJobResponse(job_id=job_id)

    @typed_errors
    async def GetJob(  # noqa: N802
        self, request: jobs_pb2.GetJobRequest, _context: Any
    ) -> jobs_pb2.GetJobResponse:
        job = await self.store.get(request.job_id)
        return jobs_pb2.GetJobResponse(job_id=request.job_id, state=job.state, counts=job.counts)

    @typed_errors
    async def StreamJobResults(  # noqa: N802
        self, request: jobs_pb2.StreamJobResultsRequest, context: Any
    ) -> None:
        offset = request.offset
        while True:
            # Before the results: once it says ended, the read below cannot miss one.
            job = await self.store.get(request.job_id)
            results = await self.store.results(request.job_id, offset, RESULTS_PER_READ)
            for result in results:
                await context.write(jobs_pb2.StreamJobResultsResponse(result=result))
            offset += len(results)
            if results:
                continue
            if job.state != jobs_pb2.JOB_STATE_RUNNING or not request.follow:
                return
            await asyncio.sleep(POLL_S)

    @typed_errors
    async def CancelJob(  # noqa: N802
        self, request: jobs_pb2.CancelJobRequest, _context: Any
    ) -> jobs_pb2.CancelJobResponse:
        await self.store.get(request.job_id)  # raises JobNotFoundError
        await self.store.cancel(request.job_id)
        await self.dispatcher.drop()  # other control planes notice when they next renew
        job = await self.store.get(request.job_id)
        return jobs_pb2.CancelJobResponse(counts=job.counts)
