"""Two results side by side: what is a regression, and the exit code it has."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from grokmoe.errors import ConfigError
from launcher.loadtest import loadtest
from loadtest import output
from loadtest.command import INVALID, OK, REGRESSION, run_compare
from loadtest.compare import compare
from loadtest.record import RequestRecord
from tests.loadtest.records import result_of, steady_run

Records = Sequence[RequestRecord]


def written(path: Path, records: Records) -> Path:
    output.prepare(path)
    output.write(path, result_of(records), records)
    return path


def code(tmp_path: Path, before: Records, after: Records, threshold: float = 0.05) -> int:
    sides = written(tmp_path / "a", before), written(tmp_path / "b", after)
    return run_compare(*sides, threshold, Console(file=io.StringIO()))


def test_the_same_is_no_regression(tmp_path: Path) -> None:
    assert code(tmp_path, steady_run(), steady_run()) == OK


def test_slower_is_one(tmp_path: Path) -> None:
    assert code(tmp_path, steady_run(200), steady_run(200, ttft=0.15)) == REGRESSION
    assert code(tmp_path, steady_run(200), steady_run(200, tpot=0.03)) == REGRESSION


def test_faster_is_none(tmp_path: Path) -> None:
    assert code(tmp_path, steady_run(200, ttft=0.15), steady_run(200)) == OK


def test_what_is_below_the_threshold_is_none(tmp_path: Path) -> None:
    assert code(tmp_path, steady_run(600), steady_run(600, ttft=0.103, tpot=0.0206)) == OK
    assert code(tmp_path, steady_run(600), steady_run(600, ttft=0.103, tpot=0.0206), threshold=0.01) == REGRESSION


def test_what_may_be_chance_is_none(tmp_path: Path) -> None:
    """Three requests that are twice as slow are three requests."""
    before, after = steady_run(40), steady_run(40)
    for record in after[10:12]:
        record.arrivals = [record.scheduled + 1.3 * (at - record.scheduled) for at in record.arrivals]
    after[11].end = after[11].arrivals[-1]
    changes = {change.name: change for change in compare((result_of(before), before), (result_of(after), after))}
    mean = changes["TTFT mean"]
    assert mean.after > mean.before
    assert not mean.is_regression(0.0)


def test_fewer_good_requests_are_one(tmp_path: Path) -> None:
    before, after = steady_run(100), steady_run(100)
    for record in after[::3]:
        record.arrivals[0] = record.scheduled  # TPOT far beyond its limit
        record.arrivals[-1] = record.end = record.scheduled + 9.0
    changes = {change.name: change for change in compare((result_of(before), before), (result_of(after), after))}
    assert changes["good requests"].is_regression(0.05)
    assert not changes["TTFT mean"].is_regression(0.05)


def test_a_result_that_is_invalid_is_told(tmp_path: Path) -> None:
    late = steady_run()
    for record in late:
        record.woken += 0.02
    assert code(tmp_path, steady_run(), late) == INVALID


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run_compare(tmp_path, tmp_path, 0.05, Console(file=io.StringIO()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = written(tmp_path / "a", steady_run(200)), written(tmp_path / "b", steady_run(200, tpot=0.04))
    assert loadtest(["compare", str(before), str(after)]) == REGRESSION
    told = capsys.readouterr().out
    assert "TPOT median, ms" in told
    assert "WORSE" in told
