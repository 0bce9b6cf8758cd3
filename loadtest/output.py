"""The folder of a result: result.json, requests.jsonl, report.html, report.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError
from loadtest.record import RequestRecord, read_records, write_records
from loadtest.report import to_html, to_markdown
from loadtest.result import SCHEMA_VERSION

RESULT, REQUESTS = "result.json", "requests.jsonl"


def prepare(directory: Path) -> None:
    """Before the load is sent, not after: ConfigError if nothing could be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESULT).touch()
    except OSError as error:
        raise ConfigError(f"output_dir {directory}: {error}") from error


def write(directory: Path, result: dict[str, Any], records: Sequence[RequestRecord]) -> None:
    """All four files."""
    (directory / RESULT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_records(directory / REQUESTS, records)
    (directory / "report.html").write_text(to_html(result, records))
    (directory / "report.md").write_text(to_markdown(result))


def read(directory: Path) -> tuple[dict[str, Any], list[RequestRecord]]:
    """ConfigError: no such folder, or another version's."""
    try:
        result = json.loads((directory / RESULT).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: {error}") from error
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"{directory}: schema_version is not {SCHEMA_VERSION}")
    return result, read_records(directory / REQUESTS)
