"""A prompt as rows of numbers in place of token ids. Needs neither torch nor numpy: any of their arrays will do."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from grokmoe.v1 import tensor_pb2

_ITEM_SIZE = {"float32": 4, "bfloat16": 2}
_WIRE = {"float32": tensor_pb2.DATA_TYPE_FLOAT32, "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16}


@dataclasses.dataclass(frozen=True)
class Embeds:
    """A prompt that goes past the model's vocabulary: for each token what its embedding would give, multiplier included.

    data: the numbers, little-endian, row after row. shape: (tokens, hidden size of the model).
    dtype: "float32" or "bfloat16".
    """

    data: bytes = dataclasses.field(repr=False)
    shape: tuple[int, int]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_SIZE:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(_ITEM_SIZE)}")
        needed = self.shape[0] * self.shape[1] * _ITEM_SIZE[self.dtype]
        if len(self.data) != needed:
            raise ValueError(f"data has {len(self.data)} bytes, shape {self.shape} of {self.dtype} needs {needed}")

    @classmethod
    def of(cls, array: Any, dtype: str = "float32") -> Self:
        """From a two-dimensional array, such as numpy's, or `tensor.numpy()` of torch's.

        dtype: what it holds. Arrays of bfloat16 are rare; any array of items of two bytes is taken for its bits, such as
        `tensor.view(torch.int16).numpy()`. Raises TypeError for an array of another kind, ValueError for another form.
        """
        view = memoryview(array)
        if dtype == "float32" and view.format not in ("f", "<f", "=f"):
            raise TypeError(f"an array of items {view.format!r} is not one of float32")
        if view.ndim != 2:
            raise ValueError(f"has {view.ndim} dimensions, must have 2: tokens, hidden size")
        if view.itemsize != _ITEM_SIZE.get(dtype, view.itemsize):
            raise TypeError(f"an array of items of {view.itemsize} bytes is not one of {dtype}")
        return cls(view.tobytes(), (view.shape[0], view.shape[1]), dtype)

    def to_message(self) -> tensor_pb2.Tensor:
        """As a request carries it."""
        return tensor_pb2.Tensor(dtype=_WIRE[self.dtype], shape=self.shape, data=self.data)
