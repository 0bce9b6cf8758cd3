"""What attention and expert workers say of themselves."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import chart, mean, new_dashboard, quantile, row, selector, total


def workers() -> Dashboard:
    """Both kinds, pod by pod."""
    return (
        new_dashboard("workers", "grokmoe: workers", "What attention and expert workers say of themselves.")
        .with_row(row("Attention workers"))
        .with_panel(
            chart(
                "Steps",
                "Ended, by outcome.",
                "short",
                [(total("grokmoe_attention_steps_total", "outcome"), "{{outcome}}")],
                6,
            )
        )
        .with_panel(
            chart("Tokens", "Per second.", "short", [(total("grokmoe_attention_tokens_total", "pod"), "{{pod}}")], 6)
        )
        .with_panel(
            chart(
                "Computation between two layers",
                "Tail.",
                "s",
                [(quantile(0.95, "grokmoe_attention_compute_seconds", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Waiting for the device",
                "Tasks.",
                "short",
                [(f"sum by (pod) ({selector('grokmoe_attention_queue')})", "{{pod}}")],
                6,
            )
        )
        .with_row(row("Expert workers"))
        .with_panel(
            chart(
                "Calls",
                "Ended, by outcome.",
                "short",
                [(total("grokmoe_expert_worker_requests_total", "outcome"), "{{outcome}}")],
                6,
            )
        )
        .with_panel(
            chart("Rows", "Per second.", "short", [(total("grokmoe_expert_worker_rows_total", "pod"), "{{pod}}")], 6)
        )
        .with_panel(
            chart(
                "Rows in one grouped GEMM",
                "Means: more rows for the same weights are cheaper.",
                "short",
                [(mean("grokmoe_expert_worker_batch_rows", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Calls in one grouped GEMM",
                "Means: above 1, rows of several lanes or cells meet.",
                "short",
                [(mean("grokmoe_expert_worker_batch_calls", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Cells in one grouped GEMM",
                "Means: above 1, rows of several routers share one reading of the weights.",
                "short",
                [(mean("grokmoe_expert_worker_batch_callers", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Queue",
                "Call received to computation begun, tail.",
                "s",
                [(quantile(0.95, "grokmoe_expert_worker_queue_seconds", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Grouped GEMM",
                "Tail.",
                "s",
                [(quantile(0.95, "grokmoe_expert_worker_compute_seconds", "pod"), "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Experts held",
                "Layer by layer, by state.",
                "short",
                [(f"sum by (pod, state) ({selector('grokmoe_expert_worker_held')})", "{{pod}} {{state}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Waiting for the device",
                "Calls.",
                "short",
                [(f"sum by (pod) ({selector('grokmoe_expert_worker_queue')})", "{{pod}}")],
                6,
            )
        )
        .with_row(row("Processes"))
        .with_panel(chart("CPU", "Cores.", "short", [(total("process_cpu_seconds_total", "pod"), "{{pod}}")], 12))
        .with_panel(chart("Memory", "Resident.", "bytes", [(selector("process_resident_memory_bytes"), "{{pod}}")], 12))
    )
