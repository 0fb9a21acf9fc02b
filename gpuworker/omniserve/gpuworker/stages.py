"""Runs one stage: the dense work of all rows in it, then their attention, here or at a server.

Stage 0 begins with the embedding, stage `layers` ends with the LM head; in between, stage `l`
leaves layer `l - 1` and enters layer `l` (see docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omniserve.gpuworker.cohort import Cohort
from omniserve.gpuworker.device.cpu import CpuDevice
from omniserve.gpuworker.parking import ParkingLot, Rows
from omniserve.gpuworker.servers import AttentionServer


class StageRunner:
    """The device side of the stage loop. Owned by the engine."""

    def __init__(
        self, device: CpuDevice, parking: ParkingLot, servers: Sequence[AttentionServer]
    ) -> None:
        self._device = device
        self._parking = parking
        self._servers = servers
        self._layers = device.config.layers
        self._q_size = device.config.q_size

    def run(self, stage: int, cohorts: Sequence[Cohort], boarded: Rows) -> torch.Tensor | None:
        """Takes all rows through `stage` and sends boarded rows away.

        Returns, from the last stage only, the logits [rows, vocabulary] float32: those of each
        cohort's `sampled` requests in order, then those of the boarded rows.
        """
        if stage == self._layers:
            return self._finish(cohorts, boarded)
        parked = torch.from_numpy(boarded)
        if stage == 0:
            tokens = [c.tokens for c in cohorts]
            tokens.append(torch.from_numpy(self._parking.token[boarded]))
            residual = self._device.embed(torch.cat(tokens))
        else:
            residual, attention = self._gather(cohorts, boarded)
            residual = self._device.leave_layer(stage - 1, residual, attention)
        positions = [c.positions for c in cohorts]
        positions.append(torch.from_numpy(self._parking.position[boarded]))
        qkv = self._device.enter_layer(stage, residual, torch.cat(positions))

        fixed = sum(c.rows for c in cohorts)
        if len(boarded):
            self._parking.residual[parked] = residual[fixed:]
            self._send(stage, qkv[fixed:], boarded)
        row = 0
        for cohort in cohorts:
            rows = slice(row, row + cohort.rows)
            cohort.residual = residual[rows]
            cohort.attention = torch.empty(cohort.rows, self._q_size, dtype=qkv.dtype)
            self._device.attend(stage, qkv[rows], cohort, cohort.attention)
            cohort.stage = stage + 1
            row += cohort.rows
        return None

    def _finish(self, cohorts: Sequence[Cohort], boarded: Rows) -> torch.Tensor | None:
        """The last stage: only rows whose next token is wanted go through it."""
        residuals, attentions = [], []
        for cohort in cohorts:
            assert cohort.residual is not None
            assert cohort.attention is not None
            residuals.append(cohort.residual[cohort.sampled_rows])
            attentions.append(cohort.attention[cohort.sampled_rows])
            cohort.stage = self._layers + 1
        residuals.append(self._parking.residual[torch.from_numpy(boarded)])
        attentions.append(self._answers(boarded))
        residual = torch.cat(residuals)
        if not len(residual):
            return None
        residual = self._device.leave_layer(self._layers - 1, residual, torch.cat(attentions))
        return self._device.logits(residual)

    def _gather(
        self, cohorts: Sequence[Cohort], boarded: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residuals = [c.residual for c in cohorts if c.residual is not None]
        attentions = [c.attention for c in cohorts if c.attention is not None]
        if len(boarded):
            residuals.append(self._parking.residual[torch.from_numpy(boarded)])
            attentions.append(self._answers(boarded))
        if len(residuals) == 1:
            return residuals[0], attentions[0]
        return torch.cat(residuals), torch.cat(attentions)

    def _answers(self, boarded: Rows) -> torch.Tensor:
        """Attention outputs of `boarded` from their slots, [rows, q_size]."""
        out = torch.empty(len(boarded), self._q_size, dtype=self._device.dtype)
        for server, rows, sequences in self._by_server(boarded):
            out[rows] = server.out[sequences]
        return out

    def _send(self, layer: int, qkv: torch.Tensor, boarded: Rows) -> None:
        self._parking.send_away(boarded, layer + 1)
        for server, rows, sequences in self._by_server(boarded):
            server.qkv[sequences] = qkv[rows]
            parked = boarded[rows.numpy()]
            server.attend(layer, self._parking.sequence[parked], self._parking.position[parked])

    def _by_server(self, boarded: Rows) -> list[tuple[AttentionServer, torch.Tensor, torch.Tensor]]:
        """Splits `boarded` into (server, indices into boarded, sequence ids)."""
        owners = torch.from_numpy(self._parking.server[boarded])
        sequences = torch.from_numpy(self._parking.sequence[boarded]).long()
        parts = []
        for server in self._servers:
            rows = torch.nonzero(owners == server.index).flatten()
            if len(rows):
                parts.append((server, rows, sequences[rows]))
        return parts
