"""The client: one channel to a control plane, shared by any number of threads."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from omniserve.api_keys import METADATA_KEY, bearer
from omniserve.client import _wire
from omniserve.client._connect import connect
from omniserve.client._errors import typed
from omniserve.client._generation import Generation
from omniserve.client._status import Status
from omniserve.client._types import (
    Job,
    JobCounts,
    JobItem,
    JobResult,
    Message,
    Model,
    SamplingParams,
    ServiceClass,
    Slo,
)
from omniserve.errors import ModelNotFoundError
from omniserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

DEFAULT_ADDRESS = "127.0.0.1:8500"


class Client:
    """Talks to the control plane at `address` ("host:port"). Thread-safe.

    Traffic is plain text, or TLS with `tls` (trusting gRPC's roots) or `tls_ca_file` (trusting the
    certificates in that PEM file). `api_key` goes with every call; without TLS it may only go to
    this machine. Raises SettingsError for a file or a key that cannot be used.

    Best-effort work is shared fairly between tenants, and cached KV only within one: `tenant` says
    whose the calls are.

    Every method raises the typed errors of `omniserve.errors`, besides UnreachableError,
    DeadlineExceededError and CallCancelledError. `timeout_s` bounds every call that does not
    stream.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: bool = False,
        tls_ca_file: str | Path | None = None,
        api_key: str = "",
        tenant: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        self._address = address
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._channel = connect(address, tls=tls, tls_ca_file=tls_ca_file, api_key=api_key)
        self._metadata = [(METADATA_KEY, bearer(api_key))] if api_key else []
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._jobs = jobs_pb2_grpc.JobServiceStub(self._channel)
        self._status = status_pb2_grpc.StatusServiceStub(self._channel)
        self._default_model = ""

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        service_class: ServiceClass | str = ServiceClass.LATENCY_SENSITIVE,
        sampling: SamplingParams | None = None,
        slo: Slo | None = None,
        request_id: str = "",
        resume_offset: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """Starts a request of exactly one of `prompt`, `messages`, `token_ids`.

        Without `model` the first that the deployment lists is used. With the `request_id` of a
        running or lately ended request it goes on behind `resume_offset` tokens. `timeout_s`
        bounds the whole answer.
        """
        request_id = request_id or uuid.uuid4().hex
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            model=model or self._first_model(),
            service_class=_wire.service_class(service_class),
            sampling=_wire.sampling(sampling or SamplingParams()),
            slo=_wire.slo(slo),
            tenant=self._tenant,
            resume_offset=resume_offset,
        )
        _wire.set_prompt(request, prompt, messages, token_ids)
        call = self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Generation(call, request_id, self._address, self.cancel)

    def cancel(self, request_id: str) -> bool:
        """Ends a request; False if it is not known or had ended."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        response: inference_pb2.CancelResponse = self._call(self._inference.Cancel, request)
        return response.cancelled

    def models(self) -> list[Model]:
        """Returns the models that the deployment serves."""
        request = inference_pb2.ListModelsRequest()
        response: inference_pb2.ListModelsResponse = self._call(self._inference.ListModels, request)
        return [Model(m.id, m.context_tokens, m.dtype, m.device) for m in response.models]

    def submit_job(self, items: Sequence[JobItem], *, model: str = "", job_id: str = "") -> str:
        """Hands in best-effort work and returns the job's id; repeating a `job_id` is harmless."""
        request = jobs_pb2.SubmitJobRequest(
            job_id=job_id or uuid.uuid4().hex,
            model=model or self._first_model(),
            items=[_wire.job_item(item) for item in items],
            tenant=self._tenant,
        )
        response: jobs_pb2.SubmitJobResponse = self._call(self._jobs.SubmitJob, request)
        return response.job_id

    def get_job(self, job_id: str) -> Job:
        """Returns the job's state and counts."""
        request = jobs_pb2.GetJobRequest(job_id=job_id)
        response: jobs_pb2.GetJobResponse = self._call(self._jobs.GetJob, request)
        return Job(
            response.job_id, _wire.job_state(response.state), _wire.job_counts(response.counts)
        )

    def job_results(
        self, job_id: str, *, offset: int = 0, follow: bool = True, timeout_s: float | None = None
    ) -> Iterator[JobResult]:
        """Yields results in order of completion from `offset` on.

        Ends with the job or, unless `follow`, with the last result there is now.
        """
        request = jobs_pb2.StreamJobResultsRequest(job_id=job_id, offset=offset, follow=follow)
        call = self._jobs.StreamJobResults(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for response in call:
                yield _wire.job_result(response.result)
        except grpc.RpcError as error:
            raise typed(error, self._address) from error
        finally:
            call.cancel()

    def cancel_job(self, job_id: str) -> JobCounts:
        """Ends the items of a job that have not ended; results so far stay."""
        request = jobs_pb2.CancelJobRequest(job_id=job_id)
        response: jobs_pb2.CancelJobResponse = self._call(self._jobs.CancelJob, request)
        return _wire.job_counts(response.counts)

    def status(self) -> Status:
        """Returns what the system is doing now."""
        return _wire.status(self._call(self._status.GetStatus, status_pb2.GetStatusRequest()))

    def close(self) -> None:
        """Closes the connection; running generations end with CallCancelledError."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _first_model(self) -> str:
        if not self._default_model:
            models = self.models()
            if not models:
                raise ModelNotFoundError("the deployment serves no model", field="model")
            self._default_model = models[0].id
        return self._default_model

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise typed(error, self._address) from error
