"""Experts that come and go: any order of loads, unloads and calls, and loads that end early."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import shutil
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from expert_worker import weights
from expert_worker.cells import Cell, Cells, by_layer, cells_of
from expert_worker.experts import ExpertCall, ExpertSet
from expert_worker.kernels import reference
from expert_worker.layer import LayerWeights
from expert_worker.loader import UNLOAD_LINGER, ExpertLoader
from expert_worker.stacked_layers import StackedLayer
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import CheckpointError, FailedPrecondition, Reason, ResourceExhausted, Unavailable
from grokmoe.model_config import TINY
from tests.expert_worker.small_model import CPU, HELD, device_thread, draw, load, until, write

ALL = cells_of(HELD)
CELLS = st.frozensets(st.sampled_from(sorted(ALL)), max_size=6)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    yield _model()
    shutil.rmtree(_model())
    _model.cache_clear()


@functools.cache
def _model() -> Path:
    return write(Path(tempfile.mkdtemp()))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class World:
    """A loader beside its device; nothing of gRPC."""

    experts: ExpertSet
    loader: ExpertLoader
    device: DeviceThread
    checkpoint: Checkpoint
    clock: Clock
    free: int = 1 << 40

    @property
    def resident(self) -> Cells:
        """What has weights."""
        return frozenset((n, expert) for n, layer in enumerate(self.experts.layers) for expert in layer.expert_ids)

    async def pass_time(self, seconds: float = UNLOAD_LINGER) -> None:
        self.clock.now += seconds
        self.loader.unload(frozenset())  # looks at the clock
        await self.settle()

    async def settle(self) -> None:
        """Until nothing is being loaded or freed."""
        holdings = self.experts.holdings
        due = lambda: (holdings.next_expiry() or self.clock.now + 1) <= self.clock.now  # noqa: E731
        await until(lambda: not holdings.loading and not holdings.freeing and not due())


def open_world(held: Iterable[Cell] = (), capacity: int = 0, stacked: bool = False, **options: Any) -> World:
    checkpoint = Checkpoint.open(_model())
    experts = ExpertSet(checkpoint.config, by_layer(held), torch.float32, CPU, capacity=capacity, **options)
    if stacked:
        experts.layers = (StackedLayer(TINY, torch.float32, CPU, reference.expert_mlp),) * TINY.num_layers
    device, clock = DeviceThread("test-device"), Clock()
    device.call(torch.set_num_threads, 1)
    device.call(weights.load, experts, checkpoint)
    loader = ExpertLoader(experts, checkpoint, device, room=lambda _: world.free, clock=clock)
    world = World(experts, loader, device, checkpoint, clock)
    return world


def close_world(world: World) -> None:
    world.loader.close()
    world.device.stop()
    world.checkpoint.close()


@contextlib.asynccontextmanager
async def opened(held: Iterable[Cell] = (), **options: Any) -> AsyncIterator[World]:
    world = open_world(held, **options)
    try:
        async with asyncio.timeout(20):
            yield world
    finally:
        close_world(world)


class Packed(RuleBasedStateMachine):
    """Every answer has the bits of a worker that holds all experts from the start; none fails that was promised."""

    stacked = False

    @initialize(held=CELLS)
    def start(self, held: Cells) -> None:
        self.runner = asyncio.Runner()
        self.runner.get_loop()
        self.world = open_world(held, stacked=self.stacked)
        self.whole = open_world(ALL, stacked=self.stacked)
        self.held, self.lingering = held, frozenset[Cell]()
        self.calls: list[tuple[int, tuple[int, ...], ExpertCall]] = []

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for _, _, call in self.calls:
                self._compute(call)
            close_world(self.world)
            close_world(self.whole)
            self.runner.close()

    @rule(wanted=CELLS)
    def load(self, wanted: Cells) -> None:
        before = self.world.experts.holdings.revision
        loaded = self.runner.run(self.world.loader.load(wanted))
        read = wanted - self.held - self.lingering
        assert loaded.num_bytes == len(read) * self.world.experts.expert_bytes
        assert loaded.revision == before + bool(wanted - self.held)
        self.held |= wanted
        self.lingering -= wanted

    @rule(wanted=CELLS, num_turns=st.integers(0, 6))
    def load_and_leave(self, wanted: Cells, num_turns: int) -> None:
        async def leave() -> None:
            task = asyncio.ensure_future(self.world.loader.load(wanted))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
            await self.world.settle()

        self.runner.run(leave())
        held = self.world.experts.holdings.held
        assert held in (self.held, self.held | wanted), "all of it or nothing"
        self.held, self.lingering = held, self.lingering - held

    @rule(unwanted=CELLS)
    def unload(self, unwanted: Cells) -> None:
        async def give_up() -> int:
            return self.world.loader.unload(unwanted)

        before = self.world.experts.holdings.revision
        assert self.runner.run(give_up()) == before + bool(self.held & unwanted)
        self.lingering |= self.held & unwanted
        self.held -= unwanted

    @rule()
    def time_passes(self) -> None:
        self.runner.run(self.world.pass_time())
        self.lingering = frozenset()

    @rule(wanted=CELLS, layer=st.sampled_from(sorted(HELD)), num_rows=st.integers(0, 3))
    def check(self, wanted: Cells, layer: int, num_rows: int) -> None:
        """A call that may be computed much later."""
        ids = tuple(expert for each, expert in sorted(wanted & (self.held | self.lingering)) if each == layer)
        rows_ND = draw(len(ids) * num_rows, seed=len(self.calls))
        call = self.world.experts.check(layer, ids, [num_rows] * len(ids), rows_ND)
        self.calls.append((layer, ids, call))

    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        if self.calls:
            layer, ids, call = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
            wanted_ND = self.whole.experts.forward(layer, ids, call.rows.counts, call.rows.rows_ND)
            assert torch.equal(self._compute(call), wanted_ND)

    def _compute(self, call: ExpertCall) -> torch.Tensor:
        return call.weights.forward(call.rows.expert_ids, call.rows.counts, call.rows.rows_ND)

    @rule(cell=st.sampled_from(sorted(ALL)))
    def check_what_is_gone(self, cell: Cell) -> None:
        if cell not in self.held | self.lingering:
            with pytest.raises(FailedPrecondition) as raised:
                self.world.experts.check(cell[0], [cell[1]], [1], draw(1))
            assert raised.value.reason is Reason.EXPERT_NOT_HELD

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "world"):
            assert self.world.experts.holdings.held == self.held
            assert self.world.resident == self.held | self.lingering


class Stacked(Packed):
    stacked = True


TestPacked, TestStacked = Packed.TestCase, Stacked.TestCase
for case in (TestPacked, TestStacked):
    case.settings = settings(
        max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


class SlowReads:
    """Reads of a checkpoint that wait for `go_on` from the `after`-th on."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
        self.num_reads, self.go_on = 0, threading.Event()
        original = world.checkpoint.read

        def read(*args: Any) -> torch.Tensor:
            self.num_reads += 1
            if self.num_reads > after:
                assert self.go_on.wait(10)
            return original(*args)

        monkeypatch.setattr(world.checkpoint, "read", read)


