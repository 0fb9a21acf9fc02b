"""What the `cuda` back end has to get right, on any `Gpu`: requests, parked rows, their servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from support.local_stages import PAGE_TOKENS, LocalStages

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.port import Event, ParkedRows
from omniserve.gpuworker.model.config import ModelConfig
from omniserve.gpuworker.model.weights import WeightSource, load_weights
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.sampling_params import SamplingParams

PAGES = 64
PARKED = 6
SLOTS = 8
COHORT_ROWS = 48
SAMPLED_ROWS = 4
"""Fewer than may come: then they go in parts."""
PROMPT, TOKENS = 70, 90
CHUNK = 37
LS_PROMPT, LS_TOKENS = 20, 60
BE_TOKENS = 10
TOLERANCE = 1e-4
"""Of the spread of a position's logits. Both sides compute in float32."""


def start(
    model: WeightSource,
    gpu: Gpu,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
) -> CudaDevice:
    transfers = 2 * TOKENS * model.config.layers
    sizes = Sizes(PAGES, PAGE_TOKENS, PARKED, COHORT_ROWS, SAMPLED_ROWS, transfers)
    weights = load_weights(model, dtype)
    return CudaDevice(gpu, model.config, weights, kernels or Kernels.plain(model.config), sizes)


def tokens_of(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(512, (TOKENS,), generator=generator).tolist()
    return tokens


def request_of(tokens: list[int], prompt: int, first_page: int) -> Request:
    sampling = SamplingParams(logprobs=1)
    request = Request("r", True, np.array(tokens), prompt, 0, known=prompt, sampling=sampling)
    pages = -(-len(tokens) // PAGE_TOKENS)
    request.blocks = list(range(first_page, first_page + pages))
    return request


def run_pass(device: CudaDevice, chunk: Chunk) -> list[torch.Tensor]:
    """One cohort through all stages; returns its logits, [1, vocabulary], if a row samples."""
    cohort = Cohort([chunk], PAGE_TOKENS)
    for stage in range(device.config.layers):
        wait_for_room(device)
        device.run(stage, [cohort], None)
        device.attend(stage, cohort)
    if not cohort.sampled:
        return []
    wait_for_room(device)
    best, logits = device.finish([cohort], None, np.array([True]), nothing)
    assert best.tolist() == logits.argmax(1).tolist()
    return [logits.clone()]


def prefill(device: CudaDevice, request: Request) -> list[torch.Tensor]:
    chunks = range(0, request.prompt_tokens, CHUNK)
    passes = [
        run_pass(device, Chunk(request, start, min(CHUNK, request.prompt_tokens - start)))
        for start in chunks
    ]
    return passes[-1]


def decode(device: CudaDevice, request: Request, until: int) -> list[torch.Tensor]:
    found = []
    while request.known < until:
        request.known += 1
        found += run_pass(device, Chunk(request, request.known - 1, 1))
    return found


def wait_for_room(device: CudaDevice) -> None:
    while not device.has_room():
        pass


def wait_for(event: Event) -> None:
    while not event.done():
        pass


def nothing() -> None:
    """There is nothing to do meanwhile."""


class Link(NamedTuple):
    """What the device knows of a `WorkerLink`."""

    slab: np.ndarray
    out_offset: int


class Server:
    """Attends over its own KV as an attention server would."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.out_offset = config.q_size + 2 * config.kv_size
        self.slab = np.full((SLOTS, self.out_offset + config.q_size), np.nan, np.float32)
        self._kv: dict[tuple[int, int], list[np.ndarray]] = {}

    def attend(self, layer: int, slot: int) -> None:
        """Takes q, k, v out of the slot, and spoils them: nobody may need them any more."""
        config, row = self._config, self.slab[slot]
        kv = self._kv.setdefault((slot, layer), [])
        kv.append(row[config.q_size : self.out_offset].copy())
        k, v = np.stack(kv).reshape(len(kv), 2, config.kv_heads, -1).transpose(1, 2, 0, 3)
        q = row[: config.q_size].reshape(config.kv_heads, -1, config.head_dim)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        row[: self.out_offset] = np.nan
        row[self.out_offset :] = out.ravel()


class Parked:
    """A BE row: its tokens are given, its logits are kept."""

    def __init__(self, row: int, tokens: list[int]) -> None:
        self.row, self.tokens = row, tokens
        self.server, self.slot = row % 2, SLOTS - 1 - row // 2
        self.stage = self.position = 0
        self.sent: Event | None = None
        """When its q, k and v are in its slot; None while it is ready."""
        self.logits: list[torch.Tensor] = []

    def is_done(self) -> bool:
        return self.position == len(self.tokens)


class Ride:
    """An LS request's passes with parked rows beside them, which board as their answers come."""

    def __init__(self, device: CudaDevice, seed: int, *, answering: bool = True) -> None:
        self._device = device
        self._layers = device.config.layers
        self._random = random = np.random.default_rng(seed)
        self._answering = answering
        self._servers = [Server(device.config), Server(device.config)]
        device.serve([Link(s.slab, s.out_offset) for s in self._servers])  # type: ignore[misc]
        texts = random.integers(0, 512, (PARKED, BE_TOKENS)).tolist()
        self.parked = [Parked(row, text) for row, text in enumerate(texts)]
        self._request = request_of(random.integers(0, 512, LS_TOKENS).tolist(), LS_PROMPT, 3)
        self.ls_logits: list[torch.Tensor] = []

    def run(self) -> None:
        """Until the LS request and, if their servers answer, all parked rows are done."""
        for chunk in self._chunks():
            self._pass(Cohort([chunk], PAGE_TOKENS))
        while self._answering and not all(row.is_done() for row in self.parked):
            self._pass(None)
        self._device.serve([])  # memory that is freed while it is registered is nobody's again

    def check(self, model: WeightSource) -> None:
        """Compares all logits with those of the `cpu` back end."""
        reference = LocalStages(model, torch.float32, LS_TOKENS)
        check(reference, self._request.tokens.tolist(), self.ls_logits)
        for row in self.parked:
            if row.logits:
                check(reference, row.tokens[: row.position], row.logits)

    def _chunks(self) -> Iterator[Chunk]:
        """A prompt in two chunks, then decode steps."""
        request = self._request
        yield Chunk(request, 0, 12)
        yield Chunk(request, 12, LS_PROMPT - 12)
        while request.known < len(request.tokens):
            request.known += 1
            yield Chunk(request, request.known - 1, 1)

    def _pass(self, ls: Cohort | None) -> None:
        device = self._device
        cohorts = [ls] if ls else []
        for stage in range(self._layers):
            boarded = self._board(stage)
            if not cohorts and not boarded:
                continue
            sent = device.run(stage, cohorts, _parked(boarded))
            for row in boarded:
                row.sent, row.stage = sent, stage + 1
            for cohort in cohorts:
                device.attend(stage, cohort)
        boarded = self._board(self._layers)
        sampled = len(ls.sampled) if ls else 0
        wanted = np.ones(sampled + len(boarded), np.bool_)
        if not len(wanted):
            return
        best, logits = device.finish(cohorts, _parked(boarded), wanted, nothing)
        assert best.tolist() == logits.argmax(1).tolist()
        self.ls_logits += [logits[:1].clone()] * sampled
        for row, found in zip(boarded, logits[sampled:], strict=True):
            row.logits.append(found[None].clone())
            row.stage, row.position = 0, row.position + 1

    def _board(self, stage: int) -> list[Parked]:
        """Most of the rows that are ready, once there is room for the stage."""
        wait_for_room(self._device)
        random = self._random
        for row in self.parked:
            sent = row.sent is not None and row.sent.done()
            if sent and self._answering and random.random() < 0.5:
                self._servers[row.server].attend(row.stage - 1, row.slot)
                row.sent = None
        ready = [r for r in self.parked if r.sent is None and r.stage == stage and not r.is_done()]
        return [row for row in ready if random.random() < 0.8]


def check(
    reference: LocalStages,
    tokens: list[int],
    found: list[torch.Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    """found: logits behind each of the last tokens, as many as there are."""
    wanted = reference.logits(tokens, len(found) - 1, CHUNK)
    assert float((torch.cat(found) - wanted).abs().max() / wanted.std()) < tolerance


def _parked(rows: list[Parked]) -> ParkedRows | None:
    if not rows:
        return None
    return ParkedRows(
        np.array([row.row for row in rows]),
        np.array([row.server for row in rows], np.int32),
        np.array([row.slot for row in rows], np.int32),
        np.array([row.position for row in rows]),
        np.array([row.tokens[row.position] for row in rows]),
    )
