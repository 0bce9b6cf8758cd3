"""The shards of a tensor-parallel group, as Grok-2 is published."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.errors import CheckpointError
from grokmoe.model_config import TINY
from tests.layouts import writers

CONFIG = dataclasses.replace(TINY, num_experts=3)
W1, W2 = (f"model.layers.1.block_sparse_moe.experts.2.{linear}.weight" for linear in ("w1", "w2"))
RANK_1 = "pytorch_model-00001-TP-001.safetensors"
COMMON = "pytorch_model-00000-TP-common.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    random_checkpoint(root / "ours", CONFIG, seed=2)
    writers.tensor_parallel(root / "ours", root / "tp", 4)
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "tp", tmp_path / "tp"))


def test_parts_are_joined_and_read_row_by_row(originals: Path) -> None:
    expected = writers.tensors_of(originals / "ours")
    with Checkpoint.open(originals / "tp") as checkpoint:
        assert checkpoint.layout == "safetensors of 4 tensor-parallel ranks, names of SGLang and Grok-2"
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name), tensor), name
        for linear in names.EXPERT_LINEARS:
            name = names.expert(1, 2, linear)
            for rows in (slice(0, 0), slice(5, 40), slice(16, 32), slice(15, 17), slice(63, None)):
                assert torch.equal(checkpoint.read(name, rows=rows), expected[name][rows])
                for columns in (slice(0, 0), slice(3, 60), slice(16, 32), slice(15, 17)):
                    assert torch.equal(checkpoint.read(name, rows=rows, columns=columns), expected[name][rows, columns])
            assert checkpoint.tensors[name].num_bytes == 64 * 64 * 2


def edit(path: Path, change: Callable[[writers.Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first_of(path: Path) -> str:
    return next(iter(load_file(path)))


def halve(tensors: writers.Tensors) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:8].contiguous()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank is missing": (
        lambda copy: [path.unlink() for path in copy.glob("*-TP-002*")],
        "files of ranks 000 to 003, found 000, 001, 003",
    ),
    "a tensor is missing in a rank": (
        lambda copy: edit(copy / RANK_1, lambda tensors: tensors.pop(next(iter(tensors)))),
        "a part of it in each of 4 ranks, found none of rank 001",
    ),
    "a part is of another size": (lambda copy: edit(copy / RANK_1, halve), r"expected shape \[64, 64\].*found shape"),
    "a part is of another type": (
        lambda copy: edit(copy / RANK_1, lambda tensors: tensors.update({W1: torch.ones(16, 64)})),
        "one tensor of this name|expected shape",
    ),
    "cut and not cut": (
        lambda copy: edit(copy / COMMON, lambda tensors: tensors.update({W2: torch.ones(64, 64)})),
        "one tensor of this name, found one more in pytorch_model-00000-TP-common",
    ),
    "surplus": (
        lambda copy: [
            edit(path, lambda tensors: tensors.update({"extra": torch.ones(1)})) for path in copy.glob("*-00001-TP-00*")
        ],
        "tensor extra in .* no tensor of this name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_shards_that_are_wrong(copy: Path, case: str) -> None:
    change, message = WRONG[case]
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)
