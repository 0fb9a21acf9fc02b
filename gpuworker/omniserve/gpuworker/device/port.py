"""What the engine asks of a device. Back ends: `cpu`, which does at once what it is asked to, and
`cuda`, which does it later and says when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import WorkerLink
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.model.config import ModelConfig

_Int64s = npt.NDArray[np.int64]
_Int32s = npt.NDArray[np.int32]


class Event(Protocol):
    """Something that a device was asked to do."""

    def done(self) -> bool:
        """Whether it is done; never blocks."""
        ...


class _Done:
    def done(self) -> bool:
        return True


DONE = _Done()


class ParkedRows(NamedTuple):
    """Rows of the parking lot in the batch of a stage; all arrays [rows]."""

    rows: _Int64s
    """Which of the residual store."""
    servers: _Int32s
    """Whose slots have their attention, and get their q, k, v: places in `Device.serve`'s list."""
    slots: _Int32s
    positions: _Int64s
    tokens: _Int64s


class KvPlaces(NamedTuple):
    """KV of tokens on the device and in a server's slots; all arrays [tokens]."""

    layers: _Int32s
    pages: _Int32s
    offsets: _Int32s
    """Within the page."""
    slots: _Int32s
    indices: _Int32s
    """Which of the tokens of its slot each is."""


class KvTransfers(Protocol):
    """Copies KV between device pages and servers' slots."""

    def export_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        """Copies what stages that were launched before compute; done when the slots have it."""
        ...

    def import_tokens(self, link: WorkerLink, places: KvPlaces) -> Event:
        """Copies into pages. Before it is done they may not be read, nor be anybody else's."""
        ...

    def start(self) -> None:
        """Called once an iteration: a device may wait for it and copy all that came till then."""
        ...


class Device(Protocol):
    """Owns the weights, device KV and the residual store. Called by the engine's loop only.

    Stages run in the order of the calls. Only `finish` and `wait` wait for them, and call
    `meanwhile` as long as they do. A cohort's place in `Cohort.held` is the device's.
    """

    config: ModelConfig
    dtype: torch.dtype
    padded_counts: Sequence[int]
    """Row counts that stages are padded to, ascending; more rows, and all if empty, are not."""
    untypical_runs: int
    """How often a kind of stage has to run before it takes as long as it will."""

    @property
    def bubble_ns(self) -> int:
        """How long it has had nothing to do between two stages of a pass with LS rows.

        Grows with `wait`: only then is it known.
        """
        ...

    @property
    def transfers(self) -> KvTransfers: ...

    def serve(self, links: Sequence[WorkerLink]) -> None:
        """Says which attention servers there are from now on."""
        ...

    def has_room(self) -> bool:
        """Whether another stage may be launched: the engine stays near the device."""
        ...

    def run(self, stage: int, cohorts: Sequence[Cohort], parked: ParkedRows | None) -> Event:
        """Launches the dense work of a stage that is not the last; needs `has_room`.

        May append k and v of the cohorts' rows. Done when q, k and v of `parked` are in their
        slots.
        """
        ...

    def attend(self, layer: int, cohort: Cohort) -> None:
        """Attends for a cohort that has just run stage `layer`.

        Appends its k and v before, if `run` has not.
        """
        ...

    def finish(
        self,
        cohorts: Sequence[Cohort],
        parked: ParkedRows | None,
        wanted: npt.NDArray[np.bool_],
        meanwhile: Callable[[], None],
    ) -> tuple[_Int64s, torch.Tensor]:
        """Runs the last stage over the sampled rows of cohorts and `parked`; needs `has_room`.

        wanted: [rows], whose logits are. Returns the token with the largest logit of each row,
        [rows], and [rows, vocabulary] float32, valid until the next call and only where wanted;
        the latter may be empty if none are.
        """
        ...

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until all stages that were launched have run."""
        ...
