"""Between roles: workers refuse who is not of the cluster, and the router refuses who is no worker of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_worker.config import AttentionWorkerSettings
from attention_worker.service import AttentionService
from expert_worker.config import ExpertWorkerSettings
from expert_worker.engine import ExpertEngine
from expert_worker.service import ExpertService
from grokmoe import AsyncClient, Unauthenticated
from grokmoe.errors import ConfigError, GrokmoeError, Unavailable
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer, ServerSettings, Service
from grokmoe.settings import to_flags
from grokmoe.telemetry import ExpertMetrics, new_registry
from launcher.process import RoleProcess
from router.config import RouterSettings
from router.transport.grpc_attention import GrpcAttentionLink
from router.transport.grpc_expert import GrpcExpertLink
from router.transport.worker_access import WorkerAccess, WorkerAccessSettings
from tests import goldens
from tests.router.tiny import CONFIG, attention_engine, device, expert_set, golden_tokens
from tests.security.certificates import Authority

TOKEN, OTHER = "cluster-0123456789abcdef", "another-0123456789abcdef"


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def expert_service() -> Service:
    metrics = ExpertMetrics(new_registry())
    return ExpertService(ExpertEngine(expert_set(), metrics, device()), metrics, 512).as_service()


def attention_service() -> Service:
    return AttentionService(attention_engine()).as_service()


LINKS = {"expert": (expert_service, GrpcExpertLink), "attention": (attention_service, GrpcAttentionLink)}


@contextlib.asynccontextmanager
async def worker(role: str, security: SecuritySettings) -> AsyncIterator[str]:
    server = RoleServer([LINKS[role][0]()], security)
    try:
        yield await server.start("127.0.0.1:0")
    finally:
        await server.stop(0)


async def describe(role: str, address: str, settings: WorkerAccessSettings) -> Any:
    link: Any = LINKS[role][1](address, access=WorkerAccess(settings))
    try:
        return await link.describe()
    finally:
        await link.close()


@dataclasses.dataclass(frozen=True)
class Identity:
    """A cluster's certificates and token, as both sides take them."""

    worker: SecuritySettings
    router: WorkerAccessSettings


def mutual(directory: Path, name: str = "ca") -> Identity:
    authority = Authority(directory, name)
    server, own = authority.server(), authority.issue("router")
    return Identity(
        SecuritySettings(tls_certificate=server.certificate, tls_key=server.key, tls_client_ca=authority.ca),
        WorkerAccessSettings(
            worker_tls_ca=authority.ca, worker_tls_certificate=own.certificate, worker_tls_key=own.key
        ),
    )


def by_token(directory: Path, token: str = TOKEN) -> Identity:
    path = directory / f"{token}.token"
    path.write_text(f"router:cluster:{token}\n")
    return Identity(SecuritySettings(tokens_file=str(path)), WorkerAccessSettings(worker_token_file=str(path)))


@pytest.mark.parametrize("role", LINKS)
def test_mutual_tls(role: str, tmp_path: Path) -> None:
    own, other = mutual(tmp_path), mutual(tmp_path, "other")
    nobody = WorkerAccessSettings(worker_tls_ca=own.router.worker_tls_ca)
    other_cluster = dataclasses.replace(other.router, worker_tls_ca=own.router.worker_tls_ca)

    async def main() -> None:
        async with worker(role, own.worker) as address:
            assert (await describe(role, address, own.router)).config_hash == CONFIG.content_hash
            for access in (WorkerAccessSettings(), nobody, other_cluster):
                with pytest.raises(Unavailable):
                    await describe(role, address, access)
        async with worker(role, other.worker) as impostor:
            with pytest.raises(Unavailable):
                await describe(role, impostor, own.router)

    run(main())


@pytest.mark.parametrize("role", LINKS)
def test_the_clusters_token(role: str, tmp_path: Path) -> None:
    own, other = by_token(tmp_path), by_token(tmp_path, OTHER)
    client = tmp_path / "clients"
    client.write_text(f"alice:{OTHER}\nrouter:cluster:{TOKEN}")

    async def main() -> None:
        async with worker(role, own.worker) as address:
            assert (await describe(role, address, own.router)).config_hash == CONFIG.content_hash
            for access in (WorkerAccessSettings(), other.router):
                with pytest.raises(ConfigError, match="the worker refuses this router: ") as caught:
                    await describe(role, address, access)
                assert OTHER not in caught.value.message
        async with worker(role, SecuritySettings(tokens_file=str(client))) as address:
            with pytest.raises(ConfigError, match="the token of alice is not for cluster"):
                await describe(role, address, other.router)  # a client's token is no cluster's

    run(main())


