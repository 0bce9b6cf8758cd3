"""Distributions of lengths in tokens, as the command line writes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from grokmoe.errors import ConfigError

MOST = 1 << 20
"""Longest length that is drawn where the distribution has no end of its own."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution over whole numbers from `low` to `high`.

    kind: `fixed` (low == high), `uniform`, or `lognormal` with this `median` and this `sigma` of the logarithm, where
    what falls outside is moved to the nearer bound.
    """

    kind: str
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if self.low < 1 or self.high < self.low:
            raise ConfigError(f"lengths from {self.low} to {self.high}: must ascend from at least 1")
        if self.kind == "lognormal" and (self.median <= 0 or self.sigma < 0):
            raise ConfigError("a lognormal length has a median above 0 and a sigma of at least 0")

    def draw(self, rng: np.random.Generator, num: int) -> npt.NDArray[np.int64]:
        """`num` of them."""
        if self.kind == "lognormal":
            drawn = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(num)))
            return np.clip(drawn, self.low, self.high).astype(np.int64)
        return rng.integers(self.low, self.high + 1, num)


def fixed(length: int) -> Lengths:
    """Always the same."""
    return Lengths("fixed", length, length)


def around(length: int, ratio: float) -> Lengths:
    """Uniform in length * [1 - ratio, 1 + ratio]."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"random_range_ratio is {ratio}, must be in [0, 1)")
    return Lengths("uniform", max(1, round(length * (1 - ratio))), max(1, round(length * (1 + ratio))))


def parse_lengths(text: str) -> Lengths:
    """`128`, `fixed:128`, `uniform:64:256`, `lognormal:MEDIAN:SIGMA` or `lognormal:MEDIAN:SIGMA:LOW:HIGH`."""
    kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
    try:
        match kind, numbers:
            case "fixed", [length]:
                return fixed(int(length))
            case "uniform", [low, high]:
                return Lengths("uniform", int(low), int(high))
            case "lognormal", [median, sigma]:
                return Lengths("lognormal", 1, MOST, float(median), float(sigma))
            case "lognormal", [median, sigma, low, high]:
                return Lengths("lognormal", int(low), int(high), float(median), float(sigma))
    except ValueError as error:
        raise ConfigError(f"length {text!r}: {error}") from error
    raise ConfigError(f"length {text!r} is none of N, fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:LOW:HIGH]")
