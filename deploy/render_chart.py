"""Renders every profile of the chart into a folder: `python deploy/render_chart.py FOLDER`.

What `kubectl apply --filename FOLDER/PROFILE` would get, a file per template; no cluster and no helm is needed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import helm_python
import yaml

CHART = Path(__file__).resolve().parent / "helm" / "grokmoe"


def render(folder: Path, release: str, namespace: str) -> list[Path]:
    """Writes `folder`/PROFILE/TEMPLATE, instead of what was there of the profile. Returns the profiles' folders."""
    chart = helm_python.Chart.load(str(CHART))
    made = []
    for profile in sorted((CHART / "profiles").glob("*.yaml")):
        target = folder / profile.stem
        shutil.rmtree(target, ignore_errors=True)
        for name, text in chart.render(yaml.safe_load(profile.read_text()), name=release, namespace=namespace).items():
            if text.strip():
                path = target / Path(name).relative_to("grokmoe/templates")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text.strip() + "\n")
        made.append(target)
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Renders every profile of the chart into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--release", default="grokmoe")
    parser.add_argument("--namespace", default="grokmoe")
    given = parser.parse_args()
    for made in render(given.folder, given.release, given.namespace):
        print(made)


if __name__ == "__main__":
    main()
