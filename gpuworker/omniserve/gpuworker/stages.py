"""Runs one stage: the dense work of all rows in it, then their attention, here or at a server.

Stage 0 begins with the embedding, stage `layers` ends with the LM head; in between, stage `l`
leaves layer `l - 1` and enters layer `l` (see docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.afterwards import Afterwards
from omniserve.gpuworker.device.port import Device, ParkedRows
from omniserve.gpuworker.parking import ParkingLot, Rows
from omniserve.gpuworker.requests import Request
from omniserve.gpuworker.servers import AttentionServer


class Finished(NamedTuple):
    """What the last stage yields, in the order of its rows: those of cohorts, then boarded ones."""

    requests: list[Request]
    best: npt.NDArray[np.int64]
    """[rows], the tokens with the largest logits."""
    logits: torch.Tensor
    """[rows, vocabulary] float32 where `needs_logits`, valid until the next last stage; else
    anything or empty."""


class StageRunner:
    """The device side of the stage loop. Owned by the engine."""

    def __init__(
        self,
        device: Device,
        parking: ParkingLot,
        servers: Sequence[AttentionServer],
        afterwards: Afterwards,
    ) -> None:
        self._device = device
        self._parking = parking
        self._servers = servers
        self._afterwards = afterwards
        self._layers = device.config.layers

    @property
    def bubble_ns(self) -> int:
        """See Device."""
        return self._device.bubble_ns

    def run(self, stage: int, cohorts: Sequence[Cohort], boarded: Rows) -> Finished | None:
        """Takes all rows through `stage` and sends boarded rows away.

        Returns what the last stage yields if any row has gone through it; what another one does
        may be under way still.
        """
        self._afterwards.look()
        while not self._device.has_room():
            self._afterwards.look()
        if stage == self._layers:
            return self._finish(cohorts, boarded)
        parked = self._parked(boarded)
        launched = self._device.run(stage, cohorts, parked)
        if parked is not None:
            self._parking.send_away(boarded, stage + 1)
            self._afterwards.call(launched, partial(_send, tuple(self._servers), stage, parked))
        for cohort in cohorts:
            self._device.attend(stage, cohort)
            cohort.stage = stage + 1
        return None

    def wait(self) -> None:
        """Until all stages have run."""
        self._device.wait(self._afterwards.look)

    def _finish(self, cohorts: Sequence[Cohort], boarded: Rows) -> Finished | None:
        """The last stage: only rows whose next token is wanted go through it."""
        requests = [request for cohort in cohorts for request in cohort.sampled]
        requests += self._parking.requests_of(boarded)
        for cohort in cohorts:
            cohort.stage = self._layers + 1
        if not requests:
            return None
        wanted = np.array([request.sampling.needs_logits for request in requests])
        parked, meanwhile = self._parked(boarded), self._afterwards.look
        return Finished(requests, *self._device.finish(cohorts, parked, wanted, meanwhile))

    def _parked(self, boarded: Rows) -> ParkedRows | None:
        lot = self._parking
        if not len(boarded):
            return None
        return ParkedRows(
            boarded,
            self._owners(boarded),
            lot.sequence[boarded],
            lot.position[boarded],
            lot.token[boarded],
        )

    def _owners(self, boarded: Rows) -> npt.NDArray[np.int32]:
        """Where in `_servers` each boarded row's server is."""
        place = np.full(1 + max(server.index for server in self._servers), -1, dtype=np.int32)
        for at, server in enumerate(self._servers):
            place[server.index] = at
        owners: npt.NDArray[np.int32] = place[self._parking.server[boarded]]
        return owners


def _send(servers: Sequence[AttentionServer], layer: int, parked: ParkedRows) -> None:
    """Asks the servers for the attention of rows whose q, k and v are in their slots."""
    for at, server in enumerate(servers):
        here = parked.servers == at
        if here.any():
            server.attend(layer, parked.slots[here], parked.positions[here])