def test_two_loads_one_after_the_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened() as world:
            slow = SlowReads(world, monkeypatch)
            first = asyncio.ensure_future(world.loader.load(frozenset({(0, 1), (1, 1)})))
            second = asyncio.ensure_future(world.loader.load(frozenset({(0, 1), (0, 2)})))
            await until(lambda: slow.num_reads == 1)
            assert world.experts.holdings.loading == {(0, 1), (1, 1)}
            slow.go_on.set()
            assert (await first).num_bytes == 2 * world.experts.expert_bytes
            assert (await second).num_bytes == world.experts.expert_bytes, "(0, 1) is there already"
            assert world.experts.holdings.revision == 3

    asyncio.run(scenario())


def test_calls_are_computed_while_a_load_hangs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened([(0, 0)]) as world:
            slow = SlowReads(world, monkeypatch)
            loading = asyncio.ensure_future(world.loader.load(frozenset({(0, 3)})))
            await until(lambda: slow.num_reads == 1)
            rows_ND = draw(2)
            await world.device.run(world.experts.forward, 0, (0,), (2,), rows_ND)
            slow.go_on.set()
            await loading

    asyncio.run(scenario())


@pytest.mark.parametrize("num_reads", [0, 1, 4], ids=["at the first", "in an expert", "between layers"])
@pytest.mark.parametrize("stacked", [False, True], ids=["packed", "stacked"])
def test_a_caller_that_leaves_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, num_reads: int, stacked: bool
) -> None:
    async def scenario() -> None:
        async with opened([(0, 0)], stacked=stacked) as world:
            made: list[weakref.ref[LayerWeights]] = []
            original = type(world.experts.layers[0]).resized

            def resized(self: Any, expert_ids: Any) -> Any:
                layer = original(self, expert_ids)
                made.append(weakref.ref(layer))
                return layer

            monkeypatch.setattr(type(world.experts.layers[0]), "resized", resized)
            slow = SlowReads(world, monkeypatch, after=num_reads)
            loading = asyncio.ensure_future(world.loader.load(frozenset({(0, 1), (1, 1), (1, 2)})))
            waiting = asyncio.ensure_future(world.loader.load(frozenset({(1, 7)})))
            await until(lambda: slow.num_reads == num_reads + 1)
            gc.disable()  # what goes must not need it
            try:
                loading.cancel()
                slow.go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await loading
                await waiting
                await world.settle()
                assert world.experts.holdings.held == world.resident == {(0, 0), (1, 7)}
                assert world.experts.holdings.revision == 2
                alive = {id(layer) for ref in made if (layer := ref())}
                assert alive <= {id(layer) for layer in world.experts.layers}
            finally:
                gc.enable()

    asyncio.run(scenario())


