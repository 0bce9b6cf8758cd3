"""`grokmoe plan`, from settings to a plan."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from grokmoe.errors import ConfigError
from grokmoe.model_config import GROK1, ModelConfig
from loadtest.lengths import parse_lengths
from loadtest.slo import parse_slo
from planner.arrivals import Load
from planner.bounds import Goals, Limits
from planner.costs import ASSUMED, Costs
from planner.costs_file import read_costs, write_costs
from planner.device import Device, Group, parse_groups, read_devices
from planner.fitting import fit
from planner.measured import Observation, read_result, read_steps
from planner.memory import attention_memory
from planner.presets import PRESETS
from planner.search import Found, Wish, search
from planner.settings import GROK1_NAME, INSIDE, PAIRS, PlanSettings
from planner.simulated.failures import draw_failures, parse_failure
from planner.simulated.results import Outcome
from planner.simulated.scenario import Scenario, worker_counts

GBIT = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked, with which costs, and what was found. outcome: of a simulation of every worker."""

    settings: PlanSettings
    wish: Wish
    costs: Costs
    found: Found
    outcome: Outcome | None = None

    @property
    def holds(self) -> bool:
        """Whether the objectives do, of all that was looked at."""
        return self.found.holds and (self.outcome is None or self.outcome.holds)


def make_plan(settings: PlanSettings) -> Plan:
    """Raises ConfigError for what cannot be, also for a model that does not fit."""
    known = PRESETS | (read_devices(settings.devices) if settings.devices else {})
    costs = costs_of(settings, known)
    if settings.save_costs:
        write_costs(settings.save_costs, costs)
    wish = wish_of(settings, known)
    found = search(wish, costs)
    return Plan(settings, wish, costs, found, _simulated(settings, wish, costs, found))


def _simulated(settings: PlanSettings, wish: Wish, costs: Costs, found: Found) -> Outcome | None:
    if not settings.simulate:
        return None
    from planner.simulated.run import simulate  # it needs torch, since the router's dispatch does; a plan does not

    cluster = found.cluster
    failures = [parse_failure(text) for text in settings.failures]
    if settings.mtbf_hours:
        counts = worker_counts(cluster)
        failures += draw_failures(
            counts, settings.mtbf_hours, settings.repair_seconds, settings.simulate, settings.seed
        )
    scenario = Scenario(
        cluster=cluster,
        costs=costs,
        load=dataclasses.replace(wish.load, rate=found.forecast.rate),
        limits=wish.limits,
        goals=wish.goals,
        seconds=settings.simulate,
        seed=settings.seed,
        skew=settings.skew,
        reach=settings.reach,
        failures=tuple(sorted(failures)),
    )
    return simulate(scenario)


def model_of(name: str) -> ModelConfig:
    """Grok-1 by its name, any other by its directory."""
    return GROK1 if name == GROK1_NAME else ModelConfig.from_file(name)


def wish_of(settings: PlanSettings, known: dict[str, Device]) -> Wish:
    """Settings as the search takes them."""
    config = model_of(settings.model)
    experts = parse_groups(settings.experts_on, known)
    attention = parse_groups(settings.attention_on, known)
    if len(attention) > 1:
        raise ConfigError(f"attention_on is {settings.attention_on!r}: must be one kind of device")
    if settings.fused:
        experts, attention = (Group(experts[0].device, 1),), (Group(attention[0].device, 1),)
    memory = attention_memory(config, settings.dtype, attention[0].device, settings.kv_gib or None)
    return Wish(
        config=config,
        dtype=settings.dtype,
        expert_dtype=settings.expert_dtype,
        attention=attention[0],
        experts=experts,
        link=0.0 if settings.fused else settings.network_gbps * GBIT,
        round_trip=settings.round_trip_us * 1e-6 or None,
        kv_gib=memory.kv,
        load=Load(settings.request_rate, parse_lengths(settings.input_len), parse_lengths(settings.output_len)),
        goals=_goals(settings),
        limits=Limits(settings.max_step_tokens, settings.max_running, settings.min_lane_rows),
        copies=settings.copies,
        lanes=settings.lanes,
        routers=settings.routers,
        router_price=0.0 if settings.router == INSIDE else settings.router_price,
        has_router_inside=settings.router == INSIDE,
        rows_by_pairs=settings.rows == PAIRS,
        num_requests=settings.num_requests,
        seed=settings.seed,
    )


def _goals(settings: PlanSettings) -> Goals:
    slo = parse_slo(settings.goodput, settings.slo_share)
    limits = dict(slo.limits)
    if set(limits) - {"ttft", "tpot"}:
        raise ConfigError("goodput: a plan is made for ttft and tpot only")
    return Goals(limits.get("ttft", math.inf), limits.get("tpot", math.inf), slo.share)


def costs_of(settings: PlanSettings, known: dict[str, Device]) -> Costs:
    """Assumed, read, or fitted; a fit knows one kind of device, the other kind stays assumed."""
    if settings.costs:
        return read_costs(settings.costs)
    if not settings.calibrate or settings.calibrate_model is None:
        return ASSUMED
    config = ModelConfig.from_file(settings.calibrate_model)
    device = parse_groups(settings.calibrate_device, known)[0].device
    observations: list[Observation] = []
    for path in settings.calibrate:
        if Path(path).name == "result.json":
            observations.append(read_result(path, config, device, settings.calibrate_experts))
        else:
            observations += read_steps(path, config)
    # Fused and split differ in every leg: threads, hand-overs, messages.
    wanted = [each for each in observations if (each.expert_workers > 0) != settings.fused] or observations
    fitted = fit(wanted, f"fitted to {', '.join(settings.calibrate)}")
    return dataclasses.replace(
        fitted, attention=ASSUMED.attention | fitted.attention, experts=ASSUMED.experts | fitted.experts
    )
