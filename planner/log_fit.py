"""Positive figures from measurements: least squares over logarithms, held by what one would have assumed.

Every figure is positive and known beforehand to some factor, so both errors and figures are compared by their
logarithms: being wrong by a half is as bad as being wrong by twice. What the measurements do not say stays as assumed.
Levenberg and Marquardt's method; derivatives by differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ERROR = 0.1
"""What a formula is expected to miss a measurement by."""

MOST_STEPS = 200
SMALL = 1e-4
"""Difference of a logarithm for its derivative."""


def fit_logs(
    model: Callable[[dict[str, float]], Floats],
    target: Floats,
    prior: Mapping[str, float],
    factors: Mapping[str, float],
    spreads: Floats,
) -> dict[str, float]:
    """The figures with which `model` is nearest to `target`. Targets of 0 do not count.

    prior: what is assumed, above 0. factors: by how much each may well be something else: 2 is half or twice.
    spreads: longest over shortest run of each measurement: one that scatters counts less.
    """
    names, counted = list(prior), target > 0
    centre = np.log([prior[name] for name in names])
    errors = np.hypot(ERROR, np.log(spreads[counted]) / 2)
    width = np.log([factors[name] for name in names])

    def residuals(theta: Floats) -> Floats:
        found = model(dict(zip(names, np.exp(theta).tolist(), strict=True)))
        return np.concatenate([np.log(found[counted] / target[counted]) / errors, (theta - centre) / width])

    theta, damping = centre.copy(), 1e-2
    rest = residuals(theta)
    for _ in range(MOST_STEPS):
        steps = np.eye(len(theta)) * SMALL
        slopes = np.stack([(residuals(theta + step) - rest) / SMALL for step in steps], axis=1)
        square, pull = slopes.T @ slopes, slopes.T @ rest
        moved = theta - np.linalg.solve(square + damping * np.diag(np.diag(square)), pull)
        tried = residuals(moved)
        gain = float(rest @ rest - tried @ tried)
        if gain > 0:
            theta, rest, damping = moved, tried, max(damping / 3, 1e-9)
            if gain < 1e-9 * float(rest @ rest):
                break
        elif damping > 1e9:
            break
        else:
            damping *= 4
    return dict(zip(names, np.exp(theta).tolist(), strict=True))
