"""Settings of an expert worker, and the grammar that says which experts it holds."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from expert_worker.expert_dtype import EXPERT_DTYPES, INT8, SAME
from grokmoe.errors import ConfigError
from grokmoe.settings import setting

ALL = "all"
NONE = "none"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ExpertWorkerSettings:
    """What an expert worker holds and how much it takes at once."""

    model: str = setting("", "checkpoint directory: config.json and safetensors", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type of weights and rows", choices=("float32", "bfloat16"))
    expert_dtype: str = setting(SAME, "what weights are stored in: as dtype says, or int8 (CPU)", choices=EXPERT_DTYPES)
    experts: str = setting(
        ALL,
        "experts to hold at start, EXPERTS[@LAYERS] joined by '+', such as 0-3, 0,5 or 0-3@0-31+4@32-63; none: a spare",
        metavar="SPEC",
    )
    capacity: int = setting(0, "most experts to hold at a time, each layer of one counted; 0: what memory takes")
    device: str = setting("cpu", "where to compute: cpu, cuda or cuda:N")
    threads: int = setting(0, "threads of one operation; 0: torch's choice")
    deterministic: bool = setting(False, "a row's bits never depend on the rows beside it; checked at start")
    max_rows: int = setting(8192, "most rows in one request; more is refused")
    max_batch_rows: int = setting(16384, "most rows that joined requests make together")

    def __post_init__(self) -> None:
        for name, least in (("capacity", 0), ("threads", 0), ("max_rows", 1), ("max_batch_rows", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, must be at least {least}")
        if self.expert_dtype == INT8 and self.device != "cpu":
            raise ConfigError(f"expert_dtype is int8, device is {self.device}: int8 experts are computed on a CPU only")


def parse_experts(spec: str, num_experts: int, num_layers: int) -> dict[int, tuple[int, ...]]:
    """Which experts a specification names, as layer -> expert numbers, both ascending.

    spec: groups joined by `+`. A group is EXPERTS or EXPERTS@LAYERS, each a comma-separated list of numbers and
    inclusive ranges a-b, or `all`; without LAYERS it means all layers. `0-3@0-31+4,6@32-63` is experts 0 to 3 in
    layers 0 to 31, and experts 4 and 6 in layers 32 to 63. What several groups name is held once. `none` alone is none.
    Raises ConfigError for what is malformed or outside the model.
    """
    held: defaultdict[int, set[int]] = defaultdict(set)
    if spec.strip() == NONE:
        return {}
    for group in spec.split("+"):
        experts, at, layers = group.partition("@")
        expert_ids = _parse_list(spec, experts, "expert", num_experts)
        for layer in _parse_list(spec, layers if at else ALL, "layer", num_layers):
            held[layer].update(expert_ids)
    return {layer: tuple(sorted(held[layer])) for layer in sorted(held)}


def _parse_list(spec: str, text: str, what: str, limit: int) -> set[int]:
    if text.strip() == ALL:
        return set(range(limit))
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"experts is {spec!r}: {part.strip()!r} is no {what} number, no range a-b, not '{ALL}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ConfigError(f"experts is {spec!r}: the range {part.strip()!r} is empty")
        if last >= limit:
            raise ConfigError(f"experts is {spec!r}: the model has {what}s 0 to {limit - 1}, there is no {last}")
        numbers.update(range(first, last + 1))
    return numbers
