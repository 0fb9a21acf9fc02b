"""Rows that go through the stages together and attend on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from omniserve.gpuworker.latency_model import Load
from omniserve.gpuworker.requests import Request


class Chunk(NamedTuple):
    """Tokens `start .. start + tokens - 1` of a request; a decode step has one token."""

    request: Request
    start: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens


class Cohort:
    """The rows of some chunks, with the index arrays that every stage needs, built once.

    A cohort may rest between two stages (`stage` is the next one to run): the LS cohort never
    does, the BE cohort does whenever the budget or an LS arrival says so.
    """

    def __init__(self, chunks: Sequence[Chunk], page_tokens: int) -> None:
        self.chunks = tuple(chunks)
        self.load = load_of(chunks)
        self.stage = 0
        self.held: Any = None
        """What the device keeps of it between its stages."""
        requests = [chunk.request for chunk in chunks]
        self.first_position = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        self.n_rows = np.array([chunk.tokens for chunk in chunks], dtype=np.int32)
        ends = self.n_rows.cumsum(dtype=np.int32)
        self.first_row = ends - self.n_rows
        self.rows = int(ends[-1])
        owner = np.arange(len(chunks)).repeat(self.n_rows)
        positions = np.arange(self.rows) + (self.first_position - self.first_row)[owner]
        self.positions = torch.from_numpy(positions)
        self.tokens = torch.from_numpy(
            np.concatenate([r.tokens[start : start + tokens] for r, start, tokens in chunks])
        )
        width = max([len(request.blocks) for request in requests])
        self.tables = np.full((len(chunks), width), -1, dtype=np.int32)
        for table, request in zip(self.tables, requests, strict=True):
            table[: len(request.blocks)] = request.blocks
        pages, offsets = np.divmod(positions, page_tokens)
        self.pages = self.tables[owner, pages]
        self.offsets = offsets.astype(np.int32)
        finishing = [i for i, (r, start, n) in enumerate(chunks) if start + n == r.known]
        self.sampled = [requests[i] for i in finishing]
        """Requests whose next token this cohort's last stage yields."""
        self.sampled_rows = torch.from_numpy(ends[finishing].astype(np.int64) - 1)


def has_ls(cohorts: Sequence[Cohort]) -> bool:
    """Whether one of `cohorts` is the LS cohort: no other has LS requests."""
    return any(cohort.chunks[0].request.latency_sensitive for cohort in cohorts)


def load_of(chunks: Sequence[Chunk]) -> Load:
    """The work of `chunks` in one pass."""
    rows = decode_rows = sampled = kv_tokens = pairs = 0
    for request, start, tokens in chunks:
        rows += tokens
        if tokens == 1:
            decode_rows += 1
            kv_tokens += start + 1
        else:
            pairs += tokens * (2 * start + tokens) // 2
        sampled += start + tokens == request.known
    return Load(rows, decode_rows, sampled, kv_tokens, pairs)
