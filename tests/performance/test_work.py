"""What a step must read and multiply, and how long that takes at given limits."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.limits import Limits, between
from benchmarks.step.floors import floor_seconds, floors_of
from benchmarks.step.loads import Load
from benchmarks.step.work import StepShape, Work, matrix_elements, work_of
from grokmoe.model_config import BENCH
from router.legs import LEGS

LIMITS = Limits(((1000, 2e9), (10**12, 1e9)), 1e10, ((100, 1e-5), (1000, 1e-4)), ((100, 1e-4), (1000, 1e-3)))
chunks = st.lists(st.tuples(st.integers(0, 4096), st.integers(1, 512)), min_size=1, max_size=8)


def test_the_bench_model_reads_what_it_is_known_to() -> None:
    """0.89 billion parameters; one token alone reads 0.26 billion of them, in bfloat16."""
    assert matrix_elements(BENCH) == pytest.approx(0.8592e9, rel=1e-3)  # and 0.0328e9 of the embedding
    work = work_of(StepShape(BENCH, [(100, 1)]))
    weights = sum(work[leg].num_bytes for leg in ("qkv", "out", "expert", "head"))
    assert weights == pytest.approx(0.510e9, rel=0.01)
    assert work["expert"].num_bytes == 8 * 2 * 3 * 1024 * 4096 * 2


@given(chunks, st.integers(0, 8))
def test_work_is_that_of_legs_and_never_negative(some: list[tuple[int, int]], num_workers: int) -> None:
    work = work_of(StepShape(BENCH, some, 2, num_workers))
    assert set(work) <= set(LEGS)
    assert ("wire" in work) == bool(num_workers)
    assert all(value >= 0 for each in work.values() for value in dataclasses.astuple(each))


@given(st.integers(1, 4000), st.integers(1, 500))
def test_a_prompt_in_two_chunks_attends_to_as_much_as_in_one(first: int, second: int) -> None:
    whole = StepShape(BENCH, [(0, first + second)])
    assert whole.num_attended == StepShape(BENCH, [(0, first), (first, second)]).num_attended


@given(st.integers(1, 2000))
def test_experts_touched_grow_to_all_of_them(num_tokens: int) -> None:
    one_more = StepShape(BENCH, [(0, num_tokens + 1)]).num_touched
    assert StepShape(BENCH, [(0, num_tokens)]).num_touched <= one_more <= BENCH.num_experts
    assert StepShape(BENCH, [(0, 1)]).num_touched == pytest.approx(BENCH.experts_per_token)


def test_a_floor_is_the_longer_of_reading_and_multiplying_and_then_the_hops() -> None:
    assert floor_seconds(Work(num_bytes=1e9, flops=1e9, working_set=1e9), LIMITS) == pytest.approx(1.0)
    assert floor_seconds(Work(num_bytes=1e9, flops=1e11, working_set=1e9), LIMITS) == pytest.approx(10.0)
    assert floor_seconds(Work(num_bytes=1e3, working_set=500), LIMITS) == pytest.approx(0.5e-6)
    assert floor_seconds(Work(num_hops=3, hop_bytes=1000), LIMITS) == pytest.approx(3e-4)


@pytest.mark.parametrize(("x", "y"), [(50, 1e-5), (100, 1e-5), (550, 5.5e-5), (1000, 1e-4), (5000, 5e-4)])
def test_between_measured_sizes_lie_straight_lines(x: float, y: float) -> None:
    assert between(LIMITS.sockets, x) == pytest.approx(y)


def test_a_prefill_is_cut_into_chunks_and_a_decode_is_one_step() -> None:
    steps = Load("prefill", 1, 1300, 1).steps(BENCH, 512, 2, 0)
    assert [list(step.chunks) for step in steps] == [[(0, 512)], [(512, 512)], [(1024, 276)]]
    (step,) = Load("decode", 3, 100, 20).steps(BENCH, 512, 2, 2)
    assert list(step.chunks) == [(110, 1)] * 3


def test_floors_of_several_steps_add_up() -> None:
    step = StepShape(BENCH, [(100, 1)])
    one, two = floors_of([step], LIMITS), floors_of([step, step], LIMITS)
    assert two == pytest.approx({leg: 2 * seconds for leg, seconds in one.items()})
