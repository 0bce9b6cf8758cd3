"""Is it well: requests, what clients wait for, who is there."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import chart, new_dashboard, number, quantiles, row, selector, total


def cluster() -> Dashboard:
    """The one to open first."""
    ready = selector("grokmoe_worker_state", 'state="ready"')
    pages, used = selector("grokmoe_kv_pages"), selector("grokmoe_kv_pages", 'state="used"')
    return (
        new_dashboard("cluster", "grokmoe: cluster", "Requests, what clients wait for, who is there.")
        .with_panel(
            number("Running", "Sequences that hold KV pages.", "short", f"sum({selector('grokmoe_requests_running')})")
        )
        .with_panel(
            number("Waiting", "Sequences without pages.", "short", f"sum({selector('grokmoe_requests_waiting')})")
        )
        .with_panel(number("Generated", "Tokens per second.", "short", total("grokmoe_generated_tokens_total")))
        .with_panel(number("Workers in use", "Of all roles.", "short", f"sum({ready})"))
        .with_panel(
            number(
                "Experts nobody holds",
                "Above 0 requests wait, and then fail.",
                "short",
                f"max({selector('grokmoe_experts_unheld')})",
            )
        )
        .with_panel(
            number(
                "Least holders",
                "At 1 the next lost expert worker stops the service.",
                "short",
                f"min({selector('grokmoe_expert_holders_least')})",
            )
        )
        .with_row(row("Requests"))
        .with_panel(
            chart("Requests", "Ended, by how.", "reqps", [(total("grokmoe_requests_total", "outcome"), "{{outcome}}")])
        )
        .with_panel(
            chart(
                "Queue",
                "Waiting for long means too little of something: see KV pages and the router's legs.",
                "short",
                [
                    (f"sum({selector('grokmoe_requests_running')})", "running"),
                    (f"sum({selector('grokmoe_requests_waiting')})", "waiting"),
                ],
            )
        )
        .with_panel(
            chart(
                "Tokens",
                "Per second.",
                "short",
                [
                    (total("grokmoe_generated_tokens_total"), "generated"),
                    (total("grokmoe_prompt_tokens_total"), "of prompts"),
                ],
            )
        )
        .with_row(row("What clients wait for"))
        .with_panel(
            chart(
                "First token", "Arrival to first token (TTFT).", "s", quantiles("grokmoe_time_to_first_token_seconds")
            )
        )
        .with_panel(
            chart("Next token", "One token to the next (ITL).", "s", quantiles("grokmoe_inter_token_latency_seconds"))
        )
        .with_panel(chart("Whole request", "Arrival to last token.", "s", quantiles("grokmoe_request_seconds")))
        .with_row(row("Who is there"))
        .with_panel(
            chart(
                "Workers",
                "By state, as routers see them.",
                "short",
                [(f"sum by (role, state) ({selector('grokmoe_worker_state')}) > 0", "{{role}} {{state}}")],
            )
        )
        .with_panel(
            chart(
                "KV pages in use",
                "Full pages make sequences wait, or be computed again.",
                "percentunit",
                [
                    (
                        f"sum by (pod, worker) ({used}) / sum by (pod, worker) ({pages})",
                        "{{pod}} {{worker}}",
                    )
                ],
            )
        )
        .with_panel(
            chart(
                "Faults",
                "What was lost, and what was done about it, per second.",
                "short",
                [
                    (total("grokmoe_losses_total"), "attention workers lost"),
                    (total("grokmoe_migrations_total"), "sequences computed again"),
                    (total("grokmoe_expert_failovers_total"), "expert workers lost"),
                    (total("grokmoe_expert_retries_total"), "rows sent again"),
                    (total("grokmoe_requests_refused_total"), "requests refused"),
                ],
            )
        )
    )
