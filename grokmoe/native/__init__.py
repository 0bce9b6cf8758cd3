"""Loops over tensors in memory, compiled by numba: what stands between the matrix products on a CPU.

A torch operation costs some microseconds whatever it does, and a decode step has hundreds of them between its products.
Here one call does what twenty operations did, on torch's own threads. See docs/decisions/0010-compiled-loops.md.
"""

from grokmoe.native.elements import as_f32, as_i32, clamped, exp2, put, share, wide
from grokmoe.native.loop import Loop, entry, inner, loop
from grokmoe.native.views import array

__all__ = ["Loop", "array", "as_f32", "as_i32", "clamped", "entry", "exp2", "inner", "loop", "put", "share", "wide"]
