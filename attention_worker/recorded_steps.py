"""Decode steps as programs: recorded once for a number of sequences, and run whole from then on.

A step in which every sequence has one token, and every token's successor is drawn, always calls the same loops on
tensors of the same shapes. What differs from step to step - ids, positions, slots, pages, numbers of keys - is copied
to where the program looks for it. Which experts a row goes to the loops find out themselves.

          first time       second time                          from then on
    T --> loop by loop --> as a program, then loop by loop: --> program
                           both have the same bits

A program that does not give the bits that the loops give one by one is never used, and none after it.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

from attention_worker.kernels import cpu
from attention_worker.kernels.tiles import Spans
from attention_worker.model import Model
from attention_worker.step_batch import RowsApart, StepBatch
from grokmoe.native import Program
from grokmoe.recording import recorded
from grokmoe.step_plan import WHOLE_VOCABULARY, LogitsScope, SequenceChunk

logger = logging.getLogger(__name__)

Fill = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, MoE input) -> MoE output."""

MOST_TOKENS = 64
"""Tokens of a step up to which programs are made: with more, what stands between the products hardly counts."""

MOST_BYTES = 256 << 20
"""Memory for what lies between the loops of all programs: those that were not used for longest make way."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """What a step leaves: the last MoE input [T, D], the logits [T, V], and nanoseconds by stage and leg."""

    x_TD: torch.Tensor
    logits_TV: torch.Tensor
    spent_ns: dict[str, int]


class _Room:
    """Where a program finds its step: a batch whose tensors stay where they are."""

    def __init__(self, num_tokens: int, max_pages: int, batch: StepBatch) -> None:
        """max_pages: of a sequence. batch: the first step."""
        token_ids_T, positions_T, slots_T, offsets_T, num_keys_T = torch.zeros(5, num_tokens, dtype=torch.int64)
        self._numbers = token_ids_T.numpy(), positions_T.numpy(), slots_T.numpy()
        self._keys = offsets_T.numpy(), num_keys_T.numpy()
        pages = torch.zeros(num_tokens * max_pages, dtype=torch.int64)
        self._pages = pages.numpy()
        apart = RowsApart(torch.arange(num_tokens), pages, offsets_T, num_keys_T, num_tokens)
        self.fill(batch)
        none = np.zeros(0, np.int64)
        self.batch = StepBatch(
            chunks=(),
            page_size=batch.page_size,
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slots_T=slots_T,
            spans=Spans(none, none, none, none, none, num_tokens),
            _apart={None: apart, cpu.MOST_ROWS_APART: apart},
        )

    def fill(self, batch: StepBatch) -> None:
        """Takes in another step of as many tokens."""
        apart = batch.rows_apart(None)
        for mine, theirs in zip(self._numbers, (batch.token_ids_T, batch.positions_T, batch.slots_T), strict=True):
            mine[:] = theirs.numpy()
        for mine, theirs in zip(self._keys, (apart.offsets_T, apart.num_keys_T), strict=True):
            mine[:] = theirs.numpy()
        self._pages[: len(apart.pages)] = apart.pages.numpy()


class _RecordedStep:
    """One program, with its room and its results."""

    def __init__(self, model: Model, room: _Room, fill: Fill, first_layer: int) -> None:
        self.room = room
        every_row_T = torch.arange(len(room.batch.token_ids_T))
        with recorded() as recording:
            forward = model.forward(room.batch, every_row_T)
            x_TD = next(forward)
            layer = first_layer
            try:
                while True:
                    self._x_TD = x_TD
                    x_TD = forward.send(fill(layer, x_TD))
                    layer += 1
            except StopIteration as end:
                self.logits_TV = end.value
        self.program = Program(recording)

    def run(self, batch: StepBatch, is_told: bool = True) -> Computed:
        self.room.fill(batch)
        return Computed(self._x_TD, self.logits_TV, self.program.run(is_told))


class RecordedSteps:
    """The programs of one model, for the thread that computes."""

    def __init__(self, model: Model, max_pages: int, first_layer: int = 0) -> None:
        """max_pages: most pages of a sequence."""
        self._model, self._max_pages, self._first_layer = model, max_pages, first_layer
        self._seen: set[int] = set()
        self._too_large: set[int] = set()
        self._steps: OrderedDict[int, _RecordedStep] = OrderedDict()
        self._trial: _RecordedStep | None = None
        self._is_trusted = True

    def run(self, batch: StepBatch) -> Computed | None:
        """Computes the step if there is a program for it. The tensors are the program's: they hold until it runs
        again."""
        step = self._steps.get(len(batch.token_ids_T))
        if step is None:
            return None
        self._steps.move_to_end(len(batch.token_ids_T))
        return step.run(batch)

    def try_out(self, batch: StepBatch, fill: Fill) -> None:
        """Records a step that is about to be computed loop by loop, if it is the second one of its size, and runs the
        program. What that writes to the pages the loops will write over. fill: records the MoE of a layer."""
        num_tokens = len(batch.token_ids_T)
        self._trial = None
        if not self._is_trusted or num_tokens in self._too_large:
            return
        if num_tokens not in self._seen:
            self._seen.add(num_tokens)
            return
        step = _RecordedStep(self._model, _Room(num_tokens, self._max_pages, batch), fill, self._first_layer)
        step.run(batch, is_told=False)
        self._trial = step

    def judge(self, logits_TV: torch.Tensor) -> None:
        """The step was computed loop by loop, with these logits. A program that has the same is used from now on."""
        if (step := self._trial) is None:
            return
        self._trial = None
        if torch.equal(step.logits_TV, logits_TV):
            self._keep(len(logits_TV), step)
            return
        self._is_trusted = False
        self._steps.clear()
        logger.error("a recorded step of %d tokens has other logits than its loops: none is used", len(logits_TV))

    @property
    def sizes(self) -> list[int]:
        """Tokens of the steps for which there are programs, ascending."""
        return sorted(self._steps)

    @property
    def num_bytes(self) -> int:
        """Memory for what lies between the loops of all programs."""
        return sum(step.program.num_bytes for step in self._steps.values())

    def _keep(self, num_tokens: int, step: _RecordedStep) -> None:
        if step.program.num_bytes > MOST_BYTES:
            self._too_large.add(num_tokens)
            return
        self._steps[num_tokens] = step
        while self.num_bytes > MOST_BYTES:
            self._steps.popitem(last=False)


def can_be_recorded(chunks: tuple[SequenceChunk, ...]) -> bool:
    """Whether a step is one of decodes alone, of which nothing is wanted but tokens."""
    return len(chunks) <= MOST_TOKENS and all(
        len(chunk.token_ids) == 1
        and chunk.sampling is not None
        and chunk.sampling.num_logprobs != WHOLE_VOCABULARY
        and chunk.logits is LogitsScope.NONE
        and chunk.scoring is None
        and chunk.embeds is None
        for chunk in chunks
    )
