"""Converting: every tensor arrives, hashes hold, a killed try is gone on with, memory is that of a piece."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grokmoe import checkpoint_part, checksums, conversion
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_files import digests_of
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.conversion import JOURNAL, Converted, Options, convert
from grokmoe.errors import CheckpointError
from grokmoe.layouts.safetensors_files import INDEX_FILE
from grokmoe.model_config import GROK1, TINY
from grokmoe.reference import reference_logits
from grokmoe.shard_plan import by_expert, by_size
from tests import goldens
from tests.layouts import writers

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = Options()
SIZED = Options(max_shard_bytes=200_000)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "model"
    random_checkpoint(directory, dataclasses.replace(TINY, tie_word_embeddings=False), seed=6)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("not copied")
    return directory


def run(source: Path, target: Path, options: Options = EXPERTS) -> Converted:
    with Checkpoint.open(source) as checkpoint:
        return convert(checkpoint, target, options)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- what arrives


@pytest.mark.parametrize("options", [EXPERTS, SIZED], ids=["experts", "size"])
@pytest.mark.parametrize("layout", sorted(writers.WRITERS))
def test_every_layout_becomes_one_of_ours(tmp_path: Path, layout: str, options: Options) -> None:
    writers.WRITERS[layout](writers.TINY_A, tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours", dataclasses.replace(options, dtype=torch.bfloat16))
    expected = writers.tensors_of(writers.TINY_A)
    stored: writers.Tensors = {}
    for path in (tmp_path / "ours").glob("*.safetensors"):
        stored |= load_file(path)  # by the safetensors library
    untied = {"lm_head.weight"} if layout.startswith("gguf") else set()
    assert stored.keys() == expected.keys() | untied
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    with Checkpoint.open(tmp_path / "ours") as checkpoint:
        assert checkpoint.layout.endswith("names of vLLM's Grok1ForCausalLM")
        logits = reference_logits(checkpoint, goldens.PROMPTS["len7"])
    assert float((logits - goldens.logits("seed", "len7")).abs().max()) < 1e-4


def test_xai_integers_become_what_they_mean(tmp_path: Path) -> None:
    meant = writers.jax_release(writers.TINY_A, tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours")
    found = writers.tensors_of(tmp_path / "ours")
    assert found.keys() == meant.keys()
    assert all(found[name].dtype is meant[name].dtype and torch.equal(found[name], meant[name]) for name in meant)
    with Checkpoint.open(tmp_path / "ours", "xai") as ours, Checkpoint.open(tmp_path / "theirs", "xai") as theirs:
        assert ours.config == theirs.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_type(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    run(original, tmp_path / "ours", Options(dtype))
    for name, tensor in writers.tensors_of(original).items():
        with Checkpoint.open(tmp_path / "ours") as checkpoint:
            assert torch.equal(checkpoint.read(name), tensor.to(dtype))
    assert writers.raw_config(tmp_path / "ours")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_what_lies_beside_it(original: Path, tmp_path: Path) -> None:
    done = run(original, tmp_path / "ours")
    files = content(tmp_path / "ours")
    shards = {name for name in files if name.endswith(".safetensors")}
    assert files.keys() - shards == {"config.json", INDEX_FILE, "SHA256SUMS", "tokenizer.json"}
    assert writers.raw_config(tmp_path / "ours") == writers.raw_config(original)
    index = json.loads(files[INDEX_FILE])
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in writers.tensors_of(original).values())
    assert done == Converted(len(shards), sum(len(files[name]) for name in shards), 0)


def test_sha256sum_agrees(original: Path, tmp_path: Path) -> None:
    run(original, tmp_path / "ours", SIZED)
    told = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "ours",
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert told.returncode == 0, told.stderr
    listed = {line.partition(":")[0] for line in told.stdout.splitlines()}
    assert listed == content(tmp_path / "ours").keys() - {"SHA256SUMS"}


# --- who needs which files


def test_a_file_per_expert_and_layer() -> None:
    plan = by_expert(GROK1)
    assert len(plan) == 64 * 8 + 64 + 3
    assert list(plan)[:3] == ["model-embedding.safetensors", "model-layer-00.safetensors", "model-gates.safetensors"]
    assert plan["model-layer-07-expert-3.safetensors"] == [
        names.expert(7, 3, linear) for linear in names.EXPERT_LINEARS
    ]
    assert len(plan["model-gates.safetensors"]) == 64
    assert plan["model-end.safetensors"] == [names.final_norm()]
    assert sorted(name for tensors in plan.values() for name in tensors) == sorted(
        spec.name for spec in names.expected(GROK1)
    )


def test_files_of_a_size() -> None:
    assert by_size({"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}, 6) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d", "e"],
    }


def test_a_worker_opens_with_its_files_alone(original: Path, tmp_path: Path) -> None:
    run(original, tmp_path / "ours")
    parts = {
        "router": (checkpoint_part.router, {"model-gates"}),
        "experts": (
            checkpoint_part.experts(lambda config: {(1, 2), (0, 7)}),
            {"model-layer-1-expert-2", "model-layer-0-expert-7"},
        ),
        "first stage": (
            checkpoint_part.attention(lambda config: range(1)),
            {"model-embedding", "model-layer-0"},
        ),
        "last stage": (
            checkpoint_part.attention(lambda config: range(1, 2)),
            {"model-layer-1", "model-end"},
        ),
    }
    for name, (part, shards) in parts.items():
        digests = digests_of(tmp_path / "ours", part)
        files = {f"{shard}.safetensors" for shard in shards}
        assert digests.keys() == files | {"config.json", INDEX_FILE, "tokenizer.json"}
        pod = tmp_path / name
        pod.mkdir()
        for file in digests:
            shutil.copy(tmp_path / "ours" / file, pod)
        assert checksums.check(pod, digests) == []
        with Checkpoint.open(pod, part=part) as checkpoint, Checkpoint.open(original) as whole:
            assert checkpoint.tensors
            for tensor in checkpoint.tensors:
                assert torch.equal(checkpoint.read(tensor), whole.read(tensor))


# --- a try that was killed

KILLED = """
import os, signal, sys
import torch
from grokmoe.checkpoint import Checkpoint
from grokmoe.conversion import Options, convert
source, target, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
def report(file, done, total):
    if done >= limit:
        os.kill(os.getpid(), signal.SIGKILL)
