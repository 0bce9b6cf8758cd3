"""What became of one request. Times are seconds from the start of the run, on the clock of the machine."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError


class Outcome(enum.StrEnum):
    """How it ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    """With an error."""
    CANCELLED = "cancelled"
    """The client left on purpose."""
    INCOMPLETE = "incomplete"
    """It was still running when the time to finish was over."""


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """One request.

    scheduled: when it was to be sent. woken: when the harness turned to it. sent: when the call began; later than
        `woken` only where `max_concurrency` made it wait.
    arrivals, counts: when each message with tokens came, and how many it had.
    end: when the message with the finish reason came, or the error.
    server_queue: seconds in the server's queue, as the server says; None: it did not.
    code, reason: of the error, see docs/errors.md.
    digest: of the token ids; equal digests mean equal tokens.
    """

    index: int
    scheduled: float
    woken: float = 0.0
    sent: float = 0.0
    arrivals: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    end: float = 0.0
    outcome: Outcome = Outcome.INCOMPLETE
    input_len: int = 0
    cached_len: int = 0
    server_queue: float | None = None
    code: str = ""
    reason: str = ""
    message: str = ""
    digest: str = ""

    @property
    def output_len(self) -> int:
        """Tokens received."""
        return sum(self.counts)

    @property
    def lag(self) -> float:
        """How late the harness was: seconds from when the request was due to when it was turned to."""
        return self.woken - self.scheduled


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON object per line, times to the microsecond."""
    with path.open("w") as file:
        for record in records:
            file.write(json.dumps(_rounded(dataclasses.asdict(record))) + "\n")


def read_records(path: Path) -> list[RequestRecord]:
    """ConfigError: not such a file."""
    try:
        lines = path.read_text().splitlines()
        return [_read(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a file of requests: {error!r}") from error


def _read(fields: dict[str, Any]) -> RequestRecord:
    return RequestRecord(**{**fields, "outcome": Outcome(fields["outcome"])})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
