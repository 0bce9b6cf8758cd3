"""Writes the chart's Grafana dashboards; with --check only says whether those there are fresh."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dashboards.cluster import cluster
from dashboards.experts import experts
from dashboards.router import router
from dashboards.workers import workers
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).resolve().parent / "helm" / "grokmoe" / "files" / "dashboards"

DASHBOARDS = {"cluster": cluster, "router": router, "workers": workers, "experts": experts}


def text_of(dashboard: Dashboard) -> str:
    """As Grafana imports it. One line per panel: the ConfigMap that carries them has bounds."""
    tree = json.loads(JSONEncoder(sort_keys=True).encode(dashboard.build()))
    panels = ",\n  ".join(json.dumps(panel, sort_keys=True) for panel in tree.pop("panels"))
    rest = json.dumps(tree, sort_keys=True, indent=1)
    return f'{rest.removesuffix("}").rstrip()},\n "panels": [\n  {panels}\n ]\n}}\n'


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, complain of what is not fresh")
    is_check = parser.parse_args().check
    wanted = {FOLDER / f"{name}.json": text_of(make()) for name, make in DASHBOARDS.items()}
    there = {path: path.read_text() for path in FOLDER.glob("*.json")}
    if is_check:
        stale = sorted(path.name for path in wanted.keys() | there.keys() if wanted.get(path) != there.get(path))
        if stale:
            print(f"not fresh: {', '.join(stale)}; run python {Path(__file__).name}", file=sys.stderr)
        return bool(stale)
    for path in there.keys() - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
