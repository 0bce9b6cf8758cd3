"""Whose requests VllmEngine.Abort may end: the caller's own, and with the scope `control` everyone's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smg_grpc_proto")

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer
from router.engine import Engine
from router.service import GenerationService
from router.vllm_engine import vllm_engine_service
from router.vllm_engine.service import MAX_ABORTED
from tests import goldens
from tests.router.served import TOKENIZER
from tests.router.tiny import attention_link, serving, until
from tests.security.test_tokens import ALICE, BOB, OPERATOR, bearer, run, tokens_file

__all__ = ["tokens_file"]


@contextlib.asynccontextmanager
async def both_services(security: SecuritySettings) -> AsyncIterator[tuple[Engine, Any, str]]:
    async with serving(attention_link()) as engine:
        generation = GenerationService(engine, TOKENIZER, "tiny", "float32")
        theirs = vllm_engine_service(generation, engine, "tiny", "float32", goldens.DIRECTORY)
        assert theirs is not None
        server = RoleServer([generation.as_service(), theirs], security)
        address = await server.start("127.0.0.1:0")
        channel = open_channel(address)
        try:
            yield engine, vllm_engine_pb2_grpc.VllmEngineStub(channel), address
        finally:
            await channel.close(None)
            await server.stop(0)


def endless(request_id: str) -> Any:
    """Until the context is full, hundreds of steps later."""
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(input_ids=goldens.PROMPTS["len7"]),
        sampling_params=vllm.SamplingParams(temperature=0, ignore_eos=True),
        stream=True,
    )


async def begin(stub: Any, request_id: str, metadata: Any) -> Any:
    """A stream that has had its first message."""
    call = stub.Generate(endless(request_id), metadata=metadata)
    await call.read()
    return call


async def reason(call: Any) -> str:
    """Why a stream ended."""
    last: Any = None
    while (message := await call.read()) is not grpc.aio.EOF:
        last = message
    return str(last.complete.finish_reason)


def abort(stub: Any, metadata: Any, *request_ids: str) -> Any:
    return stub.Abort(vllm.AbortRequest(request_ids=request_ids), metadata=metadata)


def test_only_its_own_and_with_control_everyones(tokens_file: Path) -> None:
    async def main() -> None:
        async with both_services(SecuritySettings(tokens_file=str(tokens_file))) as (engine, stub, _):
            first = await begin(stub, "a", bearer(ALICE))
            second = await begin(stub, "b", bearer(ALICE))
            await abort(stub, (*bearer(BOB), ("x-caller", "alice")), "a", "b", "nobody's")
            assert engine.num_running + engine.num_waiting == 2
            assert (await first.read()).chunk.token_ids  # goes on
            await abort(stub, bearer(ALICE), "a")
            assert await reason(first) == "abort"
            assert engine.num_running + engine.num_waiting == 1
            await abort(stub, bearer(OPERATOR), "b")
            assert await reason(second) == "abort"
            await until(lambda: not engine.num_running)

    run(main())


def test_a_request_of_the_other_service_counts_too(tokens_file: Path) -> None:
    async def main() -> None:
        security = SecuritySettings(tokens_file=str(tokens_file))
        async with both_services(security) as (_, stub, address), AsyncClient(address, token=ALICE) as alice:
            stream = alice.stream("hello", max_tokens=400, ignore_eos=True, request_id="a")
            await stream.__anext__()
            await abort(stub, bearer(BOB), "a")
            await stream.__anext__()
            await abort(stub, bearer(ALICE), "a")
            assert (await stream.completion()).finish_reason == "aborted"

    run(main())


def test_an_id_used_again_belongs_to_who_uses_it_now(tokens_file: Path) -> None:
    async def main() -> None:
        async with both_services(SecuritySettings(tokens_file=str(tokens_file))) as (engine, stub, _):
            first = await begin(stub, "a", bearer(ALICE))
            first.cancel()
            await until(lambda: not engine.num_running)
            second = await begin(stub, "a", bearer(BOB))
            await abort(stub, bearer(ALICE), "a")
            assert (await second.read()).chunk.token_ids
            await abort(stub, bearer(BOB), "a")
            assert await reason(second) == "abort"

    run(main())


def test_where_nobody_has_to_prove_anything_everyone_may() -> None:
    async def main() -> None:
        async with both_services(SecuritySettings()) as (_, stub, _address):
            call = await begin(stub, "a", (("x-caller", "alice"),))
            await abort(stub, (("x-caller", "bob"),), "a")
            assert await reason(call) == "abort"

    run(main())


def test_so_many_ids_at_a_time() -> None:
    async def main() -> None:
        async with both_services(SecuritySettings()) as (_, stub, _address):
            await abort(stub, None, *["x"] * MAX_ABORTED)
            with pytest.raises(grpc.aio.AioRpcError, match=r"request_ids: holds 1025 ids, limit is 1024"):
                await abort(stub, None, *["x"] * (MAX_ABORTED + 1))

    run(main())
