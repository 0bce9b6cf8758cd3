"""Fetches Debian's package of Prometheus into a folder, for the tests that need promtool. Installs nothing."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDER = ROOT / "build" / "prometheus"

TIMEOUT = 300.0
"""Seconds for one command."""


def fetch(folder: Path) -> str:
    """Why it could not be had; empty: it is there."""
    if shutil.which("promtool") or (folder / "usr" / "bin" / "promtool").exists():
        return ""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "no apt-get here: install Prometheus by other means, or do without"
    with tempfile.TemporaryDirectory() as into:
        # The list of packages may be missing or old: then a second try.
        if _run(into, "apt-get", "download", "prometheus") and (
            _run(into, "apt-get", "update") or _run(into, "apt-get", "download", "prometheus")
        ):
            return "apt-get has no package prometheus to give"
        (package,) = Path(into).glob("prometheus_*.deb")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(dir=folder.parent))
        if _run(into, "dpkg-deb", "--extract", str(package), str(unpacked)):
            shutil.rmtree(unpacked)
            return f"{package.name} cannot be unpacked"
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return ""


def _run(folder: str, *command: str) -> int:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return 1


def main() -> int:
    """Always 0: tests that need it are skipped without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    why = fetch(parser.parse_args().folder)
    if why:
        print(f"no promtool: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
