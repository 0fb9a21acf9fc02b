"""StatusService: what the workers report, attainment, and the limits in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omniserve.controlplane.limits_loop import LimitsView, to_proto
from omniserve.controlplane.router import Router
from omniserve.v1 import status_pb2, status_pb2_grpc


@dataclass
class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    router: Router
    view: LimitsView

    async def GetStatus(  # noqa: N802
        self, _request: status_pb2.GetStatusRequest, _context: Any
    ) -> status_pb2.GetStatusResponse:
        return status_pb2.GetStatusResponse(
            workers=[worker.report.status for worker in self.router.workers],
            ls_attainment=self.view.window.attainment,
            ls_window_requests=self.view.window.total,
            limits=to_proto(self.view.limits),
        )
