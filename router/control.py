"""grokmoe.v1.Control: the cluster's state, ending requests of others, moving experts, loading adapters."""

from __future__ import annotations

from typing import Any

from grokmoe.access import Scope
from grokmoe.adapter_codec import adapter_to_proto
from grokmoe.errors import FailedPrecondition, InvalidRequest
from grokmoe.server import Service, unary
from grokmoe.v1 import control_pb2 as pb
from router import status
from router.engine import Engine
from router.experts import ExpertPool

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
                "MoveExperts": unary(self.MoveExperts, pb.MoveExpertsRequest, pb.MoveExpertsResponse),
                "RebalanceExperts": unary(
                    self.RebalanceExperts, pb.RebalanceExpertsRequest, pb.RebalanceExpertsResponse
                ),
                "ListAdapters": unary(self.ListAdapters, pb.ListAdaptersRequest, pb.ListAdaptersResponse),
                "LoadAdapter": unary(self.LoadAdapter, pb.LoadAdapterRequest, pb.LoadAdapterResponse),
                "UnloadAdapter": unary(self.UnloadAdapter, pb.UnloadAdapterRequest, pb.UnloadAdapterResponse),
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

    async def MoveExperts(self, request: pb.MoveExpertsRequest, context: Any) -> pb.MoveExpertsResponse:
        """Moves, copies or drops experts."""
        pool = self._pool()
        experts = [(each.expert, each.layer_begin, each.layer_end) for each in request.experts]
        cost = await pool.moves.make(experts, getattr(request, "from"), request.to)
        return pb.MoveExpertsResponse(
            loaded_bytes=cost.loaded_bytes,
            load_seconds=cost.load_seconds,
            drain_seconds=cost.drain_seconds,
            placement_version=pool.placement_version,
        )

    async def RebalanceExperts(self, request: pb.RebalanceExpertsRequest, context: Any) -> pb.RebalanceExpertsResponse:
        """Plans moves for balance, and makes them if they are worth it."""
        found = await self._pool().rebalancer.rebalance(request.dry_run, request.force)
        return pb.RebalanceExpertsResponse(
            moves=[status.move(each.experts, each.source, each.target) for each in found.moves],
            imbalance=found.imbalance,
            forecast_imbalance=found.forecast,
            gain_seconds=found.gain_seconds,
            cost_seconds=found.cost_seconds,
            done=found.done,
            reason=found.reason,
        )

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        """The adapters there are, and their use."""
        return status.adapters(self._engine)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        """One more, or another content under its name."""
        return pb.LoadAdapterResponse(adapter=adapter_to_proto(await self._engine.adapters.load(request.name)))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.UnloadAdapterResponse:
        """Takes one out."""
        return pb.UnloadAdapterResponse(drain_seconds=await self._engine.adapters.unload(request.name))

    def _pool(self) -> ExpertPool:
        if self._engine.pool is None:
            raise FailedPrecondition("the experts are in this process: there is nowhere to move them")
        return self._engine.pool
