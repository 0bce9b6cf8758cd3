"""`grokmoe top`: rates between two looks, what is drawn of them, and a live view that outlives its router's absence."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grokmoe import ConfigError, ExpertPlacement, LegLatency, ModelInfo, Status, Unavailable
from grokmoe.client import RETRIES
from grokmoe.cluster_status import read_status
from grokmoe.results import read_model
from launcher.__main__ import main
from launcher.top import TopSettings, rates, top
from launcher.top_view import draw
from tests.shared.fake_generation import MODEL, STATUS, FakeServer

NUM_EXPERTS = 4


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def model() -> ModelInfo:
    return read_model(MODEL)


def look(rows: list[int], steps: int, legs: dict[str, float]) -> Status:
    return dataclasses.replace(
        read_status(STATUS),
        steps=steps,
        placement=tuple(ExpertPlacement(expert, (expert % 2,), count, (count, 0)) for expert, count in enumerate(rows)),
        legs=tuple(LegLatency(leg, seconds, steps) for leg, seconds in legs.items()),
    )


def drawn(*arguments: object) -> str:
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(draw(*arguments))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


@given(
    st.lists(st.integers(0, 10**9), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    st.lists(st.integers(0, 10**6), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    st.integers(1, 10**4),
    st.floats(0.1, 100),
)
def test_rates_are_what_happened_between_two_looks(
    first: list[int], more: list[int], num_steps: int, seconds: float
) -> None:
    before = look(first, 7, {"expert": 1.0, "wire": 5.0})
    now = look(
        [a + b for a, b in zip(first, more, strict=True)],
        7 + num_steps,
        {"expert": 1.0 + 2.0 * num_steps, "wire": 5.0 + num_steps},
    )
    found = rates(model(), before, now, seconds)
    assert found.steps * seconds == pytest.approx(num_steps)
    assert [found.rows_E[expert] * seconds for expert in range(NUM_EXPERTS)] == pytest.approx(more)
    # Every token goes through every layer, there to so many experts.
    assert found.tokens * seconds * model().num_layers * model().experts_per_token == pytest.approx(sum(more))
    assert list(found.leg_seconds.items()) == [("expert", pytest.approx(2.0)), ("wire", pytest.approx(1.0))]
    assert drawn(model(), now, found)


def test_a_router_that_was_started_anew_has_no_rates_yet() -> None:
    found = rates(model(), look([9, 9, 9, 9], 7, {"wire": 5.0}), look([1, 1, 1, 1], 2, {"wire": 0.1}), 1.0)
    assert (found.steps, found.tokens, set(found.rows_E.values()), found.leg_seconds) == (0.0, 0.0, {0.0}, {})


def test_what_is_drawn() -> None:
    now = look([100, 50, 0, 0], 12, {"wire": 1.0})
    text = drawn(model(), now, rates(model(), look([0, 0, 0, 0], 2, {"wire": 0.5}), now, 1.0))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][0] == "tiny"
    assert ["expert", "1", "suspect", "12", "0@0-1+1@1", "loads", "1@0", "e:1"] in lines
    assert ["attention", "0", "ready", "4/10", "a:1"] in lines
    assert ["attention", "1", "ready", "0/20", "layers", "0-0", "1-1", "q:1", "p:1"] in lines
    assert ["0", "100", "█" * 16, "0", "█·"] in lines
    assert ["1", "50", "█" * 8, "1", "▒·"] in lines
    assert ["2", "0", "0", "··"] in lines
    assert ["wire", "50.00", "█" * 16] in lines


def test_a_deep_model_has_a_heat_map_that_fits() -> None:
    """Neighbours share a cell, which shows the busiest of them."""
    before, now = (
        dataclasses.replace(look([0], 2, {}), placement=(ExpertPlacement(0, (0,), sum(counts), counts),))
        for counts in ((0,) * 130, (1,) * 127 + (0, 100, 0))
    )
    line = next(line for line in drawn(model(), now, rates(model(), before, now, 1.0)).splitlines() if "█" in line)
    assert line.split()[-1] == "·" * 42 + "█·"  # three layers a cell, the last cell has one


def test_a_server_that_does_not_say_has_no_heat_map() -> None:
    before, now = (
        dataclasses.replace(look([0], 2, {}), placement=(ExpertPlacement(0, (0,), rows),)) for rows in (0, 100)
    )
    text = drawn(model(), now, rates(model(), before, now, 1.0))
    assert "layer by layer" not in text
    assert ["0", "100", "█" * 16, "0"] in [line.split() for line in text.splitlines()]


def test_a_picture(server: FakeServer, tmp_path: Path) -> None:
    picture = tmp_path / "top.svg"
    arguments = ["--once", "--interval", "0.1", "--address", server.address]
    assert main(["top", *arguments, "--svg", str(picture)]) == 0
    text = picture.read_text()
    assert text.startswith("<svg")
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
    assert "font-face" not in text
    assert "suspect" in text
    with pytest.raises(ConfigError, match="svg"):
        TopSettings(svg="top.svg")


def test_once(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--interval", "0.1", "--address", server.address]) == 0
    assert "suspect" in capsys.readouterr().out
    assert main(["top", "--json", "--interval", "0.1", "--address", server.address]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "tiny"
    assert [worker["state"] for worker in told["workers"]][:2] == ["ready", "suspect"]
    assert [stage["layer_begin"] for stage in told["workers"][2]["stages"]] == [0, 1]
    assert told["steps"] == 0


def test_an_absence_is_shown_and_waited_for(server: FakeServer) -> None:
    terminal = {"TERM": "xterm"}
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None, _environ=terminal)
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        seen.append(console.file.getvalue())  # type: ignore[attr-defined]
        if len(seen) == 1:
            server.generation.failures = [Unavailable("gone for a moment")] * (1 + RETRIES)
        if len(seen) == 3:
            raise KeyboardInterrupt

    assert top(TopSettings(address=server.address, interval=1.0), console, sleep) == 0
    assert ["gone for a moment" in text for text in seen] == [False, True, True]
    assert "suspect" in seen[2].removeprefix(seen[1]), "it is there again"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="interval is 0"):
        TopSettings(interval=0.0)
