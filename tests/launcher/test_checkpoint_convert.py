"""`grokmoe checkpoint convert`, `verify`, `files` and `inspect`: what is typed and what is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grokmoe.checkpoint import Checkpoint
from launcher.__main__ import main
from tests.launcher.terminal import Terminal
from tests.layouts import writers


def checkpoint(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    writers.jax_release(writers.TINY_A, tmp_path / "theirs")
    assert checkpoint("convert", tmp_path / "theirs", tmp_path / "ours", "--shard", "experts") == 0
    return tmp_path / "ours"


def test_a_conversion_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers.jax_release(writers.TINY_A, tmp_path / "theirs")
    converted = tmp_path / "ours"
    assert checkpoint("convert", tmp_path / "theirs", converted, "--shard", "experts") == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{converted}: 30 files, 0.00 GB, from xai-org/grok-1's JAX arrays, in ")
    assert told.err == ""
    assert checkpoint("verify", converted) == 0
    assert capsys.readouterr().out == f"{converted}: 32 of 32 files are what they were written as\n"


def test_a_file_that_is_not_what_it_was(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = converted / "model-layer-1-expert-3.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    capsys.readouterr()
    assert checkpoint("verify", converted) == 1
    told = capsys.readouterr().out
    assert f"{path}: SHA-256 is " in told
    assert "31 of 32 files" in told
    assert checkpoint("verify", converted, "--role", "expert", "--experts", "0-2") == 0
    assert checkpoint("verify", converted, "--role", "expert", "--experts", "3@1") == 1
    assert checkpoint("verify", converted, "--role", "router") == 0


def test_the_list_of_a_role_is_what_sha256sum_checks(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert checkpoint("files", converted, "--role", "attention", "--layers", "0-1") == 0
    told = capsys.readouterr().out
    assert [line.split("  ")[1] for line in told.splitlines()] == [
        "model-embedding.safetensors",
        "model-layer-0.safetensors",
        "model-layer-1.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ]
    for path in converted.glob("*.safetensors"):  # a list needs no tensors
        path.unlink()
    assert checkpoint("files", converted, "--role", "attention", "--layers", "0-1") == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--role", "router", "--experts", "0"), "--experts is said of --role expert"),
        (("--layers", "0"), "--layers is said of --role attention"),
        (("--role", "expert", "--experts", "0-9"), "the model has experts 0 to 7"),
        (("--role", "expert", "--experts", "x"), "'x' is no expert number"),
        (("--role", "attention", "--layers", "2-5"), "the model has layers 0 to 2"),
    ],
)
def test_parts_that_cannot_be(
    converted: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    for command in ("files", "verify"):
        assert checkpoint(command, converted, *arguments) == 1
        assert message in capsys.readouterr().err


def test_a_directory_without_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("verify", writers.TINY_A) == 1
    assert "SHA256SUMS: expected the list that `checkpoint convert` writes, found" in capsys.readouterr().err


def test_types_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--dtype", "float32", "--shard-mb", "1")
    assert checkpoint("convert", writers.TINY_A, tmp_path / "ours", *how) == 0
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 5
    assert all(path.stat().st_size < 1_000_000 + 10_000 for path in files)
    with Checkpoint.open(tmp_path / "ours") as ours:
        assert {ours.read(name).dtype for name in ours.tensors} == {torch.float32}
    assert checkpoint("convert", writers.TINY_A, tmp_path / "more", "--shard-mb", "0") == 1
    assert "--shard-mb is 0, must be at least 1" in capsys.readouterr().err


def test_a_second_try_says_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("convert", writers.TINY_A, tmp_path / "ours", "--shard", "experts")
    program = (
        "import os, signal, sys; import launcher.checkpoint.progress as progress\n"
        "def report(self, file, done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "progress.Progress.report = report\n"
        "from launcher.__main__ import main; main(['checkpoint', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -9
    assert checkpoint(*arguments) == 0
    told = capsys.readouterr().out
    assert "30 files" in told
    assert 10 < int(told.partition("safetensors, names of vLLM's Grok1ForCausalLM, ")[2].split()[0]) < 20
    assert "of them kept from an earlier try" in told
    assert checkpoint("convert", writers.TINY_A, tmp_path / "ours") == 1
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert checkpoint("verify", tmp_path / "ours") == 0


@pytest.mark.parametrize("layout", writers.WRITERS)
def test_inspect_says_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    writers.WRITERS[layout](writers.TINY_A, tmp_path / "theirs")
    assert checkpoint("inspect", tmp_path / "theirs") == 0
    told = " ".join(capsys.readouterr().out.split())
    expected = {
        "sglang": "layout: safetensors, names of SGLang and Grok-2",
        "keyfan": "layout: safetensors, names of keyfan/grok-1-hf",
        "tensor-parallel": "layout: safetensors of 4 tensor-parallel ranks, names of SGLang and Grok-2",
        "jax": "layout: xai-org/grok-1's JAX arrays",
        "gguf-f32": "layout: GGUF of F32",
        "gguf-bf16": "layout: GGUF of BF16, F32",
    }
    assert expected[layout] in told
    assert "8 experts of width 128" in told


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    command = ("checkpoint", "convert", str(writers.TINY_A), str(tmp_path / "ours"), "--shard", "experts")
    with Terminal(*command, TERM="xterm", COLUMNS="150") as terminal:
        shown = terminal.wait_for("30 files, ")
        assert terminal.wait_ended() == 0
    assert "model-end.safetensors" in shown
    assert "4.4/4.4 MB" in shown
