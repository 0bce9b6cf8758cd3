"""What compiled code calls that is not its own: other entries by their address, the team's barrier, the CPU's clock."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from grokmoe.native.elements import thread_index
from grokmoe.native.team import BARRIER_SYMBOL

__all__ = ["barrier", "call", "cycles", "thread_index"]

barrier = types.ExternalFunction(BARRIER_SYMBOL, types.void())
"""Waits for the other threads of the team; of a thread that is alone, nothing."""


@intrinsic
def call(typing: Any, address: Any, params: Any) -> Any:
    """Calls the entry at an address with its parameters."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(64).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def cycles(typing: Any) -> Any:
    """The CPU's clock."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "llvm.readcyclecounter"
        kind = ir.FunctionType(ir.IntType(64), [])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [])

    return types.int64(), generate
