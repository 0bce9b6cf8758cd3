"""vllm.grpc.engine.VllmEngine: the service by which gateways talk to vLLM, answered by this router.

Its messages come from the package smg-grpc-proto, which only the extra `smg` installs. Nothing else of the router
depends on it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from grokmoe.server import Service
from router.engine import Engine
from router.service import GenerationService

PROTO_PACKAGE = "smg_grpc_proto"
"""Where the messages are. Nothing is served without it."""


def vllm_engine_service(
    generation: GenerationService, engine: Engine, model_name: str, dtype: str, directory: str | Path
) -> Service | None:
    """What a server registers; None where the messages are not installed.

    model_name: what it is served under. dtype: computing type, such as "bfloat16".
    directory: the checkpoint's, with the tokenizer files that gateways fetch.
    """
    if importlib.util.find_spec(PROTO_PACKAGE) is None:
        return None
    from router.vllm_engine.info import ServedModel
    from router.vllm_engine.service import VllmEngine

    return VllmEngine(generation, engine, ServedModel.read(model_name, dtype, Path(directory))).as_service()
