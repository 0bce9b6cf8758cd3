"""Every role reads its slice straight from any layout: the goldens through the real engines."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

from grokmoe.checkpoint import Checkpoint
from router.engine import Engine
from tests import goldens
from tests.cluster.command import running
from tests.layouts import writers
from tests.topologies import Setup, fused, request, run, split

NUM_TOKENS = 16
LAYOUTS = sorted(writers.WRITERS.keys() - {"keyfan"})
"""Names alone make no difference to how rows are read: of those that are safetensors, SGLang's will do."""


async def check(engine: Engine, prompt: str) -> None:
    tokens, logits = await run(engine, request(goldens.PROMPTS[prompt], NUM_TOKENS, logits=True))
    assert tokens == goldens.greedy("seed", prompt)
    expected = goldens.logits("seed", prompt)
    assert logits is not None
    assert float((logits[: len(expected)] - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topology", [fused, split])
def test_the_goldens_of_a_layout(tmp_path: Path, layout: str, topology: object) -> None:
    writers.WRITERS[layout](writers.TINY_A, tmp_path / "model")

    async def go() -> None:
        async with topology(Setup(tmp_path / "model", num_experts=2)) as engine:  # type: ignore[operator]
            for prompt in ("len1", "len33"):
                await check(engine, prompt)

    asyncio.run(go())


def test_xai_integers_through_the_engine(tmp_path: Path) -> None:
    """The engine computes with what the files mean: the same logits as of a checkpoint of ours that says so."""
    meant = writers.jax_release(writers.TINY_A, tmp_path / "jax")
    writers.save(tmp_path / "ours", writers.raw_config(writers.TINY_A), meant)

    async def logits(model: Path, dtype: str) -> torch.Tensor:
        async with fused(Setup(model, dtype=dtype, variant="xai")) as engine:
            _, found = await run(engine, request(goldens.PROMPTS["len33"], 2, logits=True))
            assert found is not None
            return found

    for dtype in ("float32", "bfloat16"):
        theirs, ours = (asyncio.run(logits(tmp_path / layout, dtype)) for layout in ("jax", "ours"))
        assert torch.equal(theirs, ours)


@pytest.mark.cluster
@pytest.mark.parametrize("layout", ["gguf-bf16", "jax"])
def test_processes_without_a_config_json(tmp_path: Path, layout: str) -> None:
    """`grokmoe up` of a directory that has one file of llama.cpp's; xAI's would be the released model without one."""
    from grokmoe import Client

    writers.WRITERS[layout](writers.TINY_A, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists() == (layout == "jax")
    model = ("--model", str(tmp_path / "model"), "--dtype", "float32", "--kv-gib", "0.001")
    with running("up", *model, "--port", "0", "--experts", "2") as up, Client(up.wait_ready()) as client:
        done = client.generate(goldens.PROMPTS["len7"], max_tokens=16, temperature=0, ignore_eos=True)
        assert list(done.token_ids) == goldens.greedy("seed", "len7")
        assert client.model().vocab_size == 512


def test_the_config_hash_is_the_same_where_the_config_is(tmp_path: Path) -> None:
    """Roles compare it: one may read another layout of the same model."""
    hashes = set()
    for layout in writers.WRITERS.keys() - {"gguf-f32", "gguf-bf16"}:
        writers.WRITERS[layout](writers.TINY_A, tmp_path / layout)
        with Checkpoint.open(tmp_path / layout) as checkpoint:
            hashes.add(checkpoint.config.content_hash)
    assert len(hashes) == 1
    with Checkpoint.open(writers.TINY_A) as checkpoint:
        assert hashes == {checkpoint.config.content_hash}
        untied = dataclasses.replace(checkpoint.config, tie_word_embeddings=False)
    assert untied.content_hash not in hashes
