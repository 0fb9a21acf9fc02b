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
class Capacity:
    """What a request may ask for so that every worker can run it."""

    context_tokens: int
    """Prompt plus generated tokens."""
    ls_tokens_max: int
    """The same of an LS request, whose KV stays on the device."""
    be_prompt_tokens_max: int
    """Prompt of a BE request, which is prefilled in BE's share of the device."""


@dataclass(frozen=True)
class Validator:
    settings: Settings
    tokenizer: Tokenizer
    capacity: Callable[[], Capacity]

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
        service_class = request.service_class or types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE
        work = await self._prompt(request, request.WhichOneof("prompt"), "", service_class)
        work.request_id = request.request_id
        if work.service_class == types_pb2.SERVICE_CLASS_LATENCY_SENSITIVE:
            work.slo.ttft_ms = request.slo.ttft_ms or self.settings.slo_ttft_ms
            work.slo.tpot_ms = request.slo.tpot_ms or self.settings.slo_tpot_ms
        work.resume_offset = request.resume_offset
        work.tenant = request.tenant
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
            work = await self._prompt(
                item,
                item.WhichOneof("prompt"),
                f"items[{index}].",
                types_pb2.SERVICE_CLASS_BEST_EFFORT,
            )
            work.request_id = f"{JOB_PREFIX}{job_id}:{index}"
            work.tenant = request.tenant
            items.append((name, work))
            await asyncio.sleep(0)  # thousands of short texts must not hold up the streams
        return items

    async def _prompt(
        self,
        request: prompts.Prompted,
        kind: str | None,
        prefix: str,
        service_class: types_pb2.ServiceClass,
    ) -> WorkerServiceGenerateRequest:
        capacity = self.capacity()
        best_effort = service_class == types_pb2.SERVICE_CLASS_BEST_EFFORT
        tokens_max = capacity.context_tokens if best_effort else capacity.ls_tokens_max
        sampling = prompts.resolve_sampling(
            request.sampling, self.settings.default_max_tokens, tokens_max, prefix
        )
        ids = await prompts.encode_prompt(request, kind, self.tokenizer, prefix)
        prompts.check_context(len(ids), sampling.max_tokens, tokens_max, f"{prefix}{kind}")
        if best_effort:
            prompts.check_prompt(len(ids), capacity.be_prompt_tokens_max, f"{prefix}{kind}")
        return WorkerServiceGenerateRequest(
            prompt_token_ids=ids, sampling=sampling, service_class=service_class
        )
