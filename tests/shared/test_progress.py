"""What is told of a long read, and of a process's start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grokmoe import process_age
from grokmoe.progress import GIB, Progress


def test_a_line_at_intervals_and_one_at_the_end() -> None:
    now, lines = [0.0], []
    progress = Progress("experts", 10 * GIB, lines.append, lambda: now[0], interval=5)
    for _ in range(8):
        now[0] += 2
        progress.add(GIB)
    assert lines == [
        "experts: 3.0 of 10.0 GiB, 0.50 GiB/s, 14 s to go",
        "experts: 6.0 of 10.0 GiB, 0.50 GiB/s, 8 s to go",
    ]
    now[0] += 4
    progress.add(2 * GIB)
    assert progress.end() == "10.00 GiB in 20.0 s, 0.50 GiB/s"


def test_what_is_over_at_once_is_not_spoken_of() -> None:
    lines: list[str] = []
    progress = Progress("experts", 0, lines.append, lambda: 0.0)
    progress.add(0)
    assert progress.end() == "0.00 GiB in 0.0 s, 0.00 GiB/s"
    assert not lines


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.5); from grokmoe.process_age import process_age; print(process_age())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert 0.5 <= float(told.stdout) < 60


@pytest.mark.parametrize("content", ["", "1 (a b) R 2 3", None])
def test_where_the_system_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    if content is not None:
        (tmp_path / "stat").write_text(content)
    monkeypatch.setattr(process_age, "_STAT", tmp_path / "stat")
    assert 0 <= process_age.process_age() < 24 * 3600
