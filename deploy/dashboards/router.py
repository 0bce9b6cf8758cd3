"""Where the time of a request and of a step goes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import chart, mean, new_dashboard, quantile, quantiles, row, selector, total


def router() -> Dashboard:
    """Requests by phase, steps by leg, what else the router does."""
    hits, queries = (total(f"grokmoe_prefix_cache_{name}_total") for name in ("hits", "queries"))
    legs = total("grokmoe_leg_seconds_sum", "leg")
    return (
        new_dashboard("router", "grokmoe: router", "Requests by phase, steps by leg.")
        .with_row(row("Requests"))
        .with_panel(chart("Queue", "Arrival to first step.", "s", quantiles("grokmoe_request_queue_seconds"), 6))
        .with_panel(
            chart("Prefill", "First step to first token.", "s", quantiles("grokmoe_request_prefill_seconds"), 6)
        )
        .with_panel(chart("Decode", "First token to last.", "s", quantiles("grokmoe_request_decode_seconds"), 6))
        .with_panel(
            chart(
                "Lengths",
                "Means, in tokens.",
                "short",
                [
                    (mean("grokmoe_request_prompt_tokens"), "prompt"),
                    (mean("grokmoe_request_output_tokens"), "output"),
                ],
                6,
            )
        )
        .with_row(row("Steps"))
        .with_panel(
            chart(
                "Legs of a step",
                "Seconds of each per step; the largest is where to look.",
                "s",
                [(f"{legs} / ignoring (leg) group_left () {total('grokmoe_step_seconds_count')}", "{{leg}}")],
                12,
            )
        )
        .with_panel(chart("Step", "Plan to tokens.", "s", quantiles("grokmoe_step_seconds"), 6))
        .with_panel(
            chart(
                "Batch",
                "Tokens per step: mean and tail.",
                "short",
                [(mean("grokmoe_step_tokens"), "mean"), (quantile(0.95, "grokmoe_step_tokens"), "95%")],
                6,
            )
        )
        .with_row(row("Memory for keys and values"))
        .with_panel(
            chart(
                "KV pages",
                "By state.",
                "short",
                [(f"sum by (state) ({selector('grokmoe_kv_pages')})", "{{state}}")],
            )
        )
        .with_panel(
            chart(
                "Prefix cache",
                "Part of the looked-up prompt tokens that need not be computed.",
                "percentunit",
                [(f"{hits} / {queries}", "hits")],
            )
        )
        .with_panel(
            chart(
                "Preemptions",
                "Sequences whose pages went to older ones, per second.",
                "short",
                [(total("grokmoe_preemptions_total"), "preempted")],
            )
        )
        .with_row(row("Process"))
        .with_panel(
            chart(
                "Calls",
                "Ended, by method and code.",
                "reqps",
                [(total("grpc_server_handled_total", "grpc_method, grpc_code"), "{{grpc_method}} {{grpc_code}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Event loop",
                "How late it gets to what is due, tail; above some milliseconds a process has too much to do.",
                "s",
                [(quantile(0.99, "grokmoe_loop_lag_seconds", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(chart("CPU", "Cores.", "short", [(total("process_cpu_seconds_total", "pod"), "{{pod}}")], 6))
        .with_panel(chart("Memory", "Resident.", "bytes", [(selector("process_resident_memory_bytes"), "{{pod}}")], 6))
    )
