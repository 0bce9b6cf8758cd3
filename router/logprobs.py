"""Tables of log-probabilities as the messages clients get."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from grokmoe.step_plan import LogprobTable
from grokmoe.v1 import generation_pb2 as pb


def to_messages(table: LogprobTable) -> list[pb.TokenLogprobs]:
    """One message per row."""
    num_rows = len(table.token_ids)
    top_ids = np.frombuffer(table.top_ids, "<u4").reshape(num_rows, -1)
    top_logprobs = np.frombuffer(table.top_logprobs, "<f4").reshape(num_rows, -1)
    return [
        pb.TokenLogprobs(
            token_id=token_id, logprob=logprob, rank=rank, top_token_ids=ids.tolist(), top_logprobs=values.tolist()
        )
        for token_id, logprob, rank, ids, values in zip(
            table.token_ids, table.logprobs, table.ranks, top_ids, top_logprobs, strict=True
        )
    ]


def prompt_to_messages(first_id: int, tables: Iterable[LogprobTable]) -> list[pb.TokenLogprobs]:
    """A prompt's: nothing precedes its first token, so that one has no log-probability."""
    return [pb.TokenLogprobs(token_id=first_id), *(row for table in tables for row in to_messages(table))]
