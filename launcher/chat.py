"""`grokmoe generate -i`: a text that a person and the model write in turns, on a terminal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from grokmoe import Client, GrokmoeError
from grokmoe.settings import add_flags, from_namespace
from launcher.generate import GenerateSettings

try:
    import readline
except ImportError:  # not everywhere; lines are then read without history
    readline = None  # type: ignore[assignment]

PROMPT = "> "

MAX_HISTORY = 1000
"""Lines kept in the history file."""

HELP = """\
What you type continues the text on a new line of it, and then the model goes on; \\n is a line break.
An empty line lets the model go on where it ended. A line that begins with // begins with /.
  /show              the text so far
  /undo              take back the last turn, yours and the model's
  /reset             begin a new text
  /set               the settings; /set NAME VALUE changes one, /set NAME makes it the default
  /help              this
  /quit              leave; so does Ctrl-D
Ctrl-C ends what the model is writing, and keeps what it has written."""

SETTABLE = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "json_schema",
    "regex",
)


class Chat:
    """The text so far, and what a line does to it."""

    def __init__(self, client: Client, settings: GenerateSettings) -> None:
        self.text = ""
        self.settings = settings
        self._client = client
        self._before: list[str] = []  # the text before each turn
        self._commands: dict[str, Callable[[str], None]] = {
            "/show": lambda _: print(self.text),
            "/undo": self._undo,
            "/reset": self._reset,
            "/set": self._set,
            "/help": lambda _: print(HELP),
        }

    def handle(self, line: str) -> bool:
        """Does what a line says. Returns whether to go on."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.strip().partition(" ")
            if name == "/quit":
                return False
            command = self._commands.get(name)
            if command is None:
                _complain(f"no command {name}; /help names them")
            else:
                command(rest.strip())
            return True
        self.turn(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def turn(self, line: str) -> None:
        """Adds a line to the text and what the model makes of it. The line is taken back if the call fails."""
        before = self.text
        added = line.replace("\\n", "\n")
        joint = "\n" if added and before and not before.endswith("\n") else ""
        prompt = before + joint + added
        if not prompt:
            _complain("nothing to go on from; /help explains")
            return
        written: list[str] = []
        try:
            self._stream(prompt, written)
        except KeyboardInterrupt:
            _complain("\nstopped")
        except GrokmoeError as error:
            print(flush=True)
            _complain(f"error: {error.message}")
            if not written:
                return
        self.text = prompt + "".join(written)
        self._before.append(before)

    def _stream(self, prompt: str, written: list[str]) -> None:
        with self._client.stream(prompt, **self.settings.options()) as stream:
            for delta in stream:
                written.append(delta.text)
                print(delta.text, end="", flush=True)
        print(flush=True)

    def _undo(self, _: str) -> None:
        if not self._before:
            _complain("nothing to take back")
            return
        self.text = self._before.pop()
        print(self.text[-200:])

    def _reset(self, _: str) -> None:
        self.text = ""
        self._before.clear()

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.replace("-", "_")
        if not name:
            for each in SETTABLE:
                print(f"{each} {getattr(self.settings, each)}")
        elif name not in SETTABLE:
            _complain(f"no setting {name}; /set names them")
        else:
            try:
                changed = dataclasses.replace(self.settings, **{name: _parse(name, value.strip())})
                changed.options()  # the file of a schema must be there
                self.settings = changed
            except (ValueError, GrokmoeError) as error:
                _complain(f"error: {error}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(name: str, value: str) -> Any:
    """A setting's value, read as its flag is; the default for nothing."""
    parser = _Parser(add_help=False)
    add_flags(parser, GenerateSettings)
    flags = [f"--{name.replace('_', '-')}={value}"] if value else []
    return getattr(from_namespace(GenerateSettings, parser.parse_args(flags)), name)


def _complain(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def chat(prompt: str | None, settings: GenerateSettings) -> int:
    """Reads lines until the end of standard input or /quit. Returns the exit code. Raises GrokmoeError."""
    is_terminal = sys.stdin.isatty()
    with settings.traced_client_options() as options, Client(settings.address, **options) as client:
        conversation = Chat(client, settings)
        if is_terminal:
            print(f"{client.model().name} at {client.address}; /help explains")
        if prompt:
            conversation.turn(prompt)
        with _history(is_terminal):
            while True:
                try:
                    line = input(PROMPT if is_terminal else "")
                except KeyboardInterrupt:
                    print()  # the line is thrown away
                    continue
                except EOFError:
                    if is_terminal:
                        print()
                    return 0
                if not conversation.handle(line):
                    return 0


def history_file() -> Path:
    """Where typed lines are kept: grokmoe/history in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "grokmoe" / "history"


@contextlib.contextmanager
def _history(is_terminal: bool) -> Any:
    """Lines typed before can be recalled, also those of earlier runs, as far as the file can be read and written."""
    if readline is None or not is_terminal:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
