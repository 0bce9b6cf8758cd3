"""What the sources never do: no pickle, no eval, no shell, no path from a request."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("grokmoe", "router", "attention_worker", "expert_worker", "launcher")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.parent.name != "v1")

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "xmlrpc"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "tempfile.mktemp",
    "importlib.import_module",
    "builtins.eval",
    "builtins.exec",
    "input",
}
ALLOWED = {
    # The person at the terminal, not a request.
    ("launcher/chat.py", "input"),
}
FILE_CALLS = {"open", "Path", "os.open", "pathlib.Path", "shutil.rmtree", "os.remove", "os.replace", "os.unlink"}
ANSWERS_REQUESTS = (
    "router/answer.py",
    "router/call_context.py",
    "router/control.py",
    "router/engine.py",
    "router/service.py",
    "router/text.py",
    "router/status.py",
    "router/validation",
    "router/structured",
    "router/vllm_engine/request.py",
    "router/vllm_engine/response.py",
    "router/vllm_engine/service.py",
    "attention_worker/service.py",
    "attention_worker/engine.py",
    "attention_worker/plan_check.py",
    "expert_worker/service.py",
    "expert_worker/forward_stream.py",
    "expert_worker/loader.py",
    "expert_worker/range_check.py",
    "expert_worker/engine.py",
    "grokmoe/tensors.py",
    "grokmoe/plan_codec.py",
)
"""Files and folders that have a request in hand. What they never do, no request can make them do."""


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls_of(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def problems(path: str, text: str) -> list[str]:
    """What a file does that none should."""
    tree, found = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in FORBIDDEN_MODULES:
                found.append(node.module)
            found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FORBIDDEN_CALLS]
    for call in calls_of(tree):
        name = name_of(call.func)
        if name in FORBIDDEN_CALLS and (path, name) not in ALLOWED:
            found.append(name)
        if any(key.arg == "shell" and getattr(key.value, "value", True) for key in call.keywords):
            found.append(f"{name} with a shell")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_and_no_objects_from_data(path: Path) -> None:
    assert not problems(str(path.relative_to(ROOT)), path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import safe_load",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
    ],
)
def test_the_scan_finds_what_it_looks_for(text: str) -> None:
    assert problems("x.py", text)


def test_what_answers_requests_opens_no_file() -> None:
    paths = [ROOT / name for name in ANSWERS_REQUESTS]
    sources = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    assert len(sources) > len(ANSWERS_REQUESTS)
    found = {
        (str(source.relative_to(ROOT)), name_of(call.func))
        for source in sources
        for call in calls_of(ast.parse(source.read_text()))
        if name_of(call.func) in FILE_CALLS
    }
    assert not found
