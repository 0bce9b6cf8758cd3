"""The file of tokens: what its lines mean, and what it never says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.access import MIN_TOKEN_LENGTH, AccessTable, Grant, Scope, parse_grants, watch_access, watch_token
from grokmoe.errors import ConfigError

TOKEN = "0123456789abcdef-secret"

tokens = st.from_regex(r"[A-Za-z0-9._~+/-]{16,40}={0,2}", fullmatch=True)
names = st.from_regex(r"[A-Za-z0-9._@-]{1,64}", fullmatch=True)
scopes = st.sets(st.sampled_from(Scope), min_size=1)


@pytest.mark.parametrize(
    ("line", "caller", "given_scopes"),
    [
        (TOKEN, "line-3", {Scope.INFERENCE}),
        (f"alice:{TOKEN}", "alice", {Scope.INFERENCE}),
        (f"  op@example.org:control:{TOKEN}  ", "op@example.org", {Scope.CONTROL}),
        (f"op:inference+control:{TOKEN}", "op", {Scope.INFERENCE, Scope.CONTROL}),
        (f"router:cluster:{TOKEN}", "router", {Scope.CLUSTER}),
    ],
)
def test_what_a_line_means(line: str, caller: str, given_scopes: set[Scope]) -> None:
    table = AccessTable(parse_grants(f"# who may call\n\n{line}\n".encode()))
    assert table.find(TOKEN) == Grant(caller, frozenset(given_scopes))
    for other in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"x:{TOKEN}", "\ud800", "ä" * 20):
        assert table.find(other) is None


@settings(max_examples=30)
@given(st.dictionaries(tokens, st.tuples(names, scopes), min_size=1, max_size=8), tokens)
def test_every_token_of_a_file_is_found_and_no_other(lines: dict[str, tuple[str, set[Scope]]], other: str) -> None:
    text = "\n".join(f"{name}:{'+'.join(granted)}:{token}" for token, (name, granted) in lines.items())
    table = AccessTable(parse_grants(text.encode()))
    for token, (name, granted) in lines.items():
        assert table.find(token) == Grant(name, frozenset(granted))
    assert (table.find(other) is None) == (other not in lines)


def test_one_caller_may_have_two_tokens() -> None:
    table = AccessTable(parse_grants(f"alice:{TOKEN}\nalice:{TOKEN}-new\n".encode()))
    assert table.find(TOKEN) == table.find(TOKEN + "-new")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        ("ok-0123456789abcdef\nalice:secret", f"line 2: the token needs {MIN_TOKEN_LENGTH} or more"),
        (f"alice:everything:{TOKEN}", "line 1: scopes are inference, control, cluster"),
        (f"alice::{TOKEN}", "line 1: scopes are"),
        (f"a b:{TOKEN}", "line 1: the name must"),
        (f"a:inference:b:{TOKEN}", "line 1: has more than"),
        (f"a:{TOKEN}\nb:{TOKEN}", "line 2: its token is that of an earlier line"),
        (f"{TOKEN} {TOKEN}", "line 1: the token needs"),
        (f"a:{TOKEN}ä", "line 1: the token needs"),
    ],
)
def test_lines_that_cannot_be_are_named_but_not_quoted(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        watch_access(path)
    assert str(path) in caught.value.message
    assert "secret" not in caught.value.message
    assert caught.value.__cause__ is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_config_error(text: bytes) -> None:
    try:
        grants = parse_grants(text)
    except ConfigError:
        return
    assert grants


def test_the_token_to_send_is_the_first(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"# of this cluster\nrouter:cluster:{TOKEN}\nrouter:cluster:{TOKEN}-old\n")
    assert watch_token(path, "worker_token_file").get() == TOKEN
    path.write_text(TOKEN + "\n")
    assert watch_token(path, "worker_token_file").get() == TOKEN
    with pytest.raises(ConfigError, match="worker_token_file"):
        watch_token(tmp_path / "nothing", "worker_token_file")


def test_a_table_does_not_keep_the_tokens() -> None:
    table = AccessTable(parse_grants(TOKEN.encode()))
    assert "secret" not in repr(vars(table))
