"""Fixtures of the router's tests."""

from __future__ import annotations

import pytest

from router.transport import worker_access


@pytest.fixture(params=["local", "grpc"])
def both_streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams to workers on Unix sockets go past gRPC, and through it."""
    if request.param == "grpc":
        monkeypatch.setattr(worker_access, "find_socket", lambda address: None)
