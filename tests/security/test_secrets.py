"""No token and no key in what processes say: logs, errors, status, flags, settings."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from attention_worker.config import AttentionWorkerSettings
from expert_worker.config import ExpertWorkerSettings
from grokmoe import AsyncClient, GrokmoeError
from grokmoe.server import ServerSettings
from launcher.connection import ConnectionSettings
from launcher.serve import ServeSettings
from launcher.up import UpSettings
from router.config import RouterSettings
from tests.security.test_tokens import ALICE, BOB, OPERATOR, ROUTER, bearer, generation, tokens_file

__all__ = ["tokens_file"]
SETTINGS = (
    AttentionWorkerSettings,
    ExpertWorkerSettings,
    RouterSettings,
    ServerSettings,
    ServeSettings,
    UpSettings,
    ConnectionSettings,
)
WRONG = "wrong-secret-0123456789"


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_name_files_of_secrets_never_secrets(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        if "str" in str(field.type) and any(
            word in field.name.split("_") for word in ("token", "tokens", "key", "secret", "password")
        ):
            assert field.metadata["metavar"] == "FILE", field.name


def test_neither_log_nor_errors_nor_status_say_a_token(
    tokens_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grokmoe.watched_file.CHECK_INTERVAL", 0.0)
    said: list[str] = []

    def append(text: str) -> None:
        with tokens_file.open("a") as file:
            file.write(text)

    async def main() -> None:
        async with generation(tokens_file) as (_, address):
            for token in (ALICE, OPERATOR, ROUTER, WRONG):
                async with AsyncClient(address, token=token, retries=0) as client:
                    for call in (
                        client.generate("x", max_tokens=1),
                        client.generate("x", temperature=-1),
                        client.status(),
                    ):
                        try:
                            said.append(repr(await call))
                        except GrokmoeError as error:
                            said.append(repr(error))
            append("bob:cluster:" + WRONG + " " + BOB)  # a line that cannot be, read at the next call
            async with AsyncClient(address, token=OPERATOR, metadata=dict(bearer(OPERATOR))) as client:
                said.append(repr(await client.status()))

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with caplog.at_level(logging.DEBUG):
            asyncio.run(main())
    finally:
        logging.getLogger().removeHandler(handler)
    everything = "\n".join([*said, stream.getvalue(), caplog.text])
    assert "refused" in everything
    assert "cannot be used" in everything
    for secret in (ALICE, BOB, OPERATOR, ROUTER, WRONG):
        assert secret not in everything
