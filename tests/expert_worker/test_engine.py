"""The queue before the device: joining, errors, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from expert_worker.engine import ExpertEngine, ExpertResult
from expert_worker.experts import ExpertSet
from expert_worker.joining import RowsByExpert, join
from grokmoe.device_thread import DeviceThread
from tests.expert_worker.small_model import assert_near, device_thread, draw, load, new_metrics, until, write


@dataclasses.dataclass
class World:
    engine: ExpertEngine
    experts: ExpertSet
    device: DeviceThread
    registry: CollectorRegistry

    def submit(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor
    ) -> asyncio.Future[ExpertResult]:
        """A call as the service makes it."""
        return self.engine.submit(self.experts.check(layer, expert_ids, counts, rows_ND))

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"grokmoe_expert_worker_{name}", labels) or 0.0

    @contextlib.contextmanager
    def busy_device(self) -> Iterator[None]:
        """Holds the device thread until the block ends."""
        release = threading.Event()
        self.device.post(release.wait)
        try:
            yield
        finally:
            release.set()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertSet:
    directory: Path = write(tmp_path_factory.mktemp("model"))
    return load(directory)


@pytest.fixture
def world(experts: ExpertSet) -> Iterator[World]:
    metrics, registry = new_metrics()
    with device_thread() as device:
        yield World(ExpertEngine(experts, metrics, device, max_batch_rows=100), experts, device, registry)


def test_one_call(world: World) -> None:
    async def scenario() -> None:
        rows_ND = draw(5)
        result = await world.submit(0, (1, 4), (2, 3), rows_ND)
        assert torch.equal(result.rows_ND, world.experts.forward(0, [1, 4], [2, 3], rows_ND))
        assert result.batch_rows == 5
        assert result.compute_ns > 0
        assert result.queue_ns >= 0
        await until(lambda: world.sample("rows_total", expert="4") == 3)
        assert world.sample("rows_total", expert="1") == 2
        assert world.sample("batch_calls_count") == world.sample("batch_calls_sum") == 1

    asyncio.run(scenario())


def test_waiting_calls_of_a_layer_become_one(world: World) -> None:
    """Four calls of layer 0, with overlapping, disjoint and empty experts, around one of layer 1."""
    calls: list[tuple[int, Sequence[int], Sequence[int]]] = [
        (0, (1, 4), (2, 3)),
        (0, (0, 4, 7), (1, 0, 6)),
        (1, (4,), (9,)),
        (0, (), ()),
        (0, (4,), (1,)),
    ]

    async def scenario() -> None:
        rows = [draw(sum(counts), seed=seed) for seed, (_, _, counts) in enumerate(calls)]
        with world.busy_device():
            futures = [world.submit(*call, rows_ND) for call, rows_ND in zip(calls, rows, strict=True)]
            assert world.sample("queue") == 5
        results = await asyncio.gather(*futures)
        for call, rows_ND, result in zip(calls, rows, results, strict=True):
            assert_near(result.rows_ND, world.experts.forward(*call, rows_ND))
        assert [result.batch_rows for result in results] == [13, 13, 9, 13, 13]
        await until(lambda: world.sample("batch_rows_count") == 2)
        assert world.sample("batch_rows_sum") == 22
        assert world.sample("batch_calls_sum") == 5
        assert world.sample("queue") == 0

    asyncio.run(scenario())


def test_calls_of_other_weights_are_not_joined(world: World) -> None:
    """Experts came and went in between: each call is computed with what it was checked against."""

    async def scenario() -> None:
        before = world.experts.layers[0]
        rows_ND = draw(3)
        expected_ND = world.experts.forward(0, (1,), (3,), rows_ND)
        try:
            with world.busy_device():
                futures = [world.submit(0, (1,), (3,), rows_ND), world.submit(0, (1,), (3,), rows_ND)]
                world.experts.replace(0, before.resized((1, 2)))
                futures += [world.submit(0, (1,), (3,), rows_ND)]
                world.experts.replace(0, before.resized(()))
            results = await asyncio.gather(*futures)
        finally:
            world.experts.replace(0, before)
        assert [result.batch_rows for result in results] == [6, 6, 3]
        assert all(torch.equal(result.rows_ND, expected_ND) for result in results)

    asyncio.run(scenario())


def test_the_oldest_goes_first_and_a_batch_is_bounded(world: World) -> None:
    async def scenario() -> None:
        done: list[int] = []
        with world.busy_device():
            futures = [world.submit(0, (0,), (size,), draw(size)) for size in (60, 50, 40, 150)]
            for number, future in enumerate(futures):
                future.add_done_callback(lambda _, number=number: done.append(number))
        results = await asyncio.gather(*futures)
        assert [result.batch_rows for result in results] == [100, 50, 100, 150]
        assert done == [0, 2, 1, 3]

    asyncio.run(scenario())


def test_no_rows_in_any_call(world: World) -> None:
    async def scenario() -> None:
        with world.busy_device():
            futures = [world.submit(0, (2,), (0,), draw(0)) for _ in range(2)]
        for result in await asyncio.gather(*futures):
            assert result.rows_ND.shape == draw(0).shape

    asyncio.run(scenario())


def test_an_error_reaches_all_callers_and_the_engine_lives_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        def explode(*_: object) -> torch.Tensor:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(world.experts.layers[0], "forward", explode)
            with world.busy_device():
                futures = [world.submit(0, (0,), (1,), draw(1)) for _ in range(2)]
            for future in futures:
                with pytest.raises(RuntimeError, match="out of memory"):
                    await future
        assert len((await world.submit(0, (0,), (1,), draw(1))).rows_ND) == 1

    asyncio.run(scenario())


def test_a_cancelled_call_is_not_computed(world: World) -> None:
    async def scenario() -> None:
        with world.busy_device():
            first, second = (world.submit(0, (0,), (count,), draw(count)) for count in (3, 4))
            first.cancel()
        assert (await second).batch_rows == 4
        with world.busy_device():
            world.submit(0, (0,), (1,), draw(1)).cancel()
        assert (await world.submit(1, (0,), (2,), draw(2))).batch_rows == 2
        await until(lambda: world.sample("batch_calls_sum") == 2)

    asyncio.run(scenario())


def test_a_loop_that_ended_harms_nobody(world: World) -> None:
    release = threading.Event()
    world.device.post(release.wait)

    async def leave() -> None:
        world.submit(0, (0,), (1,), draw(1))

    async def stay() -> None:
        future = world.submit(0, (0,), (2,), draw(2))
        release.set()
        assert len((await future).rows_ND) == 2

    asyncio.run(leave())
    asyncio.run(stay())


def test_forward_on_the_callers_thread(world: World) -> None:
    rows_ND = draw(4)
    result = world.engine.forward(1, (0, 3), (3, 1), rows_ND)
    assert torch.equal(result.rows_ND, world.experts.forward(1, (0, 3), (3, 1), rows_ND))
    assert world.sample("rows_total", expert="0") == 3


@given(st.lists(st.dictionaries(st.integers(0, 4), st.integers(0, 3), max_size=4), min_size=1, max_size=5))
def test_joining_sorts_by_expert_and_splitting_undoes_it(calls: list[dict[int, int]]) -> None:
    """Rows carry (call, expert, number); sent through unchanged they come back as they were."""
    parts = []
    for number, call in enumerate(calls):
        rows = [[number, expert, i] for expert in sorted(call) for i in range(call[expert])]
        parts.append(RowsByExpert(sorted(call), [call[e] for e in sorted(call)], torch.tensor(rows).view(-1, 3)))
    joined = join(parts)
    ids = [e for e, count in zip(joined.rows.expert_ids, joined.rows.counts, strict=True) for _ in range(count)]
    assert joined.rows.rows_ND[:, 1].tolist() == ids
    assert list(joined.rows.expert_ids) == sorted(set(joined.rows.expert_ids))
    for part, back_ND in zip(parts, joined.split(joined.rows.rows_ND), strict=True):
        assert torch.equal(part.rows_ND, back_ND)
