"""The tables of docs/scaling.md that are calculated: Grok-1 by device and topology, and how cost grows.

    python -m benchmarks.plans --write          takes some minutes, most of them for the simulations of whole clusters

Nothing here is measured: it is what `grokmoe plan` says, with the costs that it assumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from planner.bounds import bound
from planner.command import Plan, make_plan, wish_of
from planner.costs import ASSUMED
from planner.forecast import kv_tokens
from planner.layout import lay_out
from planner.memory import expert_room
from planner.model_size import all_params, expert_bytes
from planner.presets import PRESETS
from planner.search import Wish, clusters, layouts, price_per_million
from planner.settings import INSIDE, PAIRS, PlanSettings
from planner.shape import decode, prefill
from planner.step_time import StepTimer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"

GOALS = ("ttft:6000", "tpot:400")

Table = tuple[Sequence[str], list[tuple[str, ...]]]


def settings(**changes: object) -> PlanSettings:
    """512 tokens in, 128 out, H100 and FP8 unless it says otherwise."""
    fields = {"experts_on": "h100", "attention_on": "h100", "expert_dtype": "float8", "goodput": GOALS}
    return PlanSettings(**(fields | changes))  # type: ignore[arg-type]


DEVICES = (
    ("8*h100", "1*h100", "bfloat16"),
    ("4*h100", "1*h100", "float8"),
    ("5*h200", "1*h200", "bfloat16"),
    ("3*h200", "1*h200", "float8"),
    ("8*a100", "1*a100", "bfloat16"),
    ("2*b200", "1*b200", "float8"),
    ("4*mi300x", "1*mi300x", "bfloat16"),
    ("15*l40s", "1*h100", "bfloat16"),
    ("8*l40s", "1*l40s", "float8"),
    ("4*cpu-small", "1*cpu-small", "bfloat16"),
)


def by_device() -> Table:
    """One copy of the experts, one attention worker with the router inside, rows by pairs (on CPUs in messages)."""
    header = ("experts on", "weights", "lanes", "decode 1", "decode 32", "prefill 512", "tokens/s out", "binds")
    rows = []
    for experts, attention, dtype in DEVICES:
        pairs = "messages" if "cpu" in experts else PAIRS
        asked = settings(experts_on=experts, attention_on=attention, expert_dtype=dtype, router=INSIDE, rows=pairs)
        plan = make_plan(asked)
        found = plan.found
        served = f"{found.forecast.output_rate:.0f}" if found.holds else "objectives do not hold"
        rows.append((
            experts.replace("*", " "), dtype, str(found.cluster.lanes), *_steps(found.timer), served,
            found.bound.binding,
        ))  # fmt: skip
    return header, rows


def by_topology() -> Table:
    """Where the router is, and how rows go: 4 H100 with experts in FP8, one attention worker."""
    header = (
        "router",
        "rows",
        "lanes",
        "decode 1",
        "decode 32",
        "prefill 512",
        "requests/s",
        "per million out",
        "binds",
    )
    rows = []
    for router in ("process", INSIDE):
        for way in ("messages", PAIRS):
            plan = make_plan(settings(experts_on="4*h100", attention_on="1*h100", router=router, rows=way))
            found = plan.found
            rows.append((
                router, way, str(found.cluster.lanes), *_steps(found.timer), f"{found.forecast.rate:.2f}",
                f"{price_per_million(found):.2f}", found.bound.binding,
            ))  # fmt: skip
    return header, rows


def _steps(timer: StepTimer) -> tuple[str, str, str]:
    shapes = (decode(1, 576), decode(32, 576), prefill(512))
    return tuple(f"{timer.time(shape).alone * 1e3:.0f}" for shape in shapes)  # type: ignore[return-value]


RATES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


def by_load() -> Table:
    """Requests/s, to as many as a day's internet has: 65536 are 5.7 billion requests a day."""
    header = ("requests/s", "expert cards", "copies", "attention workers", "lanes", "TPOT p99, ms", "TTFT p99, ms",
              "per hour", "per million out")  # fmt: skip
    rows = []
    for rate in RATES:
        plan = make_plan(settings(request_rate=float(rate), router=INSIDE, rows=PAIRS))
        found, cluster = plan.found, plan.found.cluster
        assert found.holds, rate
        rows.append((
            str(rate), str(cluster.num_cards), str(cluster.copies), str(cluster.attention_workers), str(cluster.lanes),
            f"{found.forecast.tpot_p99 * 1e3:.0f}", f"{found.forecast.ttft_p99 * 1e3:.0f}", f"{cluster.price:.0f}",
            f"{price_per_million(found):.2f}",
        ))  # fmt: skip
    return header, rows


def by_workers() -> Table:
    """Cards that one copy of the experts is spread over, each with room for more than it holds."""
    header = ("cards of a copy", "decode 1", "decode 32", "prefill 512", "requests/s", "per million out", "binds")
    base = wish_of(settings(experts_on="b200", attention_on="b200", router=INSIDE, rows=PAIRS), PRESETS)
    rows = []
    for number in (2, 4, 8, 16, 32, 64):
        rows.append((str(number), *_of_layout(base, number)))
    return header, rows


