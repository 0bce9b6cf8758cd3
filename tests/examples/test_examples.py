"""Every program of examples/ against a real server: it ends well and says what it is for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.command import running

ROOT = Path(__file__).resolve().parents[2]

SAYS: dict[str, tuple[str, ...]] = {
    "stream": (r"^JULIET\.\nO Romeo, Romeo,", r"\d+ \+ \d+ tokens, ended by (stop|length)", r"after \d+ ms"),
    "many_at_once": (r"(?m)^HAMLET: \w", r"(?m)^CORDELIA: ", r"8 texts, \d+ tokens, \d+ tokens/s"),
    "logprobs": (r"(?m)^' be' .*rank \d+; most likely: '.*' \d+%", r"entropy over 2048 tokens: [0-7]\.\d\d nats"),
    "score": (r"perplexity, total log-probability +-\d+\.\d\d: What say you", r"least likely token: '"),
    "structured_json": (
        r"^\{'speaker': '(HAMLET|JULIET|IAGO)', 'mood': '(glad|sad|angry)', 'alive': (True|False)\}\n",
        r"(?m)^(yes|no|perhaps)\n1[56]\d\d$",
    ),
    "candidates": (r"^(( *-\d+\.\d\d) (stop|length): .*\n){4}$",),
    "cancel": (
        r"left after \d tokens",
        r"the deadline passed",
        r"aborted: \('a long speech',\)",
        r"it had made \d+ tokens",
    ),
    "errors": (r"sampling\.top_p: .*INVALID_FIELD", r"the prompt is too long", r"(not now \(UNAVAILABLE\).*\n){3}None"),
    "several_servers": (r"^(\d: '.+'\n){4}$",),
}
"""What the output of each must match."""

NEEDS_MORE = {"locust_user": "a class for Locust, which the project does not install"}
"""Examples that are not run here, and why."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with running("serve", "--port", "0", "--kv-gib", "0.02") as serve:
        yield serve.wait_ready()


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    # The packages may be a checkout that was never installed.
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SAYS.keys() | NEEDS_MORE.keys()


@pytest.mark.parametrize("name", NEEDS_MORE)
def test_the_others_compile(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    compile(source, name, "exec")


@pytest.mark.parametrize("name", SAYS)
def test_an_example_is_short_and_explains_itself(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 45
    told = run(name, "--help")
    assert told.returncode == 0, told.stderr
    assert "--address" in told.stdout
    assert " ".join(source.split('"""')[1].split()) in " ".join(told.stdout.split())


@pytest.mark.cluster
@pytest.mark.parametrize("name", SAYS)
def test_an_example_works(name: str, address: str) -> None:
    told = run(name, "--address", address)
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    for pattern in SAYS[name]:
        assert re.search(pattern, told.stdout), f"{pattern} is not in:\n{told.stdout}"


@pytest.mark.cluster
def test_the_example_of_several_servers_with_two(address: str) -> None:
    with running("serve", "--port", "0", "--kv-gib", "0.02") as other:
        told = run("several_servers", "--address", f"{address},{other.wait_ready()}")
        assert told.returncode == 0, told.stderr
        assert re.search(SAYS["several_servers"][0], told.stdout)
