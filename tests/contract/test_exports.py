"""What `import grokmoe` offers, and what it must not load."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import grokmoe
from grokmoe import errors, results

SERVER_ONLY = ("torch", "numpy", "safetensors", "tokenizers", "triton", "prometheus_client", "rich", "uvloop")


def test_all_is_what_is_there() -> None:
    public = {name for name, value in vars(grokmoe).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(grokmoe.__all__) == public | {"__version__"}
    assert grokmoe.__all__ == sorted(grokmoe.__all__)


@pytest.mark.parametrize("module", [errors, results])
def test_every_error_and_every_result_is_exported(module: object) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public <= set(grokmoe.__all__)


def test_the_version_is_a_string() -> None:
    assert isinstance(grokmoe.__version__, str)


@pytest.mark.parametrize(
    "statement", ["import grokmoe", "from grokmoe import Client", "from grokmoe import AsyncClient"]
)
def test_the_sdk_does_not_load_the_server(statement: str) -> None:
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert loaded & set(SERVER_ONLY) == set()
