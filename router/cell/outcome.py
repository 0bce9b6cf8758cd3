"""How a step has ended, judged by what came back. What is done about it is the cell's business.

DONE       all of it can be used
FAULTY     some chunks are not finite, the others can be used
CUT_OFF    from this side: nobody wants it, or its sequences are elsewhere by now
HOMELESS   an expert has no holder: its requests end
REFUSED    the worker is about to end and has not begun it
LOST       the worker is gone or hangs, is another incarnation, or sends what cannot be
BUG        anything else: its requests end with INTERNAL
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, runtime_checkable

from grokmoe.errors import FailedPrecondition, GrokmoeError, InternalError, Reason, Unavailable
from grokmoe.logs import about
from grokmoe.step_plan import StepResult
from router.experts import ExpertsUnavailable
from router.step import Step
from router.step_watch import StepAbandoned, StepHung
from router.transport.base import Hole, StepNotBegun

logger = logging.getLogger(__name__)


@runtime_checkable
class ReportsFaults(Protocol):
    """A hole that knows of rows for which the experts have no finite answer: it gave NaN for them."""

    faulty_rows: Collection[int]
    """Tokens of the step, by their place in it."""


class Fate(enum.Enum):
    """See above."""

    DONE = "done"
    FAULTY = "faulty"
    CUT_OFF = "cut off"
    HOMELESS = "homeless"
    REFUSED = "refused"
    LOST = "lost"
    BUG = "bug"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A fate, and what there is of it.

    result: of a step that is DONE or FAULTY. faulty: places of its chunks that are not finite. by_experts: of these,
    the ones for which it is the experts that had no finite answer.
    error: why it has ended otherwise.
    """

    fate: Fate
    result: StepResult | None = None
    faulty: frozenset[int] = frozenset()
    by_experts: frozenset[int] = frozenset()
    error: GrokmoeError | None = None

    @property
    def is_hung(self) -> bool:
        """Whether the worker took too long."""
        return isinstance(self.error, StepHung)

    @property
    def is_unseen(self) -> bool:
        """Whether the worker was lost before it had the plan: its sequences can have nothing to do with it."""
        return isinstance(self.error, StepNotBegun)


async def outcome_of(
    step: Step,
    vocab_size: int,
    make_hole: Callable[[], Hole],
    run: Callable[[Hole], Awaitable[StepResult]],
) -> Outcome:
    """Runs a step with a hole of its own and judges how it ends. Raises nothing but CancelledError."""
    try:
        hole = make_hole()
        result = await run(hole)
        _check_tokens(step, result, vocab_size)
    except StepAbandoned as error:
        return Outcome(Fate.CUT_OFF, error=error)
    except ExpertsUnavailable as error:
        return Outcome(Fate.HOMELESS, error=error)
    except (Unavailable, FailedPrecondition) as error:
        return Outcome(Fate.REFUSED if error.reason is Reason.SHUTTING_DOWN else Fate.LOST, error=error)
    except Exception as error:
        logger.exception("step failed", extra=about(request_ids=step.request_ids))
        return Outcome(Fate.BUG, error=bug_in_step(error))
    by_experts = _faulty_places(step, hole)
    faulty = by_experts.union(result.faulty_chunks)
    return Outcome(Fate.FAULTY if faulty else Fate.DONE, result, faulty, by_experts)


def bug_in_step(error: Exception) -> InternalError:
    """What the requests of a step end with when something raised what it never should."""
    return InternalError(f"a step failed: {type(error).__name__}: {error}")


def _check_tokens(step: Step, result: StepResult, vocab_size: int) -> None:
    """Raises Unavailable for a result that no sound worker gives."""
    if result.hidden_state is not None:
        raise Unavailable("it gave a hidden state, though it has the last layer")
    num_wanted = sum(chunk.wants_token for chunk in step.chunks)
    if len(result.token_ids) != num_wanted:
        raise Unavailable(f"it drew {len(result.token_ids)} tokens, {num_wanted} were due")
    if max(result.token_ids, default=0) >= vocab_size:
        drawing = [chunk.sequence.request for chunk in step.chunks if chunk.wants_token]
        for token, request in zip(result.token_ids, drawing, strict=True):
            if token >= vocab_size + request.num_added_tokens:
                raise Unavailable(f"it drew token {token}, which the vocabulary does not have")


def _faulty_places(step: Step, hole: Hole) -> frozenset[int]:
    """The chunks with a token for which the experts have no finite answer."""
    rows = hole.faulty_rows if isinstance(hole, ReportsFaults) else ()
    if not rows:
        return frozenset()
    owners = [place for place, chunk in enumerate(step.chunks) for _ in chunk.token_ids]
    return frozenset(owners[row] for row in rows)
