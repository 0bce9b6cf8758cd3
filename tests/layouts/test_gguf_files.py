"""GGUF: what its header says, what its blocks mean, and every way in which a file can be wrong."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import gguf_model
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.errors import CheckpointError, ConfigError
from grokmoe.layouts import gguf_names
from grokmoe.layouts.gguf_header import TYPES, read_gguf
from grokmoe.layouts.mapped_file import MappedFile
from grokmoe.model_config import TINY, ModelConfig

gguf = pytest.importorskip("gguf")

UNTIED = dataclasses.replace(
    TINY, tie_word_embeddings=False, num_experts=3, bos_token_id=1, eos_token_ids=(2,), rope_base=12345.0,
    attention_cap=25.0, attention_output_scale=TINY.head_dim**-0.5, output_multiplier=0.57735026,  # float32 in GGUF
)  # fmt: skip
DOWN = "blk.1.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    random_checkpoint(root / "ours", UNTIED, seed=4)
    for kind in gguf_model.TYPES:
        path = gguf_model.convert(root / "ours", kind, root / kind)
        path.rename(path.with_name("model.gguf"))
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "f32", tmp_path / "f32"))


def header(path: Path) -> Any:
    with path.open("rb") as file:
        return read_gguf(file, MappedFile.of(path, file.fileno()))


def test_its_header_is_its_config(originals: Path) -> None:
    for kind in gguf_model.TYPES:
        with Checkpoint.open(originals / kind) as checkpoint:
            assert checkpoint.config == UNTIED
            assert (
                checkpoint.layout
                == {"f32": "GGUF of F32", "bf16": "GGUF of BF16, F32", "q8_0": "GGUF of F32, Q8_0"}[kind]
            )


def test_a_config_beside_it_counts(copy: Path, originals: Path) -> None:
    shutil.copy(originals / "ours" / "config.json", copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"max_attn_value": 25.0', '"max_attn_value": 20.0'))
    with Checkpoint.open(copy) as checkpoint:
        assert checkpoint.config == dataclasses.replace(UNTIED, attention_cap=20.0)


def test_what_older_files_do_not_say_is_what_llama_cpp_takes_it_to_be() -> None:
    said = {f"grok.{name}": value for name, value in gguf_names.fields(UNTIED).items()}
    for name in ("embedding_scale", "logit_scale", "attention.output_scale", "attn_logit_softcapping",
                 "expert_feed_forward_length", "attention.key_length", "rope.freq_base"):  # fmt: skip
        del said[f"grok.{name}"]
    found = ModelConfig.from_dict(gguf_names.config_from(said, 256, True, Path("x")))
    assert found.embedding_multiplier == 78.38367176906169
    assert found.output_multiplier == 0.5773502691896257
    assert found.attention_output_scale == 0.08838834764831845
    assert (found.attention_cap, found.rope_base, found.head_dim, found.intermediate_size) == (30.0, 10000.0, 16, 64)


@pytest.mark.parametrize("kind", gguf_model.TYPES)
def test_rows_are_those_of_the_gguf_package(originals: Path, kind: str) -> None:
    reader = gguf.GGUFReader(originals / kind / "model.gguf")
    theirs = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        theirs[tensor.name] = torch.from_numpy(values.reshape(tuple(reversed(tensor.shape.tolist()))))
    with Checkpoint.open(originals / kind) as checkpoint:
        for tensor in gguf_names.tensors(UNTIED):
            for index, name in enumerate(tensor.ours):
                wanted = theirs[tensor.name][index] if tensor.is_stacked else theirs[tensor.name]
                assert torch.equal(checkpoint.read(name, torch.float32), wanted), name
                for rows in (slice(0, 0), slice(3, 8), slice(60, None)):
                    assert torch.equal(checkpoint.read(name, torch.float32, rows), wanted[rows])
                    if wanted.dim() == 2:
                        found = checkpoint.read(name, torch.float32, rows, slice(5, 40))
                        assert torch.equal(found, wanted[rows, 5:40])


@pytest.mark.parametrize("kind", sorted(kind.name for kind in TYPES.values() if kind.elements > 1))
def test_every_quantised_type_has_the_size_that_the_package_knows(kind: str) -> None:
    (found,) = (each for each in TYPES.values() if each.name == kind)
    number = gguf.GGMLQuantizationType[kind]
    assert TYPES[int(number)] is found
    assert gguf.GGML_QUANT_SIZES[number] == (found.elements, found.bytes)


def test_without_the_package_only_quantised_tensors_are_out_of_reach(
    originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with Checkpoint.open(originals / "q8_0") as checkpoint:
        assert checkpoint.read(names.norm(0, "pre_attn_norm")).dtype is torch.float32
        with pytest.raises(ConfigError, match=r"stored as Q8_0, which needs grokmoe\[server,gguf\]"):
            checkpoint.read(names.attention(0, "q_proj"))
    with Checkpoint.open(originals / "bf16") as checkpoint:
        assert checkpoint.read(names.attention(0, "q_proj")).dtype is torch.bfloat16


def test_a_model_in_parts(originals: Path, tmp_path: Path) -> None:
    """Files as llama.cpp's `gguf-split` writes them: the first has the fields, each its own tensors."""
    wanted = list(gguf_names.tensors(UNTIED))
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(originals / "f32" / "model.gguf").tensors}
    for number, some in ((1, wanted[:5]), (2, wanted[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"model-{number:05}-of-00002.gguf", "grok" if number == 1 else "none")
        if number == 1:
            for name, value in gguf_names.fields(UNTIED).items():
                (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"grok.{name}", value)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
        for tensor in some:
            # llama.cpp's newer conversion has another name for this norm.
            name = tensor.name.replace("layer_output_norm", "post_ffw_norm")
            writer.add_tensor(name, np.array(reader[tensor.name].data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with Checkpoint.open(tmp_path) as checkpoint, Checkpoint.open(originals / "ours") as ours:
        assert checkpoint.config == UNTIED
        for name in ours.tensors:
            assert torch.equal(checkpoint.read(name, torch.float32), ours.read(name, torch.float32))
    (tmp_path / "model-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="expected the 2 parts of model, found 1 of them"):
        Checkpoint.open(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"the GGUF files of one model, found model, other\.gguf"):
        Checkpoint.open(tmp_path)


# --- what can be wrong


def patched(before: bytes, after: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert before in data
        return data.replace(before, after, 1)

    return change


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def down(*numbers: int, dimensions: int = 3) -> bytes:
    """What a header says of DOWN. numbers: three sizes, and a type if it is given."""
    return string(DOWN) + struct.pack("<I3Q", dimensions, *numbers[:3]) + b"".join(map(_word, numbers[3:]))


def _word(number: int) -> bytes:
    return struct.pack("<I", number)


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "at least 4 bytes, found 0 bytes"),
    "another format": (lambda data: b"GGML" + data[4:], "expected a little-endian GGUF"),
    "another version": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "little-endian GGUF"),
    "more fields than bytes": (lambda data: data[:16] + b"\xff" * 8 + data[24:], "type of GGUF's|at least|truncated"),
    "more tensors than bytes": (lambda data: data[:8] + b"\xff" * 8 + data[16:], "at least|type|truncated|dimensions"),
    "another architecture": (patched(string("grok"), string("gork")), "of the architecture grok, found gork"),
    "a field twice": (patched(b"grok.expert_count", b"grok.block_count\0"[:17]), "found one more|a number for"),
    "a missing number": (
        patched(b"grok.block_count", b"grok.block_cnuot"),
        "a number for grok.block_count, found None",
    ),
    "a missing embedding": (patched(b"token_embd.weight", b"token_embd.thgiew"), "token_embd.weight.*no such tensor"),
    "another tensor": (patched(DOWN.encode(), DOWN[:-1].encode() + b"s"), "ffn_down_exps.weighs|linear_1"),
    "other experts": (
        patched(down(64, 64, 3), down(64, 32, 6)),
        r"\[3, out, in\] because num_experts is 3, found shape \[6, 32, 64\]",
    ),
    "five dimensions": (patched(down(64, 64, 3), down(64, 64, 3, dimensions=5)), "at most 4 dimensions, found 5"),
    "a type of tomorrow": (patched(down(64, 64, 3, 0), down(64, 64, 3, 77)), "found ggml's type 77"),
    "half a block": (patched(down(64, 64, 3, 0), down(48, 64, 4, 8)), "a multiple of 32 for Q8_0, found 48"),
    "beyond the end": (patched(down(64, 64, 3), down(64, 64, 1 << 40)), r"a file of at least .*\(truncated\)"),
    "cut": (lambda data: data[:-1000], "truncated"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_wrong(copy: Path, case: str) -> None:
    change, message = WRONG[case]
    path = copy / "model.gguf"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint.open(copy)
    assert "model.gguf" in raised.value.message


def test_every_beginning_of_a_header_is_refused_at_once(originals: Path, tmp_path: Path) -> None:
    data = (originals / "f32" / "model.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    began = time.monotonic()
    for size in [*range(0, 400), *range(400, 12_000, 37)]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"truncated|GGUF"):
            header(path)
    assert time.monotonic() - began < 60


@given(st.data())
def test_a_damaged_header_is_read_or_refused(originals: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    whole = bytearray((originals / "f32" / "model.gguf").read_bytes()[:12_000])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    damaged = tmp_path_factory.mktemp("damaged") / "model.gguf"
    damaged.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError):  # it is cut off in any case
        header(damaged)
