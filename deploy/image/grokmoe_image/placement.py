"""Which experts a pod of a StatefulSet holds: its ordinal chooses an entry of a list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from grokmoe_image.usage import UsageError

EXPERTS_OF = "--experts-of"
"""The flag that names the list. The worker itself does not know it: what it gets is `--experts`."""

ORDINAL = "POD_INDEX"
"""The variable with the ordinal, from the label apps.kubernetes.io/pod-index."""


def with_experts(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The arguments with `--experts-of=FILE` replaced by `--experts=SPEC`. Raises UsageError."""
    prefix = f"{EXPERTS_OF}="
    return [
        f"--experts={experts_of(argument.removeprefix(prefix), environ)}" if argument.startswith(prefix) else argument
        for argument in arguments
    ]


def experts_of(path: str, environ: Mapping[str, str]) -> str:
    """The entry of this pod. path: a JSON list of strings, by ordinal. Raises UsageError."""
    try:
        placement = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{EXPERTS_OF}={path}: {error}") from error
    if not isinstance(placement, list) or not all(isinstance(spec, str) and spec for spec in placement):
        raise UsageError(f"{EXPERTS_OF}={path}: must hold a JSON list of strings, such as {json.dumps(['0-3', '4-7'])}")
    ordinal = environ.get(ORDINAL, "")
    if not ordinal.isascii() or not ordinal.isdecimal():
        raise UsageError(f"{ORDINAL} is {ordinal!r}, must be the pod's ordinal")
    if int(ordinal) >= len(placement):
        raise UsageError(f"{EXPERTS_OF}={path} has {len(placement)} entries, none for ordinal {ordinal}")
    return str(placement[int(ordinal)])
