"""Log-probabilities through the engine: in chunks as in one, in the order promised, and nobody else's tokens change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grokmoe.step_plan import (
    GREEDY,
    WHOLE_VOCABULARY,
    LogitsScope,
    LogprobTable,
    SequenceChunk,
    StepResult,
    TokenSampling,
    TokenScoring,
)
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, run_step

PROMPT = tuple(goldens.PROMPTS["len33"])
PAGES = (7, 2, 9, 4, 0)


def score_in(cuts: tuple[int, ...], num_top: int) -> list[StepResult]:
    """The prompt's tokens from the second on judged, in chunks that end at `cuts`."""
    engine, start, results = attention_engine(), 0, []
    for end in cuts:
        targets = PROMPT[start + 1 : end + 1]
        chunk = SequenceChunk(
            PROMPT[start:end], start, PAGES[: -(-end // 8)], scoring=TokenScoring(0, targets, num_top)
        )
        results.append(run_step(engine, chunk))
        start = end
    return results


@pytest.mark.parametrize("num_top", [0, 4])
@pytest.mark.parametrize("cuts", [(33,), (8, 33), (5, 6, 20, 33), (32,)])
def test_a_prompt_in_chunks_has_the_golden_logprobs(cuts: tuple[int, ...], num_top: int) -> None:
    expected_TV = torch.log_softmax(goldens.logits("seed", "len33"), -1)[:32]
    tables = [table for result in score_in(cuts, num_top) for table in result.logprobs]
    assert len(tables) == len(cuts)
    assert [token for table in tables for token in table.token_ids] == list(PROMPT[1:])
    expected_T = expected_TV[torch.arange(32), torch.tensor(PROMPT[1:])]
    found_T = torch.tensor([logprob for table in tables for logprob in table.logprobs])
    assert (found_T - expected_T).abs().max() < 1e-4
    ranks_T = (expected_TV >= expected_T[:, None]).sum(-1)
    assert [rank for table in tables for rank in table.ranks] == ranks_T.tolist()
    top = np.frombuffer(b"".join(table.top_ids for table in tables), "<u4").reshape(32, num_top)
    assert top.tolist() == expected_TV.topk(num_top).indices.tolist()


def test_the_whole_vocabulary_in_chunks() -> None:
    expected_TV = torch.log_softmax(goldens.logits("seed", "len33"), -1)[:32]
    found_TV = torch.cat([result.logits for result in score_in((5, 20, 33), WHOLE_VOCABULARY)])
    assert (found_TV - expected_TV).abs().max() < 1e-4


def test_everything_at_once_is_in_the_order_promised() -> None:
    reference_TV = goldens.logits("seed", "len33")
    logprobs_TV = torch.log_softmax(reference_TV, -1)
    whole = TokenSampling(num_logprobs=WHOLE_VOCABULARY)
    chunks = [
        SequenceChunk(PROMPT[:5], 0, (0,), GREEDY),
        SequenceChunk(PROMPT[:6], 0, (1,), whole, LogitsScope.ALL, TokenScoring(1, PROMPT[2:5], WHOLE_VOCABULARY)),
        SequenceChunk(PROMPT[:7], 0, (2,), TokenSampling(num_logprobs=2), scoring=TokenScoring(6, PROMPT[7:8], 1)),
        SequenceChunk(PROMPT[:8], 0, (3,), whole),
    ]
    result = run_step(attention_engine(), *chunks)
    assert list(result.token_ids) == [int(reference_TV[length - 1].argmax()) for length in (5, 6, 7, 8)]
    expected = [reference_TV[:6], logprobs_TV[1:4], logprobs_TV[5:6], logprobs_TV[7:8]]
    assert (result.logits - torch.cat(expected)).abs().max() < 1e-4
    ids = [table.token_ids for table in result.logprobs]
    assert ids == [PROMPT[2:5], *((token,) for token in (result.token_ids[1], PROMPT[7], *result.token_ids[2:]))]
    assert [table.num_top for table in result.logprobs] == [512, 512, 1, 2, 512]
    assert [table.ranks for table in result.logprobs if len(table.ranks) == 1] == [
        (1,),
        (int((logprobs_TV[6] >= logprobs_TV[6, PROMPT[7]]).sum()),),
        (1,),
        (1,),
    ]


def test_a_drawn_token_is_judged_by_the_raw_logits() -> None:
    """The bias decides what is drawn, not how likely it is; a mask changes both."""
    logprobs_V = torch.log_softmax(goldens.logits("seed", "len33")[-1], -1)
    best, mask = int(logprobs_V.argmax()), bytearray(b"\xff" * (CONFIG.vocab_size // 8))
    mask[best // 8] &= ~(1 << best % 8)
    for how, expected_V in (
        (TokenSampling(bias_ids=(77,), bias=(1e6,), num_logprobs=0), logprobs_V),
        (
            TokenSampling(bias_ids=(77,), bias=(1e6,), num_logprobs=0, allowed=bytes(mask)),
            torch.log_softmax(logprobs_V.index_fill(0, torch.tensor([best]), float("-inf")), -1),
        ),
    ):
        result = run_step(attention_engine(), SequenceChunk(PROMPT, 0, PAGES, how))
        (table,) = result.logprobs
        assert result == StepResult((77,), None, (table,))
        rank = int((expected_V >= expected_V[77]).sum())
        assert table == LogprobTable((77,), (pytest.approx(float(expected_V[77]), abs=1e-4),), (rank,))