def test_memory_is_free_after_the_last_call_that_uses_it(directory: Path) -> None:
    async def scenario() -> None:
        async with opened([(0, 0), (0, 1)]) as world:
            call = world.experts.check(0, (1,), (2,), draw(2))
            layer = weakref.ref(world.experts.layers[0])
            world.loader.unload(frozenset({(0, 1)}))
            await world.pass_time(UNLOAD_LINGER / 2)
            assert world.resident == {(0, 0), (0, 1)}, "its time is not up"
            await world.pass_time(UNLOAD_LINGER / 2)
            assert world.resident == {(0, 0)}
            assert layer() is not None
            assert call.weights.forward((1,), (2,), draw(2)).shape == draw(2).shape
            del call
            assert layer() is None

    asyncio.run(scenario())


def test_more_than_the_capacity(directory: Path) -> None:
    async def scenario() -> None:
        async with opened([(0, 0), (0, 1)], capacity=3) as world:
            with pytest.raises(ResourceExhausted) as raised:
                await world.loader.load(frozenset({(1, 1), (1, 2)}))
            assert raised.value.reason is Reason.NO_ROOM
            assert "holds 2 (expert, layer) pairs and is to load 2, capacity is 3" in raised.value.message
            await world.loader.load(frozenset({(0, 0), (1, 2)}))
            # What was given up makes room, as soon as it is free.
            world.loader.unload(frozenset({(0, 0), (0, 1)}))
            waiting = asyncio.ensure_future(world.loader.load(frozenset({(1, 3)})))
            gone = asyncio.ensure_future(world.loader.load(frozenset({(1, 4)})))
            await asyncio.sleep(0)
            assert not world.experts.holdings.loading
            gone.cancel()
            await world.pass_time()
            await waiting
            assert world.resident == {(1, 2), (1, 3)}

    asyncio.run(scenario())


