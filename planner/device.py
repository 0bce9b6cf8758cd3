"""One card or one host that computes: its roofs, its memory, its price."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grokmoe.errors import ConfigError

GIB = 2**30
KINDS = ("cuda", "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a data sheet, or a measurement, says of it.

    kind: `cuda` or `cpu`: which costs apply. memory: GiB that processes can have. bandwidth: of the memory, bytes/s.
    flops: dense products per second (a multiplication and an addition are two), by type of the weights; a type that is
    not there is not supported. price: per hour. label: what a cluster's nodes are labelled with, empty: nothing.
    cores: of a host; those of its host that a card's process needs. caches: (bytes of a working set, bytes/s at which
    it is read over and over), ascending; of larger ones than the last `bandwidth` holds. cold: by how much longer code
    takes when all that it uses has left the caches; of a host only.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    price: float
    label: str = ""
    cores: int = 4
    caches: tuple[tuple[float, float], ...] = ()
    cold: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"device {self.name}: kind is {self.kind!r}, must be one of {', '.join(KINDS)}")
        for name in ("memory", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"device {self.name}: {name} is {getattr(self, name)}, must be above 0")
        if not self.price >= 0 or not self.flops or not all(value > 0 for value in self.flops.values()):
            raise ConfigError(f"device {self.name}: a price is not negative, and flops are above 0")

    def read_rate(self, working_set: float) -> float:
        """Bytes/s at which so many bytes are gone through over and over; between two that are known, on a straight line
        over their logarithms."""
        if not self.caches or working_set >= self.caches[-1][0]:
            return self.bandwidth
        sizes, rates = zip(*self.caches, strict=True)
        return float(np.interp(math.log(max(working_set, 1.0)), np.log(sizes), rates))

    def slowdown(self, passing: float) -> float:
        """By how much longer code takes when so many bytes pass through the caches between two runs of it.

        They displace it as they displace themselves when they are gone through over and over: of a working set whose
        bytes take the time of the memory's nothing is left, of one that takes the fastest cache's, all.
        """
        if not self.caches:
            return self.cold
        slowest, fastest = 1 / self.bandwidth, 1 / max(rate for _, rate in self.caches)
        share = (1 / self.read_rate(passing) - fastest) / (slowest - fastest) if slowest > fastest else 0.0
        return 1 + (self.cold - 1) * min(1.0, max(0.0, share))

    @property
    def parallel(self) -> int:
        """Cores that share work which is counted in seconds of a core; of a card such work is counted whole."""
        return self.cores if self.kind == "cpu" else 1

    def peak(self, dtype: str) -> float:
        """Products per second with weights of a type. Raises ConfigError when the device has none of it."""
        if dtype not in self.flops:
            raise ConfigError(f"device {self.name} does not compute in {dtype}, only in {', '.join(self.flops)}")
        return self.flops[dtype]


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices alike. count: of them; None: as many as are needed."""

    device: Device
    count: int | None = None


_WORDS = re.compile(r"(?:(\d+)\*)?([A-Za-z][\w.-]*)(?::(.+))?", re.ASCII)
_NUMBERS = ("memory", "bandwidth", "price")


def parse_groups(text: str, known: Mapping[str, Device]) -> tuple[Group, ...]:
    """`h100`, `8*h100`, `2*h200+4*l40s` or, with numbers of one's own, `cpu:memory=512,bandwidth=4e11,flops=3e13`.

    flops given so are for every type that the device computes in. Raises ConfigError.
    """
    groups = []
    for part in text.split("+"):
        match = _WORDS.fullmatch(part.strip())
        if match is None or match[2] not in known:
            raise ConfigError(f"devices {text!r}: {part!r} is no [COUNT*]NAME, NAME one of {', '.join(known)}")
        count = int(match[1]) if match[1] else None
        if count == 0:
            raise ConfigError(f"devices {text!r}: none of {match[2]}")
        groups.append(Group(_changed(known[match[2]], match[3] or "", text), count))
    if len(groups) > 1 and any(group.count is None for group in groups):
        raise ConfigError(f"devices {text!r}: of several kinds each needs a count")
    return tuple(groups)


def _changed(device: Device, changes: str, text: str) -> Device:
    values: dict[str, Any] = {}
    for pair in filter(None, changes.split(",")):
        name, _, number = pair.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise ConfigError(f"devices {text!r}: {pair!r} is not NAME=NUMBER") from None
        if name == "flops":
            values["flops"] = dict.fromkeys(device.flops, value)
        elif name in _NUMBERS:
            values[name] = value
        else:
            raise ConfigError(f"devices {text!r}: {name!r} is none of flops, {', '.join(_NUMBERS)}")
    return dataclasses.replace(device, **values)


def read_devices(path: str | Path) -> dict[str, Device]:
    """A JSON file `{"NAME": {"kind": ..., "memory": ..., ...}}`. Raises ConfigError."""
    try:
        raw = json.loads(Path(path).read_text())
        return {name: _device(name, fields) for name, fields in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"devices {path}: {error}") from error


def _device(name: str, fields: dict[str, Any]) -> Device:
    caches = tuple((float(size), float(rate)) for size, rate in fields.pop("caches", ()))
    return Device(name=name, caches=tuple(sorted(caches)), **fields)
