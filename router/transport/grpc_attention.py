"""An attention worker behind gRPC. Letters: T tokens, D hidden."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from grokmoe import tensors
from grokmoe.errors import Reason, Unavailable
from grokmoe.plan_codec import plan_to_proto, result_from_proto
from grokmoe.status import from_failure
from grokmoe.step_plan import StepPlan, StepResult
from grokmoe.v1 import attention_pb2
from router.discovery import stages_of
from router.legs import Legs
from router.transport.base import AttentionInfo, AttentionLink, Hole, StepNotBegun
from router.transport.grpc_stream import Stream, describe
from router.transport.pipeline import PipelineLink
from router.transport.step_answers import StepAnswers
from router.transport.worker_access import PLAIN, WorkerAccess, new_router_id

SERVICE = "grokmoe.v1.Attention"

HOLE_TIMEOUT = 120.0
"""Seconds an attention worker may take between two messages of a step, if nobody else cuts it off (router/cell/)."""


class GrpcAttentionLink:
    """An attention worker at an address. router_id: whose name is on the lease of its pages.

    Every link has its own, those of one pipeline too: a worker that is configured twice is refused the second time,
    where two ledgers of the same pages would spoil them.
    """

    num_stages = 1

    def __init__(self, address: str, router_id: str | None = None, access: WorkerAccess = PLAIN) -> None:
        self.address, self.router_id = address, router_id or new_router_id()
        self._channel = access.open(address)
        self._lanes: dict[int, Stream] = {}
        self._busy: set[int] = set()
        self._next_step = 0
        self._info: AttentionInfo | None = None

    async def describe(self) -> AttentionInfo:
        """See AttentionLink."""
        reply = await describe(
            self._channel,
            SERVICE,
            attention_pb2.AttentionDescribeRequest(router_id=self.router_id),
            attention_pb2.AttentionDescribeResponse,
        )
        if self._info is not None and reply.incarnation != self._info.incarnation:
            self._forget_streams()
        self._info = AttentionInfo(
            config_hash=reply.config_hash,
            incarnation=reply.incarnation,
            dtype=tensors.torch_dtype(reply.dtype),
            hidden_size=reply.hidden_size,
            layer_begin=reply.layer_begin,
            layer_end=reply.layer_end,
            num_pages=reply.num_pages,
            page_size=reply.page_size,
            max_step_tokens=reply.max_step_tokens,
            device=reply.device,
            is_draining=reply.draining,
            num_ranks=max(1, reply.tensor_parallel),
        )
        return self._info

    def _forget_streams(self) -> None:
        """Those that rest are of a process that has ended, and what one of them has been told as its end does not
        concern the process that is there now."""
        for lane in self._lanes.keys() - self._busy:
            self._lanes.pop(lane).cancel()

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """See AttentionLink."""
        self._next_step += 1
        self._busy.add(lane)
        try:
            return await self._drive(lane, self._next_step, plan, hole, legs)
        except BaseException:
            # The worker may be in the middle of the step: only a new stream starts from a known state.
            stream = self._lanes.pop(lane, None)
            if stream is not None:
                stream.cancel()
            raise
        finally:
            self._busy.discard(lane)

    async def _begin(self, lane: int, step_id: int, plan: StepPlan) -> Stream:
        """Sends the plan. Raises StepNotBegun, or Unavailable with SHUTTING_DOWN when the worker has said so."""
        kept = self._lanes.get(lane)
        if kept is not None:
            try:
                await _send(kept, step_id, plan)
            except StepNotBegun:
                kept.cancel()  # it has ended since its last step; the worker may be there all the same
            else:
                return kept
        stream = self._lanes[lane] = Stream(self._channel, f"/{SERVICE}/Step")
        await _send(stream, step_id, plan)
        return stream

    async def _drive(self, lane: int, step_id: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        answers = StepAnswers(step_id, plan, self._info)
        begin = time.perf_counter()
        stream = await self._begin(lane, step_id, plan)
        while True:
            message = None
            while message is None:
                try:
                    async with asyncio.timeout(HOLE_TIMEOUT):
                        message = answers.take(await stream.read())
                except TimeoutError:
                    raise Unavailable(f"no message from the attention worker for {HOLE_TIMEOUT:g} s") from None
            header, payload = message
            compute = header.compute_ns / 1e9
            legs.add("worker", compute)
            legs.add("attention_wire", max(0.0, time.perf_counter() - begin - compute))
            if header.HasField("failure"):
                raise from_failure(header.failure)
            if header.HasField("result"):
                legs.split("worker", header.stages_ns)
                return result_from_proto(header.result, payload)
            assert payload is not None, "checked: a MoE input"
            out_TD = await hole.fill(header.layer, payload)
            begin = time.perf_counter()
            reply = attention_pb2.StepRequest(step_id=step_id, layer=header.layer)
            await stream.write(tensors.encode_rows(reply, out_TD, "step_id"))

    async def close(self) -> None:
        """See AttentionLink."""
        for stream in self._lanes.values():
            stream.cancel()
        await self._channel.close(None)


def attention_link(address: str, access: WorkerAccess = PLAIN) -> AttentionLink:
    """A link to what an entry of a list of attention workers names: one, or the stages of a pipeline."""
    links = [GrpcAttentionLink(stage, access=access) for stage in stages_of(address)]
    return links[0] if len(links) == 1 else PipelineLink(links)


def _plan_messages(step_id: int, plan: StepPlan) -> Iterable[bytes]:
    request = attention_pb2.StepRequest(step_id=step_id, plan=plan_to_proto(plan))
    if plan.hidden_state is None:
        return [tensors.encode(request)]
    return tensors.encode_rows(request, plan.hidden_state, "step_id")


async def _send(stream: Stream, step_id: int, plan: StepPlan) -> None:
    try:
        await stream.write(_plan_messages(step_id, plan))
    except Unavailable as error:
        try:
            # The stream has ended since its last step. Only who reads is told the reason, such as SHUTTING_DOWN.
            await stream.read()
        except Unavailable as ended:
            if ended.reason is Reason.SHUTTING_DOWN:
                raise
        raise StepNotBegun(error.message) from error
