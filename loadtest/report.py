"""report.html, one file without anything outside it, and report.md."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Sequence
from typing import Any

from loadtest import plots, tables
from loadtest.explain import FORMULAS
from loadtest.record import RequestRecord
from loadtest.tables import Table
from loadtest.window import Window

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2330; --faint: #5c6675; --line: #dde2e9; --panel: #f5f7fa;
  --good: #1a7f4b; --bad: #b3261e; --c0: #2563c9; --c1: #d1495b; --c2: #16855b; --c3: #8a8f98; --c4: #a05a00;
  --c5: #7b3fb5; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161d; --text: #e3e8ef; --faint: #9aa5b4; --line: #2b323d;
  --panel: #1a2029; --good: #55c78d; --bad: #ff8a80; --c0: #6ea8fe; --c1: #ff8093; --c2: #4fc994; --c3: #8f99a8;
  --c4: #e0a352; --c5: #c39bf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1360px; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p.about { color: var(--faint); margin: 0 0 1rem; }
.verdict p { margin: .3rem 0; padding: .5rem .8rem; background: var(--panel); border-left: 4px solid var(--good);
  border-radius: 3px; }
.verdict p.bad { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .8rem; margin: 1rem 0; }
.tile { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.2rem; }
figure { margin: 0; background: var(--panel); border-radius: 6px; padding: .8rem; }
figure { overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; min-width: 440px; height: auto; display: block; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; } svg text.label { fill: var(--text); }
.grid { stroke: var(--line); } .span { fill: var(--c0); fill-opacity: .07; } .mark { stroke: var(--bad); }
svg text.marked { fill: var(--bad); } .cell { fill: var(--c0); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.dots { fill: none; stroke-width: 4.5; stroke-linecap: round; stroke-opacity: .55; }
.dashed { stroke-dasharray: 6 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } circle { fill: var(--panel); stroke-width: 2; }
.legend { margin: .2rem 0 0; color: var(--faint); min-height: 1.5em; } .key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; margin-right: .4rem;
  vertical-align: middle; } .key i.dashed { border-top-style: dashed; }
.key i.dots { width: 0; border: 4px solid; border-radius: 4px; margin-left: .3rem; }
.k0 { color: var(--c0); } .k1 { color: var(--c1); } .k2 { color: var(--c2); } .k3 { color: var(--c3); }
.k4 { color: var(--c4); } .k5 { color: var(--c5); }
.key i.ramp { width: 80px; height: 10px; border: 0; background: linear-gradient(90deg, transparent, var(--c0)); }
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: flex-start; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--faint); font-weight: 500; }
td small { display: block; color: var(--faint); }
details { margin: .6rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; background: var(--panel);
  padding: .8rem; border-radius: 6px; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
"""


def title(result: dict[str, Any]) -> str:
    """Of the run."""
    return f"grokmoe loadtest{': ' + result['label'] if result['label'] else ''}"


def about(result: dict[str, Any]) -> str:
    """What was loaded, and how."""
    server = result["server"]
    rate = f"{result['request_rate']:.4g} requests/s" if result["request_rate"] != "inf" else "as fast as it goes"
    bound = f", at most {result['max_concurrency']} under way" if result["max_concurrency"] else ""
    inputs = result["settings"]["dataset_name"]
    return (
        f"{server['name']} ({server['dtype']}) at {server['address']}, {_date(result['date'])}: "
        f"{result['num_prompts']} requests, {rate}{bound}, inputs {inputs}, seed {result['settings']['seed']}"
    )


def _date(text: str) -> str:
    """As one reads it."""
    return datetime.datetime.strptime(text, "%Y%m%d-%H%M%S").isoformat(" ")


def to_html(result: dict[str, Any], records: Sequence[RequestRecord]) -> str:
    """The page. `json.loads` of the text in its last <pre> is the result without its long lists."""
    window = Window.of(result)
    sections = [
        ("Sweep", plots.sweep(result)),
        ("Over time", plots.over_time(result, records)),
        ("Distributions", plots.distributions(records, window)),
        ("Server", plots.server(result)),
    ]
    lines = tables.verdict(result)
    verdict = "".join(f'<p class="{"bad" if _is_bad(line) else ""}">{html.escape(line)}</p>' for line in lines)
    body = [
        f"<h1>{html.escape(title(result))}</h1><p class=about>{html.escape(about(result))}</p>",
        f"<div class=verdict>{verdict}</div>",
        f"<div class=tiles>{''.join(_tiles(result))}</div>",
        f"<div class=tables>{''.join(map(_table, tables.all_tables(result)))}</div>",
    ]
    for name, charts in sections:
        if drawn := [each for each in charts if each]:
            body.append(f"<h2>{name}</h2><div class=charts>{''.join(drawn)}</div>")
    if server := tables.server_tables(result):
        shown = "".join(map(_table, server))
        body.append(f"<details><summary>the server's metrics in the window</summary>{shown}</details>")
    formulas = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in FORMULAS)
    body.append(f"<details><summary>what the figures mean</summary><dl>{formulas}</dl></details>")
    raw = html.escape(json.dumps(_short(result), indent=1))
    body.append(f"<details><summary>settings, machine and all figures</summary><pre>{raw}</pre></details>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title(result))}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _is_bad(line: str) -> bool:
    return line.startswith("INVALID") or "do not hold" in line or "at no rate" in line


def _tiles(result: dict[str, Any]) -> list[str]:
    shown = [
        ("good requests/s", f"{result['request_goodput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        *(
            (f"{name.upper()} {label}", f"{tables.milliseconds(result[f'{key}_{name}_ms'])} ms")
            for name in ("ttft", "tpot")
            for key, label in (("median", "median"), ("p99", "p99"))
            if f"{key}_{name}_ms" in result
        ),
        ("failed", str(result["failed"])),
    ]
    return [
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in shown
    ]


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(each)}</td>" for each in row) + "</tr>" for row in table.rows)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<div class=scroll><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cell(text: str) -> str:
    """An interval in brackets goes below its value: beside it, a row would not fit a screen."""
    value, bracket, rest = html.escape(text).partition(" (")
    return f"{value}<small>({rest}</small>" if bracket and " - " in rest else html.escape(text)


LONG = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors")


def _short(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in (*LONG, "server_metrics")}


def to_markdown(result: dict[str, Any]) -> str:
    """The same without pictures."""
    parts = [f"# {title(result)}", about(result), "\n".join(f"* {line}" for line in tables.verdict(result))]
    for table in tables.all_tables(result):
        parts += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Numbers to the right."""
    lines = [table.header, ("---", *("---:" for _ in table.header[1:])), *table.rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines)
