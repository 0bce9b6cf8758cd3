"""Typed access to the keys of a config.json: one clear error for a key that is missing, mistyped or contradictory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError when there is none."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a JSON object, holds {type(raw).__name__}")
    return raw


class KeyReader:
    """Typed access to the keys of a config, with alternatives."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        found = [(name, self._raw[name]) for name in names if self._raw.get(name) is not None]
        if any(value != found[0][1] for _, value in found):
            raise ConfigError("keys disagree: " + ", ".join(f"{name} is {value}" for name, value in found))
        if found:
            return found[0]
        if default is None:
            raise ConfigError(f"key {' or '.join(names)} is missing")
        return names[0], default

    def integer(self, *names: str, default: int | None = None) -> int:
        name, value = self._find(names, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, must be an integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self._raw.get(name) is None else self.integer(name)

    def integers(self, name: str) -> tuple[int, ...]:
        """One integer, a list of them, or none at all."""
        value = self._raw.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
            raise ConfigError(f"{name} is {value!r}, must be an integer or a list of integers")
        return tuple(values)

    def number(self, *names: str, default: float | None = None) -> float:
        name, value = self._find(names, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, must be a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, must be true or false")
        return value
