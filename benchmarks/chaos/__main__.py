"""Does the service keep its promise when processes die, hang, lie and come back, under load?

    python -m benchmarks.chaos --faults 50 --resume FILE    every kind and role; the same again goes on with it
    python -m benchmarks.chaos --faults 10 --kinds kill,hang --targets expert
    python -m benchmarks.chaos --stages 2 --targets attention    attention workers are pipelines, faults are of a stage
    python -m benchmarks.chaos --soak 20                    faults of all kinds for so many minutes, then: what is held
    python -m benchmarks.chaos --kinds kill,hang,killrank,hangrank --targets attention --tensor-parallel 2

Every cluster is real processes: a router, attention workers, and expert workers with every expert on two of them, the
embedded model in float32. Its tokens are computed once with nobody disturbing; afterwards every stream of the load is
compared with them, token by token. Faults come one at a time, so that a replica exists.

Columns: lost: streams that ended without all their tokens. changed: streams with another token. A stream that
breaks because the router went away is taken up again by the SDK (`resume`) and is not lost. longest stall: the
longest wait between two deltas of one stream, from the fault until 0.3 s after the cluster was whole again.
first token: the longest wait for a first one, queue and prefill included. in use again: from the end of the fault (the
process has been started again, goes on, is connected) until the router uses every worker. The row `none` is the same
load undisturbed: what the machine itself does. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.chaos.campaign import Campaign, Effect, campaign, plan_for
from benchmarks.chaos.cluster import ChaosCluster, ClusterPlan
from benchmarks.chaos.faults import FAULTS, TARGETS, Setting, is_possible
from benchmarks.chaos.load import Job, make_jobs, reference
from benchmarks.chaos.network import Cables
from benchmarks.chaos.record import Record
from benchmarks.chaos.report import errors, holdings_table, markdown, rows, table
from benchmarks.chaos.resources import Holding, holdings, used_pages
from grokmoe import AsyncClient
from grokmoe.errors import StartupError

NUM_JOBS = 16
"""Different requests of the load; clients go round them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    faults: int
    kinds: tuple[str, ...]
    targets: tuple[str, ...]
    seed: int
    concurrency: int
    calm: float
    soak: float
    is_markdown: bool
    resume: Path | None
    plan: ClusterPlan

    def groups(self) -> dict[Setting, list[tuple[str, str]]]:
        """What a cluster needs -> the (kind, target) that are done in it."""
        groups: dict[Setting, list[tuple[str, str]]] = {}
        for kind in self.kinds:
            for target in self.targets:
                if is_possible(kind, target) and not (FAULTS[kind].needs.has_ranks and self.plan.tensor_parallel == 1):
                    groups.setdefault(FAULTS[kind].needs, []).append((kind, target))
        return groups


