"""Takes the pictures in docs/images, of a cluster under load: the router's page in headless Chromium, `grokmoe top`.

    python tools/make_screenshots.py [FOLDER]

Needs `chromium` on the path (Debian's package); the page loads nothing else. Pictures differ from run to run, so nobody
compares them: that the page works in a browser is held by tests/router/test_status_page_browser.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grokmoe import Client, GrokmoeError  # noqa: E402
from tools import browser  # noqa: E402

FOLDER = ROOT / "docs" / "images"

LOOKS = 7.0
"""Seconds that the page is open: a few looks at the router, so that there are rates."""

UP = (
    "up", "--experts", "4", "--expert-replicas", "2", "--attention", "2", "--port", "0", "--kv-gib", "0.05",
    "--max-running", "16",
)  # fmt: skip

PROMPTS = ("HAMLET.\nTo be, or not to be", "ROMEO.\nBut soft", "KING RICHARD.\nNow is the winter", "LEAR.\nBlow, winds")


@contextlib.contextmanager
def loaded(address: str, num_callers: int = 6) -> Iterator[None]:
    """Callers that ask one after another, for as long as the block runs."""
    is_over = threading.Event()

    def call(number: int) -> None:
        with Client(address, timeout=60) as client, contextlib.suppress(GrokmoeError):
            while not is_over.is_set():
                client.generate(PROMPTS[number % len(PROMPTS)], max_tokens=64, ignore_eos=True)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(num_callers)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        is_over.set()
        for caller in callers:
            caller.join()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, str]]:
    """A running `grokmoe up`: its address, and that of its HTTP port."""
    state = folder / "state.json"
    command = [sys.executable, "-m", "launcher", *UP, "--state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            address = next(line.split()[1] for line in process.stdout if line.startswith("READY"))
            told = json.loads(state.read_text())["processes"]
            yield address, next(each["metrics"] for each in told if each["role"] == "router")
        finally:
            process.terminate()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Takes the pictures in docs/images.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder, program = parser.parse_args().folder, browser.find()
    if program is None:
        print(f"none of {', '.join(browser.PROGRAMS)} is on the path", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="shots-", dir="/tmp") as scratch,
        cluster(Path(scratch)) as (address, http),
        loaded(address),
    ):
        with browser.browsing(program) as page:
            page.open(f"http://{http}/")
            time.sleep(LOOKS)
            page.picture(folder / "status-page.png")
        top = [
            sys.executable,
            "-m",
            "launcher",
            "top",
            "--address",
            address,
            "--once",
            "--svg",
            str(folder / "top.svg"),
        ]
        subprocess.run(top, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
