"""Addresses as arrays, in compiled code."""

from __future__ import annotations

from typing import Any

from numba import carray, types
from numba.extending import intrinsic, overload

from grokmoe.native.elements import FLAGS


@intrinsic
def _pointer(typing: Any, element: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(element, types.intp), generate


def array(element: Any, address: Any, shape: Any) -> Any:
    """What is at an address, as an array. element: numpy's type; np.uint16 stands for bfloat16."""
    raise NotImplementedError("for compiled code")


@overload(array, jit_options=FLAGS)
def _array(element, address, shape):
    return lambda element, address, shape: carray(_pointer(element, address), shape)
