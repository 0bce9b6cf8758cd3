"""Dot products of int8 in compiled loops: a few rows with a panel of a weight, on AVX-512's own instruction.

A *panel* is 64 rows of a weight [O, I], stored as [I / 4, 64, 4] bytes, each the weight plus 128: four inputs of all 64
outputs lie side by side, 256 bytes, which is what `vpdpbusd` takes in four instructions. It multiplies unsigned with
signed bytes and adds up in 32 bits; the offset comes off by starting from -128 times the sum of the row.

Sums of integers are exact in any order. So the plain loop that stands in where the instruction is missing gives the
same bits, and so does any number of rows.

LLVM forms no such instruction from loops, so the loop is put together here, one per number of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from grokmoe.native.building import at, for_each_count, instruction
from grokmoe.native.loop import inner
from grokmoe.native.views import array

STEP_INPUTS = 4
"""Inputs that one instruction adds up."""

PANEL_OUTPUTS = 64
"""Outputs of a panel: four registers of sums for a row."""

MOST_ROWS = 6
"""Rows of one pass: 24 registers of sums, four of weights, one of inputs, of 32."""

WEIGHT_OFFSET = 128
"""What is added to a weight to make it unsigned."""

_INSTRUCTION = "llvm.x86.avx512.vpdpbusd.512"
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(_INT32, 16)
_REGISTERS = PANEL_OUTPUTS // 16


@functools.cache
def _operand_type() -> ir.VectorType | None:
    """What this LLVM takes the bytes as, which differs between its versions; None: it has no such instruction."""
    for operand in (ir.VectorType(ir.IntType(8), 64), _SUMS):
        try:
            text = f"declare {_SUMS} @{_INSTRUCTION}({_SUMS}, {operand}, {operand})\n"
            module = llvmlite.binding.parse_assembly(text)
            module.verify()
        except RuntimeError:
            continue
        if f"{operand}, {operand})" in str(module):  # a declaration of another version is put right by the parser
            return operand
    return None


def has_int8_dots() -> bool:
    """Whether the CPU that loops are compiled for has the instruction."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512vnni" in features.split(",") and _operand_type() is not None


@inner
def dot_plain(num_rows: int, x: int, x_stride: int, panel: int, num_steps: int, sums: int) -> None:
    """sums[n, o] += sum over i of x[n, i] * (weight[o, i] + 128), int32.

    num_rows: 1 to MOST_ROWS. num_steps: a fourth of the inputs, at least 1. The others are addresses: x of int8 rows
    that are x_stride bytes apart, panel of the weights, sums of [num_rows, PANEL_OUTPUTS].
    """
    panel_SOI = array(np.uint8, panel, (num_steps, PANEL_OUTPUTS, STEP_INPUTS))
    sums_NO = array(np.int32, sums, (num_rows, PANEL_OUTPUTS))
    for row in range(num_rows):
        x_SI = array(np.int8, x + row * x_stride, (num_steps, STEP_INPUTS))
        for step in range(num_steps):
            for output in range(PANEL_OUTPUTS):
                for i in range(STEP_INPUTS):
                    sums_NO[row, output] += np.int32(panel_SOI[step, output, i]) * np.int32(x_SI[step, i])


@intrinsic
def _dot(typing: Any, num_rows: Any, x: Any, x_stride: Any, panel: Any, num_steps: Any, sums: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for_each_count(builder, args[0], MOST_ROWS, lambda num_rows: _pass(builder, num_rows, *args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _pass(builder: Any, num_rows: int, x: Any, x_stride: Any, panel: Any, num_steps: Any, sums: Any) -> None:
    """The loop over steps for so many rows, with all sums in registers."""
    places = [(row, register) for row in range(num_rows) for register in range(_REGISTERS)]
    before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    rows = [builder.add(x, builder.mul(x_stride, _INT64(row))) for row in range(num_rows)]
    starts = [builder.load(at(builder, sums, 64 * place, _SUMS), align=4) for place in range(len(places))]
    builder.branch(body)
    builder.position_at_end(body)
    step = builder.phi(_INT64)
    held = [builder.phi(_SUMS) for _ in places]
    weights = builder.add(panel, builder.mul(step, _INT64(STEP_INPUTS * PANEL_OUTPUTS)))
    weights = [builder.load(at(builder, weights, 64 * register, _SUMS), align=1) for register in range(_REGISTERS)]
    inputs = [_broadcast(builder, builder.add(row, builder.mul(step, _INT64(STEP_INPUTS)))) for row in rows]
    new = [
        _multiply_add(builder, total, weights[register], inputs[row])
        for (row, register), total in zip(places, held, strict=True)
    ]
    following = builder.add(step, _INT64(1))
    step.add_incoming(_INT64(0), before)
    step.add_incoming(following, body)
    for phi, start, total in zip(held, starts, new, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(total, body)
    builder.cbranch(builder.icmp_signed("<", following, num_steps), body, after)
    builder.position_at_end(after)
    for place, total in enumerate(new):
        builder.store(total, at(builder, sums, 64 * place, _SUMS), align=4)


def _broadcast(builder: Any, address: Any) -> Any:
    """Four inputs of a row, in every lane."""
    four = builder.load(at(builder, address, 0, _INT32), align=1)
    nothing = ir.Constant(_SUMS, ir.Undefined)
    first = builder.insert_element(nothing, four, _INT32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_SUMS, [0] * 16))


def _multiply_add(builder: Any, total: Any, weights: Any, inputs: Any) -> Any:
    operand = _operand_type()
    operands = [total, builder.bitcast(weights, operand), builder.bitcast(inputs, operand)]
    return instruction(builder, _INSTRUCTION, _SUMS, operands)


if has_int8_dots():

    @inner
    def dot_int8(num_rows: int, x: int, x_stride: int, panel: int, num_steps: int, sums: int) -> None:
        """`dot_plain`, by the instruction that is made for it."""
        _dot(num_rows, x, x_stride, panel, num_steps, sums)
else:
    dot_int8 = dot_plain
