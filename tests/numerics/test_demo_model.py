"""The embedded model: a trained one, whose routing is neither random nor tied, in both types and both topologies."""

from __future__ import annotations

import asyncio
import functools

import torch

from grokmoe.checkpoint import Checkpoint
from grokmoe.reference import Reference
from grokmoe.tokenizer import Tokenizer
from launcher.paths import DEMO_MODEL
from tests.topologies import Setup, fused, greedy, request, run, split

TEXT = """\
KING RICHARD.
Now is the winter of our discontent
Made glorious summer by this sun of York;
And all the clouds that lour'd upon our house
In the deep bosom of the ocean buried.

BUCKINGHAM.
My gracious lord, the mayor of London comes to greet you.
"""


@functools.cache
def prompt() -> tuple[int, ...]:
    return tuple(Tokenizer.from_file(DEMO_MODEL / "tokenizer.json").encode(TEXT))


@functools.cache
def expected() -> torch.Tensor:
    with Checkpoint.open(DEMO_MODEL) as checkpoint:
        return Reference.from_checkpoint(checkpoint).logits(list(prompt()))


async def logits_of(setup: Setup) -> torch.Tensor:
    async with fused(setup) as engine:
        _, logits = await run(engine, request(prompt(), 1, logits=True))
    assert logits is not None
    return logits


def test_float32_is_the_reference() -> None:
    logits = asyncio.run(logits_of(Setup(DEMO_MODEL)))
    assert (logits - expected()).abs().max() < 1e-4


def test_bfloat16_is_near_the_reference() -> None:
    """Relative RMS per position: the median is below 2 %, and no position is lost to another choice of experts."""
    logits = asyncio.run(logits_of(Setup(DEMO_MODEL, dtype="bfloat16")))
    errors = (logits - expected()).square().mean(-1).sqrt() / expected().square().mean(-1).sqrt()
    assert errors.median() < 0.02, errors
    assert errors.max() < 0.3, errors


def test_it_has_learned_its_text() -> None:
    """Perplexity of lines like those it was trained on; a uniform guess is 2048."""
    ids = torch.tensor(prompt())
    loss = torch.nn.functional.cross_entropy(expected()[:-1], ids[1:])
    assert loss.exp() < 100


def test_the_split_writes_what_the_fused_writes() -> None:
    """With real routing, many sequences at once, chunked and spread over four workers with replicas."""

    async def texts(topology: object, setup: Setup) -> list[list[int]]:
        async with topology(setup) as engine:  # type: ignore[operator]
            prompts = [prompt()[begin:] for begin in range(0, len(prompt()), 7)]
            return await asyncio.gather(*(greedy(engine, ids, 12) for ids in prompts))

    alone = asyncio.run(texts(fused, Setup(DEMO_MODEL)))
    spread = asyncio.run(texts(split, Setup(DEMO_MODEL, num_experts=4, expert_replicas=2, max_step_tokens=48)))
    assert spread == alone
