"""A worker that answers wrongly: twice, too late, to nobody, or with what cannot be an answer. On the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from grokmoe import tensors
from grokmoe.errors import Reason, Unavailable
from grokmoe.status import to_failure
from grokmoe.v1 import expert_pb2, tensor_pb2
from router.transport.base import CorruptReply
from router.transport.grpc_expert import GrpcExpertLink
from tests.router.tiny import TIMEOUT, until

ROWS = torch.arange(12.0).reshape(3, 4)
CALL = (0, (1,), (3,), ROWS)
Response = expert_pb2.ForwardResponse


class Conversation:
    """The worker's side of one stream."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def ask(self) -> expert_pb2.ForwardRequest:
        """The next request."""
        data = await self._context.read()
        assert data is not grpc.aio.EOF  # type: ignore[attr-defined]
        return tensors.decode(expert_pb2.ForwardRequest, data)[0]

    async def answer(self, request_id: int, rows_ND: torch.Tensor | None = None, **header: Any) -> None:
        """Sends an answer, whether it was asked for or not. rows_ND: unset: those of the request, negated."""
        rows_ND = -ROWS if rows_ND is None else rows_ND
        await self.send(tensors.encode(Response(request_id=request_id, **header), rows_ND))

    async def send(self, data: bytes) -> None:
        await self._context.write(data)


Script = Callable[[Conversation], Awaitable[None]]


@contextlib.asynccontextmanager
async def worker(path: Path, script: Script, describes: bool = True) -> AsyncIterator[GrpcExpertLink]:
    """A link to a server that follows `script` on every stream, then answers properly."""

    async def forward(_: Any, context: Any) -> None:
        conversation = Conversation(context)
        await script(conversation)
        while (data := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await conversation.answer(tensors.decode(expert_pb2.ForwardRequest, data)[0].request_id)

    async def describe(_: Any, context: Any) -> Any:
        return expert_pb2.ExpertDescribeResponse(
            dtype=tensor_pb2.DATA_TYPE_FLOAT32, hidden_size=4, max_rows=8, draining=True
        )

    handlers = {
        "Forward": grpc.stream_stream_rpc_method_handler(forward),
        "Describe": grpc.unary_unary_rpc_method_handler(
            describe,
            expert_pb2.ExpertDescribeRequest.FromString,
            expert_pb2.ExpertDescribeResponse.SerializeToString,
        ),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grokmoe.v1.Expert", handlers),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    link = GrpcExpertLink(f"unix:{path}")
    try:
        if describes:
            assert (await link.describe()).is_draining
        async with asyncio.timeout(TIMEOUT):
            yield link
    finally:
        await link.close()
        await server.stop(None)


async def assert_usable(link: GrpcExpertLink) -> None:
    assert torch.equal((await link.forward(0, *CALL)).rows_ND, -ROWS)


def num_discarded(link: GrpcExpertLink) -> int:
    return link._lanes[0].num_discarded


def test_an_answer_that_comes_twice(tmp_path: Path) -> None:
    async def script(stream: Conversation) -> None:
        for _ in range(2):
            request = await stream.ask()
            await stream.answer(request.request_id)
            await stream.answer(request.request_id, ROWS * 7)

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            for number in range(1, 4):
                await assert_usable(link)
                await until(lambda number=number: num_discarded(link) == min(number, 2))  # type: ignore[misc]

    asyncio.run(main())


@pytest.mark.parametrize("comes_in_parts", [False, True])
def test_an_answer_that_comes_late(tmp_path: Path, comes_in_parts: bool) -> None:
    """Between the second request and its answer stands the answer to the first, which nobody waits for."""

    async def script(stream: Conversation) -> None:
        late, other = await stream.ask(), await stream.ask()
        if comes_in_parts:
            await stream.answer(late.request_id, ROWS[:1] * 7, remaining_rows=2)
            await stream.answer(late.request_id, ROWS[1:] * 7)
        else:
            await stream.answer(late.request_id, ROWS * 7)
        await stream.answer(other.request_id)

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            leaving = asyncio.create_task(link.forward(0, *CALL))
            await until(lambda: 0 in link._lanes and not link._lanes[0]._writes and bool(link._lanes[0]._waiting))
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            await assert_usable(link)
            assert num_discarded(link) == 1
            await assert_usable(link)

    asyncio.run(main())


def test_an_answer_to_nobody(tmp_path: Path) -> None:
    async def script(stream: Conversation) -> None:
        request = await stream.ask()
        for request_id in (0, request.request_id + 1, 2**64 - 1):
            await stream.answer(request_id, ROWS * 7)
        await stream.answer(request.request_id)

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            await assert_usable(link)
            assert num_discarded(link) == 3
            await assert_usable(link)

    asyncio.run(main())


@pytest.mark.parametrize(
    "payload",
    [
        ROWS[:2],
        ROWS[:, :3],
        ROWS.bfloat16(),
        ROWS[None],
        ROWS.reshape(-1),
        tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3, 4], data=bytes(47)),
        tensor_pb2.Tensor(dtype=99, shape=[3, 4], data=bytes(48)),  # type: ignore[arg-type]
        None,
    ],
    ids=["rows", "width", "dtype", "dims", "flat", "bytes", "no type", "nothing"],
)
def test_an_answer_of_another_shape(tmp_path: Path, payload: torch.Tensor | tensor_pb2.Tensor | None) -> None:
    async def script(stream: Conversation) -> None:
        request_id = (await stream.ask()).request_id
        if isinstance(payload, torch.Tensor):
            await stream.answer(request_id, payload)
        else:
            await stream.send(Response(request_id=request_id, payload=payload).SerializeToString())

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            with pytest.raises(CorruptReply):
                await link.forward(0, *CALL)
            await assert_usable(link)

    asyncio.run(main())


