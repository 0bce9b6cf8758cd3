"""What a process logs, all on standard error: lines for people, or one JSON object a line for programs.

A line may be about something: a request, a trace. What the task under way is about (`note`) is in every line that it
logs, what a single line is about is given with it (`about`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from grokmoe.settings import setting

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

Fields = Mapping[str, Any]

_noted: ContextVar[Fields | None] = ContextVar("grokmoe_noted", default=None)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What is logged, and how."""

    log_level: str = setting("info", "what is logged to standard error", choices=LOG_LEVELS)
    log_format: str = setting("text", "lines for people, or a JSON object a line", choices=LOG_FORMATS)

    def logs(self) -> dict[str, str]:
        """The fields of this class by name, to hand them on to other settings that have them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(LogSettings)}


def note(**fields: Any) -> None:
    """What the task is about from now on, such as request_id. Empty values are nothing."""
    _noted.set({**(_noted.get() or {}), **{name: value for name, value in fields.items() if value}})


def about(**fields: Any) -> dict[str, Fields]:
    """For `extra` of one line: what it is about."""
    return {"about": {name: value for name, value in fields.items() if value}}


def fields_of(record: logging.LogRecord) -> Fields:
    """All that a line is about."""
    return {**(_noted.get() or {}), **getattr(record, "about", {})}


class TextFormatter(logging.Formatter):
    """Such as `2026-01-31 12:00:00,000 W router.cell: worker is lost [request_id=r trace_id=t]`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        fields = " ".join(f"{name}={_plain(value)}" for name, value in fields_of(record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class JsonFormatter(logging.Formatter):
    """Keys: time (RFC 3339, UTC), level, logger, message, service, pid; then what the line is about; exception."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service,
            "pid": os.getpid(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(settings: LogSettings, service: str) -> None:
    """Sends the log to standard error; standard output carries the READY line only.

    service: which part of the system says it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.captureWarnings(settings.log_format == "json")


def say(line: str) -> None:
    """Tells whoever watches standard error how far the start has come, whatever the level of the log. A disk that is
    full must not end the start."""
    if not _is_json():
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)  # noqa: T201
        return
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None)
    logging.getLogger().handle(record)


def complain(name: str, message: str) -> None:
    """The last words of a process that cannot go on."""
    if _is_json():
        logger.critical("%s", message)
    else:
        print(f"{name}: error: {message}", file=sys.stderr)  # noqa: T201


def _is_json() -> bool:
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