with Checkpoint.open(source) as checkpoint:
    convert(checkpoint, target, Options(), report)
"""


def killed_after(source: Path, target: Path, num_bytes: int) -> None:
    told = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target), str(num_bytes)], cwd=ROOT,
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    assert told.returncode == -signal.SIGKILL, told.stderr.decode()


def test_a_killed_conversion_goes_on_where_it_was(original: Path, tmp_path: Path) -> None:
    run(original, tmp_path / "whole")
    target = tmp_path / "ours"
    total = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    made: set[str] = set()
    for part in (0.0, 0.3, 0.31, 0.9):
        killed_after(original, target, max(1, int(total * part)))
        there = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
        assert made <= there.keys()
        made = set(there)
        assert not (target / "config.json").exists()
        assert list(target.glob("*.safetensors.unfinished")), "killed in the middle of a file"
    before = {name: (target / name).stat().st_mtime_ns for name in made}
    done = run(original, target)
    assert len(made) - 1 <= done.num_kept <= len(made)  # killed between a file's end and its note, it is written anew
    kept = [name for name, time in before.items() if (target / name).stat().st_mtime_ns == time]
    assert len(kept) == done.num_kept > 3
    assert content(target) == content(tmp_path / "whole")


def test_a_note_cut_in_half_is_forgotten(original: Path, tmp_path: Path) -> None:
    run(original, tmp_path / "whole")
    target = tmp_path / "ours"
    killed_after(original, target, 300_000)
    journal = target / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-30])
    run(original, target)
    assert content(target) == content(tmp_path / "whole")


def test_a_file_that_vanished_or_shrank_is_written_again(original: Path, tmp_path: Path) -> None:
    run(original, tmp_path / "whole")
    target = tmp_path / "ours"
    killed_after(original, target, 400_000)
    first, second, *_ = sorted(target.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    run(original, target)
    assert content(target) == content(tmp_path / "whole")


def test_nobody_goes_on_with_another_conversion(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours"
    killed_after(original, target, 300_000)
    before = content(target)
    with pytest.raises(CheckpointError, match=r"what is left of another conversion.*remove it, or convert elsewhere"):
        run(original, target, SIZED)
    other = Path(shutil.copytree(original, tmp_path / "other"))
    os.utime(other / "model.safetensors")
    with pytest.raises(CheckpointError, match="what is left of another conversion"):
        run(other, target)
    assert content(target) == before


def test_two_do_not_write_at_once(original: Path, tmp_path: Path) -> None:
    with Checkpoint.open(original) as checkpoint:

        def again(file: str, done: int, total: int) -> None:
            with pytest.raises(CheckpointError, match="another process is converting to it"):
                convert(checkpoint, tmp_path / "ours", EXPERTS)

        convert(checkpoint, tmp_path / "ours", EXPERTS, again)


# --- what is refused


@pytest.mark.parametrize("rest", ["config.json", "model-00001-of-00009.safetensors", "x.safetensors.unfinished"])
def test_nothing_is_written_over_what_is_there(original: Path, tmp_path: Path, rest: str) -> None:
    (tmp_path / rest).write_text("mine")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        run(original, tmp_path)
    assert content(tmp_path) == {rest: b"mine"}


def test_a_disk_without_room_is_not_filled(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.\d GB, 0\.0 GB are free"):
        run(original, tmp_path)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_source_that_changes_is_an_error_and_no_mixture(original: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(original, tmp_path / "source"))
    with Checkpoint.open(source) as checkpoint:

        def change(file: str, done: int, total: int) -> None:
            os.utime(source / "model.safetensors", (1, 1))

        with pytest.raises(CheckpointError, match="changed or put in its place"):
            convert(checkpoint, tmp_path / "ours", EXPERTS, change)
    assert not (tmp_path / "ours" / "config.json").exists()


# --- hashes


def test_what_is_wrong_is_said_of_each_file(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours"
    run(original, target)
    digests = digests_of(target, checkpoint_part.whole)
    assert checksums.check(target, digests) == []
    gates, layer = target / "model-gates.safetensors", target / "model-layer-1.safetensors"
    data = bytearray(gates.read_bytes())
    data[-1] ^= 1
    gates.write_bytes(data)
    layer.unlink()
    wrong = checksums.check(target, digests)
    assert len(wrong) == 2
    assert f"{layer}: No such file or directory" in wrong
    assert any(sentence.startswith(f"{gates}: SHA-256 is ") for sentence in wrong)


ZEROS = "0" * 64


@pytest.mark.parametrize(
    "text", ["x  a\n", f"{ZEROS} a\n", f"{ZEROS}  ../a\n", f"{ZEROS}  \n", f"{ZEROS}  ..", "G" * 64 + "  a\n"]
)
def test_a_list_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / checksums.FILE).write_text(text)
    with pytest.raises(CheckpointError, match="lines of a SHA-256"):
        checksums.read(tmp_path)


# --- memory

PEAK = """
import sys
from pathlib import Path
import torch
from grokmoe.checkpoint import Checkpoint
from grokmoe.conversion import Options, convert
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
small, source, target, dtype = sys.argv[1:]
how = Options(getattr(torch, dtype, None))
with Checkpoint.open(small) as checkpoint:
    convert(checkpoint, target + "-small", how)
