"""Effects in a file, one JSON object a line, so that a table can be made in several runs."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.chaos.campaign import Effect


class Record:
    """The effects of this run and of those before it. path: None for this run's only, in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.effects = [_effect(line) for line in lines]

    def add(self, effects: Iterable[Effect]) -> None:
        """What is not written when the process is killed is as if it had not been done."""
        for effect in effects:
            self.effects.append(effect)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(effect)) + "\n")

    def counts(self) -> collections.Counter[tuple[str, str]]:
        """Faults of each kind and target."""
        return collections.Counter((effect.kind, effect.target) for effect in self.effects)


def _effect(line: str) -> Effect:
    fields = json.loads(line)
    return Effect(**{**fields, "errors": tuple(fields["errors"])})
