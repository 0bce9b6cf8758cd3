"""grokmoe.v1.Expert over gRPC: decodes, validates, hands over to engine and loader, encodes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from expert_worker.cells import Cells
from expert_worker.engine import ExpertEngine
from expert_worker.expert_dtype import SAME
from expert_worker.forward_stream import ForwardStream, draining
from expert_worker.loader import ExpertLoader
from expert_worker.range_check import check_ranges
from grokmoe import tensors
from grokmoe.access import Scope
from grokmoe.errors import FailedPrecondition, InvalidRequest, Unavailable
from grokmoe.expert_messages import from_messages, to_messages
from grokmoe.expert_ranges import ranges_of
from grokmoe.server import Service, raw_stream, unary
from grokmoe.status import to_status
from grokmoe.telemetry import ExpertMetrics
from grokmoe.tracing import Tracing
from grokmoe.v1 import expert_pb2

SERVICE = "grokmoe.v1.Expert"


class ExpertService:
    """The calls of an expert worker. Refuses them with UNAVAILABLE until `is_ready` says so: the weights are being
    loaded."""

    def __init__(
        self,
        engine: ExpertEngine,
        metrics: ExpertMetrics,
        max_rows: int,
        is_ready: Callable[[], bool] = lambda: True,
        loader: ExpertLoader | None = None,
        tracing: Tracing | None = None,
        takes_pairs: bool = True,
    ) -> None:
        """loader: None where what is held never changes. tracing: None: calls are not written to traces. takes_pairs:
        see ForwardStream."""
        self._engine = engine
        self._metrics = metrics
        self._max_rows = max_rows
        self._is_ready = is_ready
        self._loader = loader
        self._tracing = tracing
        self._takes_pairs = takes_pairs
        self._incarnation = uuid.uuid4().hex
        self._streams: set[ForwardStream] = set()
        self._is_draining = False

    def as_service(self) -> Service:
        """What a server registers."""
        pb = expert_pb2
        handlers = {
            "Describe": unary(self.Describe, pb.ExpertDescribeRequest, pb.ExpertDescribeResponse),
            "Forward": raw_stream(self.Forward),
            "Load": unary(self.Load, pb.ExpertLoadRequest, pb.ExpertLoadResponse),
            "Unload": unary(self.Unload, pb.ExpertUnloadRequest, pb.ExpertUnloadResponse),
        }
        return Service(SERVICE, handlers, drain=self.drain, scope=Scope.CLUSTER)

    def drain(self) -> None:
        """Takes no more work: a load ends; every stream answers what it has read, refuses what comes, and ends."""
        self._is_draining = True
        if self._loader is not None:
            self._loader.drain()
        for stream in self._streams:
            stream.drain()

    def _check_ready(self) -> None:
        if not self._is_ready():
            raise Unavailable("the weights are being loaded")

    async def Describe(
        self, request: expert_pb2.ExpertDescribeRequest, context: Any
    ) -> expert_pb2.ExpertDescribeResponse:
        """What this worker holds."""
        self._check_ready()
        experts = self._engine.experts
        return expert_pb2.ExpertDescribeResponse(
            config_hash=experts.config.content_hash,
            incarnation=self._incarnation,
            dtype=tensors.wire_dtype(experts.dtype),
            expert_dtype="" if experts.expert_dtype == SAME else experts.expert_dtype,
            hidden_size=experts.config.hidden_size,
            experts=to_messages(ranges_of(experts.holdings.held)),
            max_rows=self._max_rows,
            device=str(experts.device),
            draining=self._is_draining,
            revision=experts.holdings.revision,
            loading=to_messages(ranges_of(experts.holdings.loading)),
            expert_bytes=experts.expert_bytes,
            capacity=experts.holdings.capacity,
        )

    async def Load(self, request: expert_pb2.ExpertLoadRequest, context: Any) -> expert_pb2.ExpertLoadResponse:
        """Holds more. Ends when the caller does."""
        loader, wanted = self._checked(request)
        loaded = await loader.load(wanted)
        return expert_pb2.ExpertLoadResponse(
            revision=loaded.revision, loaded_bytes=loaded.num_bytes, load_ns=loaded.load_ns
        )

    async def Unload(self, request: expert_pb2.ExpertUnloadRequest, context: Any) -> expert_pb2.ExpertUnloadResponse:
        """Holds less."""
        loader, unwanted = self._checked(request)
        return expert_pb2.ExpertUnloadResponse(revision=loader.unload(unwanted))

    def _checked(
        self, request: expert_pb2.ExpertLoadRequest | expert_pb2.ExpertUnloadRequest
    ) -> tuple[ExpertLoader, Cells]:
        """Who does it, and what a request that can be done is about."""
        self._check_ready()
        if self._is_draining:
            raise draining()
        config = self._engine.experts.config
        if request.config_hash != config.content_hash:
            raise FailedPrecondition("config_hash is of another model, or of another variant of it")
        asked = from_messages(request.experts)
        cells = check_ranges(asked, config.num_experts, config.num_layers, config.intermediate_size)
        if self._loader is None:
            raise FailedPrecondition("what this worker holds cannot be changed")
        return self._loader, cells

    async def Forward(self, requests: Any, context: Any) -> None:
        """Requests in, answers out as they are ready. A request that fails is answered with a Failure; the stream
        ends only with bytes that are no ForwardRequest, because after those nothing on it can be trusted."""
        stream = ForwardStream(self._engine, self._metrics, self._max_rows, context, self._tracing, self._takes_pairs)
        self._streams.add(stream)
        try:
            self._check_ready()
            if self._is_draining:
                raise draining()
            await stream.serve()
        except (InvalidRequest, Unavailable) as error:
            await context.abort_with_status(to_status(error))
        finally:
            self._streams.discard(stream)
            stream.drop()
