"""Writes docs/reference.md from the docstrings of the SDK; with --check only says whether what is there is fresh."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grokmoe  # noqa: E402
from grokmoe import credentials, options  # noqa: E402

PAGE = ROOT / "docs" / "reference.md"

HEAD = """\
# Reference of the SDK

Written by `tools/make_reference.py` from the docstrings; change those. `from grokmoe import ...` has every name here.
Programs that use them are in `examples/`, reasons of errors in [errors.md](errors.md).
"""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Clients": ("Client", "Stream", "AsyncClient", "AsyncStream", "TlsConfig"),
    "Options": ("ClientOptions", "GenerateOptions", "ScoreOptions", "TokenizeOptions", "Embeds"),
    "Results": (
        "Completion",
        "Candidate",
        "Delta",
        "TokenLogprob",
        "TopLogprobs",
        "FinishReason",
        "Usage",
        "Timing",
        "ScoreResult",
        "Tokens",
        "ModelInfo",
        "Status",
        "Worker",
        "PipelineStage",
        "WorkerRole",
        "WorkerState",
        "ExpertPlacement",
        "ExpertRange",
        "ExpertMove",
        "MoveCost",
        "Rebalance",
        "LegLatency",
    ),
    "Errors": (
        "GrokmoeError",
        "InvalidRequest",
        "NotFound",
        "AlreadyExists",
        "Retryable",
        "ResourceExhausted",
        "Unavailable",
        "Unauthenticated",
        "PermissionDenied",
        "FailedPrecondition",
        "DeadlineExceeded",
        "Cancelled",
        "InternalError",
        "StartupError",
        "ConfigError",
        "CheckpointError",
        "Code",
        "Reason",
    ),
}
"""Every public name, in the order of reading."""

CONSTRUCTED = ("Client", "AsyncClient", "TlsConfig")
"""Classes that a caller makes; the others come back from a call."""

TYPES = {"Prompt": options, "Token": credentials, "Metadata": credentials, "Pem": credentials}
"""Names in signatures, and the module that explains them below their definition."""


def page() -> str:
    """The whole page. AssertionError: a public name has no place in it."""
    listed = {name for names in SECTIONS.values() for name in names}
    assert listed == set(grokmoe.__all__) - {"__version__"}, listed ^ (set(grokmoe.__all__) - {"__version__"})
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += ["\n".join(_entry(name, getattr(grokmoe, name))) for name in names]
    parts.append("\n".join(_types()))
    return "\n".join(parts)


def _types() -> Iterator[str]:
    yield "## Types in signatures\n"
    yield "| name | meaning |\n| --- | --- |"
    for name, module in TYPES.items():
        comments = _comments(ast.parse(inspect.getsource(module)).body)
        yield f"| `{name}` | {_flat(comments[name])} |"
    yield ""


def _entry(name: str, kind: type) -> Iterator[str]:
    yield f"### {name}\n"
    if issubclass(kind, Exception):
        yield f"{_error_line(kind)}\n"
        yield f"{_text(kind)}\n"
        return
    if name in CONSTRUCTED:
        yield f"```python\n{name}{_parameters(kind.__init__)}\n```\n"
    yield f"{_text(kind)}\n"
    if typing.is_typeddict(kind):
        yield from _options(kind)
    elif issubclass(kind, enum.Enum):
        yield from _members(kind)
    elif dataclasses.is_dataclass(kind):
        yield from _fields(kind)
    yield from _methods(kind)


def _error_line(kind: type) -> str:
    parents = [base.__name__ for base in kind.__mro__[1:] if base.__module__ == kind.__module__]
    line = f"`{' < '.join([kind.__name__, *parents])}`" if parents else "The root of all."
    leaf = not kind.__subclasses__() and not issubclass(kind, grokmoe.StartupError)
    return f"{line}, {kind.code.name}" if leaf else line


def _options(kind: Any) -> Iterator[str]:
    """One row per option, inherited ones last. At run time nobody knows whom they were inherited from."""
    comments = _attribute_comments(kind) | _attribute_comments(grokmoe.TokenizeOptions)
    yield "| option | type | meaning |\n| --- | --- | --- |"
    for name, comment in comments.items():
        if name in kind.__annotations__:
            yield f"| `{name}` | `{_escape(_type(kind.__annotations__[name]))}` | {_flat(comment)} |"
    yield ""


def _members(kind: Any) -> Iterator[str]:
    comments = _attribute_comments(kind)
    yield "| member | value | |\n| --- | --- | --- |"
    for member in kind:
        yield f"| `{member.name}` | `{member.value}` | {_flat(comments.get(member.name, ''))} |"
    yield ""


def _fields(kind: Any) -> Iterator[str]:
    yield "| field | type |\n| --- | --- |"
    for field in dataclasses.fields(kind):
        yield f"| `{field.name}` | `{_escape(_type(field.type))}` |"
    yield ""


def _methods(kind: type) -> Iterator[str]:
    """Own public methods and properties, in the order of the source."""
    if issubclass(kind, enum.Enum) or typing.is_typeddict(kind):
        return
    comments = _attribute_comments(kind)
    variable = re.findall(r"[A-Z][a-z]+", kind.__name__)[-1].lower() if kind.__name__ != "TopLogprobs" else "top"
    for name, value in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"**`.{name}`** {_flat(inspect.getdoc(value) or '')}\n"
        elif inspect.isfunction(value):
            prefix = "await " if inspect.iscoroutinefunction(value) else ""
            yield f"```python\n{prefix}{variable}.{name}{_parameters(value)}\n```\n"
            yield f"{_text(value)}\n"
    for name in comments:
        if name.startswith("self."):
            yield f"**`{name.removeprefix('self')}`** {_flat(comments[name])}\n"


def _parameters(function: Any) -> str:
    """A signature without self, one argument a line if it is long."""
    signature = inspect.signature(function)
    parts = []
    for name, parameter in signature.parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        text = ("**" if parameter.kind is parameter.VAR_KEYWORD else "") + name
        if parameter.annotation is not parameter.empty:
            text += f": {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        parts.append(text)
    returned = signature.return_annotation
    arrow = "" if returned in (signature.empty, "None", None) else f" -> {_type(returned)}"
    line = f"({', '.join(parts)}){arrow}"
    if len(line) <= 90:
        return line
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else annotation.__forward_arg__
    return re.sub(r"Unpack\[(\w+)\]", r"\1", text)


def _attribute_comments(kind: Any) -> dict[str, str]:
    """The text below each attribute of a class, and below `self.x = ...` in its __init__ as `self.x`."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = _comments(tree.body)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            found |= _comments(node.body)
    return found


def _comments(body: list[ast.stmt]) -> dict[str, str]:
    """The text below each assignment to a public name."""
    found: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_text:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if not name.removeprefix("self.").startswith("_"):
                found[name] = inspect.cleandoc(after.value.value)
    return found


def _text(thing: Any) -> str:
    """A docstring; lines such as `timeout: seconds.` below the first become a list."""
    first, line_end, rest = (inspect.getdoc(thing) or "").partition("\n")
    return first + line_end + re.sub(r"(?m)^([a-z_]+(?:, [a-z_]+)*): ", r"* `\1`: ", rest)


def _flat(text: str) -> str:
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/reference.md is stale, run tools/make_reference.py")


if __name__ == "__main__":
    main()
