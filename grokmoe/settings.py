"""Settings of a process: a frozen dataclass per role becomes command-line flags and environment variables.

A field `max_rows: int = setting(8192, "most rows per call")` is the flag `--max-rows` and the variable
`GROKMOE_MAX_ROWS`; the flag wins over a valid variable. Settings are read from the environment nowhere else.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from grokmoe.errors import ConfigError

ENV_PREFIX = "GROKMOE_"

S = TypeVar("S")


def setting(default: Any, help: str, choices: Sequence[str] = (), metavar: str | None = None) -> Any:
    """A dataclass field with what its flag needs."""
    metadata = {"help": help, "choices": tuple(choices), "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: tuple(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _parser_of(kind: Any) -> Any:
    """The function that turns a flag's text into the field's type."""
    if typing.get_origin(kind) is types.UnionType:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        item = _parser_of(typing.get_args(kind)[0])

        def parse_list(text: str) -> tuple[Any, ...]:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())

        return parse_list
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind
    if kind is bool:

        def parse_bool(text: str) -> bool:
            if text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(f"{text!r} is neither true nor false")
            return text.lower() in ("true", "1")

        return parse_bool
    return kind


def add_flags(parser: argparse._ActionsContainer, kind: type, environ: Mapping[str, str] | None = None) -> None:
    """Adds one flag per field of the dataclass `kind`; the environment supplies defaults."""
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        variable = ENV_PREFIX + field.name.upper()
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        parse = _parser_of(hints[field.name])
        if variable in environ:
            try:
                default = parse(environ[variable])
            except ValueError as error:
                raise ConfigError(f"{variable}: {error}") from error
            choices = field.metadata["choices"]  # argparse holds flags to them, but not defaults
            if choices and default not in choices:
                raise ConfigError(f"{variable}: {default!r} is none of {', '.join(choices)}")
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["help"] + (f" (default: {shown})" if shown not in (None, "") else "")
        options: dict[str, Any] = {"default": default, "help": text.replace("%", "%%"), "dest": field.name}
        flag = "--" + field.name.replace("_", "-")
        if hints[field.name] in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        elif field.metadata["metavar"]:
            options["metavar"] = field.metadata["metavar"]
        if parse.__name__.startswith("parse_"):  # argparse names the type in its messages
            parse.__name__ = parse.__name__.removeprefix("parse_")
        parser.add_argument(flag, type=parse, **options)


def from_namespace(kind: type[S], namespace: argparse.Namespace) -> S:
    """Builds the dataclass from parsed flags."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(namespace).items() if name in names})


def to_flags(settings: Any) -> list[str]:
    """The command line that gives these settings to another process.

    Every field is spelled out, also one at its default: the other process may have another environment than this one.
    """
    flags: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = "--" + field.name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + field.name.replace("_", "-"))
        else:
            # In one argument: a value may begin with a dash.
            flags.append(f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return flags


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's with `changes`."""
    return {**os.environ, **changes}
