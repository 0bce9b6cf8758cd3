"""Ranks that find each other, or do not: late, with other settings, at an address that is another's."""

from __future__ import annotations

import concurrent.futures
import logging
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from attention_worker.ranks import meeting as meeting_module
from attention_worker.ranks.meeting import Meeting
from grokmoe.errors import ConfigError, StartupError

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


def at_once(*acts: Callable[[], object]) -> list[object]:
    """What each gives, or the error it raises."""

    def outcome(act: Callable[[], object]) -> object:
        try:
            return act()
        except StartupError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(outcome, acts))


def test_they_meet_in_any_order_and_agree() -> None:
    """Followers may be there first."""
    port = free_port()
    facts = {"dtype": "float32", "num_pages": 7}

    def come(rank: int) -> torch.Tensor:
        if rank == 0:
            time.sleep(0.5)
        meeting = Meeting(rank, 3, LOOPBACK, port, timeout=20)
        meeting.agree(facts)
        return meeting.connect(torch.device("cpu")).host.all(torch.tensor([rank]))

    found = at_once(*(lambda rank=rank: come(rank) for rank in range(3)))
    assert all(got.flatten().tolist() == [0, 1, 2] for got in found)  # type: ignore[attr-defined]


def test_nobody_but_this_host_can_come_to_loopback() -> None:
    meeting = Meeting(0, 2, LOOPBACK, 0, timeout=5)
    port = int(meeting.address.rpartition(":")[2])
    with open("/proc/net/tcp") as table:
        listening = [fields[1] for line in table if (fields := line.split())[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"dtype": "bfloat16", "num_pages": 7}, "rank 0 has dtype float32, rank 1 has bfloat16"),
        ({"dtype": "float32", "num_pages": 8}, "rank 0 has num_pages 7, rank 1 has 8"),
        ({"dtype": "float32"}, "rank 0 has num_pages 7, rank 1 has nothing"),
    ],
)
def test_ranks_that_do_not_fit_are_named_by_both(theirs: dict[str, object], words: str) -> None:
    port = free_port()

    def come(rank: int) -> None:
        Meeting(rank, 2, LOOPBACK, port, timeout=20).agree(theirs if rank else {"dtype": "float32", "num_pages": 7})

    first, second = at_once(lambda: come(0), lambda: come(1))
    assert isinstance(first, ConfigError)
    assert words in first.message
    assert isinstance(second, ConfigError)


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(meeting_module, "TELL_AFTER", 0.2)
    meeting = Meeting(0, 3, LOOPBACK, free_port(), timeout=1)
    with caplog.at_level(logging.INFO), pytest.raises(StartupError, match=r"rank 1 of 3 did not come to 127\.0\.0\.1"):
        meeting.agree({"dtype": "float32"})
    assert "waiting for rank 1 of 3" in caplog.text


def test_a_first_rank_that_is_not_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(meeting_module, "TELL_AFTER", 0.2)
    with caplog.at_level(logging.INFO), pytest.raises(StartupError, match=r"rank 1 cannot meet rank 0 at 127\.0\.0\.1"):
        Meeting(1, 2, LOOPBACK, free_port(), timeout=1)
    assert "waiting for rank 0" in caplog.text


def test_an_address_that_is_taken() -> None:
    with socket.create_server((LOOPBACK, 0)) as server, pytest.raises(StartupError, match="rank 0 cannot listen"):
        Meeting(0, 2, LOOPBACK, server.getsockname()[1], timeout=5)


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(StartupError, match=r"rank 0 cannot listen at no-such-host\.invalid"):
        Meeting(0, 2, "no-such-host.invalid", 1234, timeout=0.5)


def test_a_name_that_is_known_a_moment_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cluster, where a pod is there before its name is."""
    looked_up = socket.getaddrinfo
    tries: list[str] = []

    def late(host: str, *args: object, **kwargs: object) -> object:
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return looked_up(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", late)
    assert Meeting(0, 2, LOOPBACK, 0, timeout=10).address.startswith(LOOPBACK)


def test_a_rank_that_went_before_all_had_connected() -> None:
    """One of three has agreed and is not seen again."""
    port, agreed = free_port(), threading.Barrier(3)

    def come(rank: int) -> object:
        meeting = Meeting(rank, 3, LOOPBACK, port, timeout=3)
        meeting.agree({"dtype": "float32"})
        agreed.wait(10)
        return None if rank == 2 else meeting.connect(torch.device("cpu"))

    first, second, _ = at_once(*(lambda rank=rank: come(rank) for rank in range(3)))
    for error in (first, second):
        assert isinstance(error, StartupError)
        assert "the 3 ranks cannot connect" in error.message
