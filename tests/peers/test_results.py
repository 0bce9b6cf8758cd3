"""Medians, spreads, ratios and goals of a race."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.peers.goals import FUSED, LLAMA, LLAMA_Q8, PARTS, TORCH, VLLM, Goal, goals, judge, split
from benchmarks.peers.report import RATIO, cell, goal_lines, lines, markdown, number
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.workload import Metric, Workload, decode, first_token, gap_beside, prefill, served


def results(values: dict[tuple[str, Metric], list[float | None]]) -> Results:
    """(row, metric) -> its value in each round; None: it failed there."""
    return Results(
        Sample(number, row, metric.name, value)
        for (row, metric), listed in values.items()
        for number, value in enumerate(listed)
        if value is not None
    )


RACE = results(
    {
        (LLAMA, prefill(512)): [400, 430, 410],
        (LLAMA_Q8, prefill(512)): [285, 280, 290],
        (VLLM, prefill(512)): [500, 400, None],
        (FUSED, prefill(512)): [1200, 1000, 1230],
        (LLAMA, first_token(32)): [4500, 4900, 4600],
        (FUSED, first_token(32)): [1400, 1500, 1700],
        (FUSED, gap_beside(32, 2048)): [290, 310, 250],
    }
)


def test_median_and_spread() -> None:
    assert RACE.median(LLAMA, prefill(512)) == 410
    assert RACE.spread(LLAMA, prefill(512)) == pytest.approx(15 / 410)
    assert RACE.median(VLLM, prefill(512)) == 450
    assert RACE.median(LLAMA, prefill(2048)) is None
    assert RACE.spread(FUSED, decode(1)) is None
    assert results({(FUSED, decode(1)): [70]}).spread(FUSED, decode(1)) is None


def test_the_best_is_the_highest_rate_and_the_shortest_time() -> None:
    assert RACE.best((LLAMA, LLAMA_Q8, VLLM), prefill(512)) == VLLM
    assert RACE.best((LLAMA, LLAMA_Q8), prefill(512)) == LLAMA
    assert RACE.best((LLAMA, FUSED), first_token(32)) == FUSED
    assert RACE.best((VLLM,), first_token(32)) is None


def test_a_ratio_is_of_values_of_the_same_round() -> None:
    assert RACE.ratios(FUSED, VLLM, prefill(512)) == [2.4, 2.5]
    assert RACE.ratios(FUSED, LLAMA, decode(8)) == []


def test_the_later_sample_of_a_round_counts() -> None:
    RACE_AGAIN = Results([*RACE.samples, Sample(0, LLAMA, prefill(512).name, 100.0)])
    assert RACE_AGAIN.values(LLAMA, prefill(512)) == {0: 100, 1: 430, 2: 410}


@pytest.mark.parametrize(
    ("goal", "other", "value", "is_met"),
    [
        (Goal(prefill(512), FUSED, 2.4, (LLAMA, LLAMA_Q8, VLLM)), VLLM, 2.45, True),
        (Goal(prefill(512), FUSED, 2.46, (LLAMA, VLLM)), VLLM, 2.45, False),
        (Goal(prefill(512), FUSED, 3.0, (LLAMA,)), LLAMA, 3.0, True),
        (Goal(first_token(32), FUSED, 1 / 3, (LLAMA,)), LLAMA, 1400 / 4500, True),
        (Goal(first_token(32), FUSED, 0.3, (LLAMA,)), LLAMA, 1400 / 4500, False),
        (Goal(gap_beside(32, 2048), FUSED, 300.0), None, 290, True),
        (Goal(gap_beside(32, 2048), FUSED, 280.0), None, 290, False),
        (Goal(prefill(512), FUSED, 1.0, (TORCH,)), None, None, None),
        (Goal(decode(8), FUSED, 1.1, (LLAMA,)), None, None, None),
    ],
)
def test_a_goal_is_met_by_the_median_of_its_rounds(
    goal: Goal, other: str | None, value: float | None, is_met: bool | None
) -> None:
    verdict = judge(goal, RACE)
    if goal.metric == first_token(32):
        value = sorted((1400 / 4500, 1500 / 4900, 1700 / 4600))[1]
    assert (verdict.other, verdict.is_met) == (other, is_met)
    assert verdict.value == (None if value is None else pytest.approx(value))


def test_the_goals_are_those_that_were_set() -> None:
    found = {(goal.metric, goal.row, goal.bound, goal.others) for goal in goals()}
    assert len(found) == len(goals()) == 9 + 5 + 5 + 4
    assert (decode(32), FUSED, 1.6, (LLAMA, LLAMA_Q8, VLLM)) in found
    assert (served(32), FUSED, 3.0, (LLAMA,)) in found
    assert (decode(8), split(4), 0.85, (FUSED,)) in found
    assert (prefill(2048), FUSED, 0.85, (PARTS,)) in found
    measured = set(Workload().metrics())
    assert all(goal.metric in measured for goal in goals())


def test_what_is_measured_has_names_of_its_own() -> None:
    metrics = Workload().metrics()
    assert len({metric.name for metric in metrics}) == len(metrics) == 2 + 3 + 2 * 3 + 1
    assert Workload(clients=()).metrics() == [prefill(512), prefill(2048), decode(1), decode(8), decode(32)]
    assert dataclasses.replace(Workload(), prefills=(100,), long_prompt=1000).most_tokens() == 1001


def test_the_table() -> None:
    header, first, *rest = lines(RACE, Workload().metrics())
    assert header == ("median of rounds", LLAMA, LLAMA_Q8, VLLM, FUSED, RATIO)
    assert first == (
        "prefill 512, tokens/s",
        "410 ±4 %",
        "285 ±2 %",
        "450 ±11 %",
        "1200 ±10 %",
        "2.45 (2.40-2.50) vLLM",
    )
    assert [line[0] for line in rest] == [
        "32 clients, TTFT p50, ms",
        "32 clients beside prompts of 2048, ITL p99, ms",
    ]
    assert rest[0][-1] == "0.31 (0.31-0.37) llama.cpp bf16"
    assert rest[1][1:] == ("-", "-", "-", "290 ±10 %", "-")


def test_the_table_of_goals_says_yes_no_and_not_measured() -> None:
    wanted = (Goal(prefill(512), FUSED, 2.4, (VLLM,)), Goal(gap_beside(32, 2048), FUSED, 280.0))
    unmeasured = Goal(decode(1), FUSED, 1.0, (LLAMA, VLLM))
    table = goal_lines(judge(goal, RACE) for goal in (*wanted, unmeasured))
    assert [line[-1] for line in table] == ["met", "yes", "no", "-"]
    assert table[1][2:4] == ("at least 2.40 x vLLM", "2.45 (2.40-2.50)")
    assert table[2][2:4] == ("at most 280 ms", "290 (250-310)")
    assert table[3][2:4] == ("at least 1.00 x llama.cpp bf16 or vLLM", "not measured")
    rows = markdown(table).splitlines()
    assert rows[1] == "| --- | --- | --- | --- | --- |"
    assert all(row.count("|") == 6 for row in rows)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (99.96, "100.0"), (52.34, "52.3"), (0.333, "0.33")])
def test_numbers_have_the_digits_that_matter(value: float, text: str) -> None:
    assert number(value) == text


def test_a_cell_without_a_value_is_a_dash() -> None:
    assert cell(RACE, "nobody", prefill(512)) == "-"
    assert cell(results({(FUSED, decode(1)): [70]}), FUSED, decode(1)) == "70.0"
