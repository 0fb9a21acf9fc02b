"""The `cuda` back end on a simulated GPU: what streams, events and graphs must keep apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import cuda_scenarios as scenarios
from support.local_stages import PAGE_TOKENS, LocalStages
from support.random_models import KINDS, Kind, make
from support.simulated_gpu import SimulatedGpu

from omniserve.errors import SettingsError
from omniserve.gpuworker import profiler
from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cuda.attention import workspace_bytes
from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.opening import open_device
from omniserve.gpuworker.model.weights import WeightSource, load_weights, open_model
from omniserve.gpuworker.settings import WorkerSettings

PAGES = 64
COHORT_ROWS = 512
LLAMA = next(kind for kind in KINDS if kind.name == "llama")


def model_of(kind: Kind, path: Path) -> WeightSource:
    make(kind).save_pretrained(path)
    return open_model(path)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_cpu_back_end(kind: Kind, tmp_path: Path) -> None:
    model, gpu, tokens = model_of(kind, tmp_path), SimulatedGpu(seed=2), scenarios.tokens_of(1)
    device = scenarios.start(model, gpu)
    request = scenarios.request_of(tokens, scenarios.PROMPT, first_page=3)
    found = scenarios.prefill(device, request)
    found += scenarios.decode(device, request, scenarios.TOKENS)
    # Both chunks fill the same graphs, and decode steps have theirs; only these sample twice.
    assert gpu.captured == 2 * model.config.layers + 1
    scenarios.check(LocalStages(model, torch.float32, len(tokens)), tokens, found)


def test_half_precision_is_as_good_as_its_digits(tmp_path: Path) -> None:
    model, tokens = model_of(LLAMA, tmp_path), scenarios.tokens_of(1)
    device = scenarios.start(model, SimulatedGpu(seed=2), torch.float16)
    found = scenarios.prefill(device, scenarios.request_of(tokens, scenarios.PROMPT, 3))
    assert found[0].dtype == torch.float32
    reference = LocalStages(model, torch.float32, len(tokens))
    scenarios.check(reference, tokens[: scenarios.PROMPT], found, tolerance=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_host_without_a_gpu_says_so(tmp_path: Path) -> None:
    model, settings = model_of(LLAMA, tmp_path), WorkerSettings(device="cuda")
    with pytest.raises(SettingsError, match="no CUDA device") as refused:
        open_device(settings, model.config, load_weights(model, torch.float32))
    assert refused.value.field == "device"


@pytest.mark.parametrize(
    ("seed", "dtype"), [*((seed, torch.float32) for seed in range(8)), (8, torch.float16)]
)
def test_boarded_rows_and_ls_rows_keep_apart(seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed)
    ride = scenarios.Ride(scenarios.start(model, gpu, dtype), seed)
    ride.run()
    gpu.wait()
    assert all(row.is_done() for row in ride.parked)
    ride.check(model)


def test_ls_goes_on_beside_servers_that_never_answer(tmp_path: Path) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed=3)
    ride = scenarios.Ride(scenarios.start(model, gpu), seed=3, answering=False)
    ride.run()
    gpu.wait()
    assert all(row.stage == 1 for row in ride.parked)
    assert len(ride.ls_logits) == scenarios.LS_TOKENS - scenarios.LS_PROMPT + 1
    ride.check(model)


@pytest.mark.parametrize("seed", range(4))
def test_two_cohorts_share_their_stages(seed: int, tmp_path: Path) -> None:
    model = model_of(LLAMA, tmp_path)
    scenarios.ride_together(scenarios.start(model, SimulatedGpu(seed)), model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kv_that_left_the_device_and_came_back_is_the_same(
    seed: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed)
    device = scenarios.start(model, gpu, dtype)
    scenarios.move_kv(device, gpu, model, seed, lambda: gpu.stall(device._model))


def test_a_pass_of_the_same_rows_uploads_them_once(tmp_path: Path) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed=4)
    device = scenarios.start(model, gpu)
    request = scenarios.request_of(scenarios.tokens_of(1), scenarios.PROMPT, first_page=3)
    scenarios.prefill(device, request)
    assert gpu.uploads == 2 + 1  # all rows of two chunks; the one that samples
    scenarios.decode(device, request, scenarios.PROMPT + 1)
    assert gpu.uploads == 3 + 2


def test_sums_of_split_kv_have_room(tmp_path: Path) -> None:
    """By the planner of FlashInfer 0.6.3, for 512 rows on a GPU of 132 processors."""
    config = replace(model_of(LLAMA, tmp_path).config, heads=16, kv_heads=2, head_dim=128)
    assert 135_266_304 <= workspace_bytes(config, 132) < 140_000_000


def test_time_without_work_between_stages_is_told(tmp_path: Path) -> None:
    """Not that between two passes, nor that between stages without LS rows."""
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed=5)
    device = scenarios.start(model, gpu)

    def pass_ns(idle: int, latency_sensitive: bool) -> int:
        """The bubbles of a pass before each of whose stages the device is `idle` for so long."""
        request = scenarios.request_of(scenarios.tokens_of(1), scenarios.PROMPT, first_page=3)
        request.latency_sensitive = latency_sensitive
        before = device.bubble_ns
        cohort = Cohort([Chunk(request, 0, scenarios.CHUNK)], PAGE_TOKENS)
        for stage in range(model.config.layers):
            device.wait(scenarios.nothing)
            for _ in range(idle):
                gpu.advance()
            scenarios.wait_for_room(device)
            device.run(stage, [cohort], None)
            device.attend(stage, cohort)
        device.wait(scenarios.nothing)
        return device.bubble_ns - before

    prompt = pass_ns(0, True)
    idle_ns = 1000 * (model.config.layers - 1)
    assert 0.9 * idle_ns < pass_ns(1000, True) - prompt < 1.1 * idle_ns
    assert pass_ns(1000, False) == 0


def test_graphs_are_made_before_their_stages_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed=6)
    weights, kernels = load_weights(model, torch.float32), Kernels.plain(model.config)
    sizes = Sizes(PAGES, PAGE_TOKENS, 1, COHORT_ROWS, COHORT_ROWS, 1)
    device = CudaDevice(gpu, model.config, weights, kernels, sizes)
    captured: list[int] = []

    def clock_ns() -> int:
        captured.append(gpu.captured)
        return gpu.now_ns

    monkeypatch.setattr(profiler.time, "perf_counter_ns", clock_ns)
    monkeypatch.setattr(profiler.time, "monotonic", lambda: 0.0)  # no limit
    profile = profiler.measure(device, "simulated", "llama", PAGE_TOKENS, PAGES)
    assert captured[0::2] == captured[1::2]
    assert profile.padded
    assert profile.rows == device.padded_counts
    sampled = [rows for rows in profile.rows if rows <= 128]
    assert captured[-1] == model.config.layers * len(profile.rows) + len(sampled)
