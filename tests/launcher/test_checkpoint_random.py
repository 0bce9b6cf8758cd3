"""`grokmoe checkpoint random`: what is typed, what is written, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from grokmoe.checkpoint import Checkpoint
from grokmoe.layouts.safetensors_files import INDEX_FILE
from grokmoe.model_config import TINY
from launcher.__main__ import main


def test_a_preset_with_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "model")
    sizes = ["--layers", "1", "--experts", "4", "--vocab", "300", "--context", "512"]
    assert main(["checkpoint", "random", out, "--preset", "tiny", *sizes, "--dtype", "float32", "--seed", "3"]) == 0
    with Checkpoint.open(out) as checkpoint:
        expected = dataclasses.replace(TINY, num_layers=1, num_experts=4, vocab_size=300, context_length=512)
        assert checkpoint.config == expected
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F32"}
    told = capsys.readouterr().out
    assert told == f"{out}: 81,216 parameters, 0.00 GB, files: 1, seed 3\n"
    assert (tmp_path / "model" / INDEX_FILE).exists()


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    def weights(name: str, seed: str) -> torch.Tensor:
        out = tmp_path / name
        assert main(["checkpoint", "random", str(out), "--preset", "tiny", "--seed", seed]) == 0
        with Checkpoint.open(out) as checkpoint:
            return checkpoint.read("model.embed_tokens.weight")

    one, again, other = weights("one", "1"), weights("again", "1"), weights("other", "2")
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_files_keep_to_their_size(tmp_path: Path) -> None:
    sizes = ["--layers", "8", "--dtype", "float32"]
    assert main(["checkpoint", "random", str(tmp_path / "m"), "--preset", "tiny", *sizes, "--shard-mb", "1"]) == 0
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) == 4
    assert all(file.stat().st_size < 1_020_000 for file in files)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layers", "0"], "num_layers is 0, must be at least 1"),
        (["--experts", "1"], "experts_per_token (2) must not exceed num_experts (1)"),
        (["--shard-mb", "0"], "--shard-mb is 0, must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(["checkpoint", "random", str(tmp_path / "m"), "--preset", "tiny", *flags]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_checkpoint_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "random", str(tmp_path / "m"), "--preset", "tiny"]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert main([*command, "--seed", "1"]) == 1
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
