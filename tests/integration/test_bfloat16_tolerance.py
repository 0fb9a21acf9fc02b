"""What bfloat16 costs: the worker's logits against those of `transformers` in float32.

Errors are in units of the reference's spread (the standard deviation of one position's logits,
about 4), after removing what shifts all logits alike, which no sampling sees. `transformers` in
bfloat16 has the same errors: means up to 0.026, single logits up to 0.18.
"""

from __future__ import annotations

import numpy as np
import torch
from support.prompts import real_prompts
from support.stack import MODEL_PATH
from transformers import AutoModelForCausalLM, GgufConfig

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.model.gguf_file import GgufModel
from omniserve.gpuworker.model.llama import load_llama
from omniserve.gpuworker.parking import ParkingLot
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.stages import StageRunner

MEAN_TOLERANCE = 0.04
MAX_TOLERANCE = 0.25
PAGE_TOKENS = 32
CHUNK_TOKENS = 128
DECODED = 8
PROMPTS = (real_prompts()[0][:308], real_prompts()[1], real_prompts()[2], real_prompts()[5])
"""Of several chunks, and of less than one; the last `DECODED` tokens go one by one."""


class Worker:
    """The stages of a worker in bfloat16, without its processes."""

    def __init__(self) -> None:
        model = GgufModel(MODEL_PATH)
        self._stages = model.config.layers + 1
        device = CpuDevice(model.config, load_llama(model, torch.bfloat16), 16, PAGE_TOKENS, 1)
        lot = ParkingLot(1, self._stages, model.config.hidden, torch.bfloat16, lambda: 0)
        self._runner = StageRunner(device, lot, [])

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Returns the logits behind the last `DECODED + 1` tokens."""
        prompt = len(tokens) - DECODED
        request = Request("r", True, np.array(tokens), prompt, 0, known=prompt)
        request.blocks = list(range(-(-len(tokens) // PAGE_TOKENS)))
        for start in range(0, prompt, CHUNK_TOKENS):
            last = self._run(Chunk(request, start, min(CHUNK_TOKENS, prompt - start)))
        found = [last]
        for position in range(prompt, len(tokens)):
            request.known += 1
            found.append(self._run(Chunk(request, position, 1)))
        return torch.cat([rows for rows in found if rows is not None])

    def _run(self, chunk: Chunk) -> torch.Tensor | None:
        cohort = Cohort([chunk], PAGE_TOKENS)
        nothing_boards = np.empty(0, np.int64)
        for stage in range(self._stages):
            logits = self._runner.run(stage, [cohort], nothing_boards)
        return None if logits is None else logits.clone()


def test_logits_in_bfloat16_stay_within_the_stated_tolerance() -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        str(MODEL_PATH.parent),
        gguf_file=MODEL_PATH.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    worker = Worker()
    agreed = 0
    for tokens in PROMPTS:
        with torch.inference_mode():
            wanted = reference(torch.tensor([tokens]), logits_to_keep=DECODED + 1).logits[0]
            found = worker.logits(tokens)
        spread = wanted.std(-1, keepdim=True)
        shift = (found - wanted).mean(-1, keepdim=True)
        errors = (found - wanted - shift).abs() / spread
        assert errors.mean(-1).max() < MEAN_TOLERANCE
        assert errors.max() < MAX_TOLERANCE
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    assert agreed >= 0.9 * len(PROMPTS) * (DECODED + 1)
