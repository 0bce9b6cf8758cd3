"""Which experts are busy, who is waited for, what moves."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import chart, new_dashboard, row, selector, total


def experts() -> Dashboard:
    """Load per expert, and what evens it out."""
    return (
        new_dashboard("experts", "grokmoe: experts", "Which experts are busy, who is waited for, what moves.")
        .with_row(row("Load"))
        .with_panel(
            chart(
                "Rows per expert",
                "Per second, all layers.",
                "short",
                [(total("grokmoe_expert_rows_total", "expert"), "{{expert}}")],
                12,
            )
        )
        .with_panel(
            chart(
                "Imbalance",
                "Load of the busiest expert worker over the mean; 1 is even.",
                "short",
                [(f"max by (pod) ({selector('grokmoe_expert_imbalance')})", "{{pod}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Waited for alone",
                "Part of the time in which layers wait for one worker, all others having answered.",
                "percentunit",
                [(total("grokmoe_expert_straggler_seconds_total", "pod, worker"), "{{pod}} {{worker}}")],
                6,
            )
        )
        .with_row(row("Calls"))
        .with_panel(
            chart(
                "Calls", "Per second, retries included.", "short", [(total("grokmoe_expert_calls_total"), "calls")], 6
            )
        )
        .with_panel(
            chart(
                "Rows sent again",
                "By cause.",
                "short",
                [(total("grokmoe_expert_retries_total", "cause"), "{{cause}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Second calls",
                "Hedges.",
                "short",
                [(total("grokmoe_expert_hedges_total", "outcome"), "{{outcome}}")],
                6,
            )
        )
        .with_panel(
            chart(
                "Answers that cannot be",
                "NaN, or a wrong shape.",
                "short",
                [(total("grokmoe_expert_corrupt_total"), "corrupt")],
                6,
            )
        )
        .with_row(row("Placement"))
        .with_panel(
            chart(
                "Holders",
                "Of the expert that fewest hold, and how many nobody holds.",
                "short",
                [
                    (f"min({selector('grokmoe_expert_holders_least')})", "least holders"),
                    (f"max({selector('grokmoe_experts_unheld')})", "held by nobody"),
                ],
            )
        )
        .with_panel(
            chart(
                "Moves",
                "Under way; the version grows with every change of the table.",
                "short",
                [
                    (f"sum({selector('grokmoe_expert_moves')})", "moves"),
                    (f"changes({selector('grokmoe_placement_version')}[$__rate_interval])", "changes, {{pod}}"),
                ],
            )
        )
        .with_panel(
            chart(
                "Loads",
                "Of experts while serving, by outcome.",
                "short",
                [(total("grokmoe_expert_worker_loads_total", "outcome"), "{{outcome}}")],
            )
        )
    )
