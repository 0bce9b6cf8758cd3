"""How much memory is free, and which errors say that none is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from expert_worker import room
from tests.expert_worker.small_model import CPU


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose files are written by the test: 1000 KiB are available on the machine."""
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def limit(system: Path, most: str, used: int, file_pages: int) -> None:
    (system / "memory.max").write_text(f"{most}\n")
    (system / "memory.current").write_text(f"{used}\n")
    (system / "memory.stat").write_text(f"anon 77\ninactive_file {file_pages}\nactive_file 5\n")


def test_of_this_machine() -> None:
    assert 1 << 20 < room.free_bytes(CPU) < room.UNKNOWN


def test_the_smaller_one_counts(system: Path) -> None:
    assert room.free_bytes(CPU) == 1_024_000
    limit(system, "max", 10, 0)
    assert room.free_bytes(CPU) == 1_024_000
    limit(system, "500000", 200_000, 100_000)
    assert room.free_bytes(CPU) == 400_000
    limit(system, "500000", 800_000, 100_000)
    assert room.free_bytes(CPU) == 0
    limit(system, "5000000000", 0, 0)
    assert room.free_bytes(CPU) == 1_024_000


@pytest.mark.parametrize("text", [None, "", "MemAvailable:", "MemAvailable: many kB"])
def test_a_system_that_does_not_say(system: Path, text: str | None) -> None:
    (system / "meminfo").unlink()
    if text is not None:
        (system / "meminfo").write_text(text)
    assert room.free_bytes(CPU) == room.UNKNOWN


def test_errors_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert room.is_out_of_memory(raised.value)
    for error in (MemoryError(), OSError(errno.ENOMEM, "no memory"), torch.OutOfMemoryError("CUDA out of memory")):
        assert room.is_out_of_memory(error)
    for error in (RuntimeError("the device fell off the bus"), OSError(errno.EIO, "bad disk"), ValueError("memory")):
        assert not room.is_out_of_memory(error)


def test_giving_back_what_nobody_took() -> None:
    room.give_back(CPU)
