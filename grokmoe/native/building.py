"""What loops that are put together by hand share: compiled code in LLVM's own terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

_INT64 = ir.IntType(64)


def for_each_count(builder: Any, count: Any, most: int, build: Callable[[int], None]) -> None:
    """One loop per number of rows from 1 to `most`, of which the one for `count` is run. build: writes the one for a
    number of rows; it may write more blocks."""
    end, never = builder.append_basic_block("dots.end"), builder.append_basic_block("dots.never")
    switch = builder.switch(count, never)
    builder.position_at_end(never)
    builder.unreachable()
    for number in range(1, most + 1):
        block = builder.append_basic_block(f"dots.{number}")
        switch.add_case(ir.Constant(count.type, number), block)
        builder.position_at_end(block)
        build(number)
        builder.branch(end)
    builder.position_at_end(end)


def at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """What is `offset` bytes behind an address, as a pointer."""
    return builder.inttoptr(builder.add(address, ir.Constant(_INT64, offset)), kind.as_pointer())


def instruction(builder: Any, name: str, result: Any, operands: list[Any]) -> Any:
    """Calls one of LLVM's functions that stand for an instruction of the CPU."""
    module = builder.module
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(module.globals.get(name) or ir.Function(module, kind, name), operands)


def prefetch(builder: Any, address: Any) -> None:
    """Has a line of memory brought into the second cache, to be read."""
    reading, second_cache, data = (ir.Constant(ir.IntType(32), value) for value in (0, 2, 1))
    instruction(builder, "llvm.prefetch.p0", ir.VoidType(), [address, reading, second_cache, data])
