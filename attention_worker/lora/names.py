"""Which tensor of an adapter is what: a factor of one projection, or the rows of added tokens. All others are refused.

Pure; shapes and values are looked at by who uses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from attention_worker.lora.files import Tensors
from grokmoe import tensor_names as names
from grokmoe.errors import CheckpointError
from grokmoe.layouts.mapped_file import tensor_error
from grokmoe.layouts.names_of_others import canonical
from grokmoe.layouts.source import StoredRows

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_WHOLE = re.compile(r"base_model\.model\.(?:model\.(embed_tokens)|(lm_head))\.weight")
_PROJECTION = re.compile(rf"model\.layers\.(\d{{1,9}})\.attn\.({'|'.join(names.PROJECTIONS)})\.weight")

_REFUSED = {
    "lora_magnitude_vector": "weight-decomposed adapters (DoRA) are not supported",
    "lora_embedding_": "adapters of the embedding are not supported, only rows of added tokens",
    "trainable_tokens": "trained rows of the base model's own tokens are not supported, only rows of added tokens",
    ".lora_B.bias": "biases are not supported",
    ".bias": "biases are not supported",
}
"""Part of a name -> why such a tensor is refused."""


TokenRows = Literal["embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Factor:
    """One of the two factors of a projection's correction. module: as PEFT's patterns name it."""

    layer: int
    projection: names.Projection
    side: Literal["A", "B"]
    module: str = field(default="", compare=False)

    @property
    def twin(self) -> Factor:
        """The other factor."""
        return replace(self, side="B" if self.side == "A" else "A")


def factor_of(tensor: StoredRows) -> Factor | None:
    """What a tensor is; None for rows of tokens (`rows_of`). Raises CheckpointError for anything else."""
    stored = tensor.stored_name
    match = _FACTOR.fullmatch(stored)
    if match is None:
        if _WHOLE.fullmatch(stored):
            return None
        why = next((why for part, why in _REFUSED.items() if part in stored), "")
        raise _refusal(tensor, why or "there is no such tensor in an adapter")
    module, side = match[1], match[2]
    found = _PROJECTION.fullmatch(canonical(f"{module}.weight"))
    if found is None:
        raise _refusal(tensor, _why_not(f"{module}.weight"))
    return Factor(int(found[1]), found[2], side, module)  # type: ignore[arg-type]  # the expression allows no other


def rows_of(tensors: Tensors, kind: TokenRows) -> str | None:
    """The stored name of the rows of all tokens, if there are any."""
    for stored in tensors:
        match = _WHOLE.fullmatch(stored)
        if match is not None and kind in match.groups():
            return stored
    return None


def _why_not(name: str) -> str:
    if ".moe" in canonical(name) or "_moe." in name:
        return (
            "adapters of experts and of the gate are not supported: expert workers compute rows without knowing whose "
            "they are; merge such an adapter into a checkpoint"
        )
    return f"only {', '.join(names.PROJECTIONS)} of attention can have an adapter"


def _refusal(tensor: StoredRows, why: str) -> CheckpointError:
    return tensor_error(tensor.stored_name, tensor.path, "a tensor that can be used", f"this: {why}")
