"""All of a simulated cluster: its cells, its expert workers, and who asks whom."""

from __future__ import annotations

import random

from planner.arrivals import Arrival
from planner.experts_time import expert_work
from planner.forecast import PAGE_SIZE, kv_tokens
from planner.shape import StepShape
from planner.simulated.attention_worker import SimulatedAttentionWorker
from planner.simulated.cell import SimulatedCell
from planner.simulated.clock import Clock
from planner.simulated.expert_worker import SimulatedExpertWorker
from planner.simulated.failures import Failure
from planner.simulated.pool import Pool
from planner.simulated.requests import Tracked, new_sequence
from planner.simulated.routing import Routing
from planner.simulated.scenario import Scenario
from planner.simulated.step_costs import StepCosts, step_costs
from planner.step_time import StepTimer
from router.placement import ExpertLayers, ranges_of
from router.sequence import Sequence
from router.step import Drawn, SchedulerSettings


class World:
    """requests: all that came. cells, experts: by index. tokens: when each came. failures: that have happened."""

    def __init__(self, scenario: Scenario) -> None:
        cluster = scenario.cluster
        self.scenario, self.clock = scenario, Clock()
        self.page_size, self.num_pages = PAGE_SIZE, kv_tokens(StepTimer(cluster, scenario.costs)) // PAGE_SIZE
        self.scheduler_settings = SchedulerSettings(
            context_length=cluster.config.context_length,
            max_step_tokens=scenario.limits.max_step_tokens,
            max_running=scenario.limits.max_running,
            num_lanes=cluster.lanes,
            min_lane_rows=scenario.limits.min_lane_rows,
        )
        config = cluster.config
        self.routing = Routing(
            config.num_layers, config.num_experts, config.experts_per_token, scenario.skew, scenario.seed
        )
        self._load: dict[int, int] = {}
        self.experts = self._make_experts()
        each = cluster.attention_workers // cluster.routers
        self.cells = [SimulatedCell(self, each, self._make_pool(index)) for index in range(cluster.routers)]
        self.requests: dict[Sequence, Tracked] = {}
        self.failures: list[Failure] = []
        self.tokens: list[float] = []
        self.num_open = 0
        self._shapes: dict[StepShape, StepCosts] = {}
        self._random = random.Random(scenario.seed)
        self._homeless: list[Sequence] = []

    def _make_experts(self) -> list[SimulatedExpertWorker]:
        cluster, costs = self.scenario.cluster, self.scenario.costs.experts
        made: list[SimulatedExpertWorker] = []
        for _ in range(cluster.copies):
            for card in cluster.layout.cards:
                cost = costs[card.device.kind]
                work = expert_work(cluster, cost, card)
                made.append(SimulatedExpertWorker(self.clock, len(made), work, cost.per_layer, self._load))
        return made

    def _make_pool(self, index: int) -> Pool:
        """The cell reaches some of the copies, beginning with one of its own, so that all are reached alike."""
        cluster = self.scenario.cluster
        config, layers = cluster.config, cluster.config.num_layers
        per_copy = len(cluster.layout.cards)
        reached = min(cluster.copies, self.scenario.reach or cluster.copies)
        first = index * cluster.copies // cluster.routers
        held: dict[int, tuple[ExpertLayers, ...]] = {}
        for copy in range(first, first + reached):
            for number, card in enumerate(cluster.layout.cards):
                pairs = [(pair % layers, pair // layers) for pair in range(card.first, card.last)]
                held[copy % cluster.copies * per_copy + number] = ranges_of(pairs)
        workers = {number: self.experts[number] for number in held}
        return Pool(layers, config.num_experts, workers, held, self._load, self.scenario.seed + index)

    def costs_of(self, shape: StepShape) -> StepCosts:
        """Of a step, remembered."""
        if shape not in self._shapes:
            self._shapes[shape] = step_costs(self.scenario.cluster, self.scenario.costs, shape)
        return self._shapes[shape]

    def arrive(self, number: int, arrival: Arrival) -> None:
        """A request comes, to the better one of two cells that are drawn."""
        sequence = new_sequence(number, arrival)
        self.requests[sequence] = Tracked(arrival)
        self.num_open += 1
        self._place(sequence)

    def _place(self, sequence: Sequence) -> None:
        usable = [cell for cell in self.cells if cell.is_usable]
        if not usable:
            self._homeless.append(sequence)
            return
        drawn = usable if len(usable) < 3 else self._random.sample(usable, 2)
        min(drawn, key=lambda cell: cell.load).add(sequence)

    def note(self, drawn: Drawn) -> None:
        """A sequence has got a token, or its last."""
        tracked = self.requests[drawn.sequence]
        if drawn.token_id is not None:
            tracked.note_token(self.clock.now)
            self.tokens.append(self.clock.now)
        if drawn.finish_reason is not None:
            tracked.is_over = True
            self.num_open -= 1

    def note_moved(self, sequence: Sequence) -> None:
        """A sequence has lost its attention worker."""
        self.requests[sequence].num_moves += 1

    def lose(self, failure: Failure) -> None:
        """Happens now; who depends on it learns of it after the scenario's time to notice."""
        self.failures.append(failure)
        noticed = self.scenario.noticed_after
        if failure.role == "expert":
            self.experts[failure.index].fail(noticed)
            self.clock.after(noticed, lambda: self._miss(failure.index))
        elif failure.role == "attention" and not self.scenario.cluster.has_router_inside:
            cell, worker = self._attention(failure.index)
            self.clock.after(noticed, lambda: cell.lose_worker(worker))
        else:  # of both in one process the index is the same
            self.clock.after(noticed, lambda: self._move_clients(self.cells[failure.index]))
        if failure.lasts is not None:
            self.clock.after(max(failure.lasts, noticed), lambda: self._bring_back(failure))

    def _attention(self, index: int) -> tuple[SimulatedCell, SimulatedAttentionWorker]:
        each = len(self.cells[0].workers)
        cell = self.cells[index // each]
        return cell, cell.workers[index % each]

    def _miss(self, index: int) -> None:
        self._load.pop(index, None)

    def _move_clients(self, cell: SimulatedCell) -> None:
        for sequence in cell.fail():
            self.note_moved(sequence)
            self._place(sequence)

    def _bring_back(self, failure: Failure) -> None:
        if failure.role == "expert":
            self.experts[failure.index].come_back()
            for cell in self.cells:
                cell.pool.try_again()
        elif failure.role == "attention" and not self.scenario.cluster.has_router_inside:
            cell, worker = self._attention(failure.index)
            cell.worker_is_back(worker)
        else:
            self.cells[failure.index].come_back()
        homeless, self._homeless = self._homeless, []
        for sequence in homeless:
            self._place(sequence)
