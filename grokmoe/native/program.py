"""A recording, run as one task of the team: the threads go from loop to loop by themselves and wait for one another.

A loop that is called by itself costs some ten microseconds of Python, and its threads fall asleep between two of them.
A decode step has hundreds: what Python does between them takes a third of its time, and none at all in a program.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import numpy as np
import torch

from grokmoe.native import team
from grokmoe.native.calls import barrier, call, cycles, thread_index
from grokmoe.native.loop import entry
from grokmoe.native.views import array
from grokmoe.recording import Recording


@entry
def _run_all(head: Any) -> None:
    """head: number of calls, address of (entry, parameters) for each, address of the cycles at which each ended."""
    num = head[0]
    calls_N2, ends_N = array(np.int64, head[1], (num, 2)), array(np.int64, head[2], (num + 1,))
    is_first = thread_index() == 0
    if is_first:
        ends_N[0] = cycles()
    for number in range(num):
        call(calls_N2[number, 0], calls_N2[number, 1])
        barrier()
        if is_first:
            ends_N[number + 1] = cycles()


class Program:
    """What was recorded, to be run any number of times by the thread that owns the team; one run at a time.

    num_bytes: what only it keeps in memory: what lies between the loops.
    """

    def __init__(self, recording: Recording) -> None:
        self._kept, self._after, self._laps = recording.kept, recording.after, recording.laps
        lengths = [len(params) for _, params in recording.calls]
        self._params = np.concatenate([np.array(params, np.int64) for _, params in recording.calls])
        self._fresh = self._params.copy()
        places = self._params.ctypes.data + 8 * (np.cumsum(lengths) - lengths)
        addresses = [address for address, _ in recording.calls]
        self._calls_N2 = np.stack([np.array(addresses, np.int64), places.astype(np.int64)], axis=1).copy()
        self._ends_N = np.zeros(len(addresses) + 1, np.int64)
        head = (len(addresses), self._calls_N2.ctypes.data, self._ends_N.ctypes.data)
        self._head = (ctypes.c_int64 * len(head))(*head)

        self.num_bytes = _own_bytes(recording.kept)

    def run(self, is_told: bool = True) -> dict[str, int]:
        """Runs all loops, then what was to be called after them, if that is to be told. Returns nanoseconds by the
        names of the laps."""
        begin = time.perf_counter_ns()
        self._params[:] = self._fresh  # loops count in their parameters what they have done
        team.run_or_call(_run_all.address, ctypes.addressof(self._head))
        spent = self._spent_ns(time.perf_counter_ns() - begin)
        for tell in self._after if is_told else ():
            tell(spent)
        return spent

    def _spent_ns(self, total_ns: int) -> dict[str, int]:
        spent: dict[str, int] = {}
        whole = max(1, int(self._ends_N[-1] - self._ends_N[0]))
        last = 0
        for place, name in self._laps:
            share = int(self._ends_N[place] - self._ends_N[last]) * total_ns // whole
            spent[name] = spent.get(name, 0) + share
            last = place
        return spent


def _own_bytes(kept: list[torch.Tensor]) -> int:
    """Memory of the tensors that nobody else holds: weights have other owners."""
    own = {}
    for place in range(len(kept)):
        if sys.getrefcount(kept[place]) <= _ONE_OWNER:
            storage = kept[place].untyped_storage()
            own[storage.data_ptr()] = storage.nbytes()
    return sum(own.values())


_listed = [object()]
_ONE_OWNER = sys.getrefcount(_listed[0])
"""References to what only a list holds, as the interpreter counts them."""
