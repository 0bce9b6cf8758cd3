"""How cost grows: time and memory against one size at a time, and whether that is a straight line.

    python -m benchmarks.scaling                               all axes, a small random model
    python -m benchmarks.scaling --preset bench                0.89 B parameters
    python -m benchmarks.scaling --axes batch,layers --values 1,4,16

Random models are made when they are needed and kept in --cache. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.scaling.axes import AXES, Curve, Sizes
from benchmarks.scaling.models import PRESETS, Models
from benchmarks.scaling.report import as_json, show
from benchmarks.step.report import WIDTH


async def measure(sizes: Sizes, names: list[str], values: list[int]) -> list[Curve]:
    """One axis after the other. values: of each axis; none: its own."""
    curves = []
    for name in names:
        axis, own = AXES[name]
        print(f"measuring {name}", file=sys.stderr, flush=True)
        curves += await axis(sizes, values or own)
    return curves


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo", help="sizes of the model (default: demo)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "grokmoe", help="where models are kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated (default: all: %(default)s)")
    parser.add_argument("--values", default="", help="of every axis, comma-separated (default: each its own)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each point (default: 3)")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    options = parser.parse_args()
    names = [name for name in options.axes.split(",") if name]
    unknown = sorted(set(names) - set(AXES))
    if unknown:
        parser.error(f"no such axis: {', '.join(unknown)}; there are {', '.join(AXES)}")
    values = sorted(int(value) for value in options.values.split(",") if value)
    sizes = Sizes(Models(options.preset, options.cache), options.dtype, options.rounds)
    curves = asyncio.run(measure(sizes, names, values))
    show(Console(width=WIDTH), curves, options.markdown)
    settings = {"preset": options.preset, "dtype": options.dtype, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "scaling", **settings, "curves": [as_json(curve) for curve in curves]}))


if __name__ == "__main__":
    main()
