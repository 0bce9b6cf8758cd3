"""Requests on their way in and out: refused or taken, placed in the queue and in a cell, ended from outside.

submit ---refused: its id is taken, no room, never servable
   |
   +-----> alive ---its last token, cancel, abort, fail, or no first step within `queue_timeout`---> gone
"""

from __future__ import annotations

import asyncio
import time

from grokmoe.errors import AlreadyExists, GrokmoeError, Reason, Unavailable
from router.adapters import Adapters
from router.admission import Admission, AdmissionSettings, CallContext
from router.fair_share import FairShare
from router.fleet import Fleet
from router.generation import Generation
from router.register import Register
from router.request import Request
from router.sequence import Sequence


class Intake:
    """One engine's. What each method promises its callers: see Engine, which has methods of the same names."""

    def __init__(self, settings: AdmissionSettings, register: Register, fleet: Fleet, adapters: Adapters) -> None:
        self._adapters = adapters
        self.admission = Admission(settings)
        self._queue_timeout = settings.queue_timeout
        self._share = FairShare()
        self._register, self._fleet = register, fleet

    def check_room(self, call: CallContext, count: int, num_tokens: int) -> None:
        """Raises ResourceExhausted when the queue has no room."""
        schedulers = [cell.scheduler for cell in self._fleet.cells if cell.info]
        self.admission.check(
            call.caller,
            count,
            num_tokens,
            self._fleet.num_waiting,
            sum(scheduler.num_waiting_tokens for scheduler in schedulers),
            sum(scheduler.ledger.num_pages * scheduler.ledger.page_size for scheduler in schedulers),
        )

    def submit(self, request: Request, call: CallContext) -> Generation:
        """Takes a request in, or raises why not."""
        if self._register.find(request.request_id) is not None:
            raise AlreadyExists(f"request_id: {request.request_id} is the id of a request that is alive")
        adapter = request.adapter
        if adapter is not None and self._adapters.table.find("adapter", adapter.name).id != adapter.id:
            raise Unavailable(f"adapter {adapter.name} was loaded anew just now", 0.0)  # while the request was read
        self.check_room(call, request.n, len(request.prompt_ids))
        cost = len(request.prompt_ids) + request.max_tokens
        places = self._share.place(call.caller, cost, call.priority, request.n)
        sequences = [Sequence(request, place, index) for index, place in enumerate(places)]
        cell = self._fleet.least_loaded(request)
        cell.check(request)
        generation = Generation(request, call, sequences, self._begun)
        self.admission.added(call.caller, request.n)
        self._limit_wait(generation)
        self._register.add(generation)
        for sequence in sequences:
            cell.add(sequence)
            self._register.put(generation, sequence, cell)
            if adapter is not None:
                self._adapters.table.add(adapter.id)
        return generation

    def _begun(self, generation: Generation) -> None:
        """A request takes part in its first step."""
        self.admission.begun(time.monotonic())
        self._share.admitted(generation.sequences[0].arrival, generation.call.priority)

    def _limit_wait(self, generation: Generation) -> None:
        """Refuses a request after all that waits longer than `queue_timeout` for its first step."""
        timeout = self._queue_timeout
        if not timeout:
            return

        def expire() -> None:
            if generation.scheduled_at is None and generation.ended_at is None:
                generation.fail(self.admission.timed_out(timeout, self._fleet.num_waiting))
                self.cancel(generation)

        asyncio.get_running_loop().call_later(timeout, expire)

    def cancel(self, generation: Generation) -> None:
        """Ends a request that nobody waits for any more."""
        for sequence in generation.sequences:
            self.cancel_candidate(generation, sequence.index)

    def cancel_candidate(self, generation: Generation, index: int) -> bool:
        """Ends one candidate; False if it has ended already."""
        sequence = generation.sequences[index]
        cell = self._register.cell_of(sequence)
        if cell is None:
            return False
        cell.cancel(sequence)
        self.forget(sequence)
        return True

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; False: none is alive."""
        generation = self._register.find(request_id)
        if generation is None:
            return False
        for sequence in generation.sequences:
            if self.cancel_candidate(generation, sequence.index):
                generation.abort(sequence)
        return True

    def fail(self, sequence: Sequence, error: GrokmoeError) -> None:
        """Ends the request of a sequence, with all its candidates, if it is alive."""
        generation = self._register.generation_of(sequence)
        if generation is not None:
            generation.fail(error)
            self.cancel(generation)

    def fail_all(self) -> None:
        """The service ends: whoever still waits for tokens gets Unavailable."""
        for generation in self._register.generations:
            generation.fail(Unavailable("the service is shutting down", reason=Reason.SHUTTING_DOWN))
            self.cancel(generation)

    def forget(self, sequence: Sequence) -> None:
        """A sequence is over."""
        generation = self._register.forget(sequence)
        if generation is not None:
            self.admission.ended(generation.call.caller)
            if generation.request.adapter_id:
                self._adapters.table.release(generation.request.adapter_id)
                self._adapters.ended()
        self._fleet.wake()
