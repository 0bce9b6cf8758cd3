"""`grokmoe checkpoint`: look into a checkpoint, convert it, see that it is whole, make one."""

from __future__ import annotations

import argparse

from launcher.checkpoint.converting import convert
from launcher.checkpoint.dtypes import DTYPES
from launcher.checkpoint.inspecting import inspect
from launcher.checkpoint.part import add_part
from launcher.checkpoint.random_model import PRESETS, SIZES, random_model
from launcher.checkpoint.tokenizer_file import convert_tokenizer
from launcher.checkpoint.verifying import list_files, verify

ANY_LAYOUT = "directory of a checkpoint in any layout (docs/checkpoints.md)"
CONVERTED = "directory that `convert` has written; for a list, config.json, index and SHA256SUMS of it will do"
SHARD_MB = 4000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes; `checkpoint` carries it out."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    command = add("inspect", "check a checkpoint's tensors against its config and sum them up")
    command.add_argument("directory", help=ANY_LAYOUT)
    command.add_argument("--variant", default="vllm", choices=("vllm", "xai"), help="whose numerics (default: vllm)")

    command = add("convert", "write a checkpoint of any layout as safetensors, or go on where a try was killed")
    command.add_argument("source", help=ANY_LAYOUT)
    command.add_argument("directory", help="where to write; must hold no checkpoint yet")
    text = "experts: a file for every expert of every layer, so that a worker needs only its own (default: size)"
    command.add_argument("--shard", choices=("size", "experts"), default="size", help=text)
    text = f"size of a file at most; one tensor may exceed it (default: {SHARD_MB})"
    command.add_argument("--shard-mb", type=int, default=SHARD_MB, metavar="MB", help=text)
    text = "type of all tensors; stored: each as it is, or as dequantising gives it (default: stored)"
    command.add_argument("--dtype", choices=("stored", *DTYPES), default="stored", help=text)

    command = add("verify", "compare the files of a checkpoint with their SHA-256")
    command.add_argument("directory", help=CONVERTED)
    add_part(command)

    command = add("files", "print the files that a role needs, with their SHA-256, as sha256sum does")
    command.add_argument("directory", help=CONVERTED)
    add_part(command)

    text = "write a SentencePiece model as tokenizer.json, for programs that read no other (the router reads both)"
    command = add("convert-tokenizer", text)
    command.add_argument("model", help="a tokenizer.model, or a directory that has one")
    command.add_argument("--output", metavar="FILE", help="what to write (default: tokenizer.json beside the model)")

    command = add("random", "write a model of random weights; the same seed gives the same weights on any machine")
    command.add_argument("directory", help="where to write; must hold no checkpoint yet")
    command.add_argument("--preset", choices=PRESETS, default="bench", help="shape of the model (default: bench)")
    for flag, field in SIZES.items():
        command.add_argument(f"--{flag}", type=int, metavar="N", help=f"{field}, instead of the preset's")
    command.add_argument("--seed", type=int, default=0, help="what the weights are drawn from (default: 0)")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights (default: bfloat16)")
    text = "size of a file at most; one tensor may exceed it"
    command.add_argument("--shard-mb", type=int, default=SHARD_MB, metavar="MB", help=text)


def checkpoint(options: argparse.Namespace) -> int:
    """Carries one command out. Returns the exit code."""
    match options.command:
        case "inspect":
            return inspect(options)
        case "convert":
            return convert(options)
        case "verify":
            return verify(options)
        case "files":
            return list_files(options)
        case "convert-tokenizer":
            return convert_tokenizer(options.model, options.output)
        case _:
            return random_model(options)