before = peak()
with Checkpoint.open(source) as checkpoint:
    convert(checkpoint, target, how)
print(peak() - before)
"""


@pytest.mark.parametrize("layout", ["ours", "jax", "tensor-parallel"])
def test_memory_is_bounded_by_one_tensor(tmp_path: Path, layout: str) -> None:
    """All memory that the process has at its peak, mapped files included, beyond what a tiny conversion takes."""
    wide = dataclasses.replace(
        TINY, hidden_size=1024, head_dim=256, intermediate_size=16384, vocab_size=1000, num_layers=1, num_experts=2,
        attention_logit_scale=0.0,
    )  # fmt: skip
    for name, config in (("small", TINY), ("wide", wide)):
        random_checkpoint(tmp_path / "ours" / name, config)
        if layout == "jax":
            writers.jax_release(tmp_path / "ours" / name, tmp_path / "jax" / name, groups=8)
        elif layout == "tensor-parallel":
            (tmp_path / layout).mkdir(exist_ok=True)
            writers.tensor_parallel(tmp_path / "ours" / name, tmp_path / layout / name, 4)
    source = tmp_path / layout
    arguments = (str(source / "small"), str(source / "wide"), str(tmp_path / "out"), "float32")
    # What malloc keeps of freed blocks, some tens of MB whatever the model's size, is not what is asked here.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    told = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=240, check=True)  # fmt: skip
    one_tensor = 1024 * 16384 * 4
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert total > 6 * one_tensor
    assert int(told.stdout) < 0.7 * one_tensor
