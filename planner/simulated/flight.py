"""One step on its way through the layers: attention, router, experts, and back, layer by layer.

    attention's device --wire--> router: gate, dispatch, a message to each worker --wire--> expert workers
          ^                                                                                      |
          +-------------------wire------------------- router: combine <----wire-----------------+

A call that is lost goes to other holders of its experts, as the router's dispatch cuts it up; where there is none, it
waits for one.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.simulated.clock import Clock, Server
from planner.simulated.expert_worker import ExpertCall
from planner.simulated.pool import Pool
from planner.simulated.routing import NO_WEIGHTS, Routing
from planner.simulated.step_costs import StepCosts
from router import dispatch
from router.placement import NOBODY


class Flight:
    """num_retries: calls that were sent again."""

    def __init__(
        self,
        clock: Clock,
        costs: StepCosts,
        device: Server,
        process: Server,
        links: tuple[Server, Server],
        pool: Pool,
        routing: Routing,
        landed: Callable[[], None],
    ) -> None:
        """device: the attention worker's. process, links: the router's, out and in. landed: the step is done."""
        self._clock, self._costs, self._pool, self._routing = clock, costs, pool, routing
        self._device, self._process, self._landed = device, process, landed
        self._out, self._in = links
        self._to_router = (costs.hops - 1) * costs.hop
        self._layer = 0
        self._open = 0
        self._is_cut = False
        self.num_retries = 0

    def begin(self) -> None:
        """Schedule and plan, and off it goes."""
        self._process.serve(self._costs.plan, self._attend)

    def cut(self) -> None:
        """Its attention worker or its router is lost: nothing more comes of it."""
        self._is_cut = True

    def _attend(self) -> None:
        if not self._is_cut:
            self._device.serve(self._costs.attend, lambda: self._clock.after(self._to_router, self._gate))

    def _gate(self) -> None:
        """Who computes which rows; the router's process is busy with it, and with a message to each."""
        if self._is_cut:
            return
        expert_ids_TK = self._routing.draw(self._layer, self._costs.rows)
        chosen = self._pool.choose(self._layer)
        plan = dispatch.plan(expert_ids_TK, NO_WEIGHTS, chosen)
        self._open = len(plan.shards)
        seconds = self._costs.router + (self._costs.hops - 1 + self._open) * self._costs.message
        self._process.serve(seconds, lambda: self._out.serve(self._costs.crossing, lambda: self._send(plan.shards)))

    def _send(self, shards: tuple[dispatch.Shard, ...]) -> None:
        for shard in shards:
            if shard.worker == NOBODY:
                self._wait(self._layer, shard)
            else:
                self._call(self._layer, shard)

    def _call(self, layer: int, shard: dispatch.Shard) -> None:
        worker = self._pool.workers[shard.worker]
        call = ExpertCall(layer, shard, self._answered, self._lost)
        self._clock.after(self._costs.hop, lambda: worker.take(call))

    def _answered(self, call: ExpertCall) -> None:
        self._clock.after(self._costs.hop, self._one_less)

    def _one_less(self) -> None:
        self._open -= 1
        if not self._open and not self._is_cut:
            self._in.serve(self._costs.crossing, lambda: self._clock.after(self._to_router, self._next_layer))

    def _lost(self, call: ExpertCall) -> None:
        self._pool.note_lost(call.shard.worker)
        if not self._is_cut:
            self.num_retries += 1
            self._again(call.layer, call.shard)

    def _again(self, layer: int, shard: dispatch.Shard) -> None:
        chosen = self._pool.choose(layer)
        parts = dispatch.reassign(shard, chosen)
        self._open += len(parts) - 1
        self._process.serve(len(parts) * self._costs.message, lambda: self._send(parts))

    def _wait(self, layer: int, shard: dispatch.Shard) -> None:
        self._pool.when_held(layer, shard.expert_ids, lambda: None if self._is_cut else self._again(layer, shard))

    def _next_layer(self) -> None:
        if self._is_cut:
            return
        self._layer += 1
        if self._layer < self._costs.num_layers:
            self._attend()
        else:
            self._process.serve(self._costs.deliver, self._end)

    def _end(self) -> None:
        if not self._is_cut:
            self._landed()
