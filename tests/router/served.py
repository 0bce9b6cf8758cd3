"""grokmoe.v1.Generation and Control over a real server, with tiny-a and a tokenizer of bytes behind them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.server import RoleServer
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import control_pb2_grpc, generation_pb2_grpc
from router.control import ControlService
from router.engine import Engine
from router.service import GenerationService
from tests.router.tiny import CONFIG, attention_link, serving


def byte_tokenizer() -> Tokenizer:
    """One token per byte from id 3 on, and ids up to the vocabulary's end that are words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + index for index, letter in enumerate(letters)}
    vocab |= {f"w{index}": index for index in range(len(vocab), CONFIG.vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


TOKENIZER = byte_tokenizer()


@dataclasses.dataclass
class Served:
    address: str
    engine: Engine
    client: AsyncClient
    channel: Any
    stub: Any
    control: Any
    server: RoleServer


@contextlib.asynccontextmanager
async def service(
    tokenizer: Tokenizer | None = TOKENIZER, model: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Served]:
    """A started server over an engine with everything in this process, and both kinds of client.

    model: changes to what the service takes for the model's configuration.
    """
    options.setdefault("attention", attention_link())
    async with serving(**options) as engine:
        engine.config = dataclasses.replace(CONFIG, **(model or {}))
        generation = GenerationService(engine, tokenizer, "tiny", "float32")
        server = RoleServer([generation.as_service(), ControlService(engine).as_service()])
        address = await server.start("127.0.0.1:0")
        await server.set_ready(True)
        channel = open_channel(address)
        try:
            async with AsyncClient(address, timeout=30, retries=0) as client:
                stub = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
                control = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
                yield Served(address, engine, client, channel, stub, control, server)
        finally:
            await channel.close(None)
            await server.stop(0)
