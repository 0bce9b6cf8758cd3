"""docs/flags.md says what the settings say of themselves, and prose names flags that exist."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import checkpoint, experts

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "flags.md"

PAGES = ["operations.md", "deploy.md", "security.md", "openai.md"]
"""What an operator reads."""

OTHERS = {
    "helm", "kubectl", "docker", "uv", "pip", "smg", "git",
}  # fmt: skip
"""Programs whose flags are their own."""


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Of a command and its own commands."""
    found = set()
    for action in parser._actions:
        found |= {word for word in action.option_strings if word.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags_of(command)
    return found


def known() -> set[str]:
    """Every flag there is."""
    found = set(re.findall(r"^\| `(--[a-z0-9-]+)`", PAGE.read_text(), re.MULTILINE))
    for module in (experts, checkpoint):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        found |= flags_of(parser)
    return found | {"--help", "--demo", "--explain"}


def test_the_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_flags.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_flags_that_exist(page: str) -> None:
    lines = (ROOT / "docs" / page).read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        word = re.match(r"\s*(?:\$ )?(\w+)", line)
        if word is not None and word[1] in OTHERS:
            continue
        for flag in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", line):
            assert flag in known() or flag.replace("--no-", "--") in known(), f"{page}: {flag}"
