"""Settings of an attention worker, and how its layers are named."""

from __future__ import annotations

import dataclasses
import math
import re

from grokmoe.errors import ConfigError
from grokmoe.settings import setting
from grokmoe.tracing import ExportSettings

ALL = "all"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class AttentionWorkerSettings(ExportSettings):
    """What an attention worker holds and how large it may grow."""

    model: str = setting("", "checkpoint directory: config.json and safetensors", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type of weights, hidden states and KV", choices=("float32", "bfloat16"))
    layers: str = setting(ALL, "layers to hold, such as 0-31; fewer than all: a stage of a pipeline", metavar="SPEC")
    device: str = setting("cpu", "where to compute: cpu, cuda or cuda:N")
    threads: int = setting(0, "threads of one operation; 0: torch's choice")
    deterministic: bool = setting(False, "a sequence's bits never depend on its company; checked at start")
    page_size: int = setting(32, "positions per KV page")
    kv_gib: float = setting(1.0, "memory for KV pages in GiB; at least one sequence of full context gets room")
    num_pages: int = setting(0, "KV pages; 0: as many as fit into --kv-gib")
    max_step_tokens: int = setting(2048, "most tokens in one step; a plan with more is refused")
    lease_seconds: float = setting(10.0, "seconds of silence after which another router may take the KV pages")

    def __post_init__(self) -> None:
        self.check_traces()
        for name, least in (("threads", 0), ("page_size", 1), ("num_pages", 0), ("max_step_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, must be at least {least}")
        for name in ("kv_gib", "lease_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, must be finite and above 0")


def parse_layers(spec: str, num_layers: int) -> range:
    """The layers that a specification names: a range a-b, both included, one number, or `all`.

    Raises ConfigError for what is malformed or outside the model.
    """
    if spec.strip() == ALL:
        return range(num_layers)
    match = _RANGE.fullmatch(spec.strip())
    if match is None:
        raise ConfigError(f"layers is {spec!r}: no layer number, no range a-b, not '{ALL}'")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ConfigError(f"layers is {spec!r}: the range is empty")
    if last >= num_layers:
        raise ConfigError(f"layers is {spec!r}: the model has layers 0 to {num_layers - 1}, there is no {last}")
    return range(first, last + 1)
