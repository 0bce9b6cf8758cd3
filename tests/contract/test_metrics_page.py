"""docs/metrics.md says what the metrics say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_metrics.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr


def test_the_operations_manual_names_metrics_that_exist() -> None:
    import re

    known = set(re.findall(r"`(grokmoe_\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    named = set(re.findall(r"`(grokmoe_\w+)", (ROOT / "docs" / "operations.md").read_text()))
    assert named
    assert named <= known, named - known
