"""The `cuda` back end on a real GPU: the same scenarios, and FlashInfer against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import cuda_scenarios as scenarios
from support.local_stages import PAGE_TOKENS, LocalStages
from support.random_models import KINDS, Kind, make

from omniserve.gpuworker.device.cuda.gpu import TorchGpu
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.model.weights import WeightSource, open_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
LLAMA = next(kind for kind in KINDS if kind.name == "llama")
BFLOAT16_TOLERANCE = 0.05
"""Mean error of a position, of the spread of its logits."""


def model_of(kind: Kind, path: Path) -> WeightSource:
    make(kind).save_pretrained(path)
    return open_model(path)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_cpu_back_end(kind: Kind, tmp_path: Path) -> None:
    model, tokens = model_of(kind, tmp_path), scenarios.tokens_of(1)
    found = _decoded(model, tokens, torch.float32, None)
    scenarios.check(LocalStages(model, torch.float32, len(tokens)), tokens, found)


@pytest.mark.parametrize("seed", range(2))
@DTYPES
def test_boarded_rows_and_ls_rows_keep_apart(seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(LLAMA, tmp_path)
    ride = scenarios.Ride(scenarios.start(model, TorchGpu(), dtype), seed)
    ride.run()
    ride.check(model)


def test_two_cohorts_share_their_stages(tmp_path: Path) -> None:
    model = model_of(LLAMA, tmp_path)
    scenarios.ride_together(scenarios.start(model, TorchGpu()), model)


@DTYPES
def test_kv_that_left_the_device_and_came_back_is_the_same(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, gpu = model_of(LLAMA, tmp_path), TorchGpu()
    device = scenarios.start(model, gpu, dtype)
    scenarios.move_kv(device, gpu, model, 0, scenarios.nothing)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_flashinfer_computes_what_torch_does(kind: Kind, tmp_path: Path) -> None:
    pytest.importorskip("flashinfer")
    model, tokens = model_of(kind, tmp_path), scenarios.tokens_of(1)
    kernels = Kernels.flashinfer(model.config, PAGE_TOKENS, torch.bfloat16)
    assert kernels is not None
    found = torch.cat(_decoded(model, tokens, torch.bfloat16, kernels))
    wanted = torch.cat(_decoded(model, tokens, torch.bfloat16, None))
    errors = (found - wanted).abs().mean(-1) / wanted.std(-1)
    assert float(errors.max()) < BFLOAT16_TOLERANCE


def _decoded(
    model: WeightSource, tokens: list[int], dtype: torch.dtype, kernels: Kernels | None
) -> list[torch.Tensor]:
    device = scenarios.start(model, TorchGpu(), dtype, kernels)
    request = scenarios.request_of(tokens, scenarios.PROMPT, first_page=3)
    found = scenarios.prefill(device, request)
    return found + scenarios.decode(device, request, scenarios.TOKENS)
