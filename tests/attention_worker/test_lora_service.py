"""Adapters over grpc: loaded by name, described, named by a plan, unloaded."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from attention_worker.service import SERVICE, AttentionService
from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.errors import FailedPrecondition, GrokmoeError, InvalidRequest, NotFound, Reason, Unavailable
from grokmoe.plan_codec import plan_to_proto
from grokmoe.server import RoleServer
from grokmoe.status import from_failure, from_rpc_error
from grokmoe.step_plan import GREEDY, SequenceChunk
from grokmoe.v1 import attention_pb2 as pb
from tests import lora_adapters
from tests.attention_worker.tiny_engine import adapter_store, attention_engine, moe, plan

CHUNK = SequenceChunk(tuple(lora_adapters.prompt("tokens")), 0, (0, 1, 2, 3, 4), GREEDY)


class Worker:
    """A worker behind a socket."""

    def __init__(self, service: AttentionService, channel: Any) -> None:
        self.service, self._channel = service, channel

    async def ask(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return await call(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def load(self, name: str) -> Any:
        reply = await self.ask(
            "LoadAdapter", pb.AttentionLoadAdapterRequest(name=name), pb.AttentionLoadAdapterResponse
        )
        return reply.adapter

    async def unload(self, adapter_id: str) -> None:
        request = pb.AttentionUnloadAdapterRequest(adapter_id=adapter_id)
        await self.ask("UnloadAdapter", request, pb.AttentionUnloadAdapterResponse)

    async def described(self) -> list[str]:
        reply = await self.ask("Describe", pb.AttentionDescribeRequest(), pb.AttentionDescribeResponse)
        return [adapter.id for adapter in reply.adapters]

    async def step(self, chunk: SequenceChunk) -> list[int]:
        """The tokens that it draws. Raises what it refuses with."""
        call = self._channel.stream_stream(f"/{SERVICE}/Step")()
        proto = plan_to_proto(plan(self.service._engine, chunk))
        await call.write(tensors.encode(pb.StepRequest(step_id=1, plan=proto)))
        while True:
            header, x_TD = tensors.decode(pb.StepResponse, await call.read())
            if header.HasField("failure"):
                call.cancel()
                raise from_failure(header.failure)
            if header.HasField("result"):
                await call.done_writing()
                return list(header.result.token_ids)
            moe_TD = moe().fill_now(header.layer, x_TD)
            await call.write(tensors.encode(pb.StepRequest(step_id=1, layer=header.layer), moe_TD))


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Worker]:
    service = AttentionService(attention_engine(adapters=adapter_store({}, root)))
    server = RoleServer([service.as_service()])
    channel = open_channel(await server.start(f"unix:{root}/socket"))
    try:
        yield Worker(service, channel)
    finally:
        await channel.close(None)
        await server.stop(0)


def test_from_load_to_unload(tmp_path: Path) -> None:
    shutil.copytree(lora_adapters.FOLDER / "tokens", tmp_path / "it")

    async def main() -> None:
        async with serving(tmp_path) as worker:
            assert await worker.described() == []
            adapter = await worker.load("it")
            assert (adapter.name, adapter.rank, adapter.added_tokens) == ("it", 2, 5)
            assert list(adapter.targets) == ["k_proj", "o_proj"]
            assert (await worker.load("it")).id == adapter.id, "loading again changes nothing"
            assert await worker.described() == [adapter.id]
            named = dataclasses.replace(CHUNK, adapter=adapter.id)
            assert await worker.step(named) == lora_adapters.greedy("tokens")[:1]
            await worker.unload(adapter.id)
            await worker.unload(adapter.id)
            assert await worker.described() == []
            with pytest.raises(FailedPrecondition) as error:
                await worker.step(named)
            assert error.value.reason is Reason.ADAPTER_NOT_LOADED

    asyncio.run(main())


def test_refusals(tmp_path: Path) -> None:
    lora_adapters.changed(tmp_path / "dora", config={"use_dora": True})
    cases: list[tuple[str, type[GrokmoeError], Reason]] = [
        ("dora", FailedPrecondition, Reason.ADAPTER_REFUSED),
        ("none", NotFound, Reason.NOT_FOUND),
        ("../dora", InvalidRequest, Reason.INVALID_FIELD),
    ]

    async def main() -> None:
        async with serving(tmp_path) as worker:
            for name, kind, reason in cases:
                with pytest.raises(kind) as error:
                    await worker.load(name)
                assert error.value.reason is reason
            worker.service.drain()
            with pytest.raises(Unavailable):
                await worker.load("dora")

    asyncio.run(main())
