"""Every metric of every role: names, help texts, labels and buckets in one file."""

from __future__ import annotations

import importlib.metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
"""vLLM's edges, so that its dashboards and ours can be laid over each other."""

TIME_PER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
"""vLLM's edges and three finer ones for small models."""

LEG_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
LAG_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25,
    0.5, 1.0, 5.0,
)  # fmt: skip
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
"""Tokens of a request."""


def new_registry() -> CollectorRegistry:
    """A registry of one process, with its version, memory, CPU and descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    about = Gauge(
        "grokmoe_build_info", "1, with the version of the program as a label.", ("version",), registry=registry
    )
    about.labels(_version()).set(1)
    return registry


def _version() -> str:
    try:
        return importlib.metadata.version("grokmoe")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


class LoopMetrics:
    """What every role's process knows of its event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.lag = Histogram(
            "grokmoe_loop_lag_seconds",
            "How late the event loop gets to what is due; up to 0.001 of it is the timer's.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )


class RouterMetrics:
    """What the router counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "grokmoe_requests_total",
            "Requests ended, by outcome: a finish reason or a gRPC code.",
            ("outcome",),
            registry=registry,
        )
        self.prompt_tokens = Counter("grokmoe_prompt_tokens_total", "Tokens of accepted prompts.", registry=registry)
        self.generated_tokens = Counter("grokmoe_generated_tokens_total", "Tokens generated.", registry=registry)
        self.prefix_queries = Counter(
            "grokmoe_prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache.",
            registry=registry,
        )
        self.prefix_hits = Counter(
            "grokmoe_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self.preemptions = Counter(
            "grokmoe_preemptions_total",
            "Sequences whose pages were taken back for an older one.",
            registry=registry,
        )
        self.running = Gauge("grokmoe_requests_running", "Sequences that hold KV pages.", registry=registry)
        self.waiting = Gauge("grokmoe_requests_waiting", "Sequences that wait for a step.", registry=registry)
        self.kv_pages = Gauge(
            "grokmoe_kv_pages",
            "KV pages by attention worker and state: used, cached or free.",
            ("worker", "state"),
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "grokmoe_time_to_first_token_seconds",
            "Arrival of a request to its first token.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "grokmoe_time_per_output_token_seconds",
            "First token to last, divided by the tokens after the first (TPOT).",
            buckets=TIME_PER_TOKEN_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "grokmoe_inter_token_latency_seconds",
            "From one token of a sequence to the next, each gap by itself (ITL).",
            buckets=TIME_PER_TOKEN_BUCKETS,
            registry=registry,
        )
        self.request_time = Histogram(
            "grokmoe_request_seconds",
            "Arrival of a request to its last token.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "grokmoe_request_queue_seconds",
            "Arrival of a request to its first step.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prefill_time = Histogram(
            "grokmoe_request_prefill_seconds",
            "First step of a request to its first token.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.decode_time = Histogram(
            "grokmoe_request_decode_seconds",
            "First token of a request to its last.",
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_length = Histogram(
            "grokmoe_request_prompt_tokens", "Tokens of a request's prompt.", buckets=LENGTH_BUCKETS, registry=registry
        )
        self.output_length = Histogram(
            "grokmoe_request_output_tokens",
            "Tokens that a request was given, all candidates.",
            buckets=LENGTH_BUCKETS,
            registry=registry,
        )
        self.step_time = Histogram(
            "grokmoe_step_seconds", "One step, plan to tokens.", buckets=LEG_BUCKETS, registry=registry
        )
        self.step_tokens = Histogram(
            "grokmoe_step_tokens", "Tokens in one step.", buckets=ROW_BUCKETS, registry=registry
        )
        self.leg_time = Histogram(
            "grokmoe_leg_seconds",
            "One leg of a step; router/legs.py says what each is.",
            ("leg",),
            buckets=LEG_BUCKETS,
            registry=registry,
        )
        self.straggler_time = Counter(
            "grokmoe_expert_straggler_seconds_total",
            "Time that layers waited for this expert worker alone, all others having answered.",
            ("worker",),
            registry=registry,
        )
        self.delivery_time = Histogram(
            "grokmoe_delivery_seconds",
            "End of a step to a stream's message with its token being with gRPC.",
            buckets=LEG_BUCKETS,
            registry=registry,
        )
        self.expert_rows = Counter(
            "grokmoe_expert_rows_total",
            "Rows routed to an expert, all layers.",
            ("expert",),
            registry=registry,
        )
        self.pair_calls = Counter(
            "grokmoe_expert_pair_calls_total",
            "Calls of expert workers whose rows went both ways by gloo or NCCL.",
            registry=registry,
        )
        self.pair_losses = Counter(
            "grokmoe_expert_pair_losses_total",
            "Times rows to an expert worker went back to gRPC's messages, or could not leave them.",
            registry=registry,
        )


class AttentionMetrics:
    """What an attention worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter(
            "grokmoe_attention_steps_total", "Steps by outcome: ok, refused, failed or abandoned.", ("outcome",),
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "grokmoe_attention_tokens_total", "Tokens that went through this worker.", registry=registry
        )
        self.compute_time = Histogram(
            "grokmoe_attention_compute_seconds",
            "Device time between two holes of a step.",
            buckets=LEG_BUCKETS,
            registry=registry,
        )
        self.kv_bytes = Gauge("grokmoe_attention_kv_bytes", "Memory of the KV cache.", registry=registry)
        self.adapters = Gauge("grokmoe_attention_adapters", "LoRA adapters that are loaded.", registry=registry)
        self.adapter_bytes = Gauge("grokmoe_attention_adapter_bytes", "Memory of their weights.", registry=registry)
        self.queue = Gauge("grokmoe_attention_queue", "Tasks that wait for the device.", registry=registry)


