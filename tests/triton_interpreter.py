"""Runs Triton kernels on the CPU, in Triton's interpreter, inside the test's own process.

    with interpreted():
        expert_mlp(...CPU tensors...)

TRITON_INTERPRET=1 would decide once per process, when `@triton.jit` executes, and the same kernels could
not be compiled next to it. Here ordinary jit functions are redirected to the interpreter for the length of
the block.

Within the block the interpreter is also
  * repaired for bfloat16 and float8_e4m3fn, which it keeps as raw integers and multiplies as such: values are
    widened to float32 for every operation and rounded to nearest even after it;
  * made strict: a load or store outside the tensors passed to the launch raises OutOfBounds. A mask that is
    missing often changes no result, and reading past a tensor goes unnoticed on a CPU; on a GPU it is a
    fault.

Written for Triton 3.7; it reaches into internals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBounds(Exception):
    """A kernel touched memory outside its tensors."""


@contextmanager
def interpreted(beside: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Within the block jit functions run in the interpreter, on CPU tensors.

    beside: tensors that kernels find by their addresses, not among their arguments.
    """
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET: these tests also need the compiler"
    # exp may overflow to infinity by design (tanh is 1 - 2 / (exp(2x) + 1)), and what is no number is computed with
    # like anything else; numpy warns, GPUs do not.
    with (
        pytest.MonkeyPatch.context() as patch,
        np.errstate(over="ignore", invalid="ignore", divide="ignore"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        patch.setattr(_reachable, "beside", [_byte_range(tensor) for tensor in beside if tensor.numel()])
        patch.setattr(JITFunction, "run", _run)
        patch.setattr(JITFunction, "__call__", _call)
        for name, method in _repaired_builder().items():
            patch.setattr(InterpreterBuilder, name, method, raising=False)
        yield


def _run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    values = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in (*args, *kwargs.values())]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    ranges = [_byte_range(tensor) for tensor in tensors if tensor.numel()]
    _reachable.ranges = np.array([*ranges, *_reachable.beside], dtype=np.uint64)
    try:
        InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)
    except interpreter.InterpreterError as error:
        # Triton wraps whatever a kernel raises and keeps only its text.
        raise error.__cause__ or error from None


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A jit function called from a kernel. Unlike InterpretedFunction's own, undoes what it patches in tl."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


class _Reachable:
    """Bytes the running kernel may touch: [begin, end) per tensor argument."""

    ranges = np.zeros((0, 2), dtype=np.uint64)
    beside: Sequence[tuple[int, int]] = ()

    def check(self, pointers: TensorHandle, mask: np.ndarray, verb: str) -> None:
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        first = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        inside = np.zeros(first.shape, dtype=bool)
        for begin, end in self.ranges:
            inside |= (first >= begin) & (first + size <= end)
        if not inside.all():
            raise OutOfBounds(f"{verb} of {(~inside).sum()} elements outside every tensor of the launch")


_reachable = _Reachable()


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar == tl.float8e4nv:
        narrow = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8)).view(torch.float8_e4m3fn)
        return TensorHandle(narrow.float().numpy(), tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """Rounds float32 to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _narrow8(values: np.ndarray) -> TensorHandle:
    """Rounds float32 to float8_e4m3fn as GPUs do: what is too large becomes the largest, NaN stays NaN."""
    narrow = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return TensorHandle(narrow.view(torch.uint8).numpy(), tl.float8e4nv)


_NARROW = (tl.bfloat16, tl.float8e4nv)


def _repaired_builder() -> dict[str, Callable[..., Any]]:
    """Methods for InterpreterBuilder, each around the one it replaces."""
    original = dict(vars(InterpreterBuilder))

    def convert(name: str) -> Callable[..., TensorHandle]:
        def method(self: Any, src: TensorHandle, dst_type: Any, *rest: Any) -> TensorHandle:
            if dst_type.scalar not in _NARROW and src.dtype.scalar not in _NARROW:
                return original[name](self, src, dst_type, *rest)
            wide = _widen(src)
            if dst_type.scalar == tl.float8e4nv:
                return _narrow8(wide.data.astype(np.float32))
            if dst_type.scalar == tl.bfloat16:
                return _narrow(wide.data.astype(np.float32))
            return self.cast_impl(wide, dst_type)

        return method

    def compute(name: str) -> Callable[..., TensorHandle]:
        def method(self: Any, *args: Any) -> TensorHandle:
            operands = [arg for arg in args if isinstance(arg, TensorHandle)]
            # The last operand is the one whose type the result has: a dot's accumulator, a select's value.
            narrow = operands[-1].dtype.scalar == tl.bfloat16
            wide = [_widen(arg) if isinstance(arg, TensorHandle) else arg for arg in args]
            result = original[name](self, *wide)
            return _narrow(result.data) if narrow and result.data.dtype != np.bool_ else result

        return method

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> TensorHandle:
        _reachable.check(pointers, mask.data, "load")
        return original["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        _reachable.check(pointers, mask.data, "store")
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    def bf16(self: Any, value: float) -> TensorHandle:
        return _narrow(np.array([value], dtype=np.float32))

    def dot(self: Any, a: TensorHandle, b: TensorHandle, total: TensorHandle, *rest: Any) -> TensorHandle:
        """In float64, rounded once: numpy's float32 products have bits that depend on how many rows there are."""
        wide = [_widen(handle).data.astype(np.float64) for handle in (a, b)]
        return TensorHandle(np.matmul(*wide).astype(np.float32) + total.data, total.dtype.scalar)

    computing = ("binary_op", "ternary_op", "unary_op", "create_fma")
    converting = ("cast_impl", "create_fp_to_fp")
    repaired = {name: compute(name) for name in computing} | {name: convert(name) for name in converting}
    repaired["create_dot"] = dot
    return repaired | {"create_masked_load": load, "create_masked_store": store, "get_bf16": bf16}
