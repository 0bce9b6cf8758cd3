"""Compiles Triton kernels without a GPU, through the ordinary launch code, and reads off the result.

    with compiling(SM_90) as kernels:
        expert_mlp(...meta tensors of full size...)
    kernels[0].name, kernels[0].grid, kernels[0].registers

A stub stands in for the driver and every launch stops after the compiler, so argument types and alignment are
derived from the real arguments. Nothing is computed, and meta tensors take no memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SM_80 = GPUTarget("cuda", 80, 32)
SM_90 = GPUTarget("cuda", 90, 32)
SM_100 = GPUTarget("cuda", 100, 32)
GFX_942 = GPUTarget("hip", "gfx942", 64)

SHARED_LIMIT = {SM_80: 163 * 1024, SM_90: 227 * 1024, SM_100: 227 * 1024, GFX_942: 64 * 1024}
"""Bytes of shared memory one program may use. The compiler does not check this."""


@dataclass
class Compiled:
    """One launch: what it would have run. `opcodes` counts machine instructions by their full mnemonic."""

    name: str
    grid: tuple[int, ...]
    shared: int
    registers: int = 0
    stack: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of the prefixes."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefixes))


def assert_fits(target: GPUTarget, kernel: Compiled) -> None:
    """It keeps everything in registers and in as much shared memory as there is, and its grid is one."""
    assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
    assert kernel.count("LDL", "STL", "scratch_") == 0, f"{kernel.name} spills: {kernel.opcodes}"
    assert kernel.shared <= SHARED_LIMIT[target], f"{kernel.name} takes {kernel.shared} shared bytes"
    assert all(size <= 65535 for size in kernel.grid[1:]), f"grid {kernel.grid} exceeds the limit of later axes"


class _StubDriver:
    """As much of a driver as the path from a launch to the compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Keys the kernels' caches: one "device" per target, and none that a real driver would name.
        return f"stub {self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Within the block launches compile for `target` and run nothing. Yields the launches, in order."""
    launches: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        read = _read_cubin if target.backend == "cuda" else _read_amdgcn
        launches.append(read(kernel, Compiled(kernel.metadata.name, tuple(grid), kernel.metadata.shared)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", _StubDriver(target))
        patch.setattr(JITFunction, "run", compile_only)
        yield launches


def _read_cubin(kernel: Any, compiled: Compiled) -> Compiled:
    usage = _cuobjdump("--dump-resource-usage", kernel)
    compiled.registers = int(re.search(r"REG:(\d+)", usage)[1])
    compiled.stack = int(re.search(r"STACK:(\d+)", usage)[1])
    # A line of code: /*0a30*/  @!P0 LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
    _tally(compiled, r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", _cuobjdump("--dump-sass", kernel))
    return compiled


def _cuobjdump(what: str, kernel: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amdgcn(kernel: Any, compiled: Compiled) -> Compiled:
    text = kernel.asm["amdgcn"]
    compiled.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    compiled.stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    _tally(compiled, r"^\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+)", text)
    return compiled


def _tally(compiled: Compiled, pattern: str, text: str) -> None:
    for match in re.finditer(pattern, text, re.MULTILINE):
        compiled.opcodes[match[1]] = compiled.opcodes.get(match[1], 0) + 1
