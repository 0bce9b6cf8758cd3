"""adapter_config.json of an adapter that PEFT has saved: what of it counts here, and what is refused by its name.

An option that this file does not know is passed over while it is unset (null, false, empty), since PEFT writes all of
them, and refused when it is set: it would mean another computation.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grokmoe.errors import CheckpointError
from grokmoe.layouts.mapped_file import file_error
from grokmoe.layouts.safetensors_header import object_without_duplicates

CONFIG_FILE = "adapter_config.json"

MAX_RANK = 512
"""Higher ranks are no small correction any more, and a merged checkpoint is cheaper."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""About training, or about which tensors there are: the file with the tensors says that itself."""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights as they are. The others train beside changed ones."""


_KEY = re.compile(r"\^?[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks and scales. Patterns are (end of a module's name, value), in order."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False

    @classmethod
    def read(cls, path: Path, data: bytes) -> AdapterConfig:
        """From the bytes of the file at `path`. Raises CheckpointError for what cannot be, or is not supported."""
        try:
            raw = json.loads(data.decode(), object_pairs_hook=object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise file_error(path, "a configuration in JSON", f"{type(error).__name__}: {error}") from error
        if not isinstance(raw, dict):
            raise file_error(path, "a JSON object", type(raw).__name__)
        _refuse(path, raw)
        config = cls(
            rank=_rank(path, "r", raw.pop("r", None)),
            alpha=_alpha(path, "lora_alpha", raw.pop("lora_alpha", None)),
            rank_pattern=_pattern(path, "rank_pattern", raw.pop("rank_pattern", None), _rank),
            alpha_pattern=_pattern(path, "alpha_pattern", raw.pop("alpha_pattern", None), _alpha),
            use_rslora=_flag(path, "use_rslora", raw.pop("use_rslora", False)),
        )
        for name, value in raw.items():
            if value and name not in _WITHOUT_EFFECT:
                raise _unsupported(path, name, value)
        return config

    def rank_of(self, module: str) -> int:
        """The rank of a module such as model.layers.0.attn.q_proj."""
        return _first(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What its product is multiplied with: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        rank, alpha = self.rank_of(module), _first(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _refuse(path: Path, raw: dict[str, Any]) -> None:
    """Takes out of `raw` what has a value that must be, or says that it has another."""
    kind = raw.pop("peft_type", None)
    if kind != "LORA":
        raise file_error(path, "peft_type LORA", repr(kind))
    bias = raw.pop("bias", "none")
    if bias != "none":
        raise _unsupported(path, "bias", bias)
    start = raw.pop("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise file_error(
            path,
            "an adapter of the base model as it is",
            f"init_lora_weights {start!r}, which changes the base model too; save it converted to a plain adapter",
        )


def _unsupported(path: Path, name: str, value: object) -> CheckpointError:
    shown = json.dumps(value)
    return file_error(path, f"{name} unset, as it is not supported", shown if len(shown) <= 80 else f"{shown[:80]}...")


def _rank(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise file_error(path, f"{name} from 1 to {MAX_RANK}", repr(value))
    return value


def _alpha(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise file_error(path, f"a number as {name}", repr(value))
    return float(value)


def _flag(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise file_error(path, f"true or false as {name}", repr(value))
    return value


def _pattern(path: Path, name: str, value: Any, read: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value or {}, dict):
        raise file_error(path, f"an object as {name}", type(value).__name__)
    for key in value or {}:
        # PEFT takes them for regular expressions, but a name is all that anybody needs, and some expressions never end.
        if not _KEY.fullmatch(key):
            raise file_error(path, f"names of modules as keys of {name}, such as layers.0.attn.q_proj", repr(key))
    return tuple((key, read(path, f"{name}[{key!r}]", item)) for key, item in (value or {}).items())


def _first(pattern: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the end of the name, at a dot or at its beginning; with ^ the whole name."""
    return next((value for key, value in pattern if _ends_with(module, key)), default)


def _ends_with(module: str, key: str) -> bool:
    return module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}"))
