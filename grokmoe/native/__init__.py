"""Loops over tensors in memory, compiled by numba: what stands between the matrix products on a CPU, and some products.

A torch operation costs some microseconds whatever it does, and a decode step has hundreds of them between its products.
Here one call does what twenty operations did, on torch's own threads. See docs/decisions/0010-compiled-loops.md.
"""

from grokmoe.native.dots import MOST_ROWS, PANEL, UNROLL, dot_panel, has_dots
from grokmoe.native.elements import as_f32, as_i32, clamped, exp2, put, share, wide
from grokmoe.native.loop import Loop, entry, inner, loop
from grokmoe.native.program import Program
from grokmoe.native.turns import take
from grokmoe.native.views import array

__all__ = [
    "MOST_ROWS",
    "PANEL",
    "UNROLL",
    "Loop",
    "Program",
    "array",
    "as_f32",
    "as_i32",
    "clamped",
    "dot_panel",
    "entry",
    "exp2",
    "has_dots",
    "inner",
    "loop",
    "put",
    "share",
    "take",
    "wide",
]
