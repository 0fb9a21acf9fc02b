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
        counts = [chunk.tokens for chunk in chunks]
        self.rows = sum(counts)
        positions = np.concatenate([np.arange(c.start, c.end) for c in chunks])
        self.tokens = torch.from_numpy(
            np.concatenate([c.request.tokens[c.start : c.end] for c in chunks])
        )
        self.positions = torch.from_numpy(positions)
        self.first_row = np.cumsum([0, *counts[:-1]], dtype=np.int32)
        self.n_rows = np.asarray(counts, dtype=np.int32)
        self.first_position = np.asarray([c.start for c in chunks], dtype=np.int32)
        width = max(len(c.request.blocks) for c in chunks)
        self.tables = np.full((len(chunks), width), -1, dtype=np.int32)
        for index, chunk in enumerate(chunks):
            self.tables[index, : len(chunk.request.blocks)] = chunk.request.blocks
        owner = np.repeat(np.arange(len(chunks)), counts)
        self.pages = self.tables[owner, positions // page_tokens]
        self.offsets = (positions % page_tokens).astype(np.int32)
        last_rows = self.first_row + self.n_rows - 1
        finishing = [i for i, c in enumerate(chunks) if c.end == c.request.known]
        self.sampled = [chunks[i].request for i in finishing]
        """Requests whose next token this cohort's last stage yields."""
        self.sampled_rows = torch.from_numpy(last_rows[finishing].astype(np.int64))


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
