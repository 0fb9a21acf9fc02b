"""gRPC control of the hot loop: who may attach, with which geometry, and figures."""

from __future__ import annotations

import math
import os
import secrets
import threading
from pathlib import Path

import grpc

from omniserve.attnkernel._core import Geometry as NativeGeometry
from omniserve.attnkernel._core import ServerLoop
from omniserve.cpuattn.settings import CpuAttnSettings
from omniserve.errors import (
    DrainingError,
    GeometryError,
    InvalidArgumentError,
    OmniServeError,
    SharedMemoryError,
)
from omniserve.internal.v1 import attention_pb2, attention_pb2_grpc
from omniserve.rpc import abort
from omniserve.shm import layout
from omniserve.v1 import status_pb2

# What layout.h's header holds of each, less the final zero.
_WORKER_ID_BYTES = layout.CHeader.worker_id.size - 1
_BELL_PATH_BYTES = layout.CHeader.bell_path.size - 1


class AttentionService(attention_pb2_grpc.AttentionServiceServicer):
    """Calls come from several gRPC threads; `_lock` makes Attach and Drain take turns."""

    def __init__(self, settings: CpuAttnSettings, loop: ServerLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._lock = threading.Lock()
        self._draining = False

    def Attach(  # noqa: N802
        self, request: attention_pb2.AttachRequest, context: grpc.ServicerContext
    ) -> attention_pb2.AttachResponse:
        try:
            with self._lock:
                return self._attach(request)
        except OmniServeError as error:
            abort(context, error)

    def GetStats(  # noqa: N802
        self,
        request: attention_pb2.GetStatsRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> attention_pb2.GetStatsResponse:
        rows, kv_bytes_read, failures = self._loop.stats()
        return attention_pb2.GetStatsResponse(
            stats=status_pb2.AttentionServerStatus(
                server_id=self._settings.server_id,
                pid=os.getpid(),
                rows=rows,
                kv_bytes_read=kv_bytes_read,
                pages_total=self._loop.geometry.pages if self._loop.attached else 0,
                pages_free=self._loop.pages_free(),
                errors=failures,
            )
        )

    def Drain(  # noqa: N802
        self,
        request: attention_pb2.DrainRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> attention_pb2.DrainResponse:
        self.drain()
        return attention_pb2.DrainResponse()

    def drain(self) -> None:
        """Answers what is in the rings, for at most `drain_ms`, and stops the loop."""
        with self._lock:
            if self._draining:
                return
            self._draining = True
            self._loop.drain(self._settings.drain_ms)
            self._loop.stop()

    def _attach(self, request: attention_pb2.AttachRequest) -> attention_pb2.AttachResponse:
        if self._draining:
            raise DrainingError("the attention server is stopping")
        geometry = _geometry_of(request.geometry)
        pages = self._pages_for(geometry)
        _check_layers(request, geometry)
        _check_text("worker_id", request.worker_id, _WORKER_ID_BYTES)
        if not (request.worker_id.isascii() and request.worker_id.isprintable()):
            raise InvalidArgumentError("worker_id must be printable ASCII", field="worker_id")
        _check_text("bell_path", request.bell_path, _BELL_PATH_BYTES)
        if not Path(request.bell_path).is_file():
            raise InvalidArgumentError(f"bell_path: no file {request.bell_path}", field="bell_path")
        try:
            self._give_segment(request, geometry, pages)
        except RuntimeError as error:  # the bell is a file, but not a bell
            raise InvalidArgumentError(f"bell_path: {error}", field="bell_path") from error
        return attention_pb2.AttachResponse(
            server_id=self._settings.server_id,
            segment_path=str(self._settings.arena_path),
            segment_id=self._loop.segment_id,
            pages=pages,
        )

    def _pages_for(self, geometry: layout.Geometry) -> int:
        pages = layout.pages_in(geometry, self._settings.arena_bytes)
        if pages < geometry.max_pages_per_sequence:
            needed = layout.arena_bytes(geometry, geometry.max_pages_per_sequence)
            raise SharedMemoryError(
                f"the arena cannot hold one sequence of {geometry.max_sequence_tokens} tokens: "
                f"needed {needed} bytes, available {self._settings.arena_bytes}",
                field="arena_bytes",
                metadata={
                    "needed_bytes": str(needed),
                    "available_bytes": str(self._settings.arena_bytes),
                },
            )
        return pages

    def _give_segment(
        self, request: attention_pb2.AttachRequest, geometry: layout.Geometry, pages: int
    ) -> None:
        loop = self._loop
        if loop.attached and loop.worker_id != request.worker_id:
            raise GeometryError(f"attached to worker {loop.worker_id}, not {request.worker_id}")
        if not loop.attached or loop.epoch != request.epoch:
            loop.format(
                request.worker_id,
                request.epoch,
                secrets.randbits(63),
                NativeGeometry(**vars(geometry), pages=pages),
                request.bell_path,
                [(layer.window, layer.softcap, list(layer.sinks)) for layer in request.layers],
            )
            return
        mine = loop.geometry
        for name, value in vars(geometry).items():
            if getattr(mine, name) != value:
                raise GeometryError(
                    f"geometry.{name}: this epoch attached with {getattr(mine, name)}, not {value}",
                    field=f"geometry.{name}",
                )
        loop.rebell(request.bell_path)


def _geometry_of(message: attention_pb2.Geometry) -> layout.Geometry:
    geometry = layout.Geometry(
        layers=message.layers,
        heads=message.heads,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,  # type: ignore[arg-type]  # check() refuses other names
        kv_dtype=message.kv_dtype,  # type: ignore[arg-type]
        page_tokens=message.page_tokens,
        max_sequences=message.max_sequences,
        max_sequence_tokens=message.max_sequence_tokens,
        slots=message.slots,
    )
    geometry.check()
    return geometry


def _check_layers(request: attention_pb2.AttachRequest, geometry: layout.Geometry) -> None:
    """Options come for every layer or for none; sinks for every head or for none."""
    if len(request.layers) not in (0, geometry.layers):
        raise InvalidArgumentError(
            f"layers: {len(request.layers)} given for {geometry.layers}", field="layers"
        )
    for index, layer in enumerate(request.layers):
        if len(layer.sinks) not in (0, geometry.heads):
            field = f"layers[{index}].sinks"
            raise InvalidArgumentError(
                f"{field}: {len(layer.sinks)} given for {geometry.heads} heads", field=field
            )
        if not (layer.softcap >= 0 and math.isfinite(layer.softcap)):
            field = f"layers[{index}].softcap"
            raise InvalidArgumentError(f"{field} must be 0 or positive", field=field)


def _check_text(field: str, text: str, limit_bytes: int) -> None:
    if not 1 <= len(text.encode()) <= limit_bytes:
        raise InvalidArgumentError(f"{field} must have 1 to {limit_bytes} bytes", field=field)
