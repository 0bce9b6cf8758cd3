"""Writes docs/flags.md from the settings themselves; with --check only says whether what is there is fresh."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention_worker.config import AttentionWorkerSettings  # noqa: E402
from expert_worker.config import ExpertWorkerSettings  # noqa: E402
from grokmoe.server import ServerSettings  # noqa: E402
from grokmoe.settings import ENV_PREFIX  # noqa: E402
from launcher.gateway import GatewaySettings  # noqa: E402
from launcher.generate import GenerateSettings  # noqa: E402
from launcher.loadtest import LoadtestSettings  # noqa: E402
from launcher.serve import ServeSettings  # noqa: E402
from launcher.top import TopSettings  # noqa: E402
from launcher.up import UpSettings  # noqa: E402
from planner.settings import PlanSettings  # noqa: E402
from router.config import RouterSettings  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"

HEAD = f"""\
# Flags

Written by `tools/make_flags.py` from the settings themselves; change those. Every flag is an environment variable, too,
such as `{ENV_PREFIX}MAX_RUNNING` for `--max-running`; the flag wins. A switch has its opposite, with no-
before its name. What the chart sets of them, and where the others go: [deploy.md](deploy.md).
"""

SECTIONS: dict[str, tuple[type, str]] = {
    "Every role": (
        ServerSettings,
        "`python -m router`, `attention_worker` and `expert_worker` have these beside their own.",
    ),
    "Router": (RouterSettings, "`python -m router`"),
    "Attention worker": (AttentionWorkerSettings, "`python -m attention_worker`"),
    "Expert worker": (ExpertWorkerSettings, "`python -m expert_worker`"),
    "All roles in one process": (ServeSettings, "`grokmoe serve`"),
    "Every role a process, on one host": (UpSettings, "`grokmoe up`"),
    "Gateway": (
        GatewaySettings,
        "`python -m launcher.gateway`, the OpenAI API in front of routers ([openai.md](openai.md))",
    ),
    "Text on a terminal": (GenerateSettings, "`grokmoe generate`"),
    "The cluster, live": (TopSettings, "`grokmoe top`"),
    "Load": (LoadtestSettings, "`grokmoe loadtest` ([loadtest.md](loadtest.md))"),
    "Planning": (PlanSettings, "`grokmoe plan` ([scaling.md](scaling.md))"),
}
"""Title -> settings, and who takes them."""


def shown(value: Any) -> str:
    """A default for the page; of a path of this checkout only what is below it."""
    if value in (None, "", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{str(value).removeprefix(str(ROOT) + '/')}`"


def kind_of(hint: Any, field: dataclasses.Field[Any]) -> str:
    """What a flag takes."""
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    if field.metadata["metavar"]:
        return str(field.metadata["metavar"])
    kinds = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    names = {bool: "switch", int: "whole number", float: "number", str: "text"}
    return names.get(kinds[0], "list")


def rows(kind: type) -> Iterator[str]:
    """Lines of a table, in the order of the settings."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flag = "--" + field.name.replace("_", "-")
        meaning = field.metadata["help"].replace("|", "\\|")
        yield f"| `{flag}` | {kind_of(hints[field.name], field)} | {shown(default)} | {meaning} |"


def text() -> str:
    """The page."""
    parts: list[str] = [HEAD]
    for title, (kind, who) in SECTIONS.items():
        parts.append(f"\n## {title}\n\n{who}\n\n| flag | takes | default | |\n| --- | --- | --- | --- |\n")
        parts += [f"{row}\n" for row in rows(kind)]
    return "".join(parts)


def main(argv: Iterable[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes docs/flags.md from the settings themselves.")
    parser.add_argument("--check", action="store_true", help="write nothing, complain of what is not fresh")
    wanted = text()
    if parser.parse_args(None if argv is None else list(argv)).check:
        if not PAGE.exists() or PAGE.read_text() != wanted:
            print(f"{PAGE.name} is not fresh: run python tools/{Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
