"""What the `cuda` back end has to get right, on any `Gpu`: requests, parked rows, their servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from support.local_stages import PAGE_TOKENS, LocalStages

from omniserve.gpuworker.cohort import Chunk, Cohort
from omniserve.gpuworker.device.cuda.device import CudaDevice, Sizes
from omniserve.gpuworker.device.cuda.gpu import Gpu
from omniserve.gpuworker.device.cuda.kernels import Kernels
from omniserve.gpuworker.device.port import Event, KvPlaces, ParkedRows
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
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.1}
"""Of the spread of a position's logits; the other side computes in float32."""
ELEMENTS: dict[torch.dtype, type[Any]] = {torch.float32: np.float32, torch.float16: np.float16}


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


def move_kv(
    device: CudaDevice, gpu: Gpu, model: WeightSource, seed: int, stall: Callable[[], None]
) -> None:
    """A checkpoint while the stages of its tokens run; a restore into other pages.

    stall: lets the device fall behind.
    """
    config, tokens = model.config, tokens_of(seed)
    slot_elements = 2 * (config.q_size + config.kv_size)
    in_slot = slot_elements // (2 * config.kv_size)
    slab = np.zeros((2 * TOKENS, slot_elements), ELEMENTS[device.dtype])
    link: Any = Link(slab, slot_elements - config.q_size)
    device.serve([link])
    request = request_of(tokens, PROMPT, first_page=3)
    assert run_pass(device, Chunk(request, 0, CHUNK)) == []
    layers, positions = np.divmod(np.arange(config.layers * CHUNK), CHUNK)
    order = np.random.default_rng(seed).permutation(len(layers))
    slots, indices = np.divmod(order, in_slot)

    def parts(blocks: list[int]) -> list[KvPlaces]:
        """In two parts, as of two requests."""
        pages = np.array(blocks)[positions // PAGE_TOKENS]
        arrays = np.stack([layers, pages, positions % PAGE_TOKENS, slots, indices])
        return [KvPlaces(*part) for part in np.split(arrays.astype(np.int32), [50], axis=1)]

    stall()
    exported = [device.transfers.export_tokens(link, part) for part in parts(request.blocks)]
    for event in exported:
        assert not event.done()
    device.transfers.start()
    for event in exported:
        wait_for(event)
    pages = device._kv.layers
    pages.fill_(torch.nan)
    gpu.wait()
    request.blocks = list(reversed(range(40, 40 + len(request.blocks))))
    for part in parts(request.blocks):
        imported = device.transfers.import_tokens(link, part)
        device.transfers.start()
        wait_for(imported)
    pages.nan_to_num_()  # beyond the tokens that came back
    gpu.wait()
    found = run_pass(device, Chunk(request, CHUNK, PROMPT - CHUNK))
    found += decode(device, request, TOKENS)
    device.serve([])
    check(reference_of(model), tokens, found, TOLERANCES[device.dtype])


def ride_together(device: CudaDevice, model: WeightSource) -> None:
    """Two cohorts in the same stages; the BE one is called off once, and begins anew."""
    ls, be = (request_of(tokens_of(seed), LS_PROMPT, 10 * seed) for seed in range(2))
    be.latency_sensitive = False
    found: dict[Request, list[torch.Tensor]] = {ls: [], be: []}
    for rounds in range(6):
        chunks = [Chunk(r, r.known - 1, 1) if rounds else Chunk(r, 0, r.known) for r in (ls, be)]
        if rounds in (0, 3):
            called_off = Cohort([chunks[1]], PAGE_TOKENS)
            wait_for_room(device)
            device.run(0, [called_off], None)
            device.attend(0, called_off)
        cohorts = [Cohort([chunk], PAGE_TOKENS) for chunk in chunks]
        for stage in range(device.config.layers):
            wait_for_room(device)
            device.run(stage, cohorts, None)
            for cohort in cohorts:
                device.attend(stage, cohort)
        wait_for_room(device)
        _, logits = device.finish(cohorts, None, np.array([True, True]), nothing)
        for request, row in zip((ls, be), logits, strict=True):
            found[request].append(row[None].clone())
            request.known += 1
    for request, rows in found.items():
        check(reference_of(model), request.tokens[: request.known - 1].tolist(), rows)


class Server:
    """Attends over its own KV as an attention server would."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._config = config
        self.out_offset = config.q_size + 2 * config.kv_size
        self.slab = np.full((SLOTS, self.out_offset + config.q_size), np.nan, ELEMENTS[dtype])
        self._kv: dict[tuple[int, int], list[np.ndarray]] = {}

    def attend(self, layer: int, slot: int) -> None:
        """Takes q, k, v out of the slot, and spoils them: nobody may need them any more."""
        config, row = self._config, self.slab[slot]
        kv = self._kv.setdefault((slot, layer), [])
        kv.append(row[config.q_size : self.out_offset].astype(np.float32))
        k, v = np.stack(kv).reshape(len(kv), 2, config.kv_heads, -1).transpose(1, 2, 0, 3)
        q = row[: config.q_size].astype(np.float32).reshape(config.kv_heads, -1, config.head_dim)
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
        self._servers = [Server(device.config, device.dtype) for _ in range(2)]
        device.serve([Link(s.slab, s.out_offset) for s in self._servers])  # type: ignore[misc]
        texts = random.integers(0, 512, (PARKED, BE_TOKENS)).tolist()
        self.parked = [Parked(row, text) for row, text in enumerate(texts)]
        # From the first page on: what is written there for others would show.
        self._request = request_of(random.integers(0, 512, LS_TOKENS).tolist(), LS_PROMPT, 0)
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
        reference, tolerance = reference_of(model), TOLERANCES[self._device.dtype]
        check(reference, self._request.tokens.tolist(), self.ls_logits, tolerance)
        for row in self.parked:
            if row.logits:
                check(reference, row.tokens[: row.position], row.logits, tolerance)

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


def reference_of(model: WeightSource) -> LocalStages:
    """The `cpu` back end."""
    return LocalStages(model, torch.float32, TOKENS)


def check(
    reference: LocalStages,
    tokens: list[int],
    found: list[torch.Tensor],
    tolerance: float = TOLERANCES[torch.float32],
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
