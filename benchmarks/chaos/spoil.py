"""How a proxy spoils one answer of a worker: takes bytes, returns what is sent instead. Pure but for random bytes.

Answers are the real messages: ForwardResponse of an expert worker, StepResponse of an attention worker.
"""

from __future__ import annotations

import dataclasses
import os

import torch
from google.protobuf.message import Message

from grokmoe import tensors
from grokmoe.v1 import attention_pb2, expert_pb2

KINDS = ("slow", "late", "duplicate", "nan", "shape", "garbage")
"""slow: every answer waits. late: an answer comes long after its deadline, others pass it. duplicate: every answer
comes twice. nan: a row holds NaN. shape: rows are narrower than asked for. garbage: bytes that are no message."""

ANSWER_OF: dict[str, type[Message]] = {
    "/grokmoe.v1.Expert/Forward": expert_pb2.ForwardResponse,
    "/grokmoe.v1.Attention/Step": attention_pb2.StepResponse,
}
"""The message that a data-plane call is answered with. No other call is ever spoilt."""


@dataclasses.dataclass
class Spoiling:
    """What is done to the answers of one worker, and to how many. seconds: of slow and late.

    left: answers still to be spoilt; negative: all. hits: spoilt so far.
    """

    kind: str = ""
    seconds: float = 0.0
    left: int = 0
    hits: int = 0

    def take(self, method: str, data: bytes) -> bool:
        """Whether this answer is spoilt; counts it."""
        if method not in ANSWER_OF or not self.left:
            return False
        if self.kind in ("nan", "shape") and tensors.decode(ANSWER_OF[method], data)[1] is None:
            return False
        self.left -= 1
        self.hits += 1
        return True


def spoilt(kind: str, method: str, data: bytes) -> list[bytes]:
    """The messages that take an answer's place. slow and late change when, not what."""
    if kind == "duplicate":
        return [data, data]
    if kind == "garbage":
        return [b"\xff" + os.urandom(max(8, len(data) - 1))]
    if kind in ("nan", "shape"):
        header: Message
        header, rows = tensors.decode(ANSWER_OF[method], data)
        assert rows is not None, "take() passes over answers without rows"
        return [tensors.encode(header, _with_nan(rows) if kind == "nan" else rows[:, :-1])]
    return [data]


def _with_nan(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[-1] = torch.nan
    return rows
