"""The router's metrics a second time under vLLM's names, for dashboards and schedulers made for those."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from grokmoe.telemetry import RouterMetrics

ALIASES = {
    "grokmoe_requests_running": "vllm:num_requests_running",
    "grokmoe_requests_waiting": "vllm:num_requests_waiting",
    "grokmoe_prompt_tokens": "vllm:prompt_tokens",
    "grokmoe_generated_tokens": "vllm:generation_tokens",
    "grokmoe_preemptions": "vllm:num_preemptions",
    "grokmoe_prefix_cache_queries": "vllm:prefix_cache_queries",
    "grokmoe_prefix_cache_hits": "vllm:prefix_cache_hits",
    "grokmoe_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "grokmoe_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "grokmoe_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "grokmoe_request_seconds": "vllm:e2e_request_latency_seconds",
    "grokmoe_request_queue_seconds": "vllm:request_queue_time_seconds",
    "grokmoe_request_prefill_seconds": "vllm:request_prefill_time_seconds",
    "grokmoe_request_decode_seconds": "vllm:request_decode_time_seconds",
}
"""Family of ours -> vLLM's of the same meaning and unit. Names of families, so counters without `_total`."""

KV_USE = "vllm:kv_cache_usage_perc"
"""A fraction, in spite of its name."""


class VllmAliases(Collector):
    """To be registered beside the metrics themselves."""

    def __init__(self, metrics: RouterMetrics, model_name: str) -> None:
        self._sources = [each for each in vars(metrics).values() if hasattr(each, "collect")]
        self._pages, self._labels = metrics.kv_pages, {"model_name": model_name}

    def describe(self) -> list[Metric]:
        """Nothing: what is registered is not to be collected for that."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of `ALIASES`, and the part of the KV pages that is in use."""
        for source in self._sources:
            for family in source.collect():
                name = ALIASES.get(family.name)
                if name is not None:
                    yield self._renamed(family, name)
        yield self._kv_use()

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        renamed.samples = [
            Sample(
                name + sample.name.removeprefix(family.name),
                {**sample.labels, **self._labels},
                sample.value,
                sample.timestamp,
                sample.exemplar,
            )
            for sample in family.samples
        ]
        return renamed

    def _kv_use(self) -> Metric:
        pages = [sample for family in self._pages.collect() for sample in family.samples]
        used = sum(sample.value for sample in pages if sample.labels["state"] == "used")
        use = GaugeMetricFamily(
            KV_USE, "Part of the KV pages that live sequences hold, 0 to 1.", labels=("model_name",)
        )
        use.add_metric((self._labels["model_name"],), used / max(1.0, sum(sample.value for sample in pages)))
        return use
