"""What is fitted to which measurements, and what is predicted from it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.predictions.configurations import MODELS, Topology
from benchmarks.predictions.measurements import Conditions, Latencies, Measured, Steps
from loadtest.arrivals import gamma_times
from planner.arrivals import Arrival
from planner.costs import Costs
from planner.device import Device
from planner.fitting import fit, predict
from planner.forecast import PAGE_SIZE
from planner.measured import MAX_STEP_TOKENS, Observation, machine, shapes_of
from planner.simulation import simulate
from planner.step_time import StepTimer
from router.step import SchedulerSettings

NUM_PAGES = 4096
"""More than these loads need."""


@dataclasses.dataclass(frozen=True)
class Case:
    """is_fitted: which steps. All other ones are predicted, and the traffic of models that nothing was fitted to."""

    name: str
    is_fitted: Callable[[Topology], bool]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One figure, milliseconds."""

    model: str
    topology: str
    load: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of a case: how many steps it was fitted to, and all that it predicts."""

    case: Case
    num_fitted: int
    steps: tuple[Prediction, ...]
    traffic: tuple[Prediction, ...]

    def summary(self, part: str) -> tuple[int, float, float, float]:
        """How many of `steps` or `traffic`; the median, the nine tenths and the largest of their errors' sizes."""
        errors = [abs(each.error) for each in getattr(self, part)] or [0.0]
        median, most, largest = np.percentile(errors, [50, 90, 100]).tolist()
        return len(getattr(self, part)), median, most, largest


def cases() -> list[Case]:
    """Each model from the others, and other numbers of workers and lanes from two workers with one."""
    found = [Case(f"{name} alone", lambda each, name=name: each.model == name) for name in MODELS]  # type: ignore[misc]
    found.append(Case("small and middle", lambda each: each.model != "large"))
    found.append(Case("two workers, one lane", lambda each: each.expert_workers == 2 and each.lanes == 1))
    return found


def run(case: Case, measured: Measured, is_split: bool = True) -> Outcome | None:
    """Of `grokmoe up`, or of the fused process: their threads and hand-overs differ, so they are fitted apart. None:
    there is nothing to fit to."""
    here = [each for each in measured.steps if (each.topology.expert_workers > 0) == is_split]
    # With several lanes a step's legs are not its own alone.
    known = [observed(each) for each in here if case.is_fitted(each.topology) and each.topology.lanes == 1]
    if not known:
        return None
    costs = fit(known, case.name)
    steps = [predicted(each, costs) for each in here if not case.is_fitted(each.topology) or each.topology.lanes > 1]
    models = {each.topology.model for each in here if case.is_fitted(each.topology)}
    traffic = [
        prediction
        for each in measured.latencies
        if is_split and (each.topology.model not in models or models == set(MODELS))
        for prediction in forecast(each, costs)
    ]
    return Outcome(case, len(known), tuple(steps), tuple(traffic))


def observed(each: Steps) -> Observation:
    """As the planner fits to it."""
    load, topology = each.load, each.topology
    lanes = topology.lanes
    return Observation(
        load.name,
        MODELS[topology.model],
        _device(each.conditions),
        topology.expert_workers,
        # With lanes, the scheduler shares the sequences out.
        shapes_of(load.batch // lanes, load.prompt, load.new),
        each.legs,
        each.seconds,
        requests=1 if load.is_prefill else 0,
        lanes=lanes,
        spread=each.spread,
    )


def _device(conditions: Conditions) -> Device:
    return machine(conditions.limits, conditions.cores)


def predicted(each: Steps, costs: Costs) -> Prediction:
    """The time of a step, or of a prompt."""
    seconds = predict(observed(each), costs)["all"]
    return Prediction(each.topology.model, each.topology.name, each.load.name, each.seconds * 1e3, seconds * 1e3)


def forecast(each: Latencies, costs: Costs) -> list[Prediction]:
    """Latencies of requests that come at the times at which they came in the measurement."""
    config, traffic = MODELS[each.topology.model], each.traffic
    empty = Observation("", config, _device(each.conditions), each.topology.expert_workers, (), {}, 0.0)
    timer = StepTimer(empty.cluster, costs)
    settings = SchedulerSettings(context_length=config.context_length, max_step_tokens=MAX_STEP_TOKENS)
    times = gamma_times(traffic.num_requests, traffic.rate, 1.0, traffic.seed)
    arrivals = [Arrival(float(time), traffic.prompt, traffic.output) for time in times]
    found = simulate(arrivals, settings, NUM_PAGES, PAGE_SIZE, lambda shape, here: timer.in_flight(shape, here, here))
    ttfts = [served.ttft + costs.router.per_request for served in found.served if served.ttft is not None]
    tpots = [served.tpot for served in found.served if served.tpot is not None]
    told = {
        "median_ttft_ms": statistics.median(ttfts) * 1e3,
        "p90_ttft_ms": float(np.percentile(ttfts, 90)) * 1e3,
        "median_tpot_ms": statistics.median(tpots) * 1e3,
        "p90_tpot_ms": float(np.percentile(tpots, 90)) * 1e3,
    }
    return [_of_traffic(each, name, told[name]) for name in told]


NAMES = {
    "median_ttft_ms": "TTFT, median",
    "p90_ttft_ms": "TTFT, p90",
    "median_tpot_ms": "TPOT, median",
    "p90_tpot_ms": "TPOT, p90",
}


def _of_traffic(each: Latencies, name: str, value: float) -> Prediction:
    load = f"{each.traffic.rate:g} requests/s: {NAMES[name]}"
    return Prediction(each.topology.model, each.topology.name, load, each.figures[name], value)


def outcomes(measured: Measured, is_split: bool = True) -> Sequence[Outcome]:
    """Of all cases."""
    return [outcome for case in cases() if (outcome := run(case, measured, is_split)) is not None]