class ExpertMetrics:
    """What an expert worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "grokmoe_expert_worker_requests_total", "Calls by outcome: ok, refused or failed.", ("outcome",),
            registry=registry,
        )  # fmt: skip
        self.rows = Counter(
            "grokmoe_expert_worker_rows_total",
            "Rows computed, by expert or slice of one, such as 3 or 3:1/2.",
            ("expert",),
            registry=registry,
        )
        self.batch_rows = Histogram(
            "grokmoe_expert_worker_batch_rows",
            "Rows in one grouped GEMM.",
            buckets=ROW_BUCKETS,
            registry=registry,
        )
        self.batch_calls = Histogram(
            "grokmoe_expert_worker_batch_calls",
            "Calls joined into one grouped GEMM.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=registry,
        )
        self.batch_callers = Histogram(
            "grokmoe_expert_worker_batch_callers",
            "Routers whose calls were joined into one grouped GEMM.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=registry,
        )
        self.queue_time = Histogram(
            "grokmoe_expert_worker_queue_seconds",
            "Call received to computation begun.",
            buckets=LEG_BUCKETS,
            registry=registry,
        )
        self.compute_time = Histogram(
            "grokmoe_expert_worker_compute_seconds",
            "One grouped GEMM.",
            buckets=LEG_BUCKETS,
            registry=registry,
        )
        self.queue = Gauge("grokmoe_expert_worker_queue", "Calls that wait for the device.", registry=registry)
        self.held = Gauge(
            "grokmoe_expert_worker_held",
            "Experts, layer by layer, by state: held, loading, or lingering after they were given up.",
            ("state",),
            registry=registry,
        )
        self.loads = Counter(
            "grokmoe_expert_worker_loads_total",
            "Loads while serving, by outcome: ok, cancelled, no_room or failed.",
            ("outcome",),
            registry=registry,
        )
        self.load_time = Histogram(
            "grokmoe_expert_worker_load_seconds",
            "One load while serving, from its turn until its experts can be called.",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=registry,
        )
