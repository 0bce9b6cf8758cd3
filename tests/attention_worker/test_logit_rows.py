"""Which rows need logits: those that somebody asks for, each once, in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attention_worker.logit_rows import LogitRows
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, TokenScoring


@st.composite
def chunks(draw: st.DrawFn) -> SequenceChunk:
    num_tokens = draw(st.integers(1, 6))
    scoring = None
    if draw(st.booleans()):
        first = draw(st.integers(0, num_tokens - 1))
        scoring = TokenScoring(first, (1,) * draw(st.integers(1, num_tokens - first)))
    sampling, scope = draw(st.sampled_from([None, GREEDY])), draw(st.sampled_from(LogitsScope))
    return SequenceChunk((1,) * num_tokens, 0, (0,), sampling, scope, scoring)


@given(st.lists(chunks(), max_size=5))
def test_every_row_that_is_asked_for_is_found_once(step: list[SequenceChunk]) -> None:
    rows = LogitRows.of(step)
    needed, begin = set(), 0
    for chunk, own in zip(step, rows.chunks, strict=True):
        step_row = rows.step_rows_R.__getitem__
        end = begin + len(chunk.token_ids)
        returned = list(range(begin, end)) if chunk.logits is LogitsScope.ALL else []
        scored = []
        if chunk.scoring is not None:
            first = begin + chunk.scoring.first
            scored = list(range(first, first + len(chunk.scoring.target_ids)))
        assert list(map(step_row, own.returned)) == returned
        assert list(map(step_row, own.scored)) == scored
        assert (own.last is None) == (chunk.sampling is None)
        needed |= {*returned, *scored}
        if own.last is not None:
            assert step_row(own.last) == end - 1
            needed.add(end - 1)
        begin = end
    assert list(rows.step_rows_R) == sorted(needed)
