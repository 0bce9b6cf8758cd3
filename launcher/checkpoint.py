"""`grokmoe checkpoint`: what a checkpoint holds, after its tensors were checked against its config; its tokenizer.

And models of random weights, to measure with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grokmoe.checkpoint import TORCH_DTYPES, Checkpoint
from grokmoe.checkpoint_summary import Size, summary
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.errors import ConfigError
from grokmoe.model_config import BENCH, GROK1, TINY
from grokmoe.sentencepiece_model import SentencePieceModel
from grokmoe.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON

PASS_THROUGH_TEMPLATE = """\
{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"""
"""Contents of the messages, line by line: a base model knows no roles, but gateways ask for a template."""

PRESETS = {"bench": BENCH, "tiny": TINY, "grok1": GROK1}
"""Shapes of random models."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}

SIZES = {"layers": "num_layers", "experts": "num_experts", "vocab": "vocab_size", "context": "context_length"}
"""Flag to the size of the preset it replaces."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes; `checkpoint` carries it out."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="check a checkpoint's tensors against its config and sum them up")
    command.add_argument("directory", help="directory with config.json and safetensors")
    command.add_argument("--variant", default="vllm", choices=("vllm", "xai"), help="whose numerics (default: vllm)")
    text = "write a SentencePiece model as tokenizer.json, for programs that read no other (the router reads both)"
    command = commands.add_parser("convert-tokenizer", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("model", help="a tokenizer.model, or a directory that has one")
    command.add_argument("--output", metavar="FILE", help="what to write (default: tokenizer.json beside the model)")
    text = "write a model of random weights; the same seed gives the same weights on any machine"
    command = commands.add_parser("random", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("directory", help="where to write; must hold no checkpoint yet")
    command.add_argument("--preset", choices=PRESETS, default="bench", help="shape of the model (default: bench)")
    for flag, field in SIZES.items():
        command.add_argument(f"--{flag}", type=int, metavar="N", help=f"{field}, instead of the preset's")
    command.add_argument("--seed", type=int, default=0, help="what the weights are drawn from (default: 0)")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights (default: bfloat16)")
    command.add_argument(
        "--shard-mb", type=int, default=4000, metavar="MB", help="size of a file at most; one tensor may exceed it"
    )


def checkpoint(options: argparse.Namespace) -> int:
    """Carries one command out. Returns the exit code."""
    match options.command:
        case "inspect":
            return inspect(options.directory, options.variant)
        case "convert-tokenizer":
            return convert_tokenizer(options.model, options.output)
        case _:
            return random_model(options)


def inspect(directory: str, variant: str) -> int:
    """Prints the summary. Returns the exit code. Raises StartupError for a checkpoint that cannot be loaded."""
    with Checkpoint.open(directory, variant) as checkpoint:
        config, found = checkpoint.config, summary(checkpoint)
    console = Console(highlight=False)
    console.print(
        f"{directory}: {found.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} query heads on "
        f"{config.num_kv_heads} KV heads of {config.head_dim}, {config.num_experts} experts of width "
        f"{config.intermediate_size}, {config.experts_per_token} per token, vocabulary {config.vocab_size}, context "
        f"{config.context_length}, head {'tied' if found.tied else 'untied'}"
    )
    console.print(f"config hash {found.config_hash} (variant {variant})")
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


def convert_tokenizer(model: str, output: str | None) -> int:
    """Writes a SentencePiece model as tokenizer.json, with a tokenizer_config.json beside it if there is none.

    model: the file, or a directory with a tokenizer.model.
    output: None: tokenizer.json beside the model, which must not be there yet.

    Returns the exit code. Raises ConfigError for a model that cannot be converted exactly.
    """
    source = Path(model) / SENTENCEPIECE_MODEL if Path(model).is_dir() else Path(model)
    target = source.with_name(TOKENIZER_JSON) if output is None else Path(output)
    if output is None and target.exists():
        raise ConfigError(f"{target}: is there already; name the file with --output to replace it")
    pieces = SentencePieceModel.from_file(source)
    config = target.with_name("tokenizer_config.json")
    has_config = config.exists()
    try:
        _replace(target, pieces.to_backend().to_str())
        if not has_config:
            _replace(config, json.dumps(_tokenizer_config(pieces), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{target}: {len(pieces.ids):,} pieces of {source}")
    console.print(f"{config}: {'left as it was' if has_config else 'with a chat template that joins the messages'}")
    return 0


def _tokenizer_config(pieces: SentencePieceModel) -> dict[str, object]:
    tokens = {f"{role}_token": piece for role, piece in pieces.roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": PASS_THROUGH_TEMPLATE,
    }


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and moves into its place, so that no reader finds half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
