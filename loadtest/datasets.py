"""Prompts from files: texts, JSON lines, conversations in ShareGPT's format, traces with times."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError
from loadtest.inputs import block_ids
from loadtest.planned import Input

CountTokens = Callable[[str], Awaitable[int]]
"""How many tokens the server makes of a text."""

FEWEST_TOKENS = 4
"""Conversations with a shorter prompt or answer are left out, as other tools do that read this format."""

MOST_PROMPT_TOKENS = 1024
MOST_TOKENS = 2048
"""And those with a longer prompt, or with more of both together."""

TRACE_BLOCK = 512
"""Tokens of a block in a trace that names blocks by hashes, unless told otherwise."""


def read_texts(path: Path, max_tokens: int) -> list[Input]:
    """A prompt per line; empty lines are left out."""
    return [Input(line, max_tokens) for line in _lines(path)]


def read_custom(path: Path, max_tokens: int) -> list[Input]:
    """A JSON object per line: `prompt` (text or ids) and, if wanted, `output_tokens`."""
    inputs = []
    for number, line in _objects(path):
        _check("prompt" in line, path, number, "no prompt")
        inputs.append(Input(_prompt(line["prompt"], path, number), int(line.get("output_tokens", max_tokens))))
    return inputs


async def read_sharegpt(
    path: Path, count: int, max_tokens: int | None, count_tokens: CountTokens, seed: int
) -> list[Input]:
    """`count` conversations in random order: the first turn is the prompt, the second says how long the answer is.

    max_tokens: instead of the second turn's length. The file is a JSON list of `{"conversations": [{"from", "value"},
    ...]}`; conversations of fewer than two turns, and those outside the bounds above, are left out.
    """
    try:
        talks = json.loads(path.read_text())  # noqa: ASYNC240 - before the run nobody is kept waiting
        turns = [[str(turn["value"]) for turn in talk.get("conversations", ())[:2]] for talk in talks]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no ShareGPT file: {error}") from error
    random.Random(seed).shuffle(turns)
    inputs: list[Input] = []
    for prompt, answer in (pair for pair in turns if len(pair) == 2):
        if len(inputs) == count:
            break
        if not prompt or not answer:
            continue
        num_prompt = await count_tokens(prompt)
        num_output = max_tokens if max_tokens is not None else await count_tokens(answer)
        is_long_enough = num_prompt >= FEWEST_TOKENS and (max_tokens is not None or num_output >= FEWEST_TOKENS)
        if is_long_enough and num_prompt <= MOST_PROMPT_TOKENS and num_prompt + num_output <= MOST_TOKENS:
            inputs.append(Input(prompt, num_output))
    return inputs


@dataclasses.dataclass(frozen=True)
class TraceReader:
    """Reads a trace, a JSON object per line; each has when, what and how much.

    when: `timestamp`, in milliseconds, as in the traces of Mooncake and vLLM; or `arrival`, in seconds.
    what: `prompt` (text or ids), or `input_length` with `hash_ids`, which name the blocks of the prompt.
    how much: `output_length`.
    """

    vocab_size: int
    seed: int
    block_size: int = TRACE_BLOCK

    def read(self, path: Path) -> list[Input]:
        """By time."""
        inputs = [self._input(line, path, number) for number, line in _objects(path)]
        return sorted(inputs, key=lambda each: each.arrival or 0.0)

    def _input(self, line: dict[str, Any], path: Path, number: int) -> Input:
        when = "timestamp" in line or "arrival" in line
        _check(when and "output_length" in line, path, number, "no timestamp or no output_length")
        try:
            arrival = float(line["timestamp"]) / 1e3 if "timestamp" in line else float(line["arrival"])
            max_tokens = int(line["output_length"])
            if "prompt" in line:
                return Input(_prompt(line["prompt"], path, number), max_tokens, arrival)
            _check("input_length" in line, path, number, "neither prompt nor input_length")
            return Input(self._blocks(line, number), max_tokens, arrival)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error

    def _blocks(self, line: dict[str, Any], number: int) -> tuple[int, ...]:
        length = int(line["input_length"])
        # Without names, or with too few, a block has a name of its own: nobody shares it.
        names: Sequence[int] = line.get("hash_ids", ())
        ids: list[int] = []
        for index in range(-(-length // self.block_size)):
            name = int(names[index]) if index < len(names) else (1 << 40) + number * 100_000 + index
            ids += block_ids(name, self.block_size, self.vocab_size, self.seed)
        return tuple(ids[:length])


def cycle(inputs: Sequence[Input], count: int, seed: int) -> list[Input]:
    """`count` of them: a random choice if there are more, in turns if there are fewer."""
    if not inputs:
        raise ConfigError("the data set has no usable prompt")
    order = random.Random(seed).sample(range(len(inputs)), len(inputs))
    return [inputs[order[index % len(order)]] for index in range(count)]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        _check(isinstance(value, dict), path, number, "not an object")
        yield number, value


def _prompt(value: Any, path: Path, number: int) -> str | tuple[int, ...]:
    is_ids = isinstance(value, list) and all(isinstance(each, int) for each in value)
    _check((isinstance(value, str) or is_ids) and bool(value), path, number, "a prompt is text or token ids")
    return value if isinstance(value, str) else tuple(value)


def _check(is_right: bool, path: Path, number: int, message: str) -> None:
    if not is_right:
        raise ConfigError(f"{path}:{number}: {message}")