def say(line: str) -> None:
    """Progress goes to standard error; the tables and the JSON to standard output."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


Reference = tuple[list[Job], list[tuple[int, ...]]]
"""Jobs and the tokens of each."""


async def undisturbed(options: Options) -> Reference:
    """Computes the reference once, on a cluster of its own: it then holds for all others."""
    say("computing the reference")
    async with ChaosCluster(options.plan) as cluster, AsyncClient(cluster.router.address) as client:
        jobs = make_jobs(NUM_JOBS, (await client.model()).vocab_size, options.seed)
        return jobs, await reference(client, jobs)


async def run_group(
    options: Options, known: Reference, needs: Setting, pairs: list[tuple[str, str]], record: Record
) -> None:
    """`faults` of each pair, less those that the record has, in random order, on one cluster."""
    counts = record.counts()
    todo = [pair for pair in pairs for _ in range(options.faults - counts[pair])]
    if not todo:
        return
    names = ", ".join(f"{kind} {target}" for kind, target in pairs)
    say(f"cluster for {names}")
    seed = options.seed + counts.total()  # what is gone on with is not to begin with the same faults
    random.Random(seed).shuffle(todo)
    started: Campaign | None = None
    try:
        async with campaign(plan_for(needs, options.plan), *known, options.concurrency, seed) as run:
            started = run
            await run.calm(options.calm)
            for number, (kind, target) in enumerate(todo, 1):
                await inject(run, kind, target, f"{number}/{len(todo)}")
                record.add(run.settled())
            await run.load.finish()
    except StartupError as error:
        say(f"given up, a process does not start: {error.message}")
    if started is not None:
        tell_oddities(started)
        record.add(started.settled(is_over=True))


def tell_oddities(run: Campaign) -> None:
    """Faults that do not count, and ends that were not clean."""
    for (kind, target), count in run.num_without_effect.items():
        say(f"{kind} {target}: {count} met nobody and are not counted")
    for node in run.cluster.nodes:
        for words in node.unclean:
            say(f"{node.name} did not end cleanly after SIGTERM: {words}")


async def inject(run: Campaign, kind: str, target: str, number: str) -> None:
    """One fault, with a line of progress."""
    span = await run.inject(kind, target)
    if span is None:
        say(f"{number} {kind} {target}: met nobody")
        return
    effect = run.latest()
    back = "never" if effect.back is None else f"{effect.back:.2f} s"
    say(
        f"{number} {kind} {target}: stall {effect.stall:.2f} s, back {back}, "
        f"{effect.num_lost} lost and {effect.num_changed} changed of {effect.num_requests}"
    )


async def soak(options: Options, known: Reference) -> tuple[list[Effect], list[Holding], list[Holding], int]:
    """Random faults for `soak` minutes on one proxied cluster. Effects, holdings before and after, pages at the end.

    The first holdings are taken after a tenth of the time: caches and pools have filled by then.
    """
    needs = Setting(is_proxied=True)
    pairs = [
        (kind, target)
        for kind in options.kinds
        for target in options.targets
        if is_possible(kind, target) and FAULTS[kind].needs in (Setting(), needs) and target in ("expert", "attention")
    ]
    draw = random.Random(options.seed)
    begin = time.monotonic()
    seconds, before = options.soak * 60, None
    async with campaign(plan_for(needs, options.plan), *known, options.concurrency, options.seed) as run:
        await run.calm(options.calm)
        while time.monotonic() - begin < seconds:
            await inject(run, *draw.choice(pairs), f"{time.monotonic() - begin:.0f} s")
            if before is None and time.monotonic() - begin > seconds / 10:
                before = holdings(run.cluster)
        await run.load.finish()
        after = holdings(run.cluster)
        tell_oddities(run)
        return run.effects(), before or after, after, await used_pages(run.client)


async def run(options: Options, console: Console) -> None:
    """Everything that was asked for, and the tables."""
    record = Record(options.resume)
    effects = record.effects
    result: dict[str, object] = {"seed": options.seed, "concurrency": options.concurrency}
    known = await undisturbed(options)
    if options.soak:
        effects, before, after, pages = await soak(options, known)
        console.print(holdings_table(before, after))
        console.print(f"KV pages held when idle: {pages}")
        result |= {
            "before": [dataclasses.asdict(each) for each in before],
            "after": [dataclasses.asdict(each) for each in after],
            "pages": pages,
        }
    else:
        for needs, pairs in options.groups().items():
            if needs.has_cables and not Cables.is_possible():
                say("no network namespaces on this machine: partition is left out")
                continue
            await run_group(options, known, needs, pairs, record)
    found = rows(effects)
    if options.is_markdown:
        print(markdown(found))
    else:
        console.print(table(found))
    for text, count in errors(effects).most_common():
        console.print(f"{count} x {text}", markup=False)
    print(json.dumps({**result, "rows": [dataclasses.asdict(row) for row in found]}))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, help="of each kind and target (default: 50)")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="comma-separated (default: all)")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=1, help="of faults and load (default: 1)")
    parser.add_argument("--concurrency", type=int, default=6, help="streams at a time (default: 6)")
    parser.add_argument("--calm", type=float, default=20.0, help="seconds without faults first (default: 20)")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="faults for so long instead")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="write every effect there, and go on with those that are there: --faults is of all runs together",
    )
    parser.add_argument("--attention", type=int, default=2, help="attention workers (default: 2)")
    parser.add_argument("--stages", type=int, default=1, help="processes that make one of them (default: 1)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each attention worker (default: 1)")
    parser.add_argument("--experts", type=int, default=4, help="expert workers (default: 4)")
    parser.add_argument("--replicas", type=int, default=2, help="workers that hold each expert (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/reliability.md has it")
    given = parser.parse_args()
    kinds, targets = tuple(given.kinds.split(",")), tuple(given.targets.split(","))
    if unknown := [name for name in (*kinds, *targets) if name not in (*FAULTS, *TARGETS)]:
        parser.error(f"unknown: {', '.join(unknown)}")
    plan = ClusterPlan(
        attention=given.attention,
        stages=given.stages,
        experts=given.experts,
        replicas=given.replicas,
        tensor_parallel=given.tensor_parallel,
    )
    options = Options(
        given.faults,
        kinds,
        targets,
        given.seed,
        given.concurrency,
        given.calm,
        given.soak,
        given.markdown,
        given.resume,
        plan,
    )

    async def until_sigterm() -> None:
        work = asyncio.ensure_future(run(options, Console(width=140)))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)  # so that everything is cleared away
        await work

    try:
        asyncio.run(until_sigterm())
    except asyncio.CancelledError:
        sys.exit("stopped by SIGTERM")


if __name__ == "__main__":
    main()
