"""`grokmoe top`: what the cluster does now, for as long as one looks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from grokmoe import Client, ConfigError, ModelInfo, Retryable, Status
from grokmoe.settings import setting
from launcher.connection import ConnectionSettings
from launcher.top_view import draw

SVG_FORMAT = re.sub(r" *@font-face {{.*?}}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""A picture that fetches nothing, fonts neither."""

PICTURE_WIDTH = 132
"""Columns of a picture."""

LEAST_INTERVAL = 0.1
"""Seconds between two looks; more of them would be load, and no more to see."""


@dataclasses.dataclass(frozen=True)
class TopSettings(ConnectionSettings):
    """What `grokmoe top` takes."""

    interval: float = setting(2.0, "seconds between two looks; rates are means over them")
    once: bool = setting(False, "look twice, print once, and end")
    json: bool = setting(False, "the same, as JSON for programs")
    svg: str = setting("", "with --once: write the view to this file, as a picture", metavar="FILE")

    def __post_init__(self) -> None:
        if self.interval < LEAST_INTERVAL:
            raise ConfigError(f"interval is {self.interval}, must be at least {LEAST_INTERVAL}")
        if self.svg and not self.once:
            raise ConfigError("svg: a picture is of one look; say --once")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What has happened between two looks, per second.

    tokens: computed, those of prompts and those generated; each passes every layer once. rows_E: sent to each expert;
    rows_EL: layer by layer, none from a server that does not say. leg_seconds: per step, by leg, longest first.
    """

    steps: float
    tokens: float
    rows_E: Mapping[int, float]
    rows_EL: Mapping[int, tuple[float, ...]]
    leg_seconds: Mapping[str, float]


def rates(model: ModelInfo, before: Status, now: Status, seconds: float) -> Rates:
    """before, now: two looks, `seconds` apart. All 0 if the router was started anew in between: it counts from zero."""
    old_rows = {each.expert: each.rows for each in before.placement}
    old_layers = {each.expert: each.layer_rows for each in before.placement}
    old_legs = {leg.leg: leg for leg in before.legs}
    if now.steps < before.steps:
        return Rates(0.0, 0.0, dict.fromkeys(old_rows, 0.0), {}, {})
    rows = {each.expert: (each.rows - old_rows.get(each.expert, 0)) / seconds for each in now.placement}
    num_steps = now.steps - before.steps
    legs = {
        leg.leg: (leg.total_seconds - old_legs[leg.leg].total_seconds) / num_steps
        for leg in now.legs
        if num_steps and leg.leg in old_legs
    }
    return Rates(
        steps=num_steps / seconds,
        tokens=sum(rows.values()) / (model.num_layers * model.experts_per_token),
        rows_E=rows,
        rows_EL={
            each.expert: tuple(
                (count - old) / seconds
                for count, old in itertools.zip_longest(each.layer_rows, old_layers.get(each.expert, ()), fillvalue=0)
            )
            for each in now.placement
        },
        leg_seconds=dict(sorted(legs.items(), key=lambda item: -item[1])),
    )


def top(settings: TopSettings, console: Console | None = None, sleep: Callable[[float], None] = time.sleep) -> int:
    """Shows the state until Ctrl-C. Returns the exit code. Raises GrokmoeError, if not while the view is live."""
    console = console or Console()
    with Client(settings.address, **settings.client_options()) as client:
        model, before, at = client.model(), client.status(), time.monotonic()
        if settings.once or settings.json:
            sleep(settings.interval)
            now = client.status()
            found = rates(model, before, now, time.monotonic() - at)
            if settings.json:
                print(json.dumps(as_json(model, now, found), indent=1))
            else:
                console.print(draw(model, now, found))
                if settings.svg:
                    save_picture(draw(model, now, found), settings.svg)
            return 0
        idle = rates(model, before, before, 1.0)
        live = Live(draw(model, before, idle), console=console, screen=console.is_terminal, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), live:
            while True:
                sleep(settings.interval)
                try:
                    now, moment = client.status(), time.monotonic()
                except Retryable as error:  # it may come back, and is then worth seeing
                    live.update(Text(f"{client.address}: {error.message}", "bold red"), refresh=True)
                    continue
                live.update(draw(model, now, rates(model, before, now, moment - at)), refresh=True)
                before, at = now, moment
    return 0


def save_picture(view: Group, path: str) -> None:
    """Writes the view as SVG, whatever the terminal. Raises ConfigError when it cannot be written."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH, force_terminal=True, color_system="256")
    console.print(view)
    try:
        Path(path).write_text(console.export_svg(title="grokmoe top", code_format=SVG_FORMAT))
    except OSError as error:
        raise ConfigError(f"svg {path}: {error.strerror}") from error


def as_json(model: ModelInfo, now: Status, found: Rates) -> dict[str, object]:
    """The view for programs. Rates are per second, legs seconds per step."""
    return {
        "model": model.name,
        "running": now.running,
        "waiting": now.waiting,
        "preemptions": now.preemptions,
        "placement_version": now.placement_version,
        "imbalance": now.imbalance,
        **dataclasses.asdict(found),
        "workers": [
            {
                "role": worker.role.value,
                "index": worker.index,
                "address": worker.address,
                "state": worker.state.value,
                "num_pages": worker.num_pages,
                "used_pages": worker.used_pages,
                "rows_per_second": worker.rows_per_second,
                "experts": list(worker.experts),
                "stages": [dataclasses.asdict(stage) for stage in worker.stages],
            }
            for worker in now.workers
        ],
    }
