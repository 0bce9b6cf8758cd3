"""Every RPC of the router with anything at all, beside a neighbour that generates: right code, nothing left over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.v1 import control_pb2, generation_pb2
from tests.fuzz.calls import EXPECTED, FUZZ, Loop, all_tasks, beside_a_neighbour, settled
from tests.fuzz.messages import wire
from tests.router.served import Served, service

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"],
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
METHODS = {
    f"/{each.full_name}/{method.name}": (method.input_type, method.server_streaming)
    for each in SERVICES
    for method in each.methods
    if method.name != "List"  # of health; nobody serves it yet
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Served, Callable[[Any], Any]]]:
    loop, stack = Loop(), contextlib.AsyncExitStack()
    try:
        yield loop.run(stack.enter_async_context(service())), loop.run
        loop.run(stack.aclose())
    finally:
        loop.close()


@pytest.mark.parametrize("method", METHODS)
def test_one_message(served: Any, method: str) -> None:
    serving, run = served
    num_tasks = len(run(all_tasks()))

    @FUZZ
    @given(wire(METHODS[method][0]))
    def check(data: bytes) -> None:
        assert run(beside_a_neighbour(serving, method, [data])) in EXPECTED

    check()
    run(settled(num_tasks))


@pytest.mark.parametrize("method", METHODS)
def test_no_message_or_several(served: Any, method: str) -> None:
    serving, run = served

    @settings(FUZZ, max_examples=3)
    @given(st.lists(wire(METHODS[method][0]), max_size=3).filter(lambda parts: len(parts) != 1))
    def check(parts: list[bytes]) -> None:
        code = run(beside_a_neighbour(serving, method, parts))
        # gRPC's library answers a unary call with no message or several by itself.
        assert code in EXPECTED | {"UNIMPLEMENTED", "CANCELLED"}

    check()
