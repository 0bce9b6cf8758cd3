"""`grokmoe checkpoint random`: a model of random weights, to measure with."""

from __future__ import annotations

import argparse
import dataclasses

from rich.console import Console

from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_summary import summary
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.errors import ConfigError
from grokmoe.model_config import BENCH, GROK1, TINY
from launcher.checkpoint.dtypes import DTYPES

PRESETS = {"bench": BENCH, "tiny": TINY, "grok1": GROK1}
"""Shapes of random models."""

SIZES = {"layers": "num_layers", "experts": "num_experts", "vocab": "vocab_size", "context": "context_length"}
"""Flag to the size of the preset it replaces."""


def random_model(options: argparse.Namespace) -> int:
    """Writes a random model. Returns the exit code.

    Raises ConfigError for sizes that cannot be, CheckpointError for a directory that holds a checkpoint, or a disk
    without room for one.
    """
    if options.shard_mb < 1:
        raise ConfigError(f"--shard-mb is {options.shard_mb}, must be at least 1")
    given = {field: getattr(options, flag) for flag, field in SIZES.items() if getattr(options, flag) is not None}
    config = dataclasses.replace(PRESETS[options.preset], **given)
    random_checkpoint(
        options.directory, config, options.seed, DTYPES[options.dtype], max_shard_bytes=options.shard_mb * 1_000_000
    )
    with Checkpoint.open(options.directory) as written:
        found = summary(written)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{options.directory}: {found.total.parameters:,} parameters, {found.total.bytes / 1e9:.2f} GB, "
        f"files: {len(found.files)}, seed {options.seed}"
    )
    return 0
