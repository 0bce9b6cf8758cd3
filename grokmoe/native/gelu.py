"""Both forms of the GELU in compiled loops, float32. NaN stays NaN, and what is infinite does not become finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from grokmoe.native.elements import clamped, exp2
from grokmoe.native.loop import inner

LOG2_E = np.float32(math.log2(math.e))
TANH_SLOPE = np.float32(2 * math.sqrt(2 / math.pi) * math.log2(math.e))
LOWEST, HIGHEST = np.float32(-126.0), np.float32(126.0)


@inner
def gelu_tanh(x: Any) -> Any:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x times a logistic function."""
    return x / (np.float32(1.0) + exp2(clamped(-TANH_SLOPE * (x + np.float32(0.044715) * x * x * x), LOWEST, HIGHEST)))


@inner
def gelu_erf(x: Any) -> Any:
    """x / 2 (1 + erf(x / sqrt 2)); erfc by Abramowitz and Stegun, formula 7.1.26, whose error is below 1.5e-7."""
    z = abs(x) * np.float32(math.sqrt(0.5))
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
    series = np.float32(1.061405429)
    series = series * t - np.float32(1.453152027)
    series = series * t + np.float32(1.421413741)
    series = series * t - np.float32(0.284496736)
    series = series * t + np.float32(0.254829592)
    tail = np.float32(0.5) * series * t * exp2(clamped(-LOG2_E * z * z, LOWEST, HIGHEST))
    return x * tail if x < np.float32(0.0) else x * (np.float32(1.0) - tail)
