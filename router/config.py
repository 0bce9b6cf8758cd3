"""Settings of the router."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError
from grokmoe.expert_spec import parse_experts
from grokmoe.expert_units import describe_unit, expert_of, num_slices_of
from grokmoe.layouts.safetensors_header import object_without_duplicates
from grokmoe.settings import setting
from grokmoe.tracing import TraceSettings
from router.admission import AdmissionSettings
from router.engine import EngineSettings
from router.experts import ExpertPoolSettings
from router.rebalancing import RebalanceSettings
from router.step import SchedulerSettings
from router.transport.pair_offers import ExpertTransportSettings
from router.transport.worker_access import WorkerAccessSettings

WORKERS = (
    "{} workers, comma-separated: host:port, unix:/path, dns:///name:port for every address of a name, or file:PATH "
    "for a file of addresses that is watched"
)


@dataclasses.dataclass(frozen=True)
class TelemetrySettings(TraceSettings):
    """What the router tells beside its metrics."""

    vllm_metrics: bool = setting(False, "metrics a second time under vLLM's names, for dashboards made for those")
    log_requests: bool = setting(False, "a line in the log for every request that has ended, not only for failures")


@dataclasses.dataclass(frozen=True)
class LimitSettings(TelemetrySettings):
    """What the router takes on at the same time, and what it tells. Every command that starts a router has these."""

    max_step_tokens: int = setting(512, "tokens per step: the chunk size of prefill")
    step_goal: float = setting(0.2, "seconds a step may take while sequences stream: prompts are cut so; 0: any")
    max_running: int = setting(256, "sequences per attention worker that hold KV pages")
    max_waiting: int = setting(1024, "sequences that may wait; one more is refused with RESOURCE_EXHAUSTED")
    max_waiting_kv: float = setting(16.0, "prompts that may wait, in multiples of what the KV pages hold")
    max_live_per_caller: int = setting(0, "sequences of one caller, waiting and running; 0: no bound of its own")
    queue_timeout: float = setting(0.0, "seconds a request may wait for its first step; 0: until its deadline")
    refuse_control_symbols: bool = setting(
        False, "refuse text that spells a control symbol of the vocabulary, unless the request allows it"
    )

    def limits(self) -> dict[str, Any]:
        """These settings, to be passed on to another class that has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LimitSettings)}


@dataclasses.dataclass(frozen=True)
class RemoteExpertSettings(ExpertTransportSettings, WorkerAccessSettings):
    """Where expert workers are and how they are used. Every command whose experts are elsewhere has these."""

    experts: tuple[str, ...] = setting([], WORKERS.format("expert"), metavar="ADDRESSES")
    placement: str = setting(
        "",
        'which workers to use for experts, in this order: a JSON file {"EXPERTS": [worker, ...]}, EXPERTS as 0, 0-3 or '
        "0:1/2; empty: every worker that holds them",
        metavar="FILE",
    )
    join_timeout: float = setting(600.0, "seconds that workers have to be reachable at start")
    replica_wait: float = setting(30.0, "seconds a step without a deadline waits for an expert that nobody holds")
    hedge_quantile: float = setting(0.0, "ask a second holder when a call takes longer than this quantile; 0: never")
    rebalance: str = setting("off", "move experts between workers by itself, to even out their load", ("off", "auto"))
    rebalance_interval: float = setting(60.0, "seconds between two looks at the balance")
    rebalance_threshold: float = setting(1.2, "load of the busiest expert worker over the mean that is put up with")
    rebalance_horizon: float = setting(1800.0, "seconds for which the load of late is taken to last")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pool_settings()  # complains of what cannot be

    def remote_experts(self) -> dict[str, Any]:
        """These settings, to be passed on to another class that has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(RemoteExpertSettings)}

    def pool_settings(self) -> ExpertPoolSettings:
        """The limits of expert calls."""
        rebalance = RebalanceSettings(
            is_automatic=self.rebalance == "auto",
            interval=self.rebalance_interval,
            threshold=self.rebalance_threshold,
            horizon=self.rebalance_horizon,
        )
        return ExpertPoolSettings(
            replica_wait=self.replica_wait, hedge_quantile=self.hedge_quantile, rebalance=rebalance
        )


@dataclasses.dataclass(frozen=True)
class RouterSettings(RemoteExpertSettings, LimitSettings):
    """What the router serves, where its workers are, and its limits."""

    model: str = setting("", "checkpoint directory: its config, gates and tokenizer are read", metavar="DIR")
    variant: str = setting("vllm", "which implementation's numerics to follow", choices=("vllm", "xai"))
    dtype: str = setting("bfloat16", "type the workers compute in", choices=("float32", "bfloat16"))
    model_name: str = setting("", "name the model is served under; empty: the directory's name")
    attention: tuple[str, ...] = setting(
        [], WORKERS.format("attention") + "; stages of one pipeline with + between them", metavar="ADDRESSES"
    )
    threads: int = setting(1, "threads of one operation: gating and combining are small")
    lanes: int = setting(1, "steps in flight per attention worker; in a pipeline at least one for each stage")
    min_lane_rows: int = setting(16, "decodes are split over lanes only if each lane gets this many")
    max_migrations: int = setting(5, "times a request may lose its attention worker before it ends with UNAVAILABLE")
    check_interval: float = setting(60.0, "seconds between two checks of all books while idle; 0: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}, must be at least 1")
        self.check_traces()

    def engine_settings(self, context_length: int) -> EngineSettings:
        """The limits as the engine takes them. Raises ConfigError for values that cannot be."""
        scheduler = SchedulerSettings(
            context_length=context_length,
            max_step_tokens=self.max_step_tokens,
            step_goal=self.step_goal,
            max_running=self.max_running,
            num_lanes=self.lanes,
            min_lane_rows=self.min_lane_rows,
        )
        admission = AdmissionSettings(
            self.max_waiting, self.max_waiting_kv, self.max_live_per_caller, self.queue_timeout
        )
        return EngineSettings(
            scheduler,
            admission,
            join_timeout=self.join_timeout,
            max_migrations=self.max_migrations,
            check_interval=self.check_interval,
        )


def read_placement(path: str, num_experts: int) -> dict[int, list[int]] | None:
    """Reads a placement table: unit -> workers. Raises ConfigError when the file is not one, or contradicts itself."""
    if not path:
        return None
    try:
        read = json.loads(Path(path).read_text(), object_pairs_hook=object_without_duplicates)
        rows = [(experts, [int(worker) for worker in workers]) for experts, workers in read.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f'placement {path}: not a JSON object {{"experts": [worker, ...]}}: {error}') from error
    table: dict[int, list[int]] = {}
    cut: dict[int, int] = {}
    for experts, workers in rows:
        try:
            if "@" in experts:
                raise ConfigError(f"experts is {experts!r}: a placement is for all layers")
            units = parse_experts(experts, num_experts, 1)[0]
        except ConfigError as error:
            raise ConfigError(f"placement {path}: {error.message}") from error
        for unit in units:
            if unit in table:
                raise ConfigError(f"placement {path}: names expert {describe_unit(unit)} twice")
            expert, num_slices = expert_of(unit), num_slices_of(unit)
            if cut.setdefault(expert, num_slices) != num_slices:
                both = " and in ".join(map(str, sorted((cut[expert], num_slices))))
                raise ConfigError(f"placement {path}: names expert {expert} in {both} slices")
            table[unit] = workers
    return table
