"""Writes tests/data/lora: adapters of tiny-a that PEFT has saved, and what the model says with PEFT's merged weights.

    pip install peft; python tools/make_lora_goldens.py

PEFT is needed here only. The logits are those of grokmoe/reference.py, which is itself compared with programs that
others wrote, on the weights that PEFT has merged, in float32.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grokmoe import tensor_names as names  # noqa: E402
from grokmoe.checkpoint import Checkpoint  # noqa: E402
from grokmoe.reference import Reference  # noqa: E402
from tests import goldens  # noqa: E402

FOLDER = ROOT / "tests" / "data" / "lora"
PROMPT = "len33"
NUM_TOKENS = 16

ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": list(names.PROJECTIONS),
        "rank_pattern": {"^model.layers.1.attn.q_proj": 3, "k_proj": 17},
        "alpha_pattern": {"layers.2.attn.o_proj": 5},
    },
    "tokens": {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "o_proj"]},
}
NUM_ADDED = {"tokens": 5}
"""Rows by which the embedding is longer, as after `resize_token_embeddings`."""


class Block(nn.Module):
    """The projections of one layer."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        for projection in names.PROJECTIONS:
            weight = checkpoint.read(names.attention(layer, projection), torch.float32)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(self.attn, projection, linear)


class Grok(nn.Module):
    """As much of the model as an adapter can change, under the names of the Hugging Face layout."""

    def __init__(self, checkpoint: Checkpoint, num_added: int) -> None:
        super().__init__()
        embedding = checkpoint.read(names.embed())
        new = (torch.randn(num_added, embedding.shape[1]) * embedding.float().std()).to(embedding.dtype)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.cat((embedding, new)))
        self.lm_head = nn.Linear(*self.model.embed_tokens.weight.shape[::-1], bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.model.layers = nn.ModuleList(Block(checkpoint, layer) for layer in range(checkpoint.config.num_layers))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def main() -> None:
    """Writes all of it anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    logits, tokens = {}, {}
    for number, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
            model = Grok(checkpoint, NUM_ADDED.get(name, 0))
            weights = {each: checkpoint.read(each, torch.float32) for each in checkpoint.tensors}
        tuned = get_peft_model(model, LoraConfig(**options))
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.4 * parameter.shape[1] ** -0.5 if "lora_A" in key else 0.15)
        tuned.save_pretrained(FOLDER / name, save_embedding_layers=name in NUM_ADDED)
        (FOLDER / name / "README.md").unlink(missing_ok=True)
        merged = dict(tuned.merge_and_unload().named_parameters())
        weights |= {key: merged[key].detach() for key in weights if key in merged}
        vocab_size = goldens.config().vocab_size + NUM_ADDED.get(name, 0)
        reference = Reference(dataclasses.replace(goldens.config(), vocab_size=vocab_size), weights)
        prompt = [*goldens.PROMPTS[PROMPT][:-1], vocab_size - 1]  # of an adapter with added tokens, one of them
        logits[name] = reference.logits(prompt)
        tokens[name] = {"prompt": prompt, "tokens": reference.greedy(prompt, NUM_TOKENS)}
    save_file(logits, FOLDER / "goldens.safetensors")
    (FOLDER / "goldens.json").write_text(json.dumps(tokens, indent=1) + "\n")


if __name__ == "__main__":
    main()
