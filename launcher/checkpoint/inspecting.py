"""`grokmoe checkpoint inspect`: what a checkpoint holds, after its tensors were checked against its config."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_summary import Size, summary


def inspect(options: argparse.Namespace) -> int:
    """Prints the summary. Returns the exit code. Raises StartupError for a checkpoint that cannot be loaded."""
    with Checkpoint.open(options.directory, options.variant) as checkpoint:
        config, found = checkpoint.config, summary(checkpoint)
    console = Console(highlight=False)
    console.print(
        f"{options.directory}: {found.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} query heads "
        f"on {config.num_kv_heads} KV heads of {config.head_dim}, {config.num_experts} experts of width "
        f"{config.intermediate_size}, {config.experts_per_token} per token, vocabulary {config.vocab_size}, context "
        f"{config.context_length}, head {'tied' if found.tied else 'untied'}"
    )
    console.print(f"layout: {found.layout}")
    console.print(f"config hash {found.config_hash} (variant {options.variant})")
    table = Table("part", box=None)
    for column in ("tensors", "parameters", "MB"):
        table.add_column(column, justify="right")
    for part, size in found.parts.items():
        _add(table, part, size)
    for expert, size in found.experts.items():
        _add(table, f"  expert {expert}", size)
    _add(table, "all", found.total)
    console.print(table)
    for name, num_bytes in found.files.items():
        console.print(f"{name}: {num_bytes / 1e6:.1f} MB")
    stored = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.dtypes.items())
    console.print(f"parameters stored: {stored}")
    return 0


def _add(table: Table, part: str, size: Size) -> None:
    table.add_row(part, f"{size.tensors:,}", f"{size.parameters:,}", f"{size.bytes / 1e6:.1f}")
