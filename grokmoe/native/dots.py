"""Dot products of bfloat16 in compiled loops: a few rows with a panel of a weight, on AVX-512's own instruction.

A *panel* is 32 rows of a weight [O, I], stored as [I / 2, 32, 2]: two inputs of all 32 outputs lie side by side, 128
bytes, which is what `vdpbf16ps` takes at a time. A *block* is up to MOST_ROWS rows of the other factor, stored in the
same way, [I / 2, rows, 2]: side by side, since rows one after the other would all fall on the same lines of a cache.
One pass over a panel serves a block, whose sums stay in registers: with few rows the time is that of reading the panel,
with many that of the multiplications.

A sum is taken in the order of the inputs, whatever the number of rows and whichever of them it is: a row's bits depend
on nothing else. The instruction rounds after every product and treats denormal numbers as zero.

LLVM forms no such instruction from loops, so the loop is put together here, one per number of rows.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from grokmoe.native.building import at, for_each_count, instruction, prefetch

PANEL = 32
"""Outputs of a panel: two registers of float32."""

MOST_ROWS = 12
"""Rows of one pass: twice as many sums, two weights and an input fill the 32 registers, with some to spare."""

UNROLL = 4
"""Pairs of inputs per turn of the loop; a row has a multiple of twice as many."""

AHEAD = 8192
"""Bytes of a panel that are asked for before they are needed. The CPU's own prefetching stops at the end of a page, and
with some rows a page lasts too short for it to get going again (docs/log.md)."""

_INSTRUCTION = "llvm.x86.avx512bf16.dpbf16ps.512"


def has_dots() -> bool:
    """Whether this CPU has the instruction."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's type, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_SUMS, _PAIRS, _WORDS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_BFloat(), 32), ir.VectorType(_INT32, 16)
_ARGUMENTS = (types.int64,) * 5


@intrinsic
def dot_panel(typing: Any, num_rows: Any, block: Any, panel: Any, num_pairs: Any, out: Any) -> Any:
    """out[n, o] = sum over i of x[n, i] * weight[o, i], float32.

    num_rows: 1 to MOST_ROWS. block: address of the rows x; panel: address of the weights, a multiple of 64. num_pairs:
    half of the inputs, a multiple of UNROLL. out: address of [num_rows, PANEL] float32.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for_each_count(builder, args[0], MOST_ROWS, lambda num_rows: _pass(builder, num_rows, *args[1:]))
        return context.get_dummy_value()

    return types.void(*_ARGUMENTS), generate


def _pass(builder: Any, num_rows: int, block: Any, panel: Any, num_pairs: Any, out: Any) -> None:
    """The loop over pairs of inputs for so many rows."""
    before, body, after = (
        builder.block,
        builder.append_basic_block(f"dots.{num_rows}.loop"),
        builder.append_basic_block(f"dots.{num_rows}.out"),
    )
    builder.branch(body)
    builder.position_at_end(body)
    pair = builder.phi(_INT64)
    pair.add_incoming(ir.Constant(_INT64, 0), before)
    starts = [[builder.phi(_SUMS), builder.phi(_SUMS)] for _ in range(num_rows)]
    sums = [list(halves) for halves in starts]
    for step in range(UNROLL):
        current = builder.add(pair, ir.Constant(_INT64, step))
        weights = [_weights(builder, panel, current, half) for half in range(2)]
        _fetch(builder, panel, current)
        words = builder.add(block, builder.mul(current, ir.Constant(_INT64, 4 * num_rows)))
        for row, halves in enumerate(sums):
            inputs = _broadcast(builder, words, 4 * row)
            for half in range(2):
                halves[half] = _multiply_add(builder, halves[half], weights[half], inputs)
    following = builder.add(pair, ir.Constant(_INT64, UNROLL))
    pair.add_incoming(following, body)
    for start, halves in zip(starts, sums, strict=True):
        for half in range(2):
            start[half].add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
            start[half].add_incoming(halves[half], body)
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), body, after)
    builder.position_at_end(after)
    for row, halves in enumerate(sums):
        for half in range(2):
            builder.store(halves[half], at(builder, out, 128 * row + 64 * half, _SUMS), align=4)


def _weights(builder: Any, panel: Any, pair: Any, half: int) -> Any:
    address = builder.add(panel, builder.mul(pair, ir.Constant(_INT64, 4 * PANEL)))
    return builder.bitcast(builder.load(at(builder, address, 64 * half, _WORDS), align=64), _PAIRS)


def _fetch(builder: Any, panel: Any, pair: Any) -> None:
    """Has the weights of a later pair brought into the second cache. Behind the last panel that may be nobody's memory,
    which a prefetch may name."""
    address = builder.add(panel, builder.mul(pair, ir.Constant(_INT64, 4 * PANEL)))
    for half in range(2):
        prefetch(builder, at(builder, address, AHEAD + 64 * half, ir.IntType(8)))


def _broadcast(builder: Any, words: Any, offset: int) -> Any:
    """Two inputs of a row, in every lane."""
    word = builder.load(at(builder, words, offset, _INT32), align=4)
    nothing = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(nothing, word, ir.Constant(_INT32, 0))
    return builder.bitcast(builder.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * 16)), _PAIRS)


def _multiply_add(builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
    return instruction(builder, _INSTRUCTION, _SUMS, [total, weights, inputs])
