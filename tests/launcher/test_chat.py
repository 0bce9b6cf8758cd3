"""`grokmoe generate -i` on a real terminal and in a pipe, against a scripted server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grokmoe import Client
from launcher.chat import HELP, SETTABLE
from launcher.generate import GenerateSettings
from tests.cluster.command import running
from tests.launcher.terminal import CTRL_C, CTRL_D, TIMEOUT, UP, Terminal
from tests.shared.fake_generation import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def prompts(server: FakeServer) -> list[str]:
    """Of the generations so far."""
    return [request.text for request in server.generation.requests if hasattr(request, "sampling")]


def piped(server: FakeServer, *lines: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "generate", "-i", "--address", server.address, *flags]
    return subprocess.run(
        command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=60, check=True
    )


def test_on_a_terminal(server: FakeServer, tmp_path: Path) -> None:
    with Terminal("generate", "-i", "--address", server.address, XDG_STATE_HOME=str(tmp_path)) as terminal:
        assert "tiny at" in terminal.wait_for("> ")
        terminal.press("hello\n")
        assert "Hello\r\n" in terminal.wait_for("> ")
        terminal.press("again\n")
        terminal.wait_for("Hello")
        terminal.wait_for("> ")
        assert prompts(server) == ["hello", "helloHello\nagain"]
        terminal.press("not sent")
        terminal.wait_for("not sent")
        terminal.interrupt_until("> ")
        terminal.press(UP + b"\n")  # the last line that was entered
        terminal.wait_for("Hello")
        terminal.wait_for("> ")
        assert prompts(server)[2].endswith("\nagain")
        terminal.press(CTRL_D)
        assert terminal.wait_ended() == 0
    assert (tmp_path / "grokmoe" / "history").read_text().split() == ["hello", "again"]  # repeats are one


def test_ctrl_c_cancels_the_generation_and_nothing_else(server: FakeServer, tmp_path: Path) -> None:
    with Terminal("generate", "-i", "--address", server.address, XDG_STATE_HOME=str(tmp_path)) as terminal:
        terminal.wait_for("> ")
        terminal.press("forever\n")
        terminal.wait_for("Hel")  # shown while the server is still at it
        assert not server.generation.cancelled.is_set()
        terminal.press(CTRL_C)
        terminal.wait_for("stopped")
        assert server.generation.cancelled.wait(TIMEOUT)
        terminal.wait_for("> ")
        terminal.press("/show\n")
        terminal.wait_for("foreverHel\r\n> ")
        terminal.press("/reset\nhello\n")
        terminal.wait_for("Hello")
        terminal.press("/quit\n")
        assert terminal.wait_ended() == 0
    assert prompts(server) == ["forever", "hello"]


def test_history_of_an_earlier_run(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "grokmoe").mkdir()
    (tmp_path / "grokmoe" / "history").write_text("of old\n")
    with Terminal("generate", "-i", "--address", server.address, XDG_STATE_HOME=str(tmp_path)) as terminal:
        terminal.wait_for("> ")
        terminal.press(UP + b"\n")
        terminal.wait_for("Hello\r\n> ")
        terminal.press(CTRL_D)
        assert terminal.wait_ended() == 0
    assert prompts(server) == ["of old"]


def test_a_history_that_cannot_be_kept(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Terminal("generate", "-i", "--address", server.address, XDG_STATE_HOME=str(tmp_path / "file")) as terminal:
        terminal.wait_for("> ")
        terminal.press(CTRL_D)
        assert terminal.wait_ended() == 0


def test_in_a_pipe_only_what_the_model_writes_is_printed(server: FakeServer) -> None:
    told = piped(server, "hello", "", "//slash", "a\\nb", "/show")
    first, second = "helloHello", "helloHelloHello"
    third = f"{second}\n/slashHello"
    assert prompts(server) == ["hello", first, f"{second}\n/slash", f"{third}\na\nb"]
    assert told.stdout == "Hello\n" * 4 + f"{third}\na\nbHello\n"
    assert told.stderr == ""


def test_the_prompt_of_the_command_line_is_the_first_turn(server: FakeServer) -> None:
    piped(server, "more", flags=("first",))
    assert prompts(server) == ["first", "firstHello\nmore"]


def test_turns_can_be_taken_back(server: FakeServer) -> None:
    told = piped(server, "one", "two", "/undo", "/show", "/undo", "/undo", "three")
    assert prompts(server) == ["one", "oneHello\ntwo", "three"]
    assert told.stdout == "Hello\nHello\noneHello\noneHello\n\nHello\n"
    assert told.stderr == "nothing to take back\n"


def test_settings_can_be_changed(server: FakeServer) -> None:
    told = piped(
        server,
        *("/set temperature 0.25", "/set max-tokens 7", "/set stop -", "/set min_p 0.5", "one"),
        *("/set max_tokens", "/set top_p x", "/set address y", "/set json_schema /nowhere", "/reset", "two", "/set"),
    )
    one, two = server.generation.requests
    assert (one.sampling.temperature, one.sampling.min_p) == (0.25, 0.5)
    assert (one.stopping.max_tokens, one.stopping.stop_strings) == (7, ["-"])
    assert (two.stopping.max_tokens, two.sampling.temperature) == (128, 0.25)
    for words in ("invalid float value: 'x'", "no setting address", "/nowhere"):
        assert words in told.stderr
    assert "temperature 0.25\n" in told.stdout


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(server: FakeServer) -> None:
    told = piped(server, "", "/what", "invalid", "hello", "/show")
    assert "nothing to go on from" in told.stderr
    assert "no command /what" in told.stderr
    assert "error: sampling.top_p: 1.5 is not in (0, 1]" in told.stderr
    assert told.stdout == "\nHello\nhelloHello\n"  # the line that failed is not part of the text


def test_help_and_settings_name_what_there_is(server: FakeServer) -> None:
    assert piped(server, "/help").stdout == f"{HELP}\n"
    assert set(SETTABLE) <= GenerateSettings.__dataclass_fields__.keys()


@pytest.mark.cluster
def test_ctrl_c_frees_what_the_request_held(tmp_path: Path) -> None:
    with running("serve", "--port", "0", "--kv-gib", "0.02") as serve, Client(serve.wait_ready()) as client:
        flags = ("--max-tokens", "900", "--address", client.address)
        with Terminal("generate", "-i", "HAMLET.", *flags, XDG_STATE_HOME=str(tmp_path)) as terminal:
            terminal.wait_for("\n")
            deadline = time.monotonic() + TIMEOUT
            while client.status().running == 0:
                assert time.monotonic() < deadline, "it never ran"
            terminal.press(CTRL_C)
            terminal.wait_for("stopped")
            while (status := client.status()).running or status.workers[0].used_pages:
                assert time.monotonic() < deadline, status
            terminal.wait_for("> ")
            terminal.press(CTRL_D)
            assert terminal.wait_ended() == 0
