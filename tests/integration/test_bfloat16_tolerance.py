"""What bfloat16 costs: the worker's logits against those of `transformers` in float32.

Errors are in units of the reference's spread (the standard deviation of one position's logits,
about 4), after removing what shifts all logits alike, which no sampling sees. `transformers` in
bfloat16 has the same errors: means up to 0.026, single logits up to 0.18.
"""

from __future__ import annotations

import pytest
import torch
from support.local_stages import LocalStages
from support.prompts import real_prompts
from support.stack import MODEL_PATH
from transformers import AutoModelForCausalLM, GgufConfig

from omniserve.gpuworker.model.gguf_file import GgufModel

MEAN_TOLERANCE = 0.04
MAX_TOLERANCE = 0.25
CHUNK_TOKENS = 128
DECODED = 8
PROMPTS = (real_prompts()[0][:308], real_prompts()[1], real_prompts()[2], real_prompts()[5])
"""Of several chunks, and of less than one; the last `DECODED` tokens go one by one."""


@pytest.mark.slow
def test_logits_in_bfloat16_stay_within_the_stated_tolerance() -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        str(MODEL_PATH.parent),
        gguf_file=MODEL_PATH.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokens_max = max(map(len, PROMPTS))
    worker = LocalStages(GgufModel(MODEL_PATH), torch.bfloat16, tokens_max)
    agreed = 0
    for tokens in PROMPTS:
        with torch.inference_mode():
            wanted = reference(torch.tensor([tokens]), logits_to_keep=DECODED + 1).logits[0]
            found = worker.logits(tokens, DECODED, CHUNK_TOKENS)
        spread = wanted.std(-1, keepdim=True)
        shift = (found - wanted).mean(-1, keepdim=True)
        errors = (found - wanted - shift).abs() / spread
        assert errors.mean(-1).max() < MEAN_TOLERANCE
        assert errors.max() < MAX_TOLERANCE
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    assert agreed >= 0.9 * len(PROMPTS) * (DECODED + 1)
