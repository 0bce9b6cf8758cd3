"""Names that others gave to the same tensors."""

from __future__ import annotations

import pytest

from grokmoe import tensor_names
from grokmoe.layouts.names_of_others import KEYFAN, NAMINGS, OURS, SGLANG, Naming, canonical, title
from grokmoe.model_config import GROK1
from tests.layouts import writers

RULES = {OURS.title: [], SGLANG.title: writers.SGLANG, KEYFAN.title: writers.KEYFAN}


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.title)
def test_every_tensor_of_the_release_has_one_name_in_each(naming: Naming) -> None:
    ours = [spec.name for spec in tensor_names.expected(GROK1)] + ["lm_head.weight"]
    theirs = [writers.respelled(name, RULES[naming.title]) for name in ours]
    assert len(set(theirs)) == len(theirs)
    assert [naming.ours(name) for name in theirs] == ours
    assert [canonical(name) for name in theirs] == ours
    assert title(frozenset(theirs)) == naming.title


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("transformer.decoder_layer.63.moe.7.linear_1.weight", "model.layers.63.moe_block.experts.7.linear_1.weight"),
        ("transformer.decoder_layer.0.multi_head_attention.linear.weight", "model.layers.0.attn.o_proj.weight"),
        ("transformer.decoder_layer.10.rms_norm.weight", "model.layers.10.pre_attn_norm.scale"),
        ("transformer.decoder_layer.10.rms_norm_3.weight", "model.layers.10.post_moe_norm.scale"),
        ("model.layers.5.block_sparse_moe.experts.0.w1.weight", "model.layers.5.moe_block.experts.0.linear.weight"),
        ("model.layers.5.block_sparse_moe.experts.0.w2.weight", "model.layers.5.moe_block.experts.0.linear_1.weight"),
        ("model.layers.5.block_sparse_moe.experts.0.w3.weight", "model.layers.5.moe_block.experts.0.linear_v.weight"),
        ("model.layers.5.self_attn.k_proj.weight", "model.layers.5.attn.k_proj.weight"),
        ("model.layers.5.pre_moe_norm.weight", "model.layers.5.pre_moe_norm.scale"),
    ],
)
def test_by_hand(theirs: str, ours: str) -> None:
    assert canonical(theirs) == ours


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "model.layers.0",
        "model.layers..attn.q_proj.weight",
        "model.layers.-1.attn.q_proj.weight",
        "model.layers.0.attn.q_proj",
        "model.layers.0.attn.q_proj.weight_scale",
        "model.layers.0.moe_block.experts.linear.weight",
        "model.layers.0.moe_block.experts.#.linear.weight",
        "model.layers.0.moe_block.experts.0.w1.weight",
        "model.layers.99999999999.attn.q_proj.weight",
        "transformer.decoder_layer.0.moe.0.linear.bias",
        "xmodel.layers.0.attn.q_proj.weight",
    ],
)
def test_others_stay_what_they_are(name: str) -> None:
    assert canonical(name) == name
