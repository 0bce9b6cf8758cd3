"""Made-up prompts: random token ids, with lengths from a distribution and, if wanted, with prefixes in common.

Random ids share no prefix by chance, so what a prefix cache does is what the test asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grokmoe.errors import ConfigError
from loadtest.lengths import Lengths
from loadtest.planned import Input

FIRST_ID = 4
"""Below it vocabularies keep their control symbols."""

Ids = npt.NDArray[np.int64]


def random_inputs(
    num: int, input_lengths: Lengths, output_lengths: Lengths, vocab_size: int, seed: int, prefix_len: int = 0
) -> list[Input]:
    """`prefix_len` ids that all have in common, then ids of their own."""
    rng = np.random.default_rng((seed, 2))
    prefix = _draw(rng, prefix_len, vocab_size)
    lengths, outputs = input_lengths.draw(rng, num), output_lengths.draw(rng, num)
    return [
        Input((*prefix, *_draw(rng, int(length), vocab_size)), int(output))
        for length, output in zip(lengths, outputs, strict=True)
    ]


def prefix_inputs(
    num: int,
    num_prefixes: int,
    prefix_len: int,
    suffix_lengths: Lengths,
    output_lengths: Lengths,
    vocab_size: int,
    seed: int,
) -> list[Input]:
    """`num_prefixes` prefixes in turn, in a random order of requests, each with a suffix of its own."""
    if num_prefixes < 1:
        raise ConfigError(f"prefix_repetition_num_prefixes is {num_prefixes}, must be at least 1")
    rng = np.random.default_rng((seed, 2))
    prefixes = [_draw(rng, prefix_len, vocab_size) for _ in range(num_prefixes)]
    suffixes, outputs = suffix_lengths.draw(rng, num), output_lengths.draw(rng, num)
    which = rng.permutation(np.arange(num) % num_prefixes)
    return [
        Input((*prefixes[prefix], *_draw(rng, int(suffix), vocab_size)), int(output))
        for prefix, suffix, output in zip(which, suffixes, outputs, strict=True)
    ]


def block_ids(hash_id: int, block_size: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """The ids of one block of a trace that names blocks by hashes: equal names, equal ids."""
    return _draw(np.random.default_rng((seed, 3, hash_id)), block_size, vocab_size)


def check_context(inputs: Sequence[Input], context_length: int) -> list[Input]:
    """Those that fit; a text is taken to, the server judges it. ConfigError: none does."""
    fitting = [
        each for each in inputs if isinstance(each.prompt, str) or len(each.prompt) + each.max_tokens <= context_length
    ]
    if inputs and not fitting:
        raise ConfigError(f"no prompt and its output fit into the model's context of {context_length} tokens")
    return fitting


def _draw(rng: np.random.Generator, num: int, vocab_size: int) -> tuple[int, ...]:
    if vocab_size <= FIRST_ID:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens has none to draw")
    return tuple(rng.integers(FIRST_ID, vocab_size, num).tolist())