@pytest.mark.parametrize("remaining_rows", [6, 2**32 - 1])
def test_an_answer_with_more_rows_than_the_worker_takes(tmp_path: Path, remaining_rows: int) -> None:
    async def script(stream: Conversation) -> None:
        await stream.answer((await stream.ask()).request_id, ROWS, remaining_rows=remaining_rows)

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            with pytest.raises(CorruptReply, match="limit is 8"):
                await link.forward(0, *CALL)
            await assert_usable(link)

    asyncio.run(main())


def test_bytes_that_are_no_answer_end_the_stream(tmp_path: Path) -> None:
    num_streams = 0

    async def script(stream: Conversation) -> None:
        nonlocal num_streams
        num_streams += 1
        if num_streams == 1:
            await stream.ask()
            await stream.send(b"\xff\xff\xff")

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            with pytest.raises(Unavailable, match="ForwardResponse"):
                await link.forward(0, *CALL)
            await assert_usable(link)
            assert num_streams == 2

    asyncio.run(main())


def test_a_worker_that_refuses_because_it_ends(tmp_path: Path) -> None:
    async def script(stream: Conversation) -> None:
        error = Unavailable("about to end", reason=Reason.SHUTTING_DOWN)
        answer = Response(request_id=(await stream.ask()).request_id, failure=to_failure(error))
        await stream.send(answer.SerializeToString())

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            with pytest.raises(Unavailable) as caught:
                await link.forward(0, *CALL)
            assert caught.value.reason is Reason.SHUTTING_DOWN
            await assert_usable(link)

    asyncio.run(main())


@pytest.mark.parametrize(("timeout", "told"), [(None, 0), (0.25, 250), (0.0, 1), (1e-9, 1)])
def test_the_worker_is_told_how_long_somebody_waits(tmp_path: Path, timeout: float | None, told: int) -> None:
    asked: list[int] = []

    async def script(stream: Conversation) -> None:
        request = await stream.ask()
        asked.append(request.timeout_ms)
        await stream.answer(request.request_id)

    async def main() -> None:
        async with worker(tmp_path / "s", script, describes=False) as link:
            await link.forward(0, *CALL, timeout=timeout)
        assert asked == [told]

    asyncio.run(main())


def test_a_caller_that_leaves_in_the_middle_of_a_request(tmp_path: Path) -> None:
    """The worker does not read: the request's later messages are stuck. The other call's turn comes all the same."""
    large_ND = torch.zeros(2_000_000, 4)
    go_on = asyncio.Event()

    async def script(stream: Conversation) -> None:
        await go_on.wait()
        left = 1
        while left:
            left = (await stream.ask()).remaining_rows

    async def main() -> None:
        async with worker(tmp_path / "s", script) as link:
            leaving = asyncio.create_task(link.forward(0, 0, (1,), (len(large_ND),), large_ND))
            await until(lambda: 0 in link._lanes and link._lanes[0]._writing.locked())
            staying = asyncio.create_task(link.forward(0, *CALL))
            await until(lambda: len(link._lanes[0]._writes) == 2)
            leaving.cancel()
            go_on.set()
            assert torch.equal((await staying).rows_ND, -ROWS)
            assert leaving.cancelled()
            await until(lambda: not link._lanes[0]._writes)

    asyncio.run(main())
