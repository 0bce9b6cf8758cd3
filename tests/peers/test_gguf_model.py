"""A checkpoint becomes a GGUF file that llama.cpp can load: every tensor once, under the name it has there."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers import gguf_model
from benchmarks.peers.child import PeerFailed
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.layouts import gguf_names
from grokmoe.model_config import BENCH, GROK1, TINY

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)


@pytest.mark.parametrize("config", [UNTIED, BENCH], ids=["tiny", "bench"])
def test_every_tensor_is_used_once(config):
    used = [source for tensor in gguf_names.tensors(config) for source in tensor.ours]
    assert sorted(used) == sorted(spec.name for spec in names.expected(config))


def test_a_tied_head_is_written_as_a_tensor_of_its_own():
    by_name = {tensor.name: tensor.ours for tensor in gguf_names.tensors(GROK1)}
    assert by_name["output.weight"] == by_name["token_embd.weight"] == (names.embed(),)
    assert len(by_name) == 3 + 64 * (4 + 4 + 1 + 3)


def test_names_and_shapes_of_a_layer():
    shapes = {spec.name: spec.shape for spec in names.expected(UNTIED)}
    found = {}
    for tensor in gguf_names.tensors(UNTIED):
        assert len({shapes[source] for source in tensor.ours}) == 1
        stack = (len(tensor.ours),) if tensor.is_stacked else ()
        found[tensor.name] = ((*stack, *shapes[tensor.ours[0]]), tensor.is_float32)
    layer = {name.removeprefix("blk.1."): each for name, each in found.items() if name.startswith("blk.1.")}
    assert layer == {
        "attn_norm.weight": ((64,), True),
        "attn_output_norm.weight": ((64,), True),
        "ffn_norm.weight": ((64,), True),
        "layer_output_norm.weight": ((64,), True),
        "attn_q.weight": ((64, 64), False),
        "attn_k.weight": ((32, 64), False),
        "attn_v.weight": ((32, 64), False),
        "attn_output.weight": ((64, 64), False),
        "ffn_gate_inp.weight": ((8, 64), True),
        "ffn_gate_exps.weight": ((8, 64, 64), False),
        "ffn_up_exps.weight": ((8, 64, 64), False),
        "ffn_down_exps.weight": ((8, 64, 64), False),
    }
    assert found["token_embd.weight"] == ((256, 64), False)
    assert found["output_norm.weight"] == ((64,), True)


def test_the_head_says_what_the_config_says():
    fields = gguf_names.fields(BENCH)
    assert fields["attention.head_count_kv"] == 2
    assert fields["attention.output_scale"] == 128**-0.5
    assert fields["expert_used_count"] == 2
    assert fields["embedding_scale"] == BENCH.embedding_multiplier
    assert all(isinstance(fields[name], float) for name in ("rope.freq_base", "router_logit_softcapping"))


@pytest.mark.parametrize("size", [2, 3, 200, 259, 260, 32000])
def test_a_vocabulary_has_as_many_different_pieces_as_it_should(size):
    pieces = gguf_model.vocabulary(size)
    assert len(set(pieces)) == len(pieces) == size
    assert pieces[:3] == list(gguf_model.SPECIAL[:size])


def test_without_the_package_only_a_file_that_is_there_will_do(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    random_checkpoint(tmp_path / "model", TINY)
    with pytest.raises(PeerFailed, match="pip install gguf"):
        gguf_model.convert(tmp_path / "model", "bf16", tmp_path)
    there = gguf_model.path_for(tmp_path / "model", TINY, "bf16", tmp_path)
    there.write_bytes(b"")
    assert gguf_model.convert(tmp_path / "model", "bf16", tmp_path) == there


@pytest.mark.parametrize("kind", gguf_model.TYPES)
def test_the_file_holds_the_checkpoint(tmp_path: Path, kind: str):
    gguf = pytest.importorskip("gguf")
    random_checkpoint(tmp_path / "model", UNTIED, dtype=torch.bfloat16)
    path = gguf_model.convert(tmp_path / "model", kind, tmp_path)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert list(stored) == [tensor.name for tensor in gguf_names.tensors(UNTIED)]
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == UNTIED.vocab_size
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        for tensor in gguf_names.tensors(UNTIED):
            parts = [checkpoint.read(source, torch.float32) for source in tensor.ours]
            expected = (torch.stack(parts) if tensor.is_stacked else parts[0]).numpy()
            found = stored[tensor.name]
            values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(expected.shape)
            exact = kind != "q8_0" or tensor.is_float32
            np.testing.assert_allclose(values, expected, rtol=0, atol=0 if exact else np.abs(expected).max() / 127)
            assert math.prod(found.shape) == expected.size
    before = path.stat().st_mtime_ns
    assert gguf_model.convert(tmp_path / "model", kind, tmp_path).stat().st_mtime_ns == before
