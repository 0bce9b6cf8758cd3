"""xAI's release: which file is which tensor, what is read of it, and every way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import mmap
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grokmoe import checkpoint_part
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_summary import summary
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.errors import CheckpointError
from grokmoe.layouts import mapped_file
from grokmoe.layouts.jax_release import leaves
from grokmoe.model_config import GROK1, TINY
from tests.layouts.writers import QuantizedWeight8bit, jax_release, pickled

SMALL = dataclasses.replace(
    TINY, hidden_size=16, intermediate_size=8, num_experts=3, head_dim=4, attention_logit_scale=0.5
)
MANY_LAYERS = dataclasses.replace(SMALL, num_layers=12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    random_checkpoint(root / "ours", SMALL, seed=1)
    jax_release(root / "ours", root / "jax", groups=2)
    return root / "jax"


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "jax"))


def test_the_release_has_770_files_in_the_order_of_their_keys() -> None:
    found = list(leaves(GROK1))
    assert len(found) == 770
    paths = [leaf.path for leaf in found]
    assert paths == sorted(paths)
    assert found[41].path == "transformer/decoder_layer_11/multi_head_attention/key"
    assert found[2].names == tuple(names.expert(0, expert, "linear") for expert in range(8))
    assert {name for leaf in found for name in leaf.names} == {spec.name for spec in names.expected(GROK1)}


def test_layer_10_comes_before_layer_2(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "ours", MANY_LAYERS, seed=3)
    meant = jax_release(tmp_path / "ours", tmp_path / "jax", None, folder=".")
    with Checkpoint.open(tmp_path / "jax") as checkpoint:
        assert checkpoint.tensors[names.norm(10, "pre_attn_norm")].path.name == "tensor00033_000"
        for name, tensor in meant.items():
            assert torch.equal(checkpoint.read(name), tensor), name


def test_rows_and_pieces(original: Path) -> None:
    with Checkpoint.open(original) as checkpoint:
        for name in (names.expert(1, 2, "linear_1"), names.attention(0, "o_proj"), names.gate(1), names.embed()):
            whole = checkpoint.read(name, torch.float32)
            for rows in (slice(2, 3), slice(0, 0), slice(1, None), slice(3, 99)):
                assert torch.equal(checkpoint.read(name, torch.float32, rows), whole[rows])
                for columns in (slice(0, 0), slice(1, 3), slice(2, 7), slice(None)):
                    assert torch.equal(checkpoint.read(name, torch.float32, rows, columns), whole[rows, columns])
            assert torch.equal(torch.cat([piece.float() for _, piece in checkpoint.pieces(name, 1)]), whole)


def test_without_a_config_it_is_the_released_model(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"num_experts being 8, found shape \[3, 16, 8\]"):
        Checkpoint.open(copy)
    embedding = np.zeros((131072, 8), np.float32)
    for path in (copy / "ckpt-0").iterdir():
        path.unlink()
    (copy / "ckpt-0" / "tensor00000_000").write_bytes(pickled(embedding))
    with pytest.raises(CheckpointError, match=r"\[131072, 6144\].*found shape \[131072, 8\]"):
        Checkpoint.open(copy, part=checkpoint_part.experts(lambda config: ()))


def test_the_summary_says_what_is_stored(original: Path) -> None:
    with Checkpoint.open(original) as checkpoint:
        found = summary(checkpoint)
    assert found.layout == "xai-org/grok-1's JAX arrays"
    assert set(found.dtypes) == {"F32", "I8 x BF16"}
    assert found.parts["experts"].bytes == 2 * 3 * (2 * (8 * 16 + 2 * 8) + (8 * 16 + 2 * 2 * 16))


def test_a_worker_needs_the_files_of_its_layers_and_maps_its_experts(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = checkpoint_part.experts(lambda config: {(1, 2)})
    with Checkpoint.open(copy) as checkpoint:
        expected = checkpoint.read(names.expert(1, 2, "linear"))
        needed = {source.path for name, source in checkpoint.tensors.items() if mine(SMALL)(name)}
    assert len(needed) == 3
    for path in (copy / "ckpt-0").iterdir():
        if path not in needed:
            path.unlink()
    mapped: list[int] = []

    class Recorder(mmap.mmap):
        def __new__(cls, descriptor: int, length: int, **options: Any) -> Recorder:
            mapped.append(length)
            return super().__new__(cls, descriptor, length, **options)

    monkeypatch.setattr(mapped_file.mmap, "mmap", Recorder)
    with Checkpoint.open(copy, part=mine) as checkpoint:
        assert torch.equal(checkpoint.read(names.expert(1, 2, "linear")), expected)
        # One matrix of 16 x 8 integers and its scales, each from the beginning of a page.
        assert len(mapped) == 2
        assert sum(mapped) < 2 * mmap.ALLOCATIONGRANULARITY
    with pytest.raises(CheckpointError, match="expected this file of the release, found no such file"):
        Checkpoint.open(copy)


ATTENTION, EXPERTS, NORM = "tensor00007_000", "tensor00003_000", "tensor00009_000"
"""Of layer 0: query [16, 16], linear_1 [3, 8, 16] in two groups of inputs, rms_norm [16]."""


def quantised(weight: Any, scales: Any) -> QuantizedWeight8bit:
    return QuantizedWeight8bit(weight, scales)


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


WRONG: dict[str, tuple[str, Any, str]] = {
    "transposed": (ATTENTION, ones(16, 4), r"\[16, 16\].*found shape \[4, 16\]"),
    "not stacked": (
        EXPERTS,
        ones(8, 16),
        r"shape \[num_experts, in, out\].*found shape \[8, 16\]",
    ),
    "stacked": (ATTENTION, ones(1, 16, 16), r"shape \[in, out\].*found shape \[1, 16, 16\]"),
    "other experts": (EXPERTS, ones(4, 8, 16), r"num_experts being 3, found shape \[4, 8, 16\]"),
    "no matrix": (ATTENTION, ones(16), r"shape \[in, out\].*found shape \[16\]"),
    "integers alone": (ATTENTION, ones(16, 16, dtype=np.int8), "scales beside integers, found none"),
    "floats with scales": (ATTENTION, quantised(ones(16, 16), ones(1, 16)), "8-bit integers.*found F32 and F32"),
    "integers as scales": (
        ATTENTION,
        quantised(ones(16, 16, dtype=np.int8), ones(1, 16, dtype=np.int8)),
        "scales of a float type, found I8 and I8",
    ),
    "groups that do not fit": (
        ATTENTION,
        quantised(ones(16, 16, dtype=np.int8), ones(3, 16)),
        r"groups of inputs, found shape \[3, 16\]",
    ),
    "no groups": (ATTENTION, quantised(ones(16, 16, dtype=np.int8), ones(0, 16)), "groups of inputs"),
    "scales of others": (
        EXPERTS,
        quantised(ones(3, 8, 16, dtype=np.int8), ones(1, 2, 16)),
        r"groups of inputs, found shape \[1, 2, 16\]",
    ),
    "a gain with scales": (NORM, quantised(ones(16, dtype=np.int8), ones(16)), "without scales, found scales"),
    "a gain of another size": (NORM, ones(8), r"\[16\].*found shape \[8\]"),
    "a gain of integers": (NORM, ones(16, dtype=np.int8), "dtype F32 or BF16 or F16, found I8"),
    "no array": (NORM, {"weight": 1}, "nothing of the file was run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_the_tensor(copy: Path, case: str) -> None:
    file, value, message = WRONG[case]
    (copy / "ckpt-0" / file).write_bytes(pickled(value))
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint.open(copy)
    assert file in raised.value.message


def change_config(copy: Path, **changes: Any) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | changes))


def cut(copy: Path) -> None:
    path = copy / "ckpt-0" / EXPERTS
    path.write_bytes(path.read_bytes()[:-200])


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "too many layers": (lambda copy: change_config(copy, num_hidden_layers=3), "decoder_layer_2.*found no such file"),
    "too few layers": (lambda copy: change_config(copy, num_hidden_layers=1), "num_hidden_layers is 1, found more"),
    "untied": (lambda copy: change_config(copy, tie_word_embeddings=False), "tie_word_embeddings is false"),
    "a hole": (lambda copy: (copy / "ckpt-0" / NORM).unlink(), "decoder_layer_0/rms_norm.*found no such file"),
    "truncated": (cut, "truncated"),
    "of another size": (lambda copy: change_config(copy, hidden_size=32), r"shape \[32, 32\] \(vocab_size|\[256, 32\]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_files_that_are_not_the_model(copy: Path, case: str) -> None:
    change, message = CHANGES[case]
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)


def test_the_real_unpickler_reads_what_the_writer_wrote(original: Path) -> None:
    """The writer is held to numpy's and pickle's own reading, so that the reader is not held to itself alone."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return QuantizedWeight8bit if name == "QuantizedWeight8bit" else super().find_class(module, name)

    with (original / "ckpt-0" / EXPERTS).open("rb") as file:
        value = Unpickler(file).load()
    assert (value.weight.dtype, value.weight.shape, value.scales.shape) == (np.int8, (3, 8, 16), (3, 2, 16))
    meant = value.weight.astype(np.float32).reshape(3, 2, 4, 16) * value.scales.astype(np.float32)[:, :, None, :]
    with Checkpoint.open(original) as checkpoint:
        for expert in range(3):
            found = checkpoint.read(names.expert(0, expert, "linear_1"), torch.float32)
            wanted = torch.from_numpy(meant[expert].reshape(8, 16).T.copy()).bfloat16().float()
            assert torch.equal(found, wanted)
