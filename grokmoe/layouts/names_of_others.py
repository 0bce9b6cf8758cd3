"""The names that others gave to the tensors of this architecture, and which of ours they mean.

Every layer's tensors have a prefix, the layer's number, and a rest; `#` stands for the number of an expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from grokmoe.tensor_names import EXPERT_LINEARS, NORMS, PROJECTIONS

_NUMBER = re.compile(r"\.(\d{1,9})\.")


@dataclasses.dataclass(frozen=True)
class Naming:
    """One way to name the tensors. in_layer: rest -> ours. outside: whole name -> ours."""

    title: str
    prefix: str
    in_layer: Mapping[str, str]
    outside: Mapping[str, str]

    def ours(self, name: str) -> str | None:
        """The canonical name, None for a name that is not of this way."""
        if name in self.outside:
            return self.outside[name]
        match = re.match(rf"{re.escape(self.prefix)}(\d{{1,9}})\.", name)
        if match is None or "#" in name:
            return None
        rest = name[match.end() :]
        expert = _NUMBER.search(rest)
        ours = self.in_layer.get(_NUMBER.sub(".#.", rest, count=1))
        if ours is None:
            return None
        return f"model.layers.{int(match[1])}.{ours.replace('#', str(int(expert[1])) if expert else '')}"


_GAINS = {f"{norm}.{spelling}": f"{norm}.scale" for norm in NORMS for spelling in ("scale", "weight")}
_OUTSIDE = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.scale",
    "model.norm.scale": "model.norm.scale",
    "lm_head.weight": "lm_head.weight",
}

OURS = Naming(
    "names of vLLM's Grok1ForCausalLM",
    "model.layers.",
    {f"attn.{projection}.weight": f"attn.{projection}.weight" for projection in PROJECTIONS}
    | {f"moe_block.experts.#.{linear}.weight": f"moe_block.experts.#.{linear}.weight" for linear in EXPERT_LINEARS}
    | {"moe_block.gate.weight": "moe_block.gate.weight"}
    | _GAINS,
    _OUTSIDE,
)
SGLANG = Naming(
    "names of SGLang and Grok-2",
    "model.layers.",
    {f"self_attn.{projection}.weight": f"attn.{projection}.weight" for projection in PROJECTIONS}
    | {
        "block_sparse_moe.experts.#.w1.weight": "moe_block.experts.#.linear.weight",
        "block_sparse_moe.experts.#.w3.weight": "moe_block.experts.#.linear_v.weight",
        "block_sparse_moe.experts.#.w2.weight": "moe_block.experts.#.linear_1.weight",
        "block_sparse_moe.gate.weight": "moe_block.gate.weight",
    }
    | _GAINS,
    _OUTSIDE,
)
KEYFAN = Naming(
    "names of keyfan/grok-1-hf",
    "transformer.decoder_layer.",
    {
        "multi_head_attention.query.weight": "attn.q_proj.weight",
        "multi_head_attention.key.weight": "attn.k_proj.weight",
        "multi_head_attention.value.weight": "attn.v_proj.weight",
        "multi_head_attention.linear.weight": "attn.o_proj.weight",
        "router.weight": "moe_block.gate.weight",
        "rms_norm.weight": "pre_attn_norm.scale",
        "rms_norm_1.weight": "post_attn_norm.scale",
        "rms_norm_2.weight": "pre_moe_norm.scale",
        "rms_norm_3.weight": "post_moe_norm.scale",
    }
    | {f"moe.#.{linear}.weight": f"moe_block.experts.#.{linear}.weight" for linear in EXPERT_LINEARS},
    {
        "transformer.in_out_embed.weight": "model.embed_tokens.weight",
        "transformer.rms_norm.weight": "model.norm.scale",
        "lm_head.weight": "lm_head.weight",
    },
)
NAMINGS = (OURS, SGLANG, KEYFAN)
"""A name that two of them have means the same in both."""


def canonical(name: str) -> str:
    """The canonical name of a tensor, or the name itself if nobody names one of ours so."""
    return next((ours for naming in NAMINGS if (ours := naming.ours(name)) is not None), name)


def title(names: frozenset[str]) -> str:
    """Whose names these are: of the ways that know most of them, the first."""
    return max(NAMINGS, key=lambda naming: sum(naming.ours(name) is not None for name in names)).title
