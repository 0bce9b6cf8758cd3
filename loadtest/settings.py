"""What a load test is told; each field is a flag of `grokmoe loadtest`, vLLM's where its benchmark has it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from grokmoe.errors import ConfigError
from grokmoe.settings import setting
from loadtest.slo import MLPERF_MIXTRAL, MLPERF_SHARE

DATASETS = ("random", "prefix_repetition", "sharegpt", "custom", "text", "timed_trace")

LIST_FLAGS = ("goodput", "metadata", "metrics_url", "fault")
"""Fields whose flag takes several arguments."""


@dataclasses.dataclass(frozen=True)
class LoadSettings:
    """The load, its inputs, what is measured, and where it goes."""

    request_rate: float = setting(math.inf, "requests/s of an open loop; inf: all at once", metavar="RATE")
    burstiness: float = setting(1.0, "shape of the gaps: 1 Poisson, below it bursts, above it more even", metavar="B")
    arrivals: str = setting("gamma", "gaps: drawn, or all the same", choices=("gamma", "constant"))
    ramp_up_strategy: str | None = setting(None, "how the rate ascends", choices=("linear", "exponential"))
    ramp_up_start_rps: float | None = setting(None, "rate at the first request", metavar="RATE")
    ramp_up_end_rps: float | None = setting(None, "rate at the last one", metavar="RATE")
    trace_speed: float = setting(1.0, "of timed_trace: 2 sends it in half the time", metavar="S")
    max_concurrency: int | None = setting(
        None, "requests under way at most; without a rate a closed loop of so many clients", metavar="C"
    )
    num_prompts: int = setting(1000, "requests; of a trace at most", metavar="N")
    num_warmups: int = setting(8, "requests before the run, not measured", metavar="N")
    processes: int = setting(1, "load processes; they share the schedule", metavar="P")
    seed: int = setting(0, "of schedule and inputs")

    sweep: bool = setting(False, "search the highest rate that holds the objectives")
    sweep_start: float = setting(0.0, "first rate; 0: half of what a closed loop of 16 reaches", metavar="RATE")
    sweep_seconds: float = setting(20.0, "length of a step's schedule", metavar="SECONDS")
    sweep_factor: float = setting(2.0, "from step to step until one fails", metavar="F")
    sweep_tolerance: float = setting(0.1, "how close to the edge is close enough", metavar="SHARE")
    sweep_steps: int = setting(12, "most steps", metavar="N")

    dataset_name: str = setting("random", "where prompts come from", choices=DATASETS)
    dataset_path: str | None = setting(None, "file of the data set", metavar="FILE")
    input_len: str | None = setting(
        None, "prompt tokens: N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:LOW:HIGH]", metavar="LENGTHS"
    )
    output_len: str | None = setting(None, "tokens to generate, written like --input-len", metavar="LENGTHS")
    random_input_len: int = setting(1024, "prompt tokens of random, if --input-len is not given", metavar="N")
    random_output_len: int = setting(128, "tokens to generate, if --output-len is not given", metavar="N")
    random_range_ratio: float = setting(0.0, "lengths of random vary by this share either way", metavar="R")
    random_prefix_len: int = setting(0, "tokens that all prompts of random begin with", metavar="N")
    prefix_repetition_prefix_len: int = setting(256, "tokens of each prefix", metavar="N")
    prefix_repetition_suffix_len: int = setting(256, "tokens after it", metavar="N")
    prefix_repetition_num_prefixes: int = setting(10, "prefixes", metavar="N")
    sharegpt_output_len: int | None = setting(None, "tokens to generate instead of the answer's", metavar="N")
    trace_block_size: int = setting(512, "tokens of a block that a trace names by its hash", metavar="N")

    temperature: float = setting(0.0, "0 is greedy")
    top_p: float | None = setting(None, "as of `grokmoe generate`")
    top_k: int | None = setting(None, "as of `grokmoe generate`")
    ignore_eos: bool | None = setting(None, "generate the whole length; default: of random, prefix_repetition, traces")
    cancel_share: float = setting(0.0, "share of the streams to leave at a random token", metavar="SHARE")
    timeout: float = setting(600.0, "deadline of a request", metavar="SECONDS")
    retries: int = setting(0, "attempts after the first; more than none hides refusals", metavar="N")
    request_id_prefix: str | None = setting(None, "of the requests' names; default: drawn", metavar="TEXT")

    goodput: tuple[str, ...] = setting(list(MLPERF_MIXTRAL), "objectives, ms: ttft, tpot, e2el", metavar="NAME:MS")
    slo_share: float = setting(MLPERF_SHARE, "of the requests that must meet them", metavar="SHARE")
    percentile_metrics: str = setting("ttft,tpot,itl,e2el", "shown on the terminal", metavar="NAMES")
    metric_percentiles: str = setting("50,90,95,99,99.9", "percentiles to report", metavar="P,P")
    window: str | None = setting(
        None, "shares of the schedule that are measured; default: 0.1,0.9 of an open loop, else 0,1", metavar="A,B"
    )
    max_lag_ms: float = setting(10.0, "the run is invalid if the 99th percentile of its own lag is above", metavar="MS")
    drain_seconds: float = setting(120.0, "for requests under way after the last was sent", metavar="SECONDS")
    metrics_url: tuple[str, ...] = setting([], "Prometheus endpoints to read during the run", metavar="URL")
    metrics_interval: float = setting(1.0, "seconds between two readings", metavar="SECONDS")
    state: str | None = setting(None, "file of `grokmoe up --state`: address, endpoints, whom to kill", metavar="FILE")
    fault: tuple[str, ...] = setting([], "such as kill:expert:1@10s or stop:attention:0@5s+2s", metavar="FAULT")
    ready_check_timeout_sec: float = setting(60.0, "seconds to wait for the server", metavar="SECONDS")

    output_dir: str = setting("loadtest-result", "folder for result.json, requests.jsonl and reports", metavar="DIR")
    label: str | None = setting(None, "name of the run, in its reports", metavar="TEXT")
    metadata: tuple[str, ...] = setting([], "for the record, into result.json", metavar="KEY=VALUE")
    save_detailed: bool = setting(False, "per-request lists in result.json too, as vLLM's (requests.jsonl has them)")
    progress: bool = setting(True, "show how the run is going")

    def __post_init__(self) -> None:
        _at_least("num_prompts", self.num_prompts, 1)
        _at_least("num_warmups", self.num_warmups, 0)
        _at_least("processes", self.processes, 1)
        _at_least("metrics_interval", self.metrics_interval, 0.05)
        _at_least("drain_seconds", self.drain_seconds, 0)
        if self.max_concurrency is not None:
            _at_least("max_concurrency", self.max_concurrency, 1)
        if (self.dataset_name in ("random", "prefix_repetition")) != (self.dataset_path is None):
            raise ConfigError(f"dataset_name {self.dataset_name} and dataset_path {self.dataset_path} contradict")
        is_ramp = self.ramp_up_strategy is not None
        if is_ramp != (self.ramp_up_start_rps is not None) or is_ramp != (self.ramp_up_end_rps is not None):
            raise ConfigError("ramp_up_strategy, ramp_up_start_rps and ramp_up_end_rps go together")
        if is_ramp + self.has_rate + self.is_trace + self.sweep > 1:
            raise ConfigError("a rate, a ramp, a trace and a sweep exclude each other")
        if self.fault and self.sweep:
            raise ConfigError("fault and sweep exclude each other")
        for pair in self.metadata:
            if "=" not in pair:
                raise ConfigError(f"metadata {pair!r} is not KEY=VALUE")
        self.window_shares()
        self.percentiles()

    @property
    def has_rate(self) -> bool:
        """Whether requests are spread over time by `request_rate`."""
        return math.isfinite(self.request_rate)

    @property
    def is_trace(self) -> bool:
        """Whether the data set has times."""
        return self.dataset_name == "timed_trace"

    @property
    def is_timed(self) -> bool:
        """Whether the schedule says when: an open loop with a lag to judge."""
        return self.has_rate or self.is_trace or self.sweep or self.ramp_up_strategy is not None

    def window_shares(self) -> tuple[float, float]:
        """Which part of the schedule is measured."""
        if self.window is None:
            return (0.1, 0.9) if self.is_timed and self.ramp_up_strategy is None else (0.0, 1.0)
        begin, end = _numbers("window", self.window, 2)
        return begin, end

    def percentiles(self) -> list[float]:
        """Which to report."""
        shares = _numbers("metric_percentiles", self.metric_percentiles)
        if any(not 0 <= share <= 100 for share in shares):
            raise ConfigError(f"metric_percentiles is {self.metric_percentiles}: from 0 to 100")
        return shares

    def sampling(self) -> dict[str, Any]:
        """What every request asks for beside its own length."""
        exact = self.ignore_eos
        if exact is None:
            exact = self.dataset_name in ("random", "prefix_repetition", "timed_trace")
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "ignore_eos": exact or None}


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {value}, must be at least {least}")


def _numbers(name: str, text: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}: {error}") from error
    if count is not None and len(numbers) != count:
        raise ConfigError(f"{name} is {text!r}, must be {count} numbers")
    return numbers
