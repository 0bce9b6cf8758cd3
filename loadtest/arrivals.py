"""When requests are sent: seconds from the start of the run, known before it starts, the same for the same seed.

An open loop: the schedule does not know how the server is doing. All functions return `times_N`, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grokmoe.errors import ConfigError

Times = npt.NDArray[np.float64]


def gamma_times(num: int, rate: float, burstiness: float, seed: int) -> Times:
    """Gaps are drawn from a gamma distribution of mean 1 / rate and shape `burstiness`.

    1 is a Poisson process; below it requests come in bursts, above it they come more evenly; the coefficient of
    variation of the gaps is 1 / sqrt(burstiness). rate: requests/s; inf: all at once. The last is due at num / rate.
    """
    if not rate > 0:
        raise ConfigError(f"request_rate is {rate}, must be above 0")
    if not 0 < burstiness < np.inf:
        raise ConfigError(f"burstiness is {burstiness}, must be above 0 and finite")
    if np.isinf(rate):
        return np.zeros(num)
    return _from_gaps(np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num), num / rate)


def constant_times(num: int, rate: float) -> Times:
    """Gaps of 1 / rate."""
    if not rate > 0:
        raise ConfigError(f"request_rate is {rate}, must be above 0")
    return np.arange(num) / rate


def ramp_times(num: int, start: float, end: float, strategy: str, burstiness: float, seed: int) -> Times:
    """The rate goes from `start` to `end` requests/s over the requests, not over time.

    strategy: `linear` adds the same to the rate with each request, `exponential` multiplies it by the same. The gaps
    are those of `gamma_times` at the rate of their request.
    """
    if not 0 <= start < np.inf or not start <= end < np.inf or end <= 0:
        raise ConfigError(f"ramp-up from {start} to {end} requests/s: must ascend, from at least 0")
    progress_N = np.arange(num) / max(1, num - 1)
    if strategy == "exponential":
        if start <= 0:
            raise ConfigError("an exponential ramp-up cannot start at 0 requests/s")
        rates_N = start * (end / start) ** progress_N
    elif strategy == "linear":
        rates_N = start + (end - start) * progress_N
    else:
        raise ConfigError(f"ramp_up_strategy is {strategy!r}, must be linear or exponential")
    # A gap at rate 0 would never end: the first one is that of the rate half a request later.
    rates_N = np.maximum(rates_N, end / (2 * max(1, num - 1)))
    gaps_N = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, num) / rates_N
    return _from_gaps(gaps_N, float((1 / rates_N).sum()))


def trace_times(arrivals: Sequence[float], speed: float = 1.0) -> Times:
    """As they were recorded, the first one at 0. speed: 2 sends in half the time."""
    if not 0 < speed < np.inf:
        raise ConfigError(f"trace_speed is {speed}, must be above 0")
    times_N = np.asarray(arrivals, np.float64)
    if np.any(np.diff(times_N) < 0):
        raise ConfigError("the trace's times do not ascend")
    return (times_N - times_N[0]) / speed if len(times_N) else times_N


def _from_gaps(gaps_N: Times, seconds: float) -> Times:
    """The first request comes after the first gap: at time 0 a process of arrivals is as far as at any other.

    All gaps are stretched alike so that the last request is due after `seconds`: fifty draws have a mean that is easily
    a fifth off, and a short run would be one at another rate than it says.
    """
    times_N: Times = np.cumsum(gaps_N)
    return times_N * (seconds / times_N[-1]) if len(times_N) else times_N
