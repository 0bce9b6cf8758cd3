"""A model with experts in float8_e4m3fn against the oracle with the same numbers, in every topology."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch

from expert_worker.expert_dtype import FP8
from expert_worker.kernels.reference import quantise_rows
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.reference import Reference
from router.engine import Engine
from tests import goldens
from tests.topologies import Setup, fused, request, run, split

SETUP = Setup(goldens.DIRECTORY, expert_dtype=FP8)


@pytest.fixture(scope="module")
def oracle() -> Reference:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
        config = checkpoint.config
    for name in weights:
        if names.expert_of(name) is not None:
            q, scale = quantise_rows(weights[name])
            weights[name] = q.float() * scale[:, None]
    return Reference(config, weights)


@pytest.mark.parametrize(
    "topology", [fused, split, lambda setup: split(dataclasses.replace(setup, deterministic=True))],
    ids=["fused", "split", "deterministic"],
)  # fmt: skip
def test_logits_and_tokens(
    oracle: Reference, topology: Callable[[Setup], contextlib.AbstractAsyncContextManager[Engine]]
) -> None:
    async def go() -> None:
        async with topology(SETUP) as engine:
            for prompt in ("len1", "len7", "len33"):
                ids = goldens.PROMPTS[prompt]
                tokens, logits = await run(engine, request(ids, 8, logits=True))
                expected = oracle.logits([*ids, *tokens[:-1]])
                assert logits is not None
                assert (logits - expected).abs().max() < 1e-4
                assert tokens == expected[len(ids) - 1 :].argmax(-1).tolist()
                assert (expected[: len(ids)] - goldens.logits("seed", prompt)).abs().max() > 1e-2, "another model"

    asyncio.run(go())
