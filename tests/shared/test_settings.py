"""Settings become flags and variables, and flags again for another process."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.config import AttentionWorkerSettings
from expert_worker.config import ExpertWorkerSettings
from grokmoe.errors import ConfigError
from grokmoe.server import ServerSettings
from grokmoe.settings import add_flags, from_namespace, setting, to_flags
from launcher.generate import GenerateSettings
from launcher.serve import ServeSettings
from launcher.up import UpSettings
from router.config import RouterSettings

ROLES = [
    RouterSettings,
    AttentionWorkerSettings,
    ExpertWorkerSettings,
    ServerSettings,
    ServeSettings,
    UpSettings,
    GenerateSettings,
]


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True)
class Example:
    """One field of every kind."""

    count: int = setting(3, "how many, 50% of them")
    share: float = setting(0.5, "part")
    name: str = setting("x", "a name", metavar="NAME")
    mode: str = setting("fast", "how", choices=("fast", "slow"))
    colour: Colour = setting(Colour.RED, "which")  # noqa: RUF009
    flag: bool = setting(False, "whether")
    parts: tuple[int, ...] = setting([1, 2], "numbers")
    seed: int | None = setting(None, "a seed")
    eager: bool | None = setting(None, "either way")
    max_rows_per_call: int = setting(8, "most rows")


def parse(kind: Any, argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, kind, environ or {})
    return from_namespace(kind, parser.parse_args(list(argv)))


@pytest.mark.parametrize("kind", [Example, *ROLES])
def test_no_flags_mean_the_defaults(kind: Any) -> None:
    assert parse(kind) == kind()


@pytest.mark.parametrize(
    ("argv", "variable", "value", "expected"),
    [
        ("--count 7", "COUNT", "7", {"count": 7}),
        ("--count -7", "COUNT", "-7", {"count": -7}),
        ("--share 1e-3", "SHARE", "1e-3", {"share": 1e-3}),
        ("--name y", "NAME", "y", {"name": "y"}),
        ("--mode slow", "MODE", "slow", {"mode": "slow"}),
        ("--colour blue", "COLOUR", "blue", {"colour": Colour.BLUE}),
        ("--flag", "FLAG", "true", {"flag": True}),
        ("--no-flag", "FLAG", "0", {"flag": False}),
        ("--parts 5,6,7", "PARTS", " 5, 6 ,7", {"parts": (5, 6, 7)}),
        ("--parts=", "PARTS", "", {"parts": ()}),
        ("--seed 0", "SEED", "0", {"seed": 0}),
        ("--eager", "EAGER", "true", {"eager": True}),
        ("--no-eager", "EAGER", "false", {"eager": False}),
        ("--max-rows-per-call 9", "MAX_ROWS_PER_CALL", "9", {"max_rows_per_call": 9}),
    ],
)
def test_a_flag_and_its_variable(argv: str, variable: str, value: str, expected: dict[str, Any]) -> None:
    assert parse(Example, argv.split()) == Example(**expected)
    assert parse(Example, (), {f"GROKMOE_{variable}": value, variable: "not ours"}) == Example(**expected)


def test_a_flag_wins_over_its_variable() -> None:
    assert parse(Example, ["--count", "4", "--no-flag"], {"GROKMOE_COUNT": "5", "GROKMOE_FLAG": "1"}) == Example(
        count=4
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [("COUNT", "many"), ("SHARE", ""), ("MODE", "idle"), ("COLOUR", "green"), ("FLAG", "yes"), ("PARTS", "1,x")],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"GROKMOE_{variable}"):
        parse(Example, (), {f"GROKMOE_{variable}": value})


@pytest.mark.parametrize("argv", ["--count many", "--mode idle", "--colour green", "--parts 1,x", "--seed x"])
def test_a_bad_flag_is_refused(argv: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=argv.split()[0]):
        parse(Example, argv.split())


@pytest.mark.parametrize("kind", [Example, *ROLES])
def test_help_names_every_flag_and_default(kind: Any) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, kind, {})
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(kind):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"].split()[0] in text
    assert kind is not Example or "50% of them (default: 3)" in text


# argparse of Python 3.11 drops a value that is "--" and nothing else.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8).filter(lambda text: text != "--")
ADDRESS = st.text("abc:/.0129-_", min_size=1, max_size=8).filter(lambda text: text != "--")
VALUES = {
    "int": st.integers(1, 2**40),
    "float": st.floats(0, 1e9),
    "str": TEXT,
    "bool": st.booleans(),
    "tuple[str, ...]": st.lists(ADDRESS, max_size=3).map(tuple),
    "tuple[int, ...]": st.lists(st.integers(), max_size=3).map(tuple),
    "int | None": st.none() | st.integers(),
    "bool | None": st.none() | st.booleans(),
    "str | None": st.none() | TEXT,
    "Colour": st.sampled_from(Colour),
}


BOUNDED: dict[str, st.SearchStrategy[Any]] = {
    "port": st.integers(0, 65535),
    "metrics_port": st.integers(-1, 65535),
    "openai_port": st.integers(0, 65535),
    "pair_port": st.integers(0, 65535),
    "health_listen": st.sampled_from(["", "127.0.0.1:0", "unix:/a b/health.sock"]),
    "tls_certificate": st.just(""),
    "tls_key": st.just(""),
    "tls_client_ca": st.just(""),
    "tokens_file": st.just(""),
    "listen": st.sampled_from(["127.0.0.1:0", "[::]:7000", "unix:/a b/c.sock"]),
    "kv_gib": st.floats(1e-3, 1e6),
    "lease_seconds": st.floats(1e-3, 1e6),
    "rank_timeout": st.floats(1e-3, 1e6),
    "rank": st.just(0),
    "tensor_parallel": st.integers(1, 8),
    "rendezvous": st.just(""),
    "rebalance_interval": st.floats(1e-3, 1e6),
    "rebalance_threshold": st.floats(1.0, 1e6),
    "rebalance_horizon": st.floats(1e-3, 1e6),
    "state": st.sampled_from(["", "state.json", "-x.json"]),
    "traces": st.sampled_from(["", "http://collector:4317", "https://[::1]:4317"]),
    "trace_share": st.floats(0, 1),
    "device": st.just("cpu"),
}
"""Fields whose settings class refuses other values."""


def values_of(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    choices = field.metadata["choices"]
    if field.name in BOUNDED:
        return BOUNDED[field.name]
    return st.sampled_from(choices) if choices else VALUES[str(field.type)]


@pytest.mark.parametrize("kind", [Example, *ROLES])
def test_settings_survive_the_way_to_another_process(kind: Any) -> None:
    fields = {field.name: values_of(field) for field in dataclasses.fields(kind)}

    @settings(max_examples=30)
    @given(st.builds(kind, **fields))
    def check(given_: Any) -> None:
        assert parse(kind, to_flags(given_)) == given_

    check()


def test_every_field_is_spelled_out_for_another_process() -> None:
    assert "--no-flag" in to_flags(Example())
    assert {"--flag", "--parts=3"} <= set(to_flags(Example(flag=True, parts=(3,))))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (RouterSettings, "threads", 0),
        (ServerSettings, "metrics_port", 70000),
        (ServerSettings, "metrics_port", -2),
        (ServerSettings, "listen", "127.0.0.1:99999"),
        (ServerSettings, "listen", "7000"),
        (AttentionWorkerSettings, "kv_gib", 0.0),
        (ExpertWorkerSettings, "threads", -1),
        (ExpertWorkerSettings, "max_rows", 0),
        (AttentionWorkerSettings, "threads", -1),
        (AttentionWorkerSettings, "page_size", 0),
        (AttentionWorkerSettings, "num_pages", -1),
        (AttentionWorkerSettings, "max_step_tokens", 0),
    ],
)
def test_values_that_cannot_be(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        parse(kind, [f"--{field.replace('_', '-')}={value}"])


@pytest.mark.parametrize("field", ["lanes", "max_step_tokens", "max_running", "min_lane_rows", "max_waiting"])
def test_router_limits_that_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match="is 0"):
        RouterSettings(**{field: 0}).engine_settings(context_length=64)
