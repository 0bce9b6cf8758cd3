"""One stream's way from its generation to gRPC, without a task that wakes for every token.

    IDLE ---news---> NOTED ---its turn in the outbox---> WRITING ---written---> IDLE, or NOTED if there is news
                                                                       |
                                                                       +---that was the last, or an error---> OVER

A message is under way at most, as gRPC wants it. A client that takes none holds up nobody: its tokens gather in the
generation, and the next message has them all.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import time
from collections.abc import Callable, Coroutine
from typing import Any

from grokmoe.errors import Cancelled
from router.answer import Answer, Part
from router.generation import Generation
from router.outbox import Outbox

Write = Callable[[bytes], Coroutine[Any, Any, None]]


class _State(enum.Enum):
    IDLE = enum.auto()
    NOTED = enum.auto()
    WRITING = enum.auto()
    OVER = enum.auto()


class StreamWriter:
    """Sends an answer, message by message."""

    def __init__(
        self,
        write: Write,
        generation: Generation,
        answer: Answer,
        outbox: Outbox,
        made: Callable[[Part], None],
        delay: Callable[[float], None],
    ) -> None:
        """write: sends one message, as a gRPC context does. made: told of every message before it is sent.
        delay: told the seconds from the end of a step to a message of its tokens being with gRPC."""
        self._write, self._generation, self._answer, self._outbox = write, generation, answer, outbox
        self._made, self._delay = made, delay
        self._unsent: collections.deque[bytes] = collections.deque()  # of one `take_now`: at most one per candidate
        self._news_at = 0.0
        self._state = _State.IDLE
        self._writing: Coroutine[Any, Any, None] | None = None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Returns when the last message has been sent. Raises what the request ends with; Cancelled if the client
        takes no more messages."""
        self._generation.listen(self._note)
        try:
            await self._end
        finally:
            self._state = _State.OVER

    def _note(self) -> None:
        if self._state is _State.IDLE:
            self._state = _State.NOTED
            self._outbox.add(self._send)

    def _send(self) -> None:
        """Its turn."""
        if self._state is not _State.NOTED:  # it is over
            return
        try:
            if not self._unsent:
                self._fill()
        except Exception as error:
            self._finish(error)
            return
        self._state = _State.IDLE
        if self._unsent:
            self._state = _State.WRITING
            self._writing = self._write(self._unsent.popleft())
            self._go_on()
            self._delay(time.monotonic() - self._news_at)

    def _fill(self) -> None:
        """Makes messages of what there is to send."""
        self._news_at = self._generation.news_at
        for delivery in self._generation.take_now():
            part = self._answer.encode(delivery)
            if part is not None:
                self._made(part)
                self._unsent.append(part.data)

    def _go_on(self, _: Any = None) -> None:
        """Takes the write as far as it comes. What a task would do; a task for each message costs as much as all else
        that is done for it here."""
        assert self._writing is not None
        try:
            waits_for = self._writing.send(None)
        except StopIteration:
            self._written()
        except (Exception, asyncio.CancelledError) as error:
            self._writing = None
            failure = Cancelled("the client takes no more messages")
            failure.__cause__ = error
            self._finish(failure)
        else:
            waits_for._asyncio_future_blocking = False  # as a task says that it has seen to it
            waits_for.add_done_callback(self._go_on)

    def _written(self) -> None:
        self._writing = None
        if self._state is _State.OVER:
            return
        if not self._unsent and self._answer.is_over:
            self._finish(None)
        elif self._unsent or self._generation.has_news:
            self._state = _State.NOTED
            self._outbox.add(self._send)
        else:
            self._state = _State.IDLE

    def _finish(self, error: Exception | None) -> None:
        self._state = _State.OVER
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # who is cancelled at this moment does not look, and that is no bug to be logged
