"""What a LoRA adapter is to all roles: a name, what names its content, and its size. Does not import torch."""

from __future__ import annotations

import dataclasses
import re

from grokmoe.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""No separator, no leading dot: a name never leaves the folder that it is looked up in."""


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that a worker has loaded.

    id: names name and content together: another content under the same name has another id.
    rank: the largest of its projections. targets: the projections that it changes, in any layer.
    num_added_tokens: ids that it adds behind the model's vocabulary. num_bytes: of its weights in memory.
    """

    name: str
    id: str
    rank: int
    targets: tuple[str, ...]
    num_added_tokens: int = 0
    num_bytes: int = 0


def check_adapter_name(field: str, name: str) -> None:
    """Raises InvalidRequest for what is no name."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 128 else f"{name[:128]}..."
        raise InvalidRequest(
            field, f"is {shown!r}: a name has 1 to 128 letters, digits, dots, dashes or underscores, no leading dot"
        )
