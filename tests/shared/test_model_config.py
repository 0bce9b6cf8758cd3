"""config.json in and out, and what it may not say."""

import dataclasses
import json
import math

import pytest

from grokmoe.errors import ConfigError
from grokmoe.model_config import GROK1, TINY, Gelu, ModelConfig
from tests import goldens

CHANGES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "num_experts": 4,
    "experts_per_token": 1,
    "context_length": 128,
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "rope_base": 5000.0,
    "embedding_multiplier": 2.0,
    "output_multiplier": 0.25,
    "attention_cap": 20.0,
    "bos_token_id": 1,
    "eos_token_ids": (2, 3),
    "gelu": Gelu.TANH,
    "router_cap": 20.0,
    "renormalize_gates": False,
    "attention_output_scale": 0.5,
    "attention_logit_scale": 0.125,
}
FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
NOT_IN_VLLM = {"gelu", "renormalize_gates", "attention_logit_scale"}


def raw(**changes):
    """A sound config.json with some keys changed; a key set to ... is left out."""
    return {key: value for key, value in (TINY.to_dict() | changes).items() if value is not ...}


def test_every_field_has_a_change():
    assert set(CHANGES) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_the_hash_changes_with_every_field(field):
    changed = dataclasses.replace(TINY, **{field: CHANGES[field]})
    assert changed.content_hash != TINY.content_hash
    assert dataclasses.replace(changed, **{field: getattr(TINY, field)}).content_hash == TINY.content_hash


def test_every_change_has_a_hash_of_its_own():
    hashes = {dataclasses.replace(TINY, **{field: value}).content_hash for field, value in CHANGES.items()}
    assert len(hashes) == len(FIELDS)


@pytest.mark.parametrize("config", [TINY, GROK1, goldens.config()], ids=["tiny", "grok1", "tiny-a"])
def test_round_trip(config):
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize("config", [TINY.as_variant("xai"), TINY.as_variant("xai", 0.5), goldens.config("xai")])
def test_round_trip_of_xai(config):
    assert ModelConfig.from_dict(config.to_dict("xai"), "xai") == config


@pytest.mark.parametrize("field", FIELDS)
def test_round_trip_of_every_field_that_the_variant_has(field):
    changed = dataclasses.replace(TINY, **{field: CHANGES[field]})
    if field == "head_dim":
        changed = dataclasses.replace(changed, attention_logit_scale=changed.head_dim**-0.5)
    if field in NOT_IN_VLLM:
        with pytest.raises(ConfigError, match=field):
            changed.to_dict()
    else:
        assert ModelConfig.from_dict(changed.to_dict()) == changed


def test_the_multiplier_means_another_thing_in_each_variant():
    vllm = ModelConfig.from_dict(raw(attn_output_multiplier=0.5))
    xai = ModelConfig.from_dict(raw(attn_output_multiplier=0.5), "xai")
    assert (vllm.attention_output_scale, vllm.attention_logit_scale) == (0.5, 0.25)
    assert (xai.attention_output_scale, xai.attention_logit_scale) == (1.0, 0.5)


@pytest.mark.parametrize("key", ["attn_output_multiplier", "attn_logit_softcapping", "bos_token_id", "eos_token_id"])
def test_null_is_as_absent(key):
    assert ModelConfig.from_dict(raw(**{key: None})) == TINY


def test_defaults_of_absent_keys():
    config = ModelConfig.from_dict(
        raw(head_dim=..., num_key_value_heads=..., num_experts_per_tok=..., rms_norm_eps=..., rope_theta=...)
    )
    assert (config.head_dim, config.num_kv_heads, config.experts_per_token) == (16, 4, 2)
    assert (config.norm_eps, config.rope_base) == (1e-5, 10000.0)


@pytest.mark.parametrize("key", ["max_attn_value", "attn_logit_softcapping"])
def test_either_spelling_of_the_attention_cap(key):
    assert ModelConfig.from_dict(raw(max_attn_value=...) | {key: 20}).attention_cap == 20.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": ...}, ["vocab_size", "missing"]),
        ({"num_hidden_layers": ...}, ["num_hidden_layers", "missing"]),
        ({"num_experts": ...}, ["num_experts", "num_local_experts", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'", "integer"]),
        ({"hidden_size": True}, ["hidden_size", "True", "integer"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0", "integer"]),
        ({"num_experts": [8]}, ["num_experts", "[8]", "integer"]),
        ({"vocab_size": {"a": 1}}, ["vocab_size", "integer"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'", "number"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>", "integer"]),
        ({"eos_token_id": [2, None]}, ["eos_token_id", "[2, None]", "integer"]),
        ({"eos_token_id": 256}, ["eos_token_id", "256", "vocab_size"]),
        ({"bos_token_id": -1}, ["bos_token_id", "-1"]),
        ({"attn_logit_softcapping": 20.0}, ["attn_logit_softcapping", "20.0", "max_attn_value", "30.0"]),
        ({"num_local_experts": 4}, ["num_experts", "8", "num_local_experts", "4"]),
        ({"num_attention_heads": 5, "head_dim": ...}, ["hidden_size (64)", "num_attention_heads (5)"]),
        ({"num_attention_heads": 0}, ["num_attention_heads (0)"]),
        ({"num_key_value_heads": 3}, ["num_heads (4)", "num_kv_heads (3)"]),
        ({"num_key_value_heads": 0}, ["num_kv_heads", "0"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"num_experts_per_tok": 9}, ["experts_per_token (9)", "num_experts (8)"]),
        ({"num_hidden_layers": 0}, ["num_layers", "0"]),
        ({"rms_norm_eps": 0.0}, ["norm_eps", "0.0"]),
        ({"rope_theta": math.inf}, ["rope_base", "inf"]),
        ({"embedding_multiplier_scale": math.nan}, ["embedding_multiplier", "nan"]),
        ({"attn_output_multiplier": 0.0}, ["attention_output_scale", "0.0"]),
        ({"router_logit_softcapping": -1.0}, ["router_cap", "-1.0"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_what_a_config_may_not_say(changes, words):
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_dict(raw(**changes))
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("content", "word"), [("{", "JSON"), ("[]", "list"), ("\xff", "JSON"), ("{}", "missing"), (None, "no such file")]
)
def test_errors_of_the_file_name_it(tmp_path, content, word):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    for argument in (path, tmp_path) if content else (path,):
        with pytest.raises(ConfigError) as raised:
            ModelConfig.from_file(argument)
        assert str(path) in str(raised.value)
        assert word in str(raised.value)


def test_an_unknown_variant():
    with pytest.raises(ConfigError, match="'hf'"):
        TINY.as_variant("hf")
