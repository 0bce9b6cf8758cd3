"""grokmoe itself, through the service: gRPC, the SDK, streaming clients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import streams
from benchmarks.peers.child import PeerFailed
from benchmarks.peers.contender import Measured
from benchmarks.peers.workload import Workload
from grokmoe import AsyncClient
from grokmoe.errors import GrokmoeError
from grokmoe.settings import to_flags
from launcher.process import RoleProcess
from launcher.serve import ServeSettings
from launcher.up import Cluster, UpSettings

INT8_SETTING = "expert_dtype"
"""The field of ServeSettings that chooses the type of the experts' matrices, where there is one."""


@dataclasses.dataclass(frozen=True)
class Service:
    """One contender. experts: expert workers of `grokmoe up`; 0: `grokmoe serve`, all roles in one process.

    expert_dtype: of the experts' matrices; empty: what the other weights have.
    """

    row: str
    model: Path
    experts: int = 0
    expert_dtype: str = ""

    def missing(self) -> str | None:
        """What this version of the service lacks."""
        if self.expert_dtype and INT8_SETTING not in {field.name for field in dataclasses.fields(ServeSettings)}:
            return "this version has no --expert-dtype"
        return None

    async def measure(self, workload: Workload, seed: int) -> Measured:
        """Raises PeerFailed."""
        try:
            async with self._topology() as address, AsyncClient(address) as client:
                prompts = streams.Prompts((await client.model()).vocab_size, seed)

                async def ask(prompt: Sequence[int], new: int) -> AsyncIterator[int]:
                    options: dict[str, Any] = {"max_tokens": new, "temperature": 0.0, "ignore_eos": True, "text": False}
                    async with client.stream(prompt, **options) as stream:
                        async for delta in stream:
                            if delta.token_ids:
                                yield len(delta.token_ids)

                found = await streams.loads(ask, prompts, workload)
                if workload.clients:
                    found |= await streams.serving(ask, prompts, workload)
                    found |= await streams.serving_beside(ask, prompts, workload)
                return {self.row: found}
        except GrokmoeError as error:
            raise PeerFailed(error.message) from error

    @contextlib.asynccontextmanager
    async def _topology(self) -> AsyncIterator[str]:
        """The processes. Yields the address."""
        common: dict[str, Any] = {"model": str(self.model), "dtype": "bfloat16", "port": 0}
        if self.expert_dtype:
            common[INT8_SETTING] = self.expert_dtype
        if self.experts:
            async with Cluster(UpSettings(**common, experts=self.experts)) as cluster:
                yield cluster.address
            return
        process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(ServeSettings(**common))])
        await process.start()
        try:
            await process.wait_ready()
            yield process.address
        finally:
            await process.stop()
