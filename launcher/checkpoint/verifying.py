"""`grokmoe checkpoint verify` and `files`: the files of a checkpoint, or of a role's part, and their SHA-256."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from grokmoe import checksums
from grokmoe.checkpoint_files import digests_of
from launcher.checkpoint.part import part_of
from launcher.checkpoint.progress import Progress


def list_files(options: argparse.Namespace) -> int:
    """Prints the list. Returns the exit code. Raises StartupError for a directory that has none."""
    sys.stdout.write(checksums.to_text(digests_of(Path(options.directory), part_of(options))))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Reads every file. Returns the exit code: 1 when one is missing or another. Raises as `list_files`."""
    directory = Path(options.directory)
    digests = digests_of(directory, part_of(options))
    total = sum(path.stat().st_size for name in digests if (path := directory / name).exists())
    with Progress() as progress:
        wrong = checksums.check(directory, digests, lambda file, done: progress.report(file, done, total))
    console = Console(highlight=False, soft_wrap=True)
    for sentence in wrong:
        console.print(sentence)
    console.print(f"{directory}: {len(digests) - len(wrong)} of {len(digests)} files are what they were written as")
    return 1 if wrong else 0
