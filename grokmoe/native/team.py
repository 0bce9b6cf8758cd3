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

_Function = ctypes.CFUNCTYPE(ctypes.c_int32)


_one, _zero = _Function(lambda: 1), _Function(lambda: 0)
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
    functions: dict[str, Any] = {NUM_SYMBOL: _one, INDEX_SYMBOL: _zero}
    fork: Any = None
    with contextlib.suppress(AttributeError):
        functions = {NUM_SYMBOL: library.omp_get_num_threads, INDEX_SYMBOL: library.omp_get_thread_num}  # type: ignore[union-attr]
        fork = library.GOMP_parallel  # type: ignore[union-attr]
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


def num_threads() -> int:
    """Threads that a loop may use: as many as torch."""
    return 1 if _fork() is None else torch.get_num_threads()
