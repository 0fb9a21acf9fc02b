"""Rows that go through the stages together and attend on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omniserve.gpuworker.device.rows import CohortRows
from omniserve.gpuworker.requests import Request


@dataclass(frozen=True, slots=True)
class Chunk:
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
        self.stage = 0
        self.held: CohortRows | None = None
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

    @property
    def decode_kv_tokens(self) -> int:
        """KV tokens that one layer of decode rows reads."""
        return sum(c.end for c in self.chunks if c.tokens == 1)

    @property
    def prefill_kv_pairs(self) -> int:
        """Query x KV token pairs of one layer of prefill rows."""
        return sum(c.tokens * (c.start + c.end) // 2 for c in self.chunks if c.tokens > 1)
