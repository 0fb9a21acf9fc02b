"""The `cuda` back end on a simulated GPU: what streams, events and graphs must keep apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import cuda_scenarios as scenarios
from support.local_stages import PAGE_TOKENS, LocalStages
from support.random_models import KINDS, Kind, make
from support.simulated_gpu import SimulatedGpu

from omniserve.gpuworker.model.weights import WeightSource, open_model

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


@pytest.mark.parametrize("seed", range(8))
def test_boarded_rows_and_ls_rows_keep_apart(seed: int, tmp_path: Path) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed)
    ride = scenarios.Ride(scenarios.start(model, gpu), seed)
    ride.run()
    gpu.finish()
    assert all(row.is_done() for row in ride.parked)
    ride.check(model)


def test_ls_goes_on_beside_servers_that_never_answer(tmp_path: Path) -> None:
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed=3)
    ride = scenarios.Ride(scenarios.start(model, gpu), seed=3, answering=False)
    ride.run()
    gpu.finish()
    assert all(row.stage == 1 for row in ride.parked)
    assert len(ride.ls_logits) == scenarios.LS_TOKENS - scenarios.LS_PROMPT + 1
    ride.check(model)


@pytest.mark.parametrize("seed", range(4))
def test_kv_that_left_the_device_and_came_back_is_the_same(seed: int, tmp_path: Path) -> None:
    """A checkpoint right behind the prompt's last pass; a restore into other pages."""
    model, gpu = model_of(LLAMA, tmp_path), SimulatedGpu(seed)
    config, tokens = model.config, scenarios.tokens_of(seed)
    device = scenarios.start(model, gpu)
    slot_elements = 2 * (config.q_size + config.kv_size)
    in_slot = slot_elements // (2 * config.kv_size)
    slab = np.zeros((2 * scenarios.TOKENS, slot_elements), np.float32)
    device.map_slabs([(slab, slot_elements - config.q_size)])
    request = scenarios.request_of(tokens, scenarios.PROMPT, first_page=3)
    found = scenarios.prefill(device, request)
    found += scenarios.decode(device, request, scenarios.PROMPT + 10)
    layers, positions = np.divmod(np.arange(config.layers * request.known), request.known)
    order = np.random.default_rng(seed).permutation(len(layers))
    slots, indices = np.divmod(order, in_slot)

    def places(blocks: list[int]) -> np.ndarray:
        pages = np.array(blocks)[positions // PAGE_TOKENS]
        return np.stack([layers, pages, positions % PAGE_TOKENS, slots, indices])

    exported = device.export_tokens(0, places(request.blocks))
    assert not device.can_transfer()
    scenarios.wait_for(exported)
    device.kv.layers.fill_(torch.nan)
    request.blocks = list(reversed(range(40, 40 + len(request.blocks))))
    scenarios.wait_for(device.import_tokens(0, places(request.blocks)))
    assert device.can_transfer()
    device.kv.layers.nan_to_num_()  # beyond the tokens that came back
    found += scenarios.decode(device, request, scenarios.TOKENS)
    scenarios.check(LocalStages(model, torch.float32, len(tokens)), tokens, found)
