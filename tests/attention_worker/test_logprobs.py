"""Log-probabilities against torch.log_softmax and plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_worker import logprobs
from attention_worker.logprobs import score, score_drawn
from grokmoe.step_plan import WHOLE_VOCABULARY, LogprobTable, TokenSampling

VOCAB = 11
LOGITS = st.lists(st.floats(-40, 40, width=32) | st.sampled_from([0.0, 1.0, -math.inf]), min_size=VOCAB, max_size=VOCAB)
ROWS = st.lists(st.tuples(LOGITS, st.integers(0, VOCAB - 1)), min_size=1, max_size=6)


def tops(table: LogprobTable) -> list[list[tuple[int, float]]]:
    """Per row the most likely tokens with their log-probabilities."""
    ids = np.frombuffer(table.top_ids, "<u4").reshape(len(table.token_ids), -1)
    values = np.frombuffer(table.top_logprobs, "<f4").reshape(len(table.token_ids), -1)
    assert ids.shape == values.shape == (len(table.token_ids), table.num_top)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def assert_table(table: LogprobTable, expected_RV: torch.Tensor, token_ids: list[int], num_top: int) -> None:
    """Of log-probabilities that are known, everything is known exactly."""
    rows = expected_RV.tolist()
    assert table.token_ids == tuple(token_ids)
    assert table.logprobs == tuple(row[token] for row, token in zip(rows, token_ids, strict=True))
    assert table.ranks == tuple(sum(x >= row[token] for x in row) for row, token in zip(rows, token_ids, strict=True))
    order = [sorted(range(len(row)), key=lambda token, row=row: (-row[token], token))[:num_top] for row in rows]
    assert tops(table) == [[(token, row[token]) for token in best] for row, best in zip(rows, order, strict=True)]


@given(ROWS, st.integers(0, VOCAB), st.sampled_from([1, 100, 10**6]))
def test_a_table_is_that_of_log_softmax(rows: list[tuple[list[float], int]], num_top: int, slice_bytes: int) -> None:
    logits_RV = torch.tensor([logits for logits, _ in rows])
    logits_RV[:, 3] = logits_RV[:, 3].clamp(min=-40)  # one token at least can be drawn
    token_ids = [token for _, token in rows]
    before_RV = logits_RV.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "SLICE_BYTES", slice_bytes)
        table, whole_RV = score(logits_RV, token_ids, num_top)
    assert whole_RV is None
    assert torch.equal(logits_RV, before_RV)
    assert_table(table, torch.log_softmax(logits_RV, -1), token_ids, num_top)
    for row, (logprob, token) in enumerate(zip(table.logprobs, token_ids, strict=True)):
        exact = logits_RV[row].double()
        assert logprob == pytest.approx(float(exact[token] - exact.logsumexp(-1)), abs=2e-5)


@pytest.mark.parametrize("slice_bytes", [1, 100, 10**6])
def test_the_whole_vocabulary_is_a_tensor(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "SLICE_BYTES", slice_bytes)
    logits_RV = torch.randn(7, VOCAB)
    table, whole_RV = score(logits_RV, range(7), WHOLE_VOCABULARY)
    expected_RV = torch.log_softmax(logits_RV, -1)
    assert whole_RV is not None
    assert torch.equal(whole_RV, expected_RV)
    assert (table.num_top, table.top_ids, table.top_logprobs) == (VOCAB, b"", b"")
    assert table.logprobs == tuple(expected_RV.diagonal().tolist())


@given(st.integers(0, 2**31), st.sampled_from([1024, 1536, 1537]), st.sampled_from([0, 1, 5, 20, 200, 1024]))
def test_a_long_vocabulary_with_many_equals(seed: int, vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_RV = (torch.randn(3, vocab_size, generator=generator) * 4).round() / 2
    token_ids = torch.randint(vocab_size, (3,), generator=generator).tolist()
    assert_table(score(logits_RV, token_ids, num_top)[0], torch.log_softmax(logits_RV, -1), token_ids, num_top)


@given(
    st.lists(
        st.tuples(LOGITS, st.integers(3, VOCAB - 1), st.integers(-1, VOCAB), st.sampled_from([b"", b"\xf8\xff\0\0"])),
        min_size=1,
        max_size=6,
    )
)
def test_drawn_tokens_each_as_it_is_asked_for(rows: list[tuple[list[float], int, int, bytes]]) -> None:
    logits_RV = torch.tensor([logits for logits, *_ in rows])
    logits_RV[:, 3] = logits_RV[:, 3].clamp(min=-40)
    before_RV = logits_RV.clone()
    # Bias does not count, what is allowed does: here all tokens but 0, 1, 2.
    hows = [TokenSampling(0.3, bias_ids=(4,), bias=(9.0,), allowed=mask, num_logprobs=num) for *_, num, mask in rows]
    found = score_drawn(logits_RV, [token for _, token, _, _ in rows], hows)
    assert torch.equal(logits_RV, before_RV)
    for row, ((table, whole_RV), (_, token, num, mask)) in enumerate(zip(found, rows, strict=True)):
        alone_RV = logits_RV[row : row + 1].clone()
        alone_RV[:, : 3 if mask else 0] = -math.inf
        expected_RV = torch.log_softmax(alone_RV, -1)
        if num == WHOLE_VOCABULARY:
            assert whole_RV is not None
            assert torch.equal(whole_RV, expected_RV)
            assert table.num_top == VOCAB
        else:
            assert whole_RV is None
            assert_table(table, expected_RV, [token], num)


def test_rows_that_are_no_distribution_disturb_nobody() -> None:
    nan, inf = math.nan, math.inf
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], [nan] * 3, [-inf] * 3, [nan, 0.0, 0.0], [0.0, inf, inf]])
    table, whole_RV = score(logits_RV, [2, 0, 1, 1, 2], WHOLE_VOCABULARY)
    half = -math.log(2)
    assert whole_RV is not None
    assert torch.equal(whole_RV[:1], torch.log_softmax(logits_RV[:1], -1))
    lowest = -torch.finfo(torch.float32).max
    expected_RV = torch.tensor([[-inf] * 3, [-inf] * 3, [-inf, half, half], [lowest, half, half]])
    torch.testing.assert_close(whole_RV[1:], expected_RV)
    assert table.ranks == (1, 3, 3, 2, 2)
    assert score(logits_RV, [0] * 5, 2)[0].top_ids == np.array([2, 1, 0, 1, 0, 1, 1, 2, 1, 2], "<u4").tobytes()
