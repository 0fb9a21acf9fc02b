"""The stages of a worker without its processes: logits of one sequence at a time."""

from __future__ import annotations

import numpy as np
import torch

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.model.weights import WeightSource, load_weights
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling_params import SamplingParams
from omniserve.gpuworker.stages import StageRunner

PAGE_TOKENS = 32


class LocalStages:
    """Loads `model` as `dtype`, with device KV for sequences of `tokens_max` tokens."""

    def __init__(self, model: WeightSource, dtype: torch.dtype, tokens_max: int) -> None:
        self._stages = model.config.layers + 1
        pages = -(-tokens_max // PAGE_TOKENS)
        device = CpuDevice(model.config, load_weights(model, dtype), pages, PAGE_TOKENS, 1)
        lot = ParkingLot(1, self._stages, lambda: 0)
        self._runner = StageRunner(device, lot, [], Afterwards())

    def logits(self, tokens: list[int], decoded: int, chunk_tokens: int) -> torch.Tensor:
        """Returns the logits behind the last `decoded + 1` tokens, [decoded + 1, vocabulary].

        The last `decoded` tokens go one by one, those before them in chunks.
        """
        prompt = len(tokens) - decoded
        sampling = SamplingParams(logprobs=1)  # so that there are logits
        request = Request("r", True, np.array(tokens), prompt, 0, known=prompt, sampling=sampling)
        request.blocks = list(range(-(-len(tokens) // PAGE_TOKENS)))
        for start in range(0, prompt, chunk_tokens):
            last = self._run(Chunk(request, start, min(chunk_tokens, prompt - start)))
        found = [last]
        for position in range(prompt, len(tokens)):
            request.known += 1
            found.append(self._run(Chunk(request, position, 1)))
        return torch.cat([rows for rows in found if rows is not None])

    def _run(self, chunk: Chunk) -> torch.Tensor | None:
        cohort = Cohort([chunk], PAGE_TOKENS)
        nothing_boards = np.empty(0, np.int64)
        for stage in range(self._stages):
            finished = self._runner.run(stage, [cohort], nothing_boards)
        return None if finished is None else finished.logits.clone()
