"""Settings of an expert worker."""

from __future__ import annotations

import dataclasses

from expert_worker.expert_dtype import EXPERT_DTYPE_HELP, EXPERT_DTYPES, INT8, SAME
from grokmoe.errors import ConfigError
from grokmoe.expert_spec import ALL
from grokmoe.settings import setting
from grokmoe.tracing import ExportSettings


@dataclasses.dataclass(frozen=True)
class ExpertWorkerSettings(ExportSettings):
    """What an expert worker holds and how much it takes at once."""

    model: str = setting("", "checkpoint directory: config.json and safetensors", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type of weights and rows", choices=("float32", "bfloat16"))
    expert_dtype: str = setting(SAME, EXPERT_DTYPE_HELP, choices=EXPERT_DTYPES)
    experts: str = setting(
        ALL,
        "experts to hold at start, EXPERTS[:SLICES/COUNT][@LAYERS] joined by '+', such as 0-3, 0,5, 0-3@0-31+4@32-63 "
        "or 0:1/2, the first half of expert 0; none: a spare",
        metavar="SPEC",
    )
    capacity: int = setting(
        0, "most experts to hold at a time, each layer of one counted, a slice as its part; 0: what memory takes"
    )
    device: str = setting("cpu", "where to compute: cpu, cuda or cuda:N")
    threads: int = setting(0, "threads of one operation; 0: torch's choice")
    deterministic: bool = setting(False, "a row's bits never depend on the rows beside it; checked at start")
    max_rows: int = setting(8192, "most rows in one request; more is refused")
    max_batch_rows: int = setting(16384, "most rows that joined requests make together")
    pairs: bool = setting(True, "take rows by gloo or NCCL from routers that offer it (--expert-transport)")

    def __post_init__(self) -> None:
        for name, least in (("capacity", 0), ("threads", 0), ("max_rows", 1), ("max_batch_rows", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, must be at least {least}")
        self.check_traces()
        if self.expert_dtype == INT8 and self.device != "cpu":
            raise ConfigError(f"expert_dtype is int8, device is {self.device}: int8 experts are computed on a CPU only")
