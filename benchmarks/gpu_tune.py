"""Finds the fastest tiles of the grouped GEMM on this GPU and writes them into the table of the repository.

    python -m benchmarks.gpu_tune [--help]

Per type and per number of rows in a tile each combination of blocks is compiled, those that do not fit are passed over,
and the others are timed at Grok-1's sizes with one tile per expert. gate and up are tuned first, then down. What is
found goes under the device's own name into `grouped_tiles.json`; other devices' entries stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_kernels import milliseconds
from expert_worker.kernels import grouped_gemm, grouped_tiles
from expert_worker.kernels.grouped_tiles import Blocks, TileClass, unparse
from expert_worker.kernels.reference import ChannelScales, quantise_rows
from grokmoe.model_config import GROK1, Gelu

HEIGHTS = (16, 32, 64, 128)
COLUMNS, DEPTHS, STAGES = (64, 128, 256), (64, 128), (2, 3, 4, 5)


def combinations(rows: int) -> Iterator[Blocks]:
    """Blocks worth a try."""
    for columns, depth, stages in itertools.product(COLUMNS, DEPTHS, STAGES):
        for warps in (4, 8) if rows * columns >= 64 * 64 else (4,):
            yield Blocks(columns, depth, warps, stages, 1 if rows >= 64 else 2)


class Call:
    """One call at full size, to be cut in any way."""

    def __init__(self, rows: int, types: str, sizes: tuple[int, int, int]) -> None:
        E, D, F = sizes
        self.device = torch.device("cuda")
        self.counts = [rows] * E

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16) / shape[-1] ** 0.5

        self.rows, self.weights = draw(E * rows, D), [draw(E, F, D), draw(E, F, D), draw(E, D, F)]
        self.scales, self.rows_in_8_bits = None, types == "float8_e4m3fn"
        if types.endswith("float8_e4m3fn"):
            pairs = [quantise_rows(weight.flatten(0, 1)) for weight in self.weights]
            shapes = [weight.shape for weight in self.weights]
            self.weights = [q.view(shape) for (q, _), shape in zip(pairs, shapes, strict=True)]
            self.scales = ChannelScales(*(s.view(shape[:2]) for (_, s), shape in zip(pairs, shapes, strict=True)))
        self.h, self.out = self.rows.new_empty(E * rows, F), torch.empty_like(self.rows)

    def median(self, shape: TileClass, runs: int) -> float | None:
        """Milliseconds; None where it does not fit."""

        def run() -> None:
            grouped_gemm.launch(
                self.rows, self.counts, *self.weights, Gelu.ERF, self.h, self.out,
                scales=self.scales, rows_in_8_bits=self.rows_in_8_bits, classes=(shape,),
            )  # fmt: skip

        try:
            run()
        except (OutOfResources, CompilationError):
            return None
        return statistics.median(milliseconds(run, self.device) for _ in range(runs))


def tune(call: Call, rows: int, start: TileClass, runs: int) -> TileClass:
    """The fastest for tiles of that height."""
    best, best_ms = start, call.median(start, runs) or float("inf")
    for part in ("gate_up", "down"):
        for swap, blocks in itertools.product((True, False) if part == "gate_up" else (best.swap,), combinations(rows)):
            tried = best._replace(rows=rows, swap=swap, **{part: blocks})
            ms = call.median(tried, runs)
            if ms is not None and ms < best_ms:
                best, best_ms = tried, ms
                print(f"{rows:4} rows {best_ms:9.4f} ms {best}", flush=True)
    return best


def write(path: Path, device_name: str, found: dict[str, list[dict[str, object]]]) -> None:
    """Puts a device's entries into the table, one class a line as they are there."""
    table = json.loads(path.read_text())
    table["devices"].setdefault(device_name, {}).update(found)
    path.write_text(render(table))


def render(table: dict[str, dict[str, dict[str, list[dict[str, object]]]]]) -> str:
    """The table as text: parts, names and types indented, every class on one line."""

    def braces(entries: list[str], indent: str, ends: str = "{}") -> str:
        if not entries:
            return ends
        inner = ",\n".join(f"{indent}  {entry}" for entry in entries)
        return f"{ends[0]}\n{inner}\n{indent}{ends[1]}"

    def classes(entries: list[dict[str, object]]) -> str:
        return braces([json.dumps(entry) for entry in entries], " " * 6, "[]")

    def types(entries: dict[str, list[dict[str, object]]]) -> str:
        return braces([f"{json.dumps(key)}: {classes(value)}" for key, value in entries.items()], " " * 4)

    def names(entries: dict[str, dict[str, list[dict[str, object]]]]) -> str:
        return braces([f"{json.dumps(key)}: {types(value)}" for key, value in entries.items()], " " * 2)

    return braces([f"{json.dumps(part)}: {names(value)}" for part, value in table.items()], "") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["bfloat16", "bfloat16 float8_e4m3fn", "float8_e4m3fn"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(HEIGHTS))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=grouped_tiles.TABLE)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    device = grouped_gemm.describe(torch.device("cuda"))
    sizes = (GROK1.num_experts, GROK1.hidden_size, GROK1.intermediate_size)
    found = {}
    for types in arguments.types:
        defaults = grouped_tiles.classes_for("", device.family, types)
        classes = []
        for rows in arguments.rows:
            start = grouped_tiles.tile_class([rows], defaults)._replace(rows=rows)
            classes.append(tune(Call(rows, types, sizes), rows, start, arguments.runs))
        found[types] = unparse(tuple(classes))
    write(arguments.output, device.name, found)
    print(f"{arguments.output}: {device.name} has {', '.join(found)}")


if __name__ == "__main__":
    main()
