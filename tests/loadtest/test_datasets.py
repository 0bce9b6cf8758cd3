"""Files of prompts: what is read, what is left out, what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from grokmoe.errors import ConfigError
from loadtest.datasets import TraceReader, cycle, read_custom, read_sharegpt, read_texts
from loadtest.planned import Input


async def count_words(text: str) -> int:
    return len(text.split())


def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("To be\n\nor not\n")
    assert read_texts(path, 9) == [Input("To be", 9), Input("or not", 9)]


def test_custom(tmp_path: Path) -> None:
    path = lines(tmp_path / "c", {"prompt": "a b"}, {"prompt": [5, 6], "output_tokens": 3})
    assert read_custom(path, 9) == [Input("a b", 9), Input((5, 6), 3)]


@pytest.mark.parametrize("line", [{"text": "a"}, {"prompt": ""}, {"prompt": ["a"]}, {"prompt": 5}, 5])
def test_custom_lines_that_are_no_prompt(tmp_path: Path, line) -> None:
    with pytest.raises(ConfigError, match=":1: "):
        read_custom(lines(tmp_path / "c", line), 9)


def talk(*turns):
    return {"conversations": [{"from": "human", "value": turn} for turn in turns]}


def sharegpt(path, talks, count=9, max_tokens=None, seed=0):
    path.write_text(json.dumps(talks))
    return asyncio.run(read_sharegpt(path, count, max_tokens, count_words, seed))


def test_sharegpt_takes_the_first_two_turns(tmp_path: Path) -> None:
    found = sharegpt(tmp_path / "s", [talk("one two three four", "a b c d e", "more")])
    assert found == [Input("one two three four", 5)]


def test_sharegpt_leaves_out_what_is_too_short_or_too_long(tmp_path: Path) -> None:
    fine = "word " * 4
    talks = [
        talk("hi", fine),
        talk(fine, "ok"),
        talk(fine),
        talk(),
        {},
        talk("word " * 1025, fine),
        talk("word " * 1000, "word " * 1049),
        talk("word " * 1000, "word " * 1048),
    ]
    assert [each.max_tokens for each in sharegpt(tmp_path / "s", talks)] == [1048]
    assert len(sharegpt(tmp_path / "s", talks, max_tokens=1)) == 3  # the answer's length does not matter then


def test_sharegpt_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    talks = [talk(f"{index} two three four", "a b c d") for index in range(50)]
    first = sharegpt(tmp_path / "s", talks, 5)
    assert first == sharegpt(tmp_path / "s", talks, 5)
    assert first != sharegpt(tmp_path / "s", talks, 5, seed=1)
    assert len(first) == 5


@pytest.mark.parametrize("text", ["", "{}x", '[{"conversations": [{"from": "human"}]}]', "[5]"])
def test_what_is_no_sharegpt_file(tmp_path: Path, text) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(ConfigError, match="ShareGPT"):
        asyncio.run(read_sharegpt(tmp_path / "s", 1, None, count_words, 0))


READER = TraceReader(vocab_size=1000, seed=0, block_size=4)


def test_a_trace_in_milliseconds_and_one_in_seconds(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t",
        {"timestamp": 2500, "prompt": [5, 6], "output_length": 3},
        {"arrival": 1.5, "prompt": "text", "output_length": 4},
    )
    assert READER.read(path) == [Input("text", 4, 1.5), Input((5, 6), 3, 2.5)]


def test_blocks_that_a_trace_shares_are_shared(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t",
        {"timestamp": 0, "input_length": 10, "output_length": 3, "hash_ids": [1, 2, 3]},
        {"timestamp": 1, "input_length": 12, "output_length": 3, "hash_ids": [1, 2, 4]},
        {"timestamp": 2, "input_length": 8, "output_length": 3},
        {"timestamp": 3, "input_length": 8, "output_length": 3},
    )
    one, two, three, four = (each.prompt for each in READER.read(path))
    assert [len(each) for each in (one, two, three, four)] == [10, 12, 8, 8]
    assert one[:8] == two[:8]
    assert one[8:] != two[8:10]
    assert len({one[:4], three[:4], three[4:], four[:4], four[4:]}) == 5


@pytest.mark.parametrize(
    "line",
    [
        {"input_length": 5, "output_length": 5},
        {"timestamp": 1, "input_length": 5},
        {"timestamp": 1, "output_length": 5},
        {"timestamp": "soon", "input_length": 5, "output_length": 5},
    ],
)
def test_trace_lines_that_say_too_little(tmp_path: Path, line) -> None:
    with pytest.raises(ConfigError, match=":1: "):
        READER.read(lines(tmp_path / "t", line))


def test_a_file_is_used_again_when_it_is_too_short() -> None:
    inputs = [Input(str(index), 1) for index in range(3)]
    twice = cycle(inputs, 6, 0)
    assert sorted(each.prompt for each in twice) == ["0", "0", "1", "1", "2", "2"]
    assert len(set(cycle(inputs, 2, 0))) == 2


def test_a_file_with_nothing_to_use() -> None:
    with pytest.raises(ConfigError):
        cycle([], 1, 0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_texts(tmp_path / "none", 1)
