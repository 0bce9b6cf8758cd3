"""Which part of a checkpoint a command is about, as flags: what one role reads."""

from __future__ import annotations

import argparse

from attention_worker.config import parse_layers
from grokmoe import checkpoint_part
from grokmoe.checkpoint_part import Part
from grokmoe.errors import ConfigError
from grokmoe.expert_spec import ALL, parse_experts
from grokmoe.expert_units import slice_of

ROLES = ("all", "router", "attention", "expert")


def add_part(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--role", choices=ROLES, default="all", help="what this role reads (default: all)")
    text = "of an expert worker, as its flag: 0-3, 0-3@0-31 (default: all)"
    parser.add_argument("--experts", default=ALL, metavar="SPEC", help=text)
    text = "of an attention worker, as its flag: 0-31 (default: all)"
    parser.add_argument("--layers", default=ALL, metavar="FIRST-LAST", help=text)


def part_of(options: argparse.Namespace) -> Part:
    """What the flags say; what they mean shows when a model is known. Raises ConfigError for flags of another role."""
    if options.experts != ALL and options.role != "expert":
        raise ConfigError("--experts is said of --role expert")
    if options.layers != ALL and options.role != "attention":
        raise ConfigError("--layers is said of --role attention")
    match options.role:
        case "router":
            return checkpoint_part.router
        case "attention":
            return checkpoint_part.attention(lambda config: parse_layers(options.layers, config.num_layers))
        case "expert":
            return checkpoint_part.experts(
                lambda config: {
                    (layer, slice_of(unit)[0])
                    for layer, units in parse_experts(options.experts, config.num_experts, config.num_layers).items()
                    for unit in units
                }
            )
        case _:
            return checkpoint_part.whole
