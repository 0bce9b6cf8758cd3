"""Files that are read again when they change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grokmoe.errors import ConfigError
from grokmoe.watched_file import CHECK_INTERVAL, WatchedFiles


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += CHECK_INTERVAL


@pytest.fixture
def clock() -> Clock:
    return Clock()


def number(parts: tuple[bytes, ...]) -> int:
    try:
        return sum(map(int, parts))
    except ValueError:
        raise ConfigError("no number") from None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("1")
    return path


def test_a_change_is_seen_after_the_interval(path: Path, clock: Clock) -> None:
    files = WatchedFiles((path,), number, "file", clock)
    assert files.get() == 1
    path.write_text("22")
    assert files.get() == 1
    clock.tick()
    assert files.get() == 22


def test_a_file_put_in_its_place_is_another_even_of_the_same_size_and_time(path: Path, clock: Clock) -> None:
    files = WatchedFiles((path,), number, "file", clock)
    beside, found = path.with_name("beside"), path.stat()
    beside.write_text("2")
    os.utime(beside, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(beside, path)
    clock.tick()
    assert files.get() == 2


def test_what_cannot_be_used_leaves_the_old_and_is_said_once(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    files = WatchedFiles((path,), number, "the file", clock)
    path.write_text("half writ")
    for _ in range(3):
        clock.tick()
        assert files.get() == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the file has changed and cannot be used" in caplog.text
    assert "half writ" not in caplog.text
    path.unlink()
    clock.tick()
    assert files.get() == 1
    path.write_text("3")
    clock.tick()
    assert files.get() == 3


def test_files_that_belong_together_are_read_together(tmp_path: Path, clock: Clock) -> None:
    paths = (tmp_path / "a", tmp_path / "b")
    for path in paths:
        path.write_text("1")
    files = WatchedFiles(paths, number, "files", clock)
    paths[1].write_text("10")
    clock.tick()
    assert files.get() == 11


@pytest.mark.parametrize("text", [None, "x"])
def test_the_first_reading_must_do(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError):
        WatchedFiles((path,), number, "the file")
