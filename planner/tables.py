"""A plan as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from planner.arrivals import mean_length
from planner.cluster import Cluster
from planner.command import Plan
from planner.forecast import kv_tokens
from planner.layout import Card
from planner.memory import attention_memory, expert_memory
from planner.model_size import all_params
from planner.search import price_per_million
from planner.shape import StepShape, decode, prefill
from planner.simulated.results import Effect
from planner.step_time import LEGS

SHOWN_BATCHES = (1, 8, 32, 128)


def describe(plan: Plan) -> str:
    """What one reads: the answer, what is needed, who holds what, memory, steps, what it rests on."""
    parts = [verdict(plan), numbers(plan), placement(plan), memory(plan), steps(plan), simulated(plan), ground(plan)]
    return "\n\n".join(part for part in parts if part)


def verdict(plan: Plan) -> str:
    """The answer, and what binds."""
    found, goals = plan.found, plan.wish.goals
    forecast = found.forecast
    holds = "holds" if found.holds else "does NOT hold"
    asked = "serves" if plan.wish.load.rate else "at most"
    limits = f"TTFT {goals.ttft * 1e3:g} ms and TPOT {goals.tpot * 1e3:g} ms for {goals.share * 100:g} %"
    return (
        f"{plan.settings.model}: {asked} {forecast.rate:.3g} requests/s, {forecast.output_rate:.4g} output tokens/s; "
        f"{limits} {holds} ({forecast.share * 100:.1f} %).\n"
        f"What binds: {found.bound.binding}. Price {found.cluster.price:.2f} per hour, "
        f"{price_per_million(found):.2f} per million output tokens."
    )


def numbers(plan: Plan) -> str:
    """How many of what, and the forecast."""
    cluster, forecast = plan.found.cluster, plan.found.forecast
    kinds = Counter(card.device.name for card in cluster.layout.cards)
    cards = " + ".join(f"{count * cluster.copies} x {name}" for name, count in kinds.items())
    rows = [
        ("expert workers", f"{cards} in {cluster.expert_dtype}, {cluster.copies} of every expert"),
        ("attention workers", f"{cluster.attention_workers} x {cluster.attention.name} in {cluster.dtype}"),
        ("routers", "in the same process" if cluster.is_fused else _routers(cluster)),
        ("lanes", f"{cluster.lanes}"),
        ("TTFT p50, p99", f"{_ms(forecast.ttft_p50)}, {_ms(forecast.ttft_p99)} ms"),
        ("TPOT p50, p99", f"{_ms(forecast.tpot_p50)}, {_ms(forecast.tpot_p99)} ms"),
        ("total tokens/s", f"{forecast.total_rate:.4g}"),
        ("rows of a step", f"{forecast.batch:.1f}; steps under way {forecast.busy * 100:.0f} % of the time"),
    ]
    return table(("", ""), rows)


def _routers(cluster: Cluster) -> str:
    where = "inside the attention workers" if cluster.has_router_inside else str(cluster.routers)
    return where + (", rows from device to device" if cluster.rows_by_pairs else "")


def placement(plan: Plan) -> str:
    """What each worker of a copy holds, equal ones not repeated."""
    layout = plan.found.cluster.layout
    return table(
        ("worker", "device", "holds (EXPERTS@LAYERS)"),
        [(str(index), card.device.name, layout.spec(card)) for index, card in enumerate(layout.cards)],
        is_text=True,
    )


def memory(plan: Plan) -> str:
    """GiB by role, of the fullest worker."""
    wish, cluster = plan.wish, plan.found.cluster
    fullest: dict[str, Card] = {}
    for card in cluster.layout.cards:
        name = card.device.name
        if name not in fullest or card.last - card.first > fullest[name].last - fullest[name].first:
            fullest[name] = card
    items = [
        (
            f"expert on {name}",
            expert_memory(wish.config, cluster.expert_dtype, card.device, card.last - card.first),
        )
        for name, card in fullest.items()
    ]
    items.append(
        (
            f"attention on {cluster.attention.name}",
            attention_memory(wish.config, cluster.dtype, cluster.attention, cluster.kv_gib),
        )
    )
    rows = [
        (name, *(f"{value:.1f}" for value in (m.weights, m.kv, m.rows, m.runtime, m.need, m.device)))
        for name, m in items
    ]
    head = f"{all_params(wish.config) / 1e9:.4g} billion weights; pages hold {kv_tokens(plan.found.timer)} positions"
    return head + "\n" + table(("GiB", "weights", "KV", "rows", "runtime", "all", "of"), rows)


def step_shapes(plan: Plan) -> list[tuple[str, StepShape]]:
    """Steps that are shown: decode at some batches, a full step of prefill."""
    context = mean_length(plan.wish.load.prompt) + mean_length(plan.wish.load.output) / 2
    limits = plan.wish.limits
    most = min(limits.max_running, limits.max_step_tokens)
    shown = [(f"decode {batch}", decode(batch, context)) for batch in SHOWN_BATCHES if batch <= most]
    tokens = limits.max_step_tokens
    return [*shown, (f"prefill {tokens}", prefill(tokens))]


def steps(plan: Plan) -> str:
    """Milliseconds by leg, nothing else under way."""
    rows = []
    for name, shape in step_shapes(plan):
        time = plan.found.timer.time(shape)
        tokens = shape.rows / time.alone
        rows.append((name, *(_ms(time.seconds[leg]) for leg in LEGS), _ms(time.alone), f"{tokens:.4g}"))
    return table(("ms per step", *LEGS, "whole", "tokens/s"), rows)


def simulated(plan: Plan) -> str:
    """Worker by worker, and what failures did. Empty: nothing was simulated."""
    outcome = plan.outcome
    if outcome is None:
        return ""
    holds = "hold" if outcome.holds else "do NOT hold"
    open_ = f", {outcome.unfinished} never ended" if outcome.unfinished else ""
    rows = [
        (
            "requests",
            f"{outcome.requests} in {plan.settings.simulate:g} s{open_}; {outcome.share * 100:.1f} % are good",
        ),
        ("TTFT p50, p99", f"{_ms(outcome.ttft_p50)}, {_ms(outcome.ttft_p99)} ms"),
        ("TPOT p50, p99", f"{_ms(outcome.tpot_p50)}, {_ms(outcome.tpot_p99)} ms"),
        ("output tokens/s", f"{outcome.output_rate:.4g}"),
        ("rows of a step", f"{outcome.mean_rows:.1f}"),
        ("busy, mean and most", ", ".join(f"{name} {_shares(both)}" for name, both in outcome.busy.items())),
        ("lost", f"{outcome.retries} expert calls sent again, {outcome.moves} sequences moved"),
    ]
    title = f"Simulated worker by worker ({outcome.num_steps} steps, {outcome.took:.0f} s): the objectives {holds}."
    parts = [title + "\n" + table(("", ""), rows)]
    if outcome.effects:
        header = ("failure", "at s", "back after", "under way", "longest stall s", "tokens/s at least", "whole after s")
        parts.append(table(header, [_effect(each) for each in outcome.effects]))
    return "\n\n".join(parts)


def _shares(both: tuple[float, float]) -> str:
    return f"{both[0] * 100:.0f} % {both[1] * 100:.0f} %"


def _effect(effect: Effect) -> tuple[str, ...]:
    failure = effect.failure
    return (
        f"{failure.role} {failure.index}",
        f"{failure.at:.1f}",
        "-" if failure.lasts is None else f"{failure.lasts:g}",
        str(effect.under_way),
        f"{effect.longest_stall:.2f}",
        "-" if effect.dip is None else f"{effect.dip * 100:.0f} %",
        "-" if effect.recovered_after is None else f"{effect.recovered_after:g}",
    )


def ground(plan: Plan) -> str:
    """What the figures rest on."""
    return (
        f"Costs: {plan.costs.origin}. Devices by their data sheets. Routing taken for even. A plan is a calculation: "
        "docs/scaling.md says how far it was from what was measured."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], is_text: bool = False) -> str:
    """Columns two spaces apart; numbers to the right, unless all is text."""
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    is_number = [
        not is_text and column > 0 and all(_is_number(row[column]) for row in rows) for column in range(len(header))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
