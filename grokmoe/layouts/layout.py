"""What a layout says of a checkpoint on disk, before anything is compared with a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grokmoe.checkpoint_part import Needs
from grokmoe.layouts.source import Source
from grokmoe.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint's files.

    sources: by canonical name; one that is not the model's has the name it was found under.
    names: of all tensors that the checkpoint says it has, here or not.
    files: that were looked at. title: the layout for people.
    """

    sources: Mapping[str, Source]
    names: frozenset[str]
    files: tuple[Path, ...]
    title: str


class Layout(Protocol):
    """A layout found in a directory."""

    def config(self) -> Mapping[str, Any] | None:
        """The keys of a config.json, for a checkpoint that has none; None if that cannot be."""
        ...

    def contents(self, config: ModelConfig, needs: Needs) -> Contents:
        """Reads headers. Files without a tensor that is needed may be missing. Raises CheckpointError."""
        ...
