"""Compiling a loop, and calling it with tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import cfunc, njit, types

from grokmoe import recording
from grokmoe.native import team
from grokmoe.native.cache import cache_folder
from grokmoe.native.elements import FLAGS

numba.config.CACHE_DIR = cache_folder()
team.prepare()

inner: Callable[[Callable[..., Any]], Any] = njit(**FLAGS)
"""Decorates a function that entries call."""

entry: Callable[[Callable[[Any], None]], Any] = cfunc(types.void(types.CPointer(types.int64)), cache=True, **FLAGS)
"""Decorates what a Loop calls: a function of an array of int64, the size and what else the loop was called with.

Beside what modules hold it refers to its element type alone: only then does the next process find it in the cache.
"""

_ELEMENTS = {torch.bfloat16: np.uint16, torch.float32: np.float32}


class Loop:
    """A loop over rows, compiled for a type of elements when it is first called with it."""

    def __init__(self, build: Callable[[Any], Any], grain: int) -> None:
        """build: makes the entry for an element type. grain: rows that take about ten microseconds; twice as many are
        worth a second thread."""
        self._build, self._grain = build, grain
        self._addresses: dict[torch.dtype, int] = {}

    def compile(self, dtype: torch.dtype) -> int:
        """The address of the entry for a type, which is made now if it was not before."""
        address = self._addresses.get(dtype)
        if address is None:
            address = self._addresses[dtype] = self._build(_ELEMENTS[dtype]).address
        return address

    def __call__(
        self, dtype: torch.dtype, size: int, *args: torch.Tensor | int | float, grain: int | None = None
    ) -> None:
        """Runs over `size` rows with the entry of `dtype`, or writes that down (`recording`). grain: for rows that are
        not of the usual size.

        Tensors go as their addresses: they must be contiguous where the entry takes them to be, and stay alive; floats
        go as the bits of a float32.
        """
        if size == 0:
            return
        address = self.compile(dtype)
        if (open_recording := recording.current()) is not None:
            open_recording.calls.append((address, [size, *map(_value, args)]))
            open_recording.kept += [arg for arg in args if isinstance(arg, torch.Tensor)]
            return
        params = (ctypes.c_int64 * (len(args) + 1))(size, *map(_value, args))
        grain = grain or self._grain
        if size < 2 * grain:
            _brief(address)(ctypes.addressof(params))
        elif (num_threads := min(team.num_threads(), size // grain)) > 1:
            team.run(address, ctypes.addressof(params), num_threads)
        else:
            _long(address)(ctypes.addressof(params))


def loop(grain: int) -> Callable[[Callable[[Any], Any]], Loop]:
    """Decorates the function that builds an entry."""
    return lambda build: Loop(build, grain)


@functools.cache
def _brief(address: int) -> Callable[[int], None]:
    """Keeps the interpreter's lock: the call is over sooner than the lock would change hands twice."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)


@functools.cache
def _long(address: int) -> Callable[[int], None]:
    """Lets go of the interpreter's lock meanwhile."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _value(arg: torch.Tensor | int | float) -> int:
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr()
    return arg if isinstance(arg, int) else float_bits(arg)


@functools.lru_cache(maxsize=256)
def float_bits(x: float) -> int:
    """The bits of x as float32."""
    return int(struct.unpack("I", struct.pack("f", x))[0])
