"""docs/flags.md says what the settings say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_flags.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr
