"""Random checkpoints: functions of seed and name, written with little memory, never over another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint, random_rows, write_checkpoint
from grokmoe.errors import CheckpointError
from grokmoe.layouts.safetensors_files import INDEX_FILE, SINGLE_FILE
from grokmoe.model_config import BENCH, TINY

SPECS = {spec.name: spec for spec in names.expected(TINY)}
WIDE = dataclasses.replace(
    TINY, hidden_size=128, head_dim=32, intermediate_size=512, num_layers=4, attention_logit_scale=0.0
)


def whole(name: str, seed: int, drawn_at_once: int = 1 << 22) -> torch.Tensor:
    return torch.cat(list(random_rows(SPECS[name], seed, drawn_at_once)))


@given(st.sampled_from(sorted(SPECS)), st.integers(0, 5), st.integers(1, 5000))
def test_the_length_of_the_pieces_changes_no_value(name: str, seed: int, drawn_at_once: int) -> None:
    pieces = list(random_rows(SPECS[name], seed, drawn_at_once))
    most = max(drawn_at_once, SPECS[name].shape[-1])
    assert all(piece.numel() <= most for piece in pieces)
    assert torch.equal(torch.cat(pieces), whole(name, seed))
    assert tuple(torch.cat(pieces).shape) == SPECS[name].shape


def test_a_tensor_is_drawn_from_seed_and_name() -> None:
    """Written out, so that no change of the program changes the models it makes."""
    found = whole(names.attention(1, "k_proj"), seed=7)[0, :4]
    expected = [-0.126526, -0.020876, -0.107900, -0.055733]
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=1e-6)


def test_matrices_keep_the_size_of_what_they_multiply() -> None:
    for name, spec in SPECS.items():
        tensor = whole(name, seed=0)
        if spec.part == "norms":
            assert float(tensor.mean()) == pytest.approx(4.0 if name == names.final_norm() else 1.0, rel=0.1)
        else:
            assert float(tensor.std()) == pytest.approx(spec.shape[-1] ** -0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_others_read_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """By the safetensors library, file by file, against the tensors as they are drawn."""
    random_checkpoint(tmp_path, TINY, seed=5, dtype=dtype, max_shard_bytes=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 110_000 for file in files)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == SPECS.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, whole(name, seed=5).to(dtype))
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["weight_map"].keys() == SPECS.keys()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == TINY


def test_the_memory_it_takes_is_that_of_a_piece(tmp_path: Path) -> None:
    total = sum(np.prod(spec.shape) for spec in names.expected(WIDE)) * 4
    tracemalloc.start()
    try:
        random_checkpoint(tmp_path, WIDE, dtype=torch.float32)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / SINGLE_FILE).stat().st_size > total > 20e6
    assert peak < total / 10


@pytest.mark.parametrize("rest", ["config.json", SINGLE_FILE, INDEX_FILE, "model-00001-of-00009.safetensors"])
def test_nothing_is_written_over_what_is_there(tmp_path: Path, rest: str) -> None:
    (tmp_path / rest).write_text("mine")
    for write in (
        lambda: random_checkpoint(tmp_path, TINY),
        lambda: random_checkpoint(tmp_path, TINY, max_shard_bytes=1000),
        lambda: write_checkpoint(tmp_path, TINY.to_dict(), {}),
    ):
        with pytest.raises(CheckpointError, match=f"already holds a checkpoint, or part of one: {rest}"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == [rest]
    assert (tmp_path / rest).read_text() == "mine"


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(CheckpointError, match=r"needs 1\.8 GB, 1\.0 GB are free"):
        random_checkpoint(tmp_path, BENCH)
    assert not list(tmp_path.iterdir())


def test_scalars_and_empty_tensors_can_be_written(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.arange(6.0).view(2, 3).T}
    write_checkpoint(tmp_path, {}, tensors)
    stored = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert stored.keys() == tensors.keys()


def test_the_bench_model_is_as_large_as_it_says() -> None:
    sizes = {spec.name: int(np.prod(spec.shape)) for spec in names.expected(BENCH)}
    experts = sum(size for name, size in sizes.items() if names.expert_of(name) is not None)
    assert sum(sizes.values()) == 891_913_216
    read = sum(sizes.values()) - experts * 3 // 4 - sizes[names.embed()]
    assert round(read / 1e9, 2) == 0.26
