"""grokmoe.v1.Attention over gRPC: decodes, hands over to the engine, encodes."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from attention_worker.engine import AttentionEngine, MoeInput, StepRun
from attention_worker.lease import Lease
from attention_worker.lora.store import AdapterStore
from attention_worker.step_trace import StepTrace
from grokmoe import tensors
from grokmoe.access import Scope
from grokmoe.adapter_codec import adapter_to_proto
from grokmoe.errors import Code, FailedPrecondition, InvalidRequest, Reason, Unavailable
from grokmoe.logs import about
from grokmoe.plan_codec import plan_from_proto, result_to_proto
from grokmoe.server import Service, raw_stream, unary
from grokmoe.status import to_failure, to_status
from grokmoe.step_plan import StepResult
from grokmoe.tracing import Tracing, trace_id_of
from grokmoe.v1 import attention_pb2

logger = logging.getLogger(__name__)

SERVICE = "grokmoe.v1.Attention"


def _ending() -> Unavailable:
    return Unavailable("this attention worker is about to end", reason=Reason.SHUTTING_DOWN)


class AttentionService:
    """Translates between messages and the engine. Holds one step per stream, and the lease of the pages."""

    def __init__(self, engine: AttentionEngine, lease: Lease | None = None, tracing: Tracing | None = None) -> None:
        """lease: names the engine's incarnation; None: one with the default limits.

        tracing: where steps that belong to a trace are written; None: nowhere."""
        self._engine, self._tracing = engine, tracing
        self._lease = lease or Lease(engine.incarnation)
        self._lanes: set[_Lane] = set()
        self._is_draining = False

    def as_service(self) -> Service:
        """What a server registers."""
        describe = unary(self.Describe, attention_pb2.AttentionDescribeRequest, attention_pb2.AttentionDescribeResponse)
        pb = attention_pb2
        handlers = {
            "Describe": describe,
            "Step": raw_stream(self.Step),
            "LoadAdapter": unary(self.LoadAdapter, pb.AttentionLoadAdapterRequest, pb.AttentionLoadAdapterResponse),
            "UnloadAdapter": unary(
                self.UnloadAdapter, pb.AttentionUnloadAdapterRequest, pb.AttentionUnloadAdapterResponse
            ),
        }
        return Service(SERVICE, handlers, drain=self.drain, scope=Scope.CLUSTER)

    def drain(self) -> None:
        """Lets every lane finish the step under way, then end. Every other plan is refused from now on."""
        self._is_draining = True
        for lane in self._lanes:
            lane.drain()

    async def Describe(
        self, request: attention_pb2.AttentionDescribeRequest, context: Any
    ) -> attention_pb2.AttentionDescribeResponse:
        """What this worker is; and the lease of its pages, for a router that says who it is."""
        engine = self._engine
        incarnation = self._claim(request.router_id) if request.router_id else ""
        return attention_pb2.AttentionDescribeResponse(
            config_hash=engine.config.content_hash,
            incarnation=incarnation,
            dtype=tensors.wire_dtype(engine.dtype),
            hidden_size=engine.config.hidden_size,
            layer_begin=engine.held.start,
            layer_end=engine.held.stop,
            num_pages=engine.settings.num_pages,
            page_size=engine.settings.page_size,
            max_step_tokens=engine.settings.max_step_tokens,
            device=str(engine.torch_device),
            draining=self._is_draining,
            tensor_parallel=engine.num_ranks,
            adapters=map(adapter_to_proto, engine.adapters.loaded if engine.adapters is not None else ()),
        )

    def _claim(self, router_id: str) -> str:
        holder = self._lease.holder
        incarnation = self._lease.claim(router_id)
        if router_id != holder:
            logger.info("leased by router %s", router_id)
        if incarnation != self._engine.incarnation:
            self._engine.change_incarnation(incarnation)
        return incarnation

    async def LoadAdapter(
        self, request: attention_pb2.AttentionLoadAdapterRequest, context: Any
    ) -> attention_pb2.AttentionLoadAdapterResponse:
        """Has an adapter, too, from now on. The lease does not matter: it changes nothing that is there."""
        if self._is_draining:
            raise _ending()
        adapter = adapter_to_proto(await self._adapters().load(request.name))
        return attention_pb2.AttentionLoadAdapterResponse(adapter=adapter)

    async def UnloadAdapter(
        self, request: attention_pb2.AttentionUnloadAdapterRequest, context: Any
    ) -> attention_pb2.AttentionUnloadAdapterResponse:
        """Forgets an adapter."""
        self._adapters().unload(request.adapter_id)
        return attention_pb2.AttentionUnloadAdapterResponse()

    def _adapters(self) -> AdapterStore:
        if self._engine.adapters is None:
            raise FailedPrecondition("this worker takes no adapters")
        return self._engine.adapters

    async def Step(self, requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One lane of steps. A step that fails is answered with a Failure; the lane goes on.

        Ends with INVALID_ARGUMENT after bytes that are no message, since nothing on the stream can be trusted then, and
        with UNAVAILABLE when the worker is about to end.
        """
        lane = _Lane(self._engine, self._lease, self._is_draining, self._tracing)
        self._lanes.add(lane)
        try:
            while (data := await lane.read(context)) is not None:
                for message in await lane.take(data):
                    await context.write(message)
        except (InvalidRequest, Unavailable) as error:
            await context.abort_with_status(to_status(error))
        finally:
            self._lanes.discard(lane)
            lane.end()


