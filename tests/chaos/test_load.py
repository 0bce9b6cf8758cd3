"""The load of the chaos programs notices every wrong token and every stream that ends early."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from benchmarks.chaos.load import Job, Load, Outcome
from grokmoe import FinishReason
from grokmoe.errors import InternalError, Unavailable

EXPECTED = (5, 6, 7, 8)
JOB = Job((1, 2), {"max_tokens": 4, "temperature": 0.0})

Script = Sequence[Any]
"""What a stream brings: a token id, an error to raise, or a finish reason."""


@dataclasses.dataclass
class Piece:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class ScriptedClient:
    """Answers the n-th stream by the n-th script, and remembers which were to be resumed."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.asked: list[bool] = []

    @contextlib.asynccontextmanager
    async def stream(
        self, prompt: Sequence[int], timeout: float, resume: bool, **options: object
    ) -> AsyncIterator[AsyncIterator[Piece]]:
        self.asked.append(resume)
        yield self._play(self._scripts.pop(0))

    async def _play(self, script: Script) -> AsyncIterator[Piece]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield Piece((), item) if isinstance(item, FinishReason) else Piece((item,), None)


def outcome_of(client: ScriptedClient, resume: bool = False) -> Outcome:
    """Of one stream."""
    return asyncio.run(Load(client, [JOB], [EXPECTED], 1, resume).run_one())  # type: ignore[arg-type]


def test_the_right_tokens_are_no_change() -> None:
    outcome = outcome_of(ScriptedClient([*EXPECTED, FinishReason.LENGTH]))
    assert (outcome.error, outcome.changed_at) == ("", None)
    assert len(outcome.arrivals) == 4


@pytest.mark.parametrize(("tokens", "which"), [((5, 6, 9, 8), 2), ((9, 6, 7, 8), 0), ((5, 6, 7, 8, 8), 4)])
def test_a_wrong_token_is_noticed_when_it_comes(tokens: tuple[int, ...], which: int) -> None:
    outcome = outcome_of(ScriptedClient([*tokens, FinishReason.LENGTH]))
    assert outcome.changed_at is not None
    assert sum(arrival < outcome.changed_at for arrival in outcome.arrivals[: which + 1]) == which + 1
    assert all(arrival >= outcome.changed_at for arrival in outcome.arrivals[which + 1 :])


def test_a_stream_that_ends_early_is_lost() -> None:
    assert outcome_of(ScriptedClient([5, 6, FinishReason.LENGTH])).error == "2 tokens, 4 were due"
    assert "stop" in outcome_of(ScriptedClient([*EXPECTED, FinishReason.STOP])).error


def test_an_error_is_lost() -> None:
    assert outcome_of(ScriptedClient([5, InternalError("a bug")]), resume=True).error == "InternalError: a bug"
    assert outcome_of(ScriptedClient([5, Unavailable("gone")])).error == "Unavailable: gone"


def test_the_sdk_is_to_resume() -> None:
    for resume in (False, True):
        client = ScriptedClient([*EXPECTED, FinishReason.LENGTH])
        outcome_of(client, resume)
        assert client.asked == [resume]


def test_a_repeated_token_after_a_break_is_noticed() -> None:
    assert outcome_of(ScriptedClient([5, 6, 6, 7, FinishReason.LENGTH]), resume=True).changed_at is not None


def test_waits_are_between_deltas_and_to_now() -> None:
    live = Outcome(1.0, [2.0, 4.0])
    assert live.waits(now=9.0) == [(2.0, 4.0), (4.0, 9.0)]
    assert live.first_wait(now=9.0) == (1.0, 2.0)
    assert Outcome(1.0, [2.0, 4.0], end=5.0).waits(now=9.0) == [(2.0, 4.0)]
    assert Outcome(1.0).first_wait(now=9.0) == (1.0, 9.0)
