"""What of an adapter's folder is read, what is refused and with which words, and where folders are looked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention_worker.lora.adapter import Adapter, Base, build_adapter
from attention_worker.lora.config import AdapterConfig
from attention_worker.lora.files import read_adapter
from attention_worker.lora.sources import AdapterSources
from attention_worker.sharding import Shard
from grokmoe import tensor_names as names
from grokmoe.errors import CheckpointError, ConfigError, InvalidRequest, NotFound
from grokmoe.linear import new_linear
from grokmoe.model_config import ModelConfig
from tests import goldens, lora_adapters
from tests.attention_worker.tiny_engine import read_tensor

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model.model.layers"
Q_A, Q_B = f"{PREFIX}.0.attn.q_proj.lora_A.weight", f"{PREFIX}.0.attn.q_proj.lora_B.weight"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def base(config: ModelConfig | None = None) -> Base:
    """tiny-a, or tiny-a with a head of its own, which is twice the embedding."""

    def read(name: str) -> torch.Tensor:
        return read_tensor(name) if name == names.embed() else 2 * read_tensor(names.embed())

    config = config or goldens.config()
    return Base(config, range(3), Shard.whole(config), torch.float32, torch.device("cpu"), read, new_linear)


def load(directory: Path, model: Base | None = None) -> Adapter:
    return build_adapter("it", read_adapter("it", directory), model or base())


@pytest.mark.parametrize("name", lora_adapters.NAMES)
def test_the_product_of_the_factors(name: str) -> None:
    """Of every projection, and zero in what pads the rank. The equation, written out from the file."""
    adapter = load(lora_adapters.FOLDER / name)
    config = json.loads((lora_adapters.FOLDER / name / "adapter_config.json").read_text())
    stored = load_file(lora_adapters.FOLDER / name / "adapter_model.safetensors")
    num_found = 0
    for layer, parts in enumerate(adapter.parts):
        for projection, part in zip(names.PROJECTIONS, parts, strict=True):
            a = stored.get(f"{PREFIX}.{layer}.attn.{projection}.lora_A.weight")
            assert (part is None) == (a is None)
            if part is None or a is None:
                continue
            num_found += 1
            rank, alpha = len(a), 5 if (name, layer, projection) == ("all", 2, "o_proj") else config["lora_alpha"]
            scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
            expected = scale * stored[f"{PREFIX}.{layer}.attn.{projection}.lora_B.weight"] @ a
            torch.testing.assert_close(part.scale * part.b_RO.T @ part.a_RI, expected)
            assert len(part.a_RI) % 16 == 0
            assert not part.a_RI[rank:].any()
    assert num_found == 3 * len(config["target_modules"])


def test_what_is_said_of_it() -> None:
    infos = [load(lora_adapters.FOLDER / name).info for name in lora_adapters.NAMES]
    assert [info.rank for info in infos] == [4, 17, 2]
    assert [info.num_added_tokens for info in infos] == [0, 0, 5]
    assert infos[0].targets == ("q_proj", "v_proj")
    assert all(info.num_bytes > 0 for info in infos)


def test_its_id_names_every_byte_and_the_name(tmp_path: Path) -> None:
    ids = [read_adapter(name, lora_adapters.FOLDER / "qv").id for name in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]

    def nudge(tensors: Tensors) -> None:
        tensors[Q_A].view(torch.int32)[3, 7] ^= 1

    ids += [read_adapter("a", lora_adapters.changed(tmp_path / "x", tensors=nudge)).id]
    ids += [read_adapter("a", lora_adapters.changed(tmp_path / "y", config={"lora_alpha": 9})).id]
    assert len(set(ids)) == 4


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora unset, as it is not supported, found true"),
    ({"bias": "all"}, "bias unset"),
    ({"lora_bias": True}, "lora_bias unset"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out unset"),
    ({"use_qalora": True}, "use_qalora unset"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens unset"),
    ({"trainable_token_indices": [7]}, "trainable_token_indices unset"),
    ({"target_parameters": ["experts.w"]}, "target_parameters unset"),
    ({"layer_replication": [[0, 2]]}, "layer_replication unset"),
    ({"an_option_of_tomorrow": "on"}, 'an_option_of_tomorrow unset, as it is not supported, found "on"'),
    ({"peft_type": "LOHA"}, "peft_type LORA, found 'LOHA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    ({"r": 0}, "r from 1 to 512, found 0"),
    ({"r": 4.0}, "r from 1 to 512, found 4.0"),
    ({"lora_alpha": "8"}, "a number as lora_alpha, found '8'"),
    ({"lora_alpha": float("inf")}, "a number as lora_alpha, found inf"),
    ({"rank_pattern": {"q.*(": 3}}, "names of modules as keys of rank_pattern"),
    ({"alpha_pattern": [1]}, "an object as alpha_pattern"),
]


@pytest.mark.parametrize(("config", "words"), OPTIONS, ids=[next(iter(config)) for config, _ in OPTIONS])
def test_options_that_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(lora_adapters.changed(tmp_path / "it", config=config))
    assert words in error.value.message
    assert "adapter_config.json" in error.value.message


def test_options_that_change_nothing(tmp_path: Path) -> None:
    """What PEFT writes about training, and options that this reader does not know, unset."""
    config = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "of_tomorrow": None,
              "init_lora_weights": "gaussian", "another": False, "layers_to_transform": [0, 1, 2]}  # fmt: skip
    load(lora_adapters.changed(tmp_path / "it", config=config))


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replaced(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def spoiled(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[name].view(-1)[5].fill_(value)


EXPERT = "base_model.model.model.layers.0.moe_block.experts.3.linear_v.lora_A.weight"
TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    (replaced(EXPERT, torch.ones(4, 192)), "adapters of experts and of the gate are not supported"),
    (renamed(Q_A, f"{PREFIX}.0.moe_block.gate.lora_A.weight"), "adapters of experts and of the gate are not supported"),
    (renamed(Q_A, f"{PREFIX}.0.block_sparse_moe.experts.0.w1.lora_A.weight"), "adapters of experts and of the gate"),
    (renamed(Q_A, f"{PREFIX}.0.attn.qkv_proj.lora_A.weight"), "only q_proj, k_proj, v_proj, o_proj of attention"),
    (replaced(f"{PREFIX}.0.attn.q_proj.lora_magnitude_vector", torch.ones(192)), "weight-decomposed adapters (DoRA)"),
    (replaced(f"{PREFIX}.0.attn.q_proj.lora_B.bias", torch.ones(192)), "biases are not supported"),
    (replaced("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 512)), "adapters of the embedding"),
    (replaced("some.thing", torch.ones(4)), "there is no such tensor in an adapter"),
    (lambda tensors: tensors.pop(Q_B), "both factors, A and B, found one of them"),
    (renamed(Q_A, f"{PREFIX}.7.attn.q_proj.lora_A.weight"), "a layer below 3, found 7"),
    (replaced(Q_A, torch.ones(5, 192)), "shape [4, 192] (rank 4 of adapter_config.json, q_proj of the model)"),
    (replaced(Q_B, torch.ones(64, 4)), "shape [192, 4]"),
    (replaced(Q_A, torch.ones(4, 192, dtype=torch.float64)), "dtype F32 or BF16 or F16, found F64"),
    (spoiled(Q_A, float("nan")), "finite values"),
    (spoiled(Q_B, float("inf")), "finite values"),
    (lambda tensors: tensors.clear(), "changes no projection"),
    (replaced(EMBEDDING, torch.ones(512, 192)), "changed rows of the model's tokens are not supported"),
    (replaced(EMBEDDING, torch.ones(511, 192)), "512 or more rows of 192"),
]


@pytest.mark.parametrize(("change", "words"), TENSORS, ids=[words[:24] for _, words in TENSORS])
def test_tensors_that_are_refused(tmp_path: Path, change: Callable[[Tensors], object], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(lora_adapters.changed(tmp_path / "it", tensors=change))
    assert words in error.value.message


@pytest.mark.parametrize(
    "other", ["model.layers.0.self_attn.q_proj", "transformer.decoder_layer.0.multi_head_attention.query"]
)
def test_names_of_another_layout_are_the_same_tensors(tmp_path: Path, other: str) -> None:
    """Whatever a checkpoint may call a projection, an adapter may."""

    def change(tensors: Tensors) -> None:
        for side, stored in (("A", Q_A), ("B", Q_B)):
            tensors[f"base_model.model.{other}.lora_{side}.weight"] = tensors.pop(stored)

    def double(tensors: Tensors) -> None:
        own = tensors[Q_A], tensors[Q_B]
        change(tensors)
        tensors[Q_A], tensors[Q_B] = (each.clone() for each in own)

    assert load(lora_adapters.changed(tmp_path / "it", tensors=change)).parts[0][0] is not None
    with pytest.raises(CheckpointError, match="one tensor of this meaning, found two"):
        load(lora_adapters.changed(tmp_path / "two", tensors=double))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: expected a file of an adapter, found no such file"
    ):
        load(tmp_path)
    directory = lora_adapters.changed(tmp_path / "it")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which is pickled and never read"):
        load(directory)


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    directory = lora_adapters.changed(tmp_path / "it")
    os.truncate(directory / "adapter_model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        load(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="a configuration in JSON"):
        load(directory)


def test_added_tokens_as_peft_and_as_vllm_save_them(tmp_path: Path) -> None:
    """The whole tables with new rows behind, or the new rows in a file of their own."""
    whole = load(lora_adapters.FOLDER / "tokens").added
    assert whole is not None

    def take_out(tensors: Tensors) -> None:
        rows = [tensors.pop(name)[512:].clone() for name in (EMBEDDING, HEAD)]
        (tmp_path / "it").mkdir(exist_ok=True)
        new = {"input_embeddings": rows[0], "output_embeddings": rows[1]}
        save_file(new, tmp_path / "it" / "new_embeddings.safetensors")

    apart = load(lora_adapters.changed(tmp_path / "it", "tokens", tensors=take_out)).added
    assert apart is not None
    assert torch.equal(whole.embedding_XD, apart.embedding_XD)
    x_1D = torch.randn(2, 192)
    assert torch.equal(whole.head(x_1D), apart.head(x_1D))


def test_added_tokens_of_a_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    import dataclasses

    untied = base(dataclasses.replace(goldens.config(), tie_word_embeddings=False))

    def give_head(tensors: Tensors) -> None:
        tensors[HEAD] = 2 * tensors[HEAD]

    added = load(lora_adapters.changed(tmp_path / "it", "tokens", tensors=give_head), untied).added
    assert added is not None
    torch.testing.assert_close(added.head(torch.eye(192)).T, 2 * added.embedding_XD)
    with pytest.raises(CheckpointError, match="adds 5 rows to the embedding and 0 to the head"):
        load(lora_adapters.changed(tmp_path / "no", "tokens", tensors=lambda each: each.pop(HEAD)), untied)
    with pytest.raises(CheckpointError, match="changed rows of the model's tokens"):
        load(lora_adapters.FOLDER / "tokens", untied)


def test_peft_s_rule_for_patterns() -> None:
    config = AdapterConfig(8, 16.0, (("layers.1.attn.q_proj", 3), ("^attn.k_proj", 4), ("proj", 5)))
    assert config.rank_of("model.layers.1.attn.q_proj") == 3
    assert config.rank_of("model.layers.11.attn.q_proj") == 8, "not the end at a dot"
    assert config.rank_of("model.layers.1.attn.k_proj") == 8, "not the whole name"
    assert config.rank_of("attn.k_proj") == 4
    assert config.scale_of("x") == 2.0


class TestSources:
    def test_named_and_below_the_root(self, tmp_path: Path) -> None:
        for name in ("b", "c"):
            lora_adapters.changed(tmp_path / name)
        (tmp_path / "no-adapter").mkdir()
        sources = AdapterSources.from_flags([f"a={lora_adapters.FOLDER / 'qv'}"], str(tmp_path))
        assert sources.names() == ["a", "b", "c"]
        assert sources.find("a") == lora_adapters.FOLDER / "qv"
        assert sources.find("b") == (tmp_path / "b").resolve()
        with pytest.raises(NotFound, match="no adapter no-adapter; it has: a, b, c"):
            sources.find("no-adapter")

    @pytest.mark.parametrize("name", ["", "..", ".", "../b", "/etc", "a/b", "a\\b", ".hidden", "a\0", "é", "x" * 129])
    def test_a_path_is_no_name(self, tmp_path: Path, name: str) -> None:
        lora_adapters.changed(tmp_path / "root" / "b")
        with pytest.raises(InvalidRequest, match="a name has 1 to 128"):
            AdapterSources({}, tmp_path / "root").find(name)

    def test_a_link_does_not_lead_out_of_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        lora_adapters.changed(tmp_path / "elsewhere")
        (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(NotFound):
            AdapterSources({}, tmp_path / "root").find("b")

    @pytest.mark.parametrize("text", ["a", "a=", "=x", "../a=x", "a/b=x"])
    def test_flags_that_cannot_be(self, text: str) -> None:
        with pytest.raises(ConfigError, match="lora"):
            AdapterSources.from_flags([text], "")

    def test_a_root_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="there is no such folder"):
            AdapterSources.from_flags([], str(tmp_path / "no"))
        with pytest.raises(ConfigError, match="names a twice"):
            AdapterSources.from_flags(["a=x", "a=y"], "")
