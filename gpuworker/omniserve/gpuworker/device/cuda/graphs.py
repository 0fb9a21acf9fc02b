"""Stages as CUDA graphs: one for each stage and number of rows, made when it is met again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from omniserve.gpuworker.device.cuda.gpu import Stream, Work

# A graph takes as long to make as a dozen stages, so there are few row counts, close together
# where decode rows are.
_COUNTS = (1, 2, 4, 8, *range(16, 257, 16), *range(320, 513, 64))


class StageGraphs:
    """Launches stages of padded row counts on one stream."""

    def __init__(self, stream: Stream, stage: Callable[[int, int], None], rows_max: int) -> None:
        """stage: enqueues the work of a stage for so many rows, on memory that stays."""
        self._stream = stream
        self._stage = stage
        self.counts = tuple(count for count in _COUNTS if count <= rows_max)
        """Of the graphs that there may be, ascending."""
        self._graphs: dict[tuple[int, int], Work | None] = {}

    def padded(self, rows: int) -> int:
        """Rows of the smallest graph that has room; `rows` itself where none has."""
        at = int(np.searchsorted(self.counts, rows))
        return self.counts[at] if at < len(self.counts) else rows

    def launch(self, stage: int, rows: int) -> None:
        """Launches `stage`; the first time of its kind as it is, which libraries need to set up."""
        work = partial(self._stage, stage, rows)
        if not self.counts or rows > self.counts[-1]:
            self._stream.launch(work)
            return
        key = (stage, rows)
        if key not in self._graphs:
            self._graphs[key] = None
            self._stream.launch(work)
            return
        graph = self._graphs[key] or self._stream.capture(work)
        self._graphs[key] = graph
        self._stream.launch(graph)
