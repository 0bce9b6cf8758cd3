"""Counts of one call: of functions in Python, of operations of torch and of the bytes they allocate. They do not depend
on time, load or machine; those of functions do on the version of Python."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


def calls_of(run: Callable[[], object]) -> int:
    """Functions called by one call, those written in C included. The second call is counted: the first may build what
    later ones find."""
    run()
    count = 0

    def note(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # finalisers would be counted with whoever allocates
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(each) for each in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.num_bytes += sum(each.untyped_storage().nbytes() for each in _tensors(out) if _address(each) not in given)
        return out


def operations_of(run: Callable[[], object]) -> tuple[int, int]:
    """Operations of torch in one call, and the bytes of what they returned that is new."""
    run()
    with _Operations() as operations:
        run()
    return operations.count, operations.num_bytes


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
