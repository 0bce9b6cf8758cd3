"""Which tiles there are for a step, and which of the table's a device uses. No GPU and no Triton."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.kernels import grouped_tiles
from expert_worker.kernels.grouped_tiles import (
    Blocks,
    TileClass,
    classes_for,
    fixed_class,
    parse,
    tile_class,
    tile_table,
    unparse,
)

FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = ("bfloat16", "float32", "bfloat16 float8_e4m3fn")


@given(counts_E=st.lists(st.integers(0, 300), max_size=12), block_rows=st.sampled_from([16, 64, 128]))
def test_tiles_cover_each_row_once(counts_E: list[int], block_rows: int) -> None:
    tiles = tile_table(counts_E, block_rows)
    covered = []
    for expert, first, end in tiles:
        covered += [(expert, row) for row in range(first, min(first + block_rows, end))]
    experts = [expert for expert, count in enumerate(counts_E) for _ in range(count)]
    assert covered == list(zip(experts, range(sum(counts_E)), strict=True))
    assert all(first < end for _, first, end in tiles)
    assert len(tiles) == sum(-(-count // block_rows) for count in counts_E)


@pytest.mark.parametrize(
    ("counts_E", "rows"),
    [([1, 0], 16), ([16, 16], 16), ([17, 1], 64), ([64], 64), ([0, 65], 128), ([999], 128)],
    ids=str,
)
def test_tile_class_by_busiest_expert(counts_E: Sequence[int], rows: int) -> None:
    assert tile_class(counts_E, classes_for("any", "sm_80", "bfloat16")).rows == rows


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_tiles_for_every_type(family: str, types: str) -> None:
    """Ascending, one for deterministic workers among them, and the same after writing and reading."""
    classes = classes_for("any", family, types)
    assert [shape.rows for shape in classes] == sorted({shape.rows for shape in classes})
    assert fixed_class(classes).rows == 64
    assert parse(json.loads(json.dumps(unparse(classes)))) == classes


def test_a_tuned_device_uses_its_own_and_another_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = (TileClass(32, True, Blocks(64, 64, 4, 2, 1), Blocks(64, 64, 4, 2, 1)),)
    table = json.loads(grouped_tiles.TABLE.read_text())
    table["devices"]["Fast 1"] = {"bfloat16": unparse(own)}
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(grouped_tiles, "TABLE", tmp_path / "table.json")
    caches = (grouped_tiles._table, grouped_tiles._warn_once)
    for cache in caches:
        cache.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert classes_for("Fast 1", "sm_90", "bfloat16") == own
        assert not caplog.records
        default = classes_for("Fast 1", "sm_90", "float32")
        assert classes_for("Fast 1", "sm_90", "float32") == default
    assert len(caplog.records) == 1
    assert "no tiles were tuned for Fast 1 and float32" in caplog.text
    for cache in caches:
        cache.cache_clear()
