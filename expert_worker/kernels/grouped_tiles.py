"""How the grouped GEMM is cut, per device, type and number of rows: from a table in the repository.

`grouped_tiles.json` has two parts. "families" says what any device of an architecture can run: tests assert that each
entry fits; they were chosen without timing. "devices" says what `benchmarks/gpu_tune.py` found fastest on a device, by
the name that the device gives itself. A device that is not there uses its family's tiles, and the log says so once.

Pure but for reading that file: nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("grouped_tiles.json")

FIXED_ROWS = 64
"""Height of all tiles of a deterministic worker. A tile of that many rows computes for a shorter time than its weights
take to read, so decode steps lose little."""


class Blocks(NamedTuple):
    """How one product is cut: output columns of a piece, contraction step, warps, pipeline stages, programs that a
    multiprocessor is to hold."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int
    per_processor: int


class TileClass(NamedTuple):
    """Rows of a tile, whether weights are the left operand, and how both products are cut for tiles of that height."""

    rows: int
    swap: bool
    gate_up: Blocks
    down: Blocks


Classes = tuple[TileClass, ...]
"""Ascending in rows."""


def classes_for(device_name: str, family: str, types: str) -> Classes:
    """The classes of a device. types: rows' and weights' type, such as "bfloat16" or "bfloat16 float8_e4m3fn".

    KeyError for a family or types that no kernel is made for.
    """
    table = _table()
    tuned = table["devices"].get(device_name, {}).get(types)
    if tuned is not None:
        return parse(tuned)
    _warn_once(device_name, family, types)
    return parse(table["families"][family][types])


def has_tiles(family: str, types: str) -> bool:
    """Whether there are any for an architecture, see `classes_for`."""
    return types in _table()["families"][family]


def parse(entries: Sequence[Any]) -> Classes:
    """From the form that classes have in the table."""
    return tuple(TileClass(e["rows"], e["swap"], Blocks(*e["gate_up"]), Blocks(*e["down"])) for e in entries)


def unparse(classes: Classes) -> list[dict[str, Any]]:
    """To the form that classes have in the table."""
    return [
        {"rows": c.rows, "swap": c.swap, "gate_up": list(c.gate_up), "down": list(c.down)}
        for c in sorted(classes, key=lambda c: c.rows)
    ]


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@functools.cache
def _warn_once(device_name: str, family: str, types: str) -> None:
    logger.warning("no tiles were tuned for %s and %s: using those of any %s", device_name, types, family)


def tile_class(counts_E: Sequence[int], classes: Classes) -> TileClass:
    """The lowest tile that holds the busiest expert's rows, else the highest.

    By the busiest expert because its weights are read once per row tile, and weights dominate the traffic;
    rows that a tile has too many cost arithmetic only. The last bits of a row may depend on the class, and
    on nothing else in the batch.
    """
    return next((shape for shape in classes if shape.rows >= max(counts_E)), classes[-1])


def fixed_class(classes: Classes) -> TileClass:
    """The one class of a deterministic worker."""
    return next((shape for shape in classes if shape.rows >= FIXED_ROWS), classes[-1])


def tile_table(counts_E: Sequence[int], block_rows: int) -> list[tuple[int, int, int]]:
    """Per tile: expert, first row, one past the expert's last. Each row is in one tile; no tile is empty."""
    tiles = []
    begin = 0
    for expert, count in enumerate(counts_E):
        end = begin + count
        tiles += [(expert, first, end) for first in range(begin, end, block_rows)]
        begin = end
    return tiles
