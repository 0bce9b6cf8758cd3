"""`grokmoe experts`: who holds which experts, and moving them between expert workers while requests run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable

from grokmoe import Client, ConfigError, ExpertMove, ExpertRange, Rebalance, Status, WorkerRole, expert_spec
from grokmoe.expert_ranges import ranges_of
from grokmoe.expert_units import slice_of, unit_of
from grokmoe.settings import add_flags, from_namespace
from launcher.connection import ConnectionSettings

EPILOG = """\
examples:
  grokmoe experts status
  grokmoe experts move 0,3 --from 1 --to 2          both experts, all layers
  grokmoe experts copy 5@0-15 --to expert-7:7002    one more holder, in the first 16 layers
  grokmoe experts drop 5@0-15 --from 0              one holder less, never the last one
  grokmoe experts move 3:1/2 --from 0 --to 2        the first of two slices of an expert that is cut
  grokmoe experts rebalance --dry-run
A worker is its address, or its number in `status`. Experts are named as to an expert worker: EXPERTS[:SLICES/COUNT]
[@LAYERS] joined by +, lists of numbers and ranges, both ends included. To cut an expert, copy its slices to their
workers and then drop the whole one; to put it together, the other way round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands and their flags."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="who holds what, and how even the load is")
    status.add_argument("--json", action="store_true", help="for programs")
    for name, text in (
        ("move", "from one worker to another"),
        ("copy", "to one worker more"),
        ("drop", "off one worker, if another one has them"),
    ):
        command = commands.add_parser(name, help=f"put experts {text}" if name != "drop" else f"take experts {text}")
        command.add_argument(
            "experts", metavar="EXPERTS[@LAYERS]", help="such as 3, 0-3,7@0-15 or 3:1/2; default: all layers"
        )
        if name != "copy":
            command.add_argument("--from", dest="source", required=True, metavar="WORKER", help="who gives them up")
        if name != "drop":
            command.add_argument("--to", dest="target", required=True, metavar="WORKER", help="who takes them")
    rebalance = commands.add_parser("rebalance", help="move experts so that workers have even load, if it is worth it")
    rebalance.add_argument("--dry-run", action="store_true", help="only say what would be done")
    rebalance.add_argument("--force", action="store_true", help="also when the gain does not exceed the cost")
    for command in commands.choices.values():
        add_flags(command, ConnectionSettings)


def experts(namespace: argparse.Namespace) -> int:
    """Runs a subcommand. Returns the exit code. Raises GrokmoeError."""
    settings = from_namespace(ConnectionSettings, namespace)
    with Client(settings.address, **settings.client_options()) as client:
        if namespace.action == "status":
            status = client.status()
            print(json.dumps(as_json(status), indent=2) if namespace.json else describe(status))
        elif namespace.action == "rebalance":
            print(describe_rebalance(client.rebalance_experts(dry_run=namespace.dry_run, force=namespace.force)))
        else:
            model = client.model()
            moved = parse_experts(namespace.experts, model.num_experts, model.num_layers)
            source = _worker(client, getattr(namespace, "source", None))
            target = _worker(client, getattr(namespace, "target", None))
            cost = client.move_experts(moved, source=source, target=target)
            print(
                f"done: {cost.loaded_bytes / 1e6:.1f} MB loaded in {cost.load_seconds:.2f} s, "
                f"old holder done after {cost.drain_seconds * 1e3:.0f} ms, placement version {cost.placement_version}"
            )
    return 0


def parse_experts(text: str, num_experts: int, num_layers: int) -> list[ExpertRange]:
    """`0-3,7@0-15` or `3:1/2` as ranges. Raises ConfigError."""
    held = expert_spec.parse_experts(text, num_experts, num_layers)
    if not held:
        raise ConfigError(f"experts is {text!r}: name those that are meant")
    ranges = []
    for unit, begin, end in ranges_of((layer, unit) for layer, units in held.items() for unit in units):
        expert, index, num_slices = slice_of(unit)
        ranges.append(ExpertRange(expert, begin, end, index, num_slices))
    return ranges


def _worker(client: Client, name: str | None) -> str | None:
    """The address of a worker that may have been named by its number."""
    if name is None or not name.isdecimal():
        return name
    for worker in client.status().workers:
        if worker.role is WorkerRole.EXPERT and worker.index == int(name):
            return worker.address
    raise ConfigError(f"there is no expert worker {name}")


def describe(status: Status) -> str:
    """A table of workers, and what moves."""
    head = ("worker", "state", "rows/s", "holds", "loads", "address")
    rows = [
        (
            str(worker.index),
            worker.state.value,
            f"{worker.rows_per_second:.0f}",
            describe_ranges(worker.held) or "nothing",
            describe_ranges(worker.loading),
            worker.address,
        )
        for worker in status.workers
        if worker.role is WorkerRole.EXPERT
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    balance = f"{status.imbalance:.2f}" if status.imbalance else "not known: too few rows"
    lines.append(f"placement version {status.placement_version}, imbalance {balance}")
    lines += [f"under way: {_move(move)} ({move.phase or 'waits'})" for move in status.moves]
    return "\n".join(lines)


def describe_rebalance(found: Rebalance) -> str:
    """What was done, or why not."""
    lines = [_move(move) for move in found.moves]
    lines.append(
        f"imbalance {found.imbalance:.2f}, forecast {found.forecast_imbalance:.2f}; "
        f"gain {found.gain_seconds:.1f} s, cost {found.cost_seconds:.1f} s of expert computation"
    )
    lines.append("done" if found.done else f"nothing done: {found.reason or 'dry run'}")
    return "\n".join(lines)


def _move(move: ExpertMove) -> str:
    words = {(True, True): "move", (False, True): "copy", (True, False): "drop"}[bool(move.source), bool(move.target)]
    ends = (f" from {move.source}" if move.source else "") + (f" to {move.target}" if move.target else "")
    return f"{words} {describe_ranges(move.experts)}{ends}"


def describe_ranges(ranges: Iterable[ExpertRange]) -> str:
    """As they are written on the command line: `0-3@0-15+7:1/2@0-7`; empty: none."""
    units = [(unit_of(each.expert, each.slice, each.num_slices), each.layer_begin, each.layer_end) for each in ranges]
    return expert_spec.describe_ranges(units) if units else ""


def as_json(status: Status) -> dict[str, object]:
    """What `describe` says, for programs."""
    return {
        "placement_version": status.placement_version,
        "imbalance": status.imbalance,
        "workers": [
            {
                "index": worker.index,
                "address": worker.address,
                "state": worker.state.value,
                "device": worker.device,
                "rows_per_second": worker.rows_per_second,
                "held": [dataclasses.asdict(each) for each in worker.held],
                "loading": [dataclasses.asdict(each) for each in worker.loading],
            }
            for worker in status.workers
            if worker.role is WorkerRole.EXPERT
        ],
        "moves": [dataclasses.asdict(move) for move in status.moves],
    }
