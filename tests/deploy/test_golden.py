"""What the chart makes of each profile, and of what no profile has, line by line, so that a change of a template shows
what it changes.

python -m tests.deploy.test_golden        writes the files anew; look at the difference before committing it
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.deploy.rendered import CASES, PROFILES, Object, objects_of, title

FOLDER = Path(__file__).parent / "golden"

SHOWN = (*PROFILES, "stages")
"""The cases that are kept."""


def lines_of(found: Object, prefix: str = "") -> list[str]:
    """An object as lines `path = value`, sorted: short to read, and a difference is on one line."""
    if isinstance(found, dict) and found:
        return [line for key in sorted(found) for line in lines_of(found[key], f"{prefix}.{key}" if prefix else key)]
    if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        return [f"{prefix} = {' '.join(found)}"]
    if isinstance(found, list) and found:
        named = [one.get("name", index) if isinstance(one, dict) else index for index, one in enumerate(found)]
        return [line for key, one in zip(named, found, strict=True) for line in lines_of(one, f"{prefix}[{key}]")]
    return [f"{prefix} = {found!r}"]


SAME_EVERYWHERE = (
    "apiVersion", "kind =", "metadata.name =", "securityContext", "metadata.labels", "resources", "unhealthyPod",
    "topologySpreadConstraints", "automount", "enableServiceLinks", "imagePullPolicy", "timeoutSeconds",
)  # fmt: skip
"""Left out: other tests look at these in every object, and they would be most of the lines."""


def snapshot(name: str) -> str:
    """All objects of a case."""
    parts = []
    for found in sorted(objects_of(CASES[name]), key=title):
        if found["kind"] == "ConfigMap" and "cluster.json" in found.get("data", {}):
            found = {**found, "data": sorted(found["data"])}
        kept = [line for line in lines_of(found) if not any(part in line for part in SAME_EVERYWHERE)]
        parts.append("\n".join([f"# {title(found)}", *kept]))
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("name", SHOWN)
def test_a_profile_renders_as_it_did(name: str) -> None:
    expected = (FOLDER / f"{name}.txt").read_text()
    found = snapshot(name)
    assert found == expected, "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm=""))


def test_there_is_a_snapshot_of_each_profile_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SHOWN)


if __name__ == "__main__":
    for each in SHOWN:
        (FOLDER / f"{each}.txt").write_text(snapshot(each))
