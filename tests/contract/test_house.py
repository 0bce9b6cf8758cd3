"""House rules that a machine can hold: stubs are fresh, docs name what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_generated_stubs_are_fresh() -> None:
    pytest.importorskip("grpc_tools")
    command = [sys.executable, str(ROOT / "tools" / "make_stubs.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs_name_files_that_exist(page: Path) -> None:
    """Paths in backticks, relative to the root or to the folder named before them in the same table cell."""
    named = re.findall(r"`((?:[a-z_]+/)+[A-Za-z0-9_.-]*)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs_name_tests_that_exist(page: Path) -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    missing = [name for name in re.findall(r"`(test_[a-z0-9_]+)`", page.read_text()) if f"def {name}(" not in sources]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs_name_flags_that_exist(page: Path) -> None:
    """Flags in backticks after a dash-dash are fields of a settings class, or of a program in the repository."""
    from attention_worker.config import AttentionWorkerSettings
    from expert_worker.config import ExpertWorkerSettings
    from grokmoe.server import ServerSettings
    from launcher.demo import DemoSettings
    from launcher.gateway import GatewaySettings
    from launcher.generate import GenerateSettings
    from launcher.loadtest import LoadtestSettings
    from launcher.serve import ServeSettings
    from launcher.top import TopSettings
    from launcher.up import UpSettings
    from planner.settings import PlanSettings
    from router.config import RouterSettings

    kinds = (
        AttentionWorkerSettings,
        ExpertWorkerSettings,
        ServerSettings,
        DemoSettings,
        GatewaySettings,
        GenerateSettings,
        LoadtestSettings,
        PlanSettings,
        ServeSettings,
        TopSettings,
        UpSettings,
        RouterSettings,
    )
    known = {field.replace("_", "-") for kind in kinds for field in kind.__dataclass_fields__}
    commands = [ROOT / "launcher" / f"{name}.py" for name in ("loadtest", "experts", "plan")]
    commands += ROOT.glob("launcher/checkpoint/*.py")
    for program in [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tools/*.py"), *commands]:
        known |= set(re.findall(r'add_argument\(\s*"--([a-z-]+)"', program.read_text()))
    named = set(re.findall(r"`[^`\n]*?--([a-z][a-z-]+)", page.read_text()))
    assert named <= known, named - known


def test_every_metric_has_a_name_of_ours() -> None:
    from prometheus_client import CollectorRegistry

    from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, RouterMetrics

    registry = CollectorRegistry()
    for kind in (RouterMetrics, AttentionMetrics, ExpertMetrics):
        kind(registry)
    families = list(registry.collect())
    assert len(families) > 20
    assert all(family.name.startswith("grokmoe_") and family.documentation.endswith(".") for family in families)
