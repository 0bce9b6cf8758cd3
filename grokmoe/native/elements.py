"""What compiled loops do with single numbers: bfloat16 as its bits, powers of two, a thread's share.

A loop reads with `wide` and writes with `put`, so that one text serves float32 and bfloat16. It computes in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from grokmoe.native.team import INDEX_SYMBOL, NUM_SYMBOL

FLAGS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
    "boundscheck": False,
}
"""Sums may be taken in another order than written, always the same one, which is what makes them fast. NaN and infinity
are what they should be."""


@intrinsic
def as_f32(typing: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def as_i32(typing: Any, x: Any) -> Any:
    """The bits of a float32, as a signed number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _as_u32(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def wide(x: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError("for compiled code")


@overload(wide, jit_options=FLAGS)
def _wide(x):
    if x is types.uint16:
        return lambda x: as_f32(np.uint32(x) << np.uint32(16))
    return lambda x: x


@njit(**FLAGS)
def _to_bf16(x: Any) -> Any:
    """Rounded to even, as torch does. NaN stays NaN: its bits are not rounded, which might make it infinity."""
    bits = _as_u32(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


def put(out: Any, row: Any, column: Any, x: Any) -> Any:
    """Writes float32 x to out[row, column], rounded to out's type."""
    raise NotImplementedError("for compiled code")


@overload(put, jit_options=FLAGS)
def _put(out, row, column, x):
    def put_bf16(out, row, column, x):
        out[row, column] = _to_bf16(x)

    def put_f32(out, row, column, x):
        out[row, column] = x

    return put_bf16 if out.dtype is types.uint16 else put_f32


@njit(**FLAGS)
def clamped(x: Any, low: Any, high: Any) -> Any:
    """x within low and high; NaN stays NaN."""
    x = low if x < low else x
    return high if x > high else x


@njit(**FLAGS)
def exp2(x: Any) -> Any:
    """2^x for x from -126 to 126, float32, relative error below 3e-7: a polynomial on [-1/2, 1/2] and the exponent.

    Compiled loops compute sixteen of them at once; those of the C library would be called one by one.
    """
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = np.float32(1.5403530e-4)
    power = power * rest + np.float32(1.3333558e-3)
    power = power * rest + np.float32(9.6181291e-3)
    power = power * rest + np.float32(5.5504109e-2)
    power = power * rest + np.float32(2.4022651e-1)
    power = power * rest + np.float32(6.9314718e-1)
    power = power * rest + np.float32(1.0)
    return power * as_f32(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


_num_threads = types.ExternalFunction(NUM_SYMBOL, types.int32())
thread_index = types.ExternalFunction(INDEX_SYMBOL, types.int32())


@njit(**FLAGS)
def share(size: Any) -> Any:
    """(first, end): the calling thread's part of 0 .. size, when a team runs the loop; all of it when one does."""
    index, num = np.int64(thread_index()), np.int64(_num_threads())
    return size * index // num, size * (index + 1) // num
