"""Public requests in, worker requests out: checked, tokenised, defaults filled in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from omniserve.controlplane import prompts
from omniserve.controlplane.settings import Settings
from omniserve.controlplane.tokenizer import Tokenizer
from omniserve.errors import InvalidArgumentError
from omniserve.internal.v1.worker_pb2 import WorkerServiceGenerateRequest
from omniserve.v1 import inference_pb2, jobs_pb2, types_pb2

JOB_PREFIX = "job:"
# Leaves room for JOB_PREFIX and ":<index>" in the request ids of a job's items.
JOB_ID_CHARS = 100
CUSTOM_ID_CHARS = 512


@dataclass(frozen=True)
class Validator:
    settings: Settings
    tokenizer: Tokenizer
    context_tokens: Callable[[], int]
    """Prompt plus generated tokens that one request may have now."""

    async def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> WorkerServiceGenerateRequest:
        """Cheap checks come first: no text is tokenised for a request that cannot run."""
        if request.request_id:
            prompts.check_id(request.request_id, "request_id", prompts.REQUEST_ID_CHARS)
            if request.request_id.startswith(JOB_PREFIX):
                raise InvalidArgumentError(
                    f"{JOB_PREFIX!r} begins the ids of jobs' items", field="request_id"
                )
        elif request.resume_offset:
            raise InvalidArgumentError("needed to resume", field="request_id")
        prompts.check_model(request.model, self.settings.model)
        if request.service_class not in types_pb2.ServiceClass.values():
            raise InvalidArgumentError("unknown value", field="service_class")
        prompts.check_slo(request.slo)
        work = await self._prompt(request, request.WhichOneof("prompt"), "")
        work.request_id = request.request_id
        work.service_class = request.service_class or types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE
        if work.service_class == types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE:
            work.slo.ttft_ms = request.slo.ttft_ms or self.settings.slo_ttft_ms
            work.slo.tpot_ms = request.slo.tpot_ms or self.settings.slo_tpot_ms
        work.resume_offset = request.resume_offset
        return work

    async def job(
        self, request: jobs_pb2.SubmitJobRequest, job_id: str
    ) -> list[tuple[str, WorkerServiceGenerateRequest]]:
        """Returns every item's custom id and request. One bad item refuses the whole job."""
        prompts.check_id(job_id, "job_id", JOB_ID_CHARS)
        prompts.check_model(request.model, self.settings.model)
        if not 1 <= len(request.items) <= self.settings.job_items_max:
            raise InvalidArgumentError(
                f"must have 1 to {self.settings.job_items_max} items", field="items"
            )
        names: set[str] = set()
        items = []
        for index, item in enumerate(request.items):
            name = item.custom_id or str(index)
            if len(name) > CUSTOM_ID_CHARS or name in names:
                raise InvalidArgumentError(
                    f"must be unique in its job and at most {CUSTOM_ID_CHARS} characters",
                    field=f"items[{index}].custom_id",
                )
            names.add(name)
            work = await self._prompt(item, item.WhichOneof("prompt"), f"items[{index}].")
            work.request_id = f"{JOB_PREFIX}{job_id}:{index}"
            work.service_class = types_pb2.SERVICE_CLASS_BEST_EFFORT
            items.append((name, work))
            await asyncio.sleep(0)  # thousands of short texts must not hold up the streams
        return items

    async def _prompt(
        self, request: prompts.Prompted, kind: str | None, prefix: str
    ) -> WorkerServiceGenerateRequest:
        context_tokens = self.context_tokens()
        sampling = prompts.resolve_sampling(
            request.sampling, self.settings.default_max_tokens, context_tokens, prefix
        )
        ids = await prompts.encode_prompt(request, kind, self.tokenizer, prefix)
        prompts.check_context(len(ids), sampling.max_tokens, context_tokens, f"{prefix}{kind}")
        return WorkerServiceGenerateRequest(prompt_token_ids=ids, sampling=sampling)
