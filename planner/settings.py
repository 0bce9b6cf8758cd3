"""What a plan is told; each field is a flag of `grokmoe plan`."""

from __future__ import annotations

import dataclasses

from grokmoe.errors import ConfigError
from grokmoe.settings import setting
from loadtest.slo import MLPERF_MIXTRAL, MLPERF_SHARE
from planner.model_size import WEIGHT_BYTES

GROK1_NAME = "grok-1"

INSIDE, PAIRS = "inside", "pairs"

DEVICES = "[COUNT*]NAME joined by '+', COUNT of them at most; NAME:memory=GIB,bandwidth=B/S,flops=F/S,price=P"


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Model, devices, network, load, and where the plan goes."""

    model: str = setting(GROK1_NAME, "grok-1, or a directory with config.json", metavar="NAME")
    dtype: str = setting("bfloat16", "type of attention's weights, of rows and KV", choices=("float32", "bfloat16"))
    expert_dtype: str = setting("bfloat16", "type of the experts' weights", choices=tuple(WEIGHT_BYTES))
    experts_on: str = setting("h100", f"devices for experts: {DEVICES}", metavar="DEVICES")
    attention_on: str = setting("cpu", "device for attention workers, written alike, of one kind", metavar="DEVICES")
    devices: str | None = setting(None, "JSON file of further devices", metavar="FILE")
    fused: bool = setting(False, "one process instead of router and workers; one device for experts")
    router: str = setting(
        "process", "a router of its own, or one inside every attention worker", choices=("process", INSIDE)
    )
    rows: str = setting(
        "messages", "how rows reach experts: in messages, or from device to device", choices=("messages", PAIRS)
    )
    network_gbps: float = setting(100.0, "network of the router's machine, Gbit/s each way", metavar="G")
    round_trip_us: float = setting(0.0, "of an empty message, microseconds; 0: that of the costs", metavar="US")

    request_rate: float = setting(0.0, "requests/s to serve; 0: as many as the devices can", metavar="RATE")
    input_len: str = setting("512", "prompt tokens, as of `grokmoe loadtest`", metavar="LENGTHS")
    output_len: str = setting("128", "tokens to generate, likewise", metavar="LENGTHS")
    goodput: tuple[str, ...] = setting(list(MLPERF_MIXTRAL), "objectives, ms: ttft and tpot", metavar="NAME:MS")
    slo_share: float = setting(MLPERF_SHARE, "of the requests that must meet them", metavar="SHARE")

    copies: int = setting(1, "holders of every expert, at least", metavar="N")
    lanes: int = setting(0, "steps in flight per attention worker; 0: what is best", metavar="N")
    routers: int = setting(0, "routers; 0: what is best", metavar="N")
    kv_gib: float = setting(0.0, "memory for KV pages of an attention worker; 0: what is left", metavar="GIB")
    max_step_tokens: int = setting(512, "as of the router", metavar="N")
    max_running: int = setting(256, "as of the router", metavar="N")
    min_lane_rows: int = setting(16, "as of the router", metavar="N")
    router_price: float = setting(0.4, "of a router's machine, per hour", metavar="P")

    costs: str | None = setting(None, "file of costs that --save-costs has written; default: assumed", metavar="FILE")
    calibrate: tuple[str, ...] = setting(
        [], "fit costs to these: output of benchmarks/step, or result.json with metrics", metavar="FILE"
    )
    calibrate_model: str | None = setting(None, "directory of the model they were measured with", metavar="DIR")
    calibrate_experts: int = setting(2, "expert workers behind a result.json; 0: fused", metavar="N")
    calibrate_device: str = setting(
        "cpu-small", "device that a result.json is of; benchmarks/step says its own", metavar="DEVICE"
    )
    save_costs: str | None = setting(None, "write the costs that were used", metavar="FILE")

    num_requests: int = setting(400, "requests of a simulation", metavar="N")
    simulate: float = setting(0.0, "seconds to simulate the cluster that was found, every worker of it", metavar="S")
    failures: tuple[str, ...] = setting(
        [], "in that: expert:3@10s+30s: expert worker 3 is lost at 10 s, back 30 s later", metavar="FAILURE"
    )
    mtbf_hours: float = setting(0.0, "in that: mean time between two failures of a worker; 0: none", metavar="H")
    repair_seconds: float = setting(60.0, "until a worker that failed so is back", metavar="S")
    skew: float = setting(0.0, "in that: the r-th expert of a layer is chosen r^-SKEW as often as the first")
    reach: int = setting(0, "in that: copies of the experts that a router reaches; 0: all", metavar="N")
    seed: int = setting(0, "of arrivals and lengths")
    json: bool = setting(False, "for programs")
    values: str | None = setting(None, "write the plan as values for the Helm chart", metavar="FILE")
    claim: str = setting(GROK1_NAME, "in these values: the PersistentVolumeClaim with the checkpoint", metavar="NAME")

    def __post_init__(self) -> None:
        for name, least in (
            ("request_rate", 0),
            ("round_trip_us", 0),
            ("copies", 1),
            ("lanes", 0),
            ("routers", 0),
            ("kv_gib", 0),
            ("max_step_tokens", 1),
            ("max_running", 1),
            ("min_lane_rows", 1),
            ("router_price", 0),
            ("num_requests", 20),
            ("calibrate_experts", 0),
            ("simulate", 0),
            ("mtbf_hours", 0),
            ("repair_seconds", 0),
            ("skew", 0),
            ("reach", 0),
        ):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if not self.network_gbps > 0:
            raise ConfigError(f"network_gbps is {self.network_gbps}, must be above 0")
        if bool(self.calibrate) != (self.calibrate_model is not None):
            raise ConfigError("calibrate and calibrate_model go together")
        if self.calibrate and self.costs:
            raise ConfigError("costs and calibrate exclude each other")
        if (self.failures or self.mtbf_hours or self.skew or self.reach) and not self.simulate:
            raise ConfigError("failures, mtbf_hours, skew and reach are of a simulation: simulate says how long")
        if self.fused and self.simulate:
            raise ConfigError("simulate is of workers in processes of their own: fused does not go with it")
        if (self.fused or self.router == INSIDE) and self.values:
            raise ConfigError("values are of routers of their own: neither fused nor router inside goes with them")
