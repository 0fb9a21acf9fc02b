"""Runs one stage: the dense work of all rows in it, then their attention, here or at a server.

Stage 0 begins with the embedding, stage `layers` ends with the LM head; in between, stage `l`
leaves layer `l - 1` and enters layer `l` (see docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from omniserve.attnkernel import Slots, StageRows
from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.device.rows import CohortRows, Part
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
        self, device: CpuDevice, parking: ParkingLot, servers: Sequence[AttentionServer]
    ) -> None:
        self._device = device
        self._parking = parking
        self._servers = servers
        self._layers = device.config.layers
        self._slots: list[Slots] = []
        self._lot_rows = StageRows(parking.residual, [])

    def run(self, stage: int, cohorts: Sequence[Cohort], boarded: Rows) -> Finished | None:
        """Takes all rows through `stage` and sends boarded rows away.

        Returns what the last stage yields if any row has gone through it.
        """
        if stage == self._layers:
            return self._finish(cohorts, boarded)
        held = [self._held(cohort) for cohort in cohorts]
        parts = [rows.all for rows in held]
        if len(boarded):
            owners = self._owners(boarded)
            parts.append(self._parked(boarded, owners))
        self._device.run(stage, parts)
        if len(boarded):
            self._send(stage, boarded, owners)
        for cohort, rows in zip(cohorts, held, strict=True):
            self._device.attend(stage, cohort, rows)
            cohort.stage = stage + 1
        return None

    def _finish(self, cohorts: Sequence[Cohort], boarded: Rows) -> Finished | None:
        """The last stage: only rows whose next token is wanted go through it."""
        parts = [self._held(cohort).sampled for cohort in cohorts]
        requests = [request for cohort in cohorts for request in cohort.sampled]
        if len(boarded):
            parts.append(self._parked(boarded, self._owners(boarded)))
            requests += self._parking.requests_of(boarded)
        for cohort in cohorts:
            cohort.stage = self._layers + 1
        if not requests:
            return None
        wanted = np.array([request.sampling.needs_logits for request in requests])
        return Finished(requests, *self._device.finish(parts, wanted))

    def _held(self, cohort: Cohort) -> CohortRows:
        if cohort.held is None:
            cohort.held = self._device.enter(cohort)
        return cohort.held

    def _parked(self, boarded: Rows, owners: npt.NDArray[np.int32]) -> Part:
        """Rows of the parking lot: attention outputs and q, k, v are in their servers' slots."""
        lot = self._parking
        slots = [server.slots for server in self._servers]
        if slots != self._slots:  # a server came or went
            self._slots, self._lot_rows = slots, StageRows(lot.residual, slots)
        return Part(
            self._lot_rows,
            boarded,
            owners,
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

    def _send(self, layer: int, boarded: Rows, owners: npt.NDArray[np.int32]) -> None:
        """Asks the servers for the attention of rows whose q, k and v are in their slots."""
        lot = self._parking
        lot.send_away(boarded, layer + 1)
        for at, server in enumerate(self._servers):
            rows = boarded[owners == at]
            if len(rows):
                server.attend(layer, lot.sequence[rows], lot.position[rows])
