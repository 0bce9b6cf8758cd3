"""Where adapters come from: folders that the operator has named, and those of one folder that he has named.

A name that comes by a call is looked up; it never is a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from attention_worker.lora.config import CONFIG_FILE
from grokmoe.adapter import check_adapter_name
from grokmoe.errors import ConfigError, InvalidRequest, NotFound, Reason

MOST_SHOWN = 20
"""Names in a complaint."""


class AdapterSources:
    """named: name -> folder. root: a folder of folders, each the adapter of its name; None: there is none."""

    def __init__(self, named: Mapping[str, Path], root: Path | None) -> None:
        self.named, self._root = dict(named), root

    @classmethod
    def from_flags(cls, named: Sequence[str], root: str) -> AdapterSources:
        """named: NAME=DIR each. Raises ConfigError."""
        found: dict[str, Path] = {}
        for text in named:
            name, equals, directory = text.partition("=")
            if not equals or not directory:
                raise ConfigError(f"lora is {text!r}, must be NAME=DIR")
            try:
                check_adapter_name("lora", name)
            except InvalidRequest as error:
                raise ConfigError(error.message) from error
            if name in found:
                raise ConfigError(f"lora names {name} twice")
            found[name] = Path(directory)
        if root and not Path(root).is_dir():
            raise ConfigError(f"lora_root is {root}: there is no such folder")
        return cls(found, Path(root) if root else None)

    def find(self, name: str) -> Path:
        """The folder of an adapter. Raises InvalidRequest for what is no name, NotFound with the names there are."""
        check_adapter_name("name", name)
        if name in self.named:
            return self.named[name]
        if self._root is not None and (self._root / name / CONFIG_FILE).is_file():
            root, found = self._root.resolve(), (self._root / name).resolve()
            if found.is_relative_to(root):
                return found
        names = self.names()
        shown = ", ".join(names[:MOST_SHOWN]) + (", ..." if len(names) > MOST_SHOWN else "")
        raise NotFound(f"this worker has no adapter {name}; it has: {shown or 'none'}", reason=Reason.NOT_FOUND)

    def names(self) -> list[str]:
        """All that `find` finds, in order."""
        below = [] if self._root is None else [path.parent.name for path in self._root.glob(f"*/{CONFIG_FILE}")]
        return sorted({*self.named, *below})