def test_rows_go_over_streams_that_prove_who_sends_them(tmp_path: Path) -> None:
    own = by_token(tmp_path)

    async def forward(address: str, settings: WorkerAccessSettings) -> Any:
        link: Any = GrpcExpertLink(address, access=WorkerAccess(settings))
        try:
            with contextlib.suppress(ConfigError):
                await link.describe()
            return await link.forward(0, 0, (0,), (1,), torch.zeros(1, CONFIG.hidden_size))
        finally:
            await link.close()

    async def main() -> None:
        async with worker("expert", own.worker) as address:
            assert (await forward(address, own.router)).rows_ND.shape == (1, CONFIG.hidden_size)
            with pytest.raises(GrokmoeError, match="needs a bearer token"):
                await forward(address, WorkerAccessSettings())

    run(main())


def test_replaced_certificates_are_used_for_new_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokmoe.watched_file.CHECK_INTERVAL", 0.0)
    old = mutual(tmp_path)

    async def main() -> None:
        async with worker("expert", old.worker) as before:
            link: Any = GrpcExpertLink(before, access=WorkerAccess(old.router))
            rows = torch.zeros(1, CONFIG.hidden_size)
            await link.forward(0, 0, (0,), (1,), rows)
            new = mutual(tmp_path)  # another authority, in the same files
            assert new == old
            async with worker("expert", new.worker):
                await link.describe()  # on a new connection; the worker has read the files again, too
                await link.forward(0, 0, (0,), (1,), rows)  # on the old one
                await link.forward(1, 0, (0,), (1,), rows)
                await link.close()

    run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {"worker_tls_certificate": "x"},
        {"worker_tls_server_name": "x"},
        {"worker_tls_ca": "/nowhere"},
        {"worker_token_file": "/nowhere"},
    ],
)
def test_settings_that_cannot_be(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="worker_"):
        WorkerAccess(WorkerAccessSettings(**fields))


def test_a_token_in_the_clear_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = WorkerAccess(by_token(tmp_path).router)

    async def main() -> None:
        for address in ("127.0.0.1:1", "unix:/tmp/x"):
            await access.open(address).close()
        assert not caplog.text
        await access.open("10.0.0.1:1").close()

    run(main())
    assert "the token crosses the network to 10.0.0.1:1 in the clear" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.cluster
def test_a_cluster_of_processes_with_everything(tmp_path: Path) -> None:
    identity, tokens, clients = mutual(tmp_path), by_token(tmp_path), tmp_path / "clients"
    clients.write_text(f"alice:inference+control:{OTHER}\n")
    authority = Authority(tmp_path, "public")
    public = authority.server()
    common: Any = {"model": str(goldens.DIRECTORY), "dtype": "float32"}

    def of_worker() -> list[str]:
        fields = identity.worker.security()
        fields |= {"tokens_file": tokens.worker.tokens_file, "health_listen": "127.0.0.1:0"}
        return to_flags(ServerSettings(**fields))

    async def main() -> None:
        attention = AttentionWorkerSettings(**common, kv_gib=0.001, threads=1)
        experts = ExpertWorkerSettings(**common, threads=1)
        workers = [
            RoleProcess("attention", 0, "attention_worker", [*to_flags(attention), *of_worker()]),
            RoleProcess("expert", 0, "expert_worker", [*to_flags(experts), *of_worker()]),
        ]
        async with contextlib.AsyncExitStack() as stack:
            for process in workers:
                stack.push_async_callback(process.stop)
                await process.start()
            for process in workers:
                await process.wait_ready()
                assert process.health
            router = RouterSettings(
                **common,
                **{**dataclasses.asdict(identity.router), "worker_token_file": tokens.router.worker_token_file},
                attention=(workers[0].address,),
                experts=(workers[1].address,),
            )
            server = ServerSettings(tls_certificate=public.certificate, tls_key=public.key, tokens_file=str(clients))
            process = RoleProcess("router", 0, "router", [*to_flags(router), *to_flags(server)])
            stack.push_async_callback(process.stop)
            await process.start()
            await process.wait_ready()
            async with AsyncClient(process.address, tls=authority.client(), token=OTHER) as client:
                prompt = goldens.PROMPTS["len1"]
                answer = await client.generate(prompt, max_tokens=16, temperature=0, text=False, ignore_eos=True)
                assert answer.token_ids == tuple(golden_tokens("len1"))
                status = await client.status()
                assert TOKEN not in str(status)
                assert OTHER not in str(status)
            async with AsyncClient(process.address, tls=authority.client()) as stranger:
                with pytest.raises(Unauthenticated):
                    await stranger.generate(prompt)

    asyncio.run(asyncio.wait_for(main(), 120))