def by_experts() -> Table:
    """Experts of each layer, every one as large as Grok-1's, two per token: the model grows, what a token computes does
    not. As many H100 as hold it."""
    header = ("experts", "weights, GB", "cards", "decode 1", "decode 32", "prefill 512", "requests/s",
              "per million out", "binds")  # fmt: skip
    base = wish_of(settings(router=INSIDE, rows=PAIRS), PRESETS)
    rows = []
    for number in (8, 16, 32, 64, 128, 256):
        wish = dataclasses.replace(base, config=dataclasses.replace(base.config, num_experts=number))
        cards = min(len(layout.cards) for layout in layouts(wish))
        weights = number * wish.config.num_layers * expert_bytes(wish.config, wish.expert_dtype) / 1e9
        rows.append((str(number), f"{weights:.0f}", str(cards), *_of_layout(wish, cards)))
    assert all_params(base.config) > 3e11
    return header, rows


def _of_layout(wish: Wish, number: int) -> tuple[str, ...]:
    """One copy on so many cards, with the number of attention workers and lanes that costs least by the token."""
    config, device = wish.config, wish.experts[0].device
    room = expert_room(config, wish.expert_dtype, device)
    layout = lay_out([device] * number, [room] * number, config.num_experts, config.num_layers)
    best = None
    for cluster in clusters(dataclasses.replace(wish, copies=1)):
        if cluster.copies > 1 or cluster.attention_workers > 64:
            continue
        timer = StepTimer(dataclasses.replace(cluster, layout=layout), ASSUMED)
        found = bound(timer, 512, 128, wish.limits, kv_tokens(timer), wish.goals)
        worth = found.rate / timer.cluster.price
        if best is None or worth > best[0]:
            best = worth, timer, found
    assert best is not None
    _, timer, found = best
    price = timer.cluster.price / (found.rate * 128 * 3600) * 1e6
    return (*_steps(timer), f"{found.rate:.1f}", f"{price:.2f}", found.binding)


SIMULATED = (
    (8, 40.0, 0.0, 0.0),
    (8, 40.0, 0.1, 0.0),
    (64, 40.0, 0.0, 0.0),
    (64, 40.0, 0.1, 0.0),
    (64, 40.0, 0.0, 0.5),
    (512, 20.0, 0.5, 0.0),
    (4096, 8.0, 1.0, 0.0),
)
"""Requests/s, seconds of them, the mean time between failures of a worker in hours, skew of the routing."""


def simulated() -> Table:
    """Clusters worker by worker, with failures: a worker that fails is back after 20 s."""
    header = ("requests/s", "workers", "each fails every", "skew", "failures", "TTFT p50, p99, s", "TPOT p50, p99, ms",
              "good", "lost", "calls again", "sequences moved", "longest stall, s", "simulated in")  # fmt: skip
    rows = []
    for rate, seconds, hours, skew in SIMULATED:
        asked = settings(
            request_rate=float(rate), router=INSIDE, rows=PAIRS, copies=2, simulate=seconds, reach=4,
            mtbf_hours=hours, repair_seconds=20.0, skew=skew,
        )  # fmt: skip
        rows.append(_simulated(rate, hours, skew, make_plan(asked)))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return header, rows


def _simulated(rate: int, hours: float, skew: float, plan: Plan) -> tuple[str, ...]:
    cluster, found = plan.found.cluster, plan.outcome
    assert found is not None
    stall = max((each.longest_stall for each in found.effects), default=0.0)
    workers = f"{cluster.num_cards} + {cluster.attention_workers}"
    return (
        str(rate), workers, f"{hours:g} h" if hours else "never", f"{skew:g}", str(len(found.effects)),
        f"{found.ttft_p50:.1f}, {found.ttft_p99:.1f}", f"{found.tpot_p50 * 1e3:.0f}, {found.tpot_p99 * 1e3:.0f}",
        f"{found.share:.1%}", str(found.unfinished), str(found.retries), str(found.moves),
        f"{stall:.1f}" if found.effects else "", f"{found.took:.0f} s",
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {
    "by_device": by_device,
    "by_topology": by_topology,
    "by_load": by_load,
    "by_workers": by_workers,
    "by_experts": by_experts,
    "simulated": simulated,
}


def markdown(table: Table) -> str:
    """As the page has it."""
    header, rows = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def put(page: str, name: str, text: str) -> str:
    """The page with a table between its marks."""
    begin, end = f"<!-- made by benchmarks/plans: {name} -->", "<!-- end -->"
    before, mark, rest = page.partition(begin)
    assert mark, f"the page has no {begin}"
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES), help="which (default: all: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    options = parser.parse_args()
    for name in options.tables.split(","):
        text = markdown(TABLES[name]())
        print(f"{name}\n\n{text}\n", flush=True)
        if options.write:
            PAGE.write_text(put(PAGE.read_text(), name, text))


if __name__ == "__main__":
    main()