def test_a_caller_that_leaves_while_it_waits_for_room(directory: Path) -> None:
    async def scenario() -> None:
        async with opened([(0, 0)], capacity=1) as world:
            world.loader.unload(frozenset({(0, 0)}))
            waiting = asyncio.ensure_future(world.loader.load(frozenset({(1, 3)})))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait((waiting,))
            await world.loader.load(frozenset({(0, 0)}))  # it is not stuck behind the other
            assert world.resident == {(0, 0)}

    asyncio.run(scenario())


def test_no_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the system says so beforehand, nor where an allocation fails in the middle."""

    async def scenario() -> None:
        async with opened([(0, 0)]) as world:
            wanted, size = frozenset({(0, 1), (1, 1)}), world.experts.expert_bytes
            world.free = 3 * size - 1
            with pytest.raises(ResourceExhausted, match=f"{3 * size} bytes are needed") as raised:
                await world.loader.load(wanted)
            assert raised.value.reason is Reason.NO_ROOM
            world.free = 3 * size
            original = weights.load_layer

            def allocate(experts: ExpertSet, checkpoint: Checkpoint, layer: int, *rest: Any) -> None:
                if layer == 1:
                    torch.empty(1 << 60)
                original(experts, checkpoint, layer, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(weights, "load_layer", allocate)
                with pytest.raises(ResourceExhausted) as raised:
                    await world.loader.load(wanted)
            assert raised.value.reason is Reason.NO_ROOM
            await world.settle()
            assert world.resident == {(0, 0)}
            await world.loader.load(wanted)
            assert world.resident == {(0, 0), *wanted}

    asyncio.run(scenario())


def test_a_checkpoint_that_cannot_be_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened([(0, 0)]) as world:

            def fail(*_: object) -> torch.Tensor:
                raise CheckpointError("/models/secret/place: shorter than it was")

            with monkeypatch.context() as patch:
                patch.setattr(world.checkpoint, "read", fail)
                with pytest.raises(FailedPrecondition) as raised:
                    await world.loader.load(frozenset({(1, 1)}))
            assert "/models" not in raised.value.message
            await world.loader.load(frozenset({(1, 1)}))

    asyncio.run(scenario())


def test_draining_ends_a_load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened() as world:
            slow = SlowReads(world, monkeypatch)
            loads = [asyncio.ensure_future(world.loader.load(frozenset({(1, expert)}))) for expert in (1, 2)]
            await until(lambda: slow.num_reads == 1)
            world.loader.drain()
            slow.go_on.set()
            for each in loads:
                with pytest.raises(Unavailable) as raised:
                    await each
                assert raised.value.reason is Reason.SHUTTING_DOWN

    asyncio.run(scenario())


@pytest.mark.parametrize("held", [frozenset(), frozenset({(1, 2)})], ids=["none", "one"])
def test_deterministic_experts_that_come_later(directory: Path, held: Cells) -> None:
    """They compute with the row counts that the device's thread has found, and give the bits of one that was there."""

    async def scenario() -> None:
        async with opened(held, deterministic=True) as world, opened(ALL, deterministic=True) as whole:
            await world.device.run(world.experts.warm_up)
            await world.loader.load(frozenset({(0, 3)}))
            expert = world.experts.layers[0]._experts_E[0]  # type: ignore[attr-defined]
            assert expert.up.row_counts == whole.experts.layers[0]._experts_E[3].up.row_counts  # type: ignore[attr-defined]
            for num_rows in (1, 3, 17, 300):
                rows_ND = draw(num_rows)
                answers = [
                    await each.device.run(each.experts.forward, 0, (3,), (num_rows,), rows_ND)
                    for each in (world, whole)
                ]
                assert torch.equal(*answers)

    asyncio.run(scenario())


def test_warming_an_empty_worker_leaves_it_empty(directory: Path) -> None:
    experts = load(directory, held={})
    with device_thread() as device:
        device.call(experts.warm_up)
    assert not any(layer.expert_ids for layer in experts.layers)
    assert experts.holdings.held == frozenset()
