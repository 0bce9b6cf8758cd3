"""Settings of an attention worker, and how its layers are named."""

from __future__ import annotations

import dataclasses
import math
import re

from grokmoe.errors import ConfigError
from grokmoe.server import MAX_PORT
from grokmoe.settings import setting
from grokmoe.tracing import ExportSettings

ALL = "all"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


LORA = "LoRA adapters to load at start, each a folder as PEFT saves it"
LORA_ROOT = "folder of such folders: adapters that can be loaded by their names while the worker serves"


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
    kv_gib: float = setting(
        1.0, "memory for KV pages in GiB, of each rank; one sequence of full context always gets room"
    )
    num_pages: int = setting(0, "KV pages; 0: as many as fit into --kv-gib")
    max_step_tokens: int = setting(2048, "most tokens in one step; a plan with more is refused")
    lora: tuple[str, ...] = setting([], LORA, metavar="NAME=DIR,...")
    lora_root: str = setting("", LORA_ROOT, metavar="DIR")
    lora_gib: float = setting(1.0, "memory for adapters in GiB, of each rank; one more than fits is refused")
    lease_seconds: float = setting(10.0, "seconds of silence after which another router may take the KV pages")
    tensor_parallel: int = setting(1, "ranks, processes that share out the heads and the vocabulary", metavar="T")
    rank: int = setting(0, "which of the ranks this is; 0 serves, the others do as it does", metavar="R")
    rendezvous: str = setting(
        "",
        "host:port at which the ranks meet, where rank 0 listens; empty: rank 0 starts the others, on its own host",
        metavar="ADDRESS",
    )
    rank_timeout: float = setting(10.0, "seconds that a rank may be behind the others; the worker ends then")

    def __post_init__(self) -> None:
        self.check_traces()
        for name, least in (
            ("threads", 0),
            ("page_size", 1),
            ("num_pages", 0),
            ("max_step_tokens", 1),
            ("tensor_parallel", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, must be at least {least}")
        for name in ("kv_gib", "lora_gib", "lease_seconds", "rank_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, must be finite and above 0")
        self._check_ranks()

    def _check_ranks(self) -> None:
        if not 0 <= self.rank < self.tensor_parallel:
            raise ConfigError(
                f"rank is {self.rank}, tensor_parallel {self.tensor_parallel}: must be from 0 to below it"
            )
        if self.rendezvous:
            host, _, port = self.rendezvous.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) <= MAX_PORT:
                raise ConfigError(f"rendezvous is {self.rendezvous!r}, must be host:port")
        elif self.rank:
            raise ConfigError(f"rank is {self.rank}, and rendezvous is missing: where it meets rank 0")

    @property
    def rendezvous_host_port(self) -> tuple[str, int]:
        """For ranks on several hosts."""
        host, _, port = self.rendezvous.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)


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
