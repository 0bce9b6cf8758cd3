"""A page in headless Chromium, asked over a pipe in its own protocol: what it shows, its complaints, a picture."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
"""Debian's package is `chromium`."""

BECOME = """
import os, sys
for number, end in enumerate(sys.argv[1:3], 3):
    os.dup2(int(end), number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""It reads commands from descriptor 3 and writes answers to 4."""

ANSWER_TIMEOUT = 60.0
"""Seconds for one answer."""


def find() -> str | None:
    """The program; None: there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One open page. complaints: exceptions of its scripts, and what the browser refused it."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest = send, receive, b""
        self._last_id, self._session = 0, ""
        self.complaints: list[str] = []

    def attach(self) -> None:
        """Makes the page; nothing is loaded yet."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """The answer to one command. RuntimeError: there is none, or it is an error."""
        self._last_id += 1
        command: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._send, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._last_id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], ANSWER_TIMEOUT)
            data = os.read(self._receive, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser does not answer")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.complaints.append(str(event["params"]["entry"]))

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.ask("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What an expression gives in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, script: str, timeout: float = 30.0) -> None:
        """Returns when an expression is true."""
        deadline = time.monotonic() + timeout
        while not self.value(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s: {script}")
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """Writes what it shows as PNG, as high as it is."""
        height = self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def browsing(program: str, width: int = 1240, height: int = 900) -> Iterator[Page]:
    """A browser with one empty page, gone at the end of the block."""
    commands, answers = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]  # fmt: skip
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
        process = subprocess.Popen(
            [sys.executable, "-c", BECOME, *map(str, ends), program, *flags],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, commands[0], answers[1]):
            os.close(end)
        try:
            page = Page(commands[1], answers[0])
            page.attach()
            yield page
        finally:
            os.close(commands[1])
            os.close(answers[0])
            process.terminate()
            process.wait(30)
