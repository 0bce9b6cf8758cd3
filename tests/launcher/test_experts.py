"""`grokmoe experts`: what is typed, what goes over the wire, what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import grokmoe
from grokmoe import ConfigError, ExpertRange
from launcher.__main__ import main
from launcher.experts import describe_ranges, parse_experts
from tests.shared.fake_generation import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("3", [(3, 0, 64)]),
        ("0-2,7", [(0, 0, 64), (1, 0, 64), (2, 0, 64), (7, 0, 64)]),
        ("5@0-15", [(5, 0, 16)]),
        ("0, 3@7", [(0, 7, 8), (3, 7, 8)]),
        ("5@0-15,20+1", [(1, 0, 64), (5, 0, 16), (5, 20, 21)]),
        ("3:2/2", [(3, 0, 64, 1, 2)]),
        ("1,2:1,4/4@3+0", [(0, 0, 64), (1, 3, 4, 0, 4), (2, 3, 4, 0, 4), (1, 3, 4, 3, 4), (2, 3, 4, 3, 4)]),
    ],
)
def test_what_is_typed(text: str, ranges: list[tuple[int, ...]]) -> None:
    assert parse_experts(text, 8, 64) == [ExpertRange(*each) for each in ranges]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "3@", "3@x", "-1", "1@2-1", "none", "8", "3:1", "3:3/2"])
def test_what_cannot_be_typed(text: str) -> None:
    with pytest.raises(ConfigError, match="experts is"):
        parse_experts(text, 8, 64)


def test_what_is_shown_can_be_typed() -> None:
    text = "0-3:1/2@0-15+7@2-3"
    assert describe_ranges(parse_experts(text, 8, 64)) == text
    assert describe_ranges([]) == ""


def run(server: FakeServer, *arguments: str) -> int:
    return main(["experts", *arguments, "--address", server.address])


def test_status(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["worker", "state", "rows/s", "holds", "loads", "address"]
    assert lines[1].split() == ["1", "suspect", "12", "0@0-1+1@1", "1@0", "e:1"]
    assert lines[2:] == ["placement version 7, imbalance 1.50", "under way: move 1@0 from e:0 to e:1 (loading)"]
    assert run(server, "status", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["workers"][0]["held"][0] == {"expert": 0, "layer_begin": 0, "layer_end": 2, "slice": 0, "num_slices": 1}
    assert told["moves"][0]["target"] == "e:1"


def test_move_copy_drop(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "move", "3", "--from", "e:0", "--to", "e:9") == 0
    assert run(server, "copy", "3@0-1", "--to", "e:9") == 0
    assert run(server, "drop", "3", "--from", "1") == 0
    asked = [each for each in server.generation.requests if hasattr(each, "to")]
    assert [(getattr(each, "from"), each.to) for each in asked] == [("e:0", "e:9"), ("", "e:9"), ("e:1", "")]
    assert asked[1].experts[0].layer_end == 2
    assert "0.0 MB loaded in 1.50 s, old holder done after 250 ms, placement version 8" in capsys.readouterr().out


def test_rebalance(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "rebalance", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "move 1@0 from e:0 to e:1",
        "imbalance 2.00, forecast 1.00; gain 30.0 s, cost 4.0 s of expert computation",
        "nothing done: not asked to",
    ]
    assert run(server, "rebalance", "--force") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done"


def test_what_goes_wrong_is_said(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "drop", "3", "--from", "17") == 1
    assert "there is no expert worker 17" in capsys.readouterr().err
    server.generation.failures = [grokmoe.FailedPrecondition("worker 0 is the last ready holder")]
    assert run(server, "drop", "3", "--from", "e:0") == 1
    assert "grokmoe experts: error: worker 0 is the last ready holder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(server, "move", "3", "--to", "e:0")
    assert "--from" in capsys.readouterr().err