class _Lane:
    """The state of one Step stream: the step under way, if any, and the incarnation of the last plan."""

    def __init__(self, engine: AttentionEngine, lease: Lease, is_draining: bool, tracing: Tracing | None) -> None:
        self._engine, self._lease, self._tracing = engine, lease, tracing
        self._trace: StepTrace | None = None
        self._traceparents: tuple[str, ...] = ()
        self._incarnation = ""
        self._run: StepRun | None = None
        self._step_id = 0
        self._layer = 0
        self._is_draining = is_draining
        self._reading: asyncio.Task[Any] | None = None
        self._rows: tensors.RowAssembler[attention_pb2.StepRequest] = tensors.RowAssembler(
            attention_pb2.StepRequest, "step_id", engine.settings.max_step_tokens, engine.config.hidden_size
        )

    async def read(self, context: Any) -> bytes | None:
        """The next message; None when the caller is done. Raises Unavailable when no step is under way and the lane
        is to end."""
        if self._is_draining and self._run is None:
            raise _ending()
        self._reading = asyncio.ensure_future(context.read())
        try:
            data = await self._reading
        except asyncio.CancelledError:
            if self._is_draining and self._run is None:
                raise _ending() from None
            raise
        finally:
            self._reading = None
        return None if data is grpc.aio.EOF else data

    def drain(self) -> None:
        """No further step begins; the one under way goes on."""
        self._is_draining = True
        if self._run is None and self._reading is not None:
            self._reading.cancel()

    async def take(self, data: bytes) -> list[bytes]:
        """One message in, the messages that answer it out. Raises InvalidRequest for bytes that are no message."""
        begin = time.perf_counter_ns()
        try:
            whole = self._rows.add(data)
        except InvalidRequest as error:
            if self._rows.failed_id is None:
                raise
            return [self._fail(self._rows.failed_id, error)]
        if whole is None:
            return []
        request, payload = whole
        try:
            result = await self._advance(request, payload)
        except Exception as error:
            return [self._fail(request.step_id, error)]
        header = attention_pb2.StepResponse(step_id=request.step_id)
        header.compute_ns = time.perf_counter_ns() - begin
        if self._trace is not None:
            layer = result.layer if isinstance(result, MoeInput) else self._engine.held.stop
            self._trace.turn(layer, header.compute_ns / 1e9)
        if isinstance(result, MoeInput):
            self._layer = header.layer = result.layer
            return list(tensors.encode_rows(header, result.x_TD, "step_id"))
        assert self._run is not None
        header.stages_ns.update(self._run.stages_ns)
        self._write_trace("")
        self.close()
        header.result.CopyFrom(result_to_proto(result))
        payload = result.logits if result.hidden_state is None else result.hidden_state
        if payload is None:
            return [tensors.encode(header)]
        return list(tensors.encode_rows(header, payload, "step_id"))

    async def _advance(self, request: attention_pb2.StepRequest, payload: Any) -> MoeInput | StepResult:
        if request.HasField("plan"):
            if self._run is not None:
                raise FailedPrecondition(f"step {self._step_id} is under way on this lane")
            self._step_id = request.step_id
            if self._is_draining:
                raise _ending()
            plan = plan_from_proto(request.plan, payload)
            self._traceparents = plan.traceparents
            self._run = self._engine.begin(plan)
            self._trace = StepTrace.of(self._tracing, plan)
            self._keep_lease(self._run.incarnation)
            return await self._engine.device.run(self._run.advance, None)
        if self._run is None or request.step_id != self._step_id:
            raise InvalidRequest("step_id", f"is {request.step_id}: no such step is under way on this lane")
        if request.layer != self._layer:
            raise InvalidRequest("layer", f"is {request.layer}, the step waits for layer {self._layer}")
        if payload is None:
            raise InvalidRequest("payload", "is missing")
        self._engine.check_incarnation(self._run)
        self._lease.renew(self._run.incarnation)
        return await self._engine.device.run(self._run.advance, payload)

    def _fail(self, step_id: int, error: Exception) -> bytes:
        failure = to_failure(error)
        if failure.code == Code.INTERNAL:
            traces = [trace_id_of(parent) for parent in self._traceparents]
            logger.exception("step %d failed", step_id, exc_info=error, extra=about(trace_ids=traces))
            self._engine.metrics.steps.labels("failed").inc()
        if step_id == self._step_id:
            self._write_trace(str(error))
            self.close()
        return tensors.encode(attention_pb2.StepResponse(step_id=step_id, failure=failure))

    def _keep_lease(self, incarnation: str) -> None:
        """A plan that is accepted is a sign of life of the lease's holder, and its stream one of his."""
        if incarnation == self._incarnation:
            self._lease.renew(incarnation)
        else:
            self._lease.stream_closed(self._incarnation)
            self._lease.stream_opened(incarnation)
            self._incarnation = incarnation

    def _write_trace(self, error: str) -> None:
        trace, self._trace = self._trace, None
        if trace is not None and self._run is not None:
            trace.end(self._run.stages_ns, error)

    def end(self) -> None:
        """The stream is closed."""
        self._write_trace("the stream was closed")
        self.close()
        self._lease.stream_closed(self._incarnation)

    def close(self) -> None:
        """Drops the step under way."""
        run, self._run = self._run, None
        if run is not None:
            # On the device thread: the forward may be running there this very moment.
            self._engine.device.post(run.close)
