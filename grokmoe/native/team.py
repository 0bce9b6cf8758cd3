"""The team of threads that torch computes with, for loops that are not torch's.

torch's products run on a team of OpenMP threads that belongs to the thread that calls them. A second team beside it,
be it ever so idle, makes every product several times slower (docs/log.md), so loops borrow torch's: they are handed to
the very library that torch has loaded, by its entry point for compiled `omp parallel` blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch

NUM_SYMBOL, INDEX_SYMBOL = "grokmoe_num_threads", "grokmoe_thread_index"
"""Names by which compiled loops find the functions that tell a thread its place in the team."""

BARRIER_SYMBOL = "grokmoe_barrier"
"""The name of the one that lets a thread wait for the others."""

_Function, _Barrier = ctypes.CFUNCTYPE(ctypes.c_int32), ctypes.CFUNCTYPE(None)


_one, _zero, _nothing = _Function(lambda: 1), _Function(lambda: 0), _Barrier(lambda: None)
"""Of a thread that is alone."""


def _library() -> ctypes.CDLL | None:
    """torch's own library, through which the OpenMP library is found that it uses: there may be others in the process.
    None where it is elsewhere."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


@functools.cache
def _fork() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, flags); None: loops run on the calling thread alone."""
    library = _library()
    functions: dict[str, Any] = {NUM_SYMBOL: _one, INDEX_SYMBOL: _zero, BARRIER_SYMBOL: _nothing}
    fork: Any = None
    with contextlib.suppress(AttributeError, AssertionError):
        assert library is not None
        found = library.omp_get_num_threads, library.omp_get_thread_num, library.GOMP_barrier
        fork = library.GOMP_parallel
        functions = dict(zip(functions, found, strict=True))
    for symbol, function in functions.items():
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        llvmlite.binding.add_symbol(symbol, address)
    if fork is None:
        return None
    fork.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    fork.restype = None
    return fork  # type: ignore[no-any-return]


def prepare() -> None:
    """Makes the team's functions known to compiled code. Must come before the first loop is compiled or loaded."""
    _fork()


def run(address: int, argument: int, num_threads: int) -> None:
    """Calls the compiled function at `address` with `argument` on so many threads of the team; waits for all."""
    fork = _fork()
    assert fork is not None
    fork(address, argument, num_threads, 0)


_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_or_call(address: int, argument: int) -> None:
    """The same on as many threads as torch has; on one, a call that lets go of the interpreter's lock."""
    if (threads := num_threads()) > 1:
        run(address, argument, threads)
    else:
        _Entry(address)(argument)


def num_threads() -> int:
    """Threads that a loop may use: as many as torch."""
    return 1 if _fork() is None else torch.get_num_threads()
