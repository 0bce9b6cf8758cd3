"""What a router makes of the messages of an attention worker: those due are taken, repeats are passed over, and what
cannot be is the end of the worker.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from grokmoe import tensors
from grokmoe.errors import Unavailable
from grokmoe.step_plan import SequenceChunk, StepPlan
from grokmoe.v1 import attention_pb2 as pb
from router.transport.base import AttentionInfo
from router.transport.step_answers import StepAnswers

INFO = AttentionInfo(
    config_hash="",
    incarnation="",
    dtype=torch.float32,
    hidden_size=4,
    layer_begin=0,
    layer_end=2,
    num_pages=1,
    page_size=8,
    max_step_tokens=8,
    device="cpu",
)
PLAN = StepPlan("", (SequenceChunk((1, 2), 0, (0,)), SequenceChunk((3,), 0, (1,))))
STEP = 7


def answers(info: AttentionInfo | None = INFO) -> StepAnswers:
    return StepAnswers(STEP, PLAN, info)


def layer(number: int, step_id: int = STEP, shape: tuple[int, ...] = (3, 4), dtype: Any = torch.float32) -> bytes:
    header = pb.StepResponse(step_id=step_id, layer=number)
    return b"".join(tensors.encode_rows(header, torch.zeros(shape, dtype=dtype), "step_id"))


def result(step_id: int = STEP) -> bytes:
    return tensors.encode(pb.StepResponse(step_id=step_id, result=pb.StepResult(token_ids=[5])))


def test_a_step_in_order() -> None:
    taken = answers()
    for number in range(2):
        whole = taken.take(layer(number))
        assert whole is not None
        assert (whole[0].layer, whole[1].shape) == (number, (3, 4))
    whole = taken.take(result())
    assert whole is not None
    assert whole[0].result.token_ids == [5]


def test_repeats_and_other_steps_are_passed_over() -> None:
    taken = answers()
    assert taken.take(result(STEP - 1)) is None, "late: the last step's"
    assert taken.take(layer(0, STEP - 1)) is None
    assert taken.take(layer(0)) is not None
    assert taken.take(layer(0)) is None, "twice"
    assert taken.take(layer(1)) is not None
    assert taken.take(layer(0)) is None
    assert taken.take(result()) is not None


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([layer(1)], "layer 0 is due"),
        ([layer(0), result()], "before layer 1"),
        ([layer(0, shape=(2, 4))], "for 3 tokens"),
        ([layer(0, shape=(3, 5))], "width 5"),
        ([layer(0, dtype=torch.bfloat16)], "bfloat16"),
        ([tensors.encode(pb.StepResponse(step_id=STEP))], "shape None"),
        ([b"\xff\xff garbage"], "cannot be"),
    ],
)
def test_what_no_sound_worker_sends(messages: list[bytes], words: str) -> None:
    taken, (*before, last) = answers(), messages
    for message in before:
        assert taken.take(message) is not None
    with pytest.raises(Unavailable, match=words):
        taken.take(last)


HIDDEN = pb.StepResponse(step_id=STEP, result=pb.StepResult(is_hidden_state=True))


def test_a_hidden_state_is_float32_whatever_the_worker_computes_in() -> None:
    taken = answers(dataclasses.replace(INFO, dtype=torch.bfloat16, layer_begin=1))
    assert taken.take(layer(1, dtype=torch.bfloat16)) is not None
    whole = taken.take(tensors.encode(HIDDEN, torch.ones(3, 4)))
    assert whole is not None
    assert whole[0].result.is_hidden_state
    assert torch.equal(whole[1], torch.ones(3, 4))


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (None, "hidden state of shape None for 3 tokens"),
        (torch.zeros(2, 4), "for 3 tokens"),
        (torch.zeros(3, 5), "width 5"),
        (torch.zeros(12), r"shape \[12\]"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_hidden_states_that_cannot_be(hidden: torch.Tensor | None, words: str) -> None:
    taken = answers(dataclasses.replace(INFO, layer_end=1))
    assert taken.take(layer(0)) is not None
    with pytest.raises(Unavailable, match=words):
        taken.take(tensors.encode(HIDDEN, hidden))


def test_a_failure_may_come_at_any_time() -> None:
    failure = tensors.encode(pb.StepResponse(step_id=STEP, failure={"code": 13, "message": "ouch"}))
    whole = answers().take(failure)
    assert whole is not None
    assert whole[0].failure.message == "ouch"


def test_a_stage_begins_at_its_own_layer() -> None:
    taken = answers(dataclasses.replace(INFO, layer_begin=5, layer_end=6))
    assert taken.take(layer(5)) is not None
    assert taken.take(result()) is not None
