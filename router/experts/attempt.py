"""One call to one worker, and its deadlines.

A call has two. At the first one, derived from what the worker's calls have taken so far, it is given up if somebody
else can take its rows; if nobody can, it becomes overdue and is given up when somebody appears. At the second, the
ceiling or the end of the step's time, it is given up in any case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

import torch

from grokmoe.errors import DeadlineExceeded, FailedPrecondition, GrokmoeError, InternalError, Reason, Unavailable
from router.dispatch import Shard
from router.experts.answers import NotFinite, check_answer, merge
from router.experts.counters import Cause
from router.experts.latency import call_deadline
from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers, ExpertsUnavailable
from router.transport.base import CorruptReply, ExpertReply
from router.worker_state import WorkerEvent


class AttemptFailed(Exception):
    """A worker gave no answer that can be used; it is out of use, unless it only has the experts no more.

    error: why, in the worker's words. unsure_ND: its answer, if only some rows of it cannot be true.
    """

    def __init__(self, cause: Cause, error: GrokmoeError) -> None:
        super().__init__(error.message)
        self.cause, self.error = cause, error
        self.unsure_ND = error.rows_ND if isinstance(error, NotFinite) else None


class Attempts:
    """Makes calls, and remembers those that are overdue."""

    def __init__(self, members: ExpertMembers) -> None:
        self._members = members
        self._overdue: set[Callable[[], None]] = set()
        members.on_change.append(self._reconsider)

    async def call(
        self,
        member: ExpertMember,
        lane: int,
        layer: int,
        shard: Shard,
        rows_ND: torch.Tensor,
        num_attempts: int,
        give_up_at: float,
        unsure_ND: torch.Tensor | None = None,
    ) -> ExpertReply:
        """Sends the rows of a shard to a worker, whoever the shard names.

        num_attempts: how often these rows have been sent before. give_up_at: end of the step's time, monotonic.
        unsure_ND: an answer of another attempt, of which some rows are not finite. If some of this one are not, either,
        the reply is what the two have together, and the worker is not to blame: it may be the rows.
        Raises AttemptFailed, ExpertsUnavailable at `give_up_at`, or what says that the request is at fault.
        """
        members, settings, num_rows = self._members, self._members.settings, rows_ND.shape[0]
        begin, ahead = time.monotonic(), member.load + num_rows
        longest = min(settings.deadline_ceiling, max(give_up_at - begin, 0.0))
        patience = call_deadline(member.latency, ahead, num_attempts, settings)
        scope = asyncio.timeout(longest)
        loop = asyncio.get_running_loop()

        def reconsider() -> None:
            if scope.expired():
                return
            if members.has_holders(layer, shard.expert_ids, (member.index,)):
                scope.reschedule(loop.time())
            else:
                self._overdue.add(reconsider)

        timer = loop.call_later(patience, reconsider) if patience < longest else None
        members.counters.calls += 1
        work = shard.work
        number = member.begin(layer, num_rows, work)
        try:
            async with scope:
                reply = await member.link.forward(lane, layer, shard.expert_ids, shard.counts, rows_ND, longest)
            reply = self._checked(rows_ND, reply, unsure_ND)
        except (TimeoutError, DeadlineExceeded) as error:
            elapsed = time.monotonic() - begin
            if time.monotonic() >= give_up_at:
                raise ExpertsUnavailable(f"{member.name} has not answered in the time that the step has") from error
            member.latency.add(ahead, elapsed)
            # What the worker still owes on this lane would stand before everything sent later.
            member.link.reset(lane)
            raise self._failed(member, Cause.DEADLINE, Unavailable(f"no answer for {elapsed:.2f} s")) from error
        except asyncio.CancelledError:
            # It would have taken longer: worth knowing only if that is long, such as of a call that lost to its hedge.
            usual = member.latency.quantile(ahead, settings.deadline_quantile)
            if usual is not None and time.monotonic() - begin > usual:
                member.latency.add(ahead, time.monotonic() - begin)
            raise
        except Unavailable as error:
            cause = Cause.DRAINING if error.reason is Reason.SHUTTING_DOWN else Cause.LOST
            raise self._failed(member, cause, error) from error
        except FailedPrecondition as error:
            if error.reason is not Reason.EXPERT_NOT_HELD:
                raise
            members.note_missing(member, layer, shard.expert_ids)
            raise AttemptFailed(Cause.NOT_HELD, error) from error
        except CorruptReply as error:
            members.counters.corrupt += 1
            raise self._failed(member, Cause.CORRUPT, error) from error
        except InternalError as error:  # such as out of memory: another holder may do better
            raise self._failed(member, Cause.INTERNAL, error) from error
        finally:
            if timer is not None:
                timer.cancel()
            self._overdue.discard(reconsider)
            member.end(number, num_rows)
            members.note_idle(member)
        member.latency.add(ahead, time.monotonic() - begin)
        member.report(num_rows, work, reply)
        members.note_revision(member, reply.revision)
        return reply

    def _checked(self, rows_ND: torch.Tensor, reply: ExpertReply, unsure_ND: torch.Tensor | None) -> ExpertReply:
        """A reply that can be used. Raises CorruptReply when it cannot."""
        try:
            check_answer(rows_ND, reply.rows_ND, self._members.settings.check_finite)
        except NotFinite:
            if unsure_ND is None:
                raise
            self._members.counters.corrupt += 1
            return dataclasses.replace(reply, rows_ND=merge(unsure_ND, reply.rows_ND))
        return reply

    def _failed(self, member: ExpertMember, cause: Cause, error: GrokmoeError) -> AttemptFailed:
        event = WorkerEvent.DRAINS if cause is Cause.DRAINING else WorkerEvent.FAILED
        self._members.lose(member, event, error.message)
        return AttemptFailed(cause, error)

    def _reconsider(self) -> None:
        overdue, self._overdue = self._overdue, set()
        for reconsider in overdue:
            reconsider()
