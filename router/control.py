"""grokmoe.v1.Control: the cluster's state, and ending requests of others."""

from __future__ import annotations

from typing import Any

from grokmoe.access import Scope
from grokmoe.errors import InvalidRequest
from grokmoe.server import Service, unary
from grokmoe.v1 import control_pb2 as pb
from router import status
from router.engine import Engine

SERVICE = "grokmoe.v1.Control"


class ControlService:
    """Operation, apart from inference."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def as_service(self) -> Service:
        """What a server registers."""
        return Service(
            SERVICE,
            {
                "GetStatus": unary(self.GetStatus, pb.GetStatusRequest, pb.GetStatusResponse),
                "Abort": unary(self.Abort, pb.AbortRequest, pb.AbortResponse),
            },
            scope=Scope.CONTROL,
        )

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """The router's view of the cluster."""
        return status.cluster(self._engine)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """Ends requests by their ids."""
        if not request.request_ids:
            raise InvalidRequest("request_ids", "is empty")
        return pb.AbortResponse(aborted_ids=[id_ for id_ in request.request_ids if self._engine.abort(id_)])
