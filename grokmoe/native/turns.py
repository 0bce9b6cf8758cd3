"""Work that threads take as they come: a thread that the machine holds up takes less of it."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def take(typing: Any, params: Any, index: Any) -> Any:
    """params[index], which grows by one: the next unit of work, told to one thread only. params: an entry's."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64), types.intp), generate
