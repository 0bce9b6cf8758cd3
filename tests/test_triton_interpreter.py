"""The interpreter computes bfloat16 as torch does, sees wild accesses, leaves Triton as it found it."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tests.triton_interpreter import OutOfBounds, interpreted

BLOCK = 256


@triton.jit
def _helper(a, b):
    return tl.maximum(a, b) - tl.cdiv(3, 2)


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + BLOCK + i, a * b - a)
    tl.store(out_ptr + 2 * BLOCK + i, tl.where(a < b, a, -b))
    tl.store(out_ptr + 3 * BLOCK + i, _helper(a, b))
    tl.store(out_ptr + 4 * BLOCK + i, (a.to(tl.float32) * 1.1).to(tl.bfloat16))


@triton.jit
def round_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def copy_kernel(x_ptr, out_ptr, num_loaded, num_stored, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < num_loaded, other=0.0)
    tl.store(out_ptr + i, x, mask=i < num_stored)


def test_bf16_arithmetic() -> None:
    a, b = torch.randn(2, BLOCK).bfloat16()
    out = torch.empty(5, BLOCK, dtype=torch.bfloat16)
    with interpreted():
        arithmetic_kernel[(1,)](a, b, out, BLOCK=BLOCK)
    scaled = (a.float() * 1.1).bfloat16()
    expected = [a + b, a * b - a, torch.where(a < b, a, -b), torch.maximum(a, b) - 2, scaled]
    assert torch.equal(out, torch.stack(expected))


def test_bf16_rounding() -> None:
    """To nearest even, at ties, at the edges of the range, and for what is not a number."""
    edges = [0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan]
    ties = [1 + k * 2**-8 for k in range(8)] + [1 + k * 2**-8 + 2**-20 for k in range(8)]
    x = torch.tensor(edges + ties)
    x = torch.cat([x, torch.randn(BLOCK - len(x))])
    out = torch.empty(BLOCK, dtype=torch.bfloat16)
    with interpreted():
        round_kernel[(1,)](x, out, BLOCK=BLOCK)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_loaded", "num_stored"), [(11, 10), (10, 11)])
def test_access_outside_the_tensors_raises(num_loaded: int, num_stored: int) -> None:
    x, out = torch.zeros(2, 64)[:, :10].unbind()
    with interpreted():
        copy_kernel[(1,)](x, out, 10, 10, BLOCK=16)
        with pytest.raises(OutOfBounds, match="1 elements"):
            copy_kernel[(1,)](x, out, num_loaded, num_stored, BLOCK=16)


def test_leaves_triton_as_it_was() -> None:
    namespaces = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, JITFunction)
    before = [dict(vars(namespace)) for namespace in namespaces]
    test_bf16_arithmetic()
    assert [dict(vars(namespace)) for namespace in namespaces] == before
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        _helper(1, 2)
