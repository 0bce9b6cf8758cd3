"""`grokmoe checkpoint convert`: any layout as safetensors, with a progress bar."""

from __future__ import annotations

import argparse
import time

from rich.console import Console

from grokmoe.checkpoint import Checkpoint
from grokmoe.conversion import Options
from grokmoe.conversion import convert as convert_checkpoint
from grokmoe.errors import ConfigError
from launcher.checkpoint.dtypes import DTYPES
from launcher.checkpoint.progress import Progress


def convert(options: argparse.Namespace) -> int:
    """Writes the checkpoint. Returns the exit code. Raises StartupError as `grokmoe.conversion.convert` does."""
    if options.shard_mb < 1:
        raise ConfigError(f"--shard-mb is {options.shard_mb}, must be at least 1")
    max_shard_bytes = None if options.shard == "experts" else options.shard_mb * 1_000_000
    how = Options(DTYPES.get(options.dtype), max_shard_bytes)
    began = time.monotonic()
    with Checkpoint.open(options.source) as source, Progress() as progress:
        done = convert_checkpoint(source, options.directory, how, progress.report)
        layout = source.layout
    kept = f", {done.num_kept} of them kept from an earlier try" if done.num_kept else ""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{options.directory}: {done.num_files} files, {done.num_bytes / 1e9:.2f} GB, from {layout}{kept}, "
        f"in {time.monotonic() - began:.1f} s"
    )
    return 0
