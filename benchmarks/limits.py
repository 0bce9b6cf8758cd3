"""What this machine can do at best: bytes read, products of matrices, messages between two processes.

    python -m benchmarks.limits

The floors of other benchmarks are made of these figures, measured in the same run: the bandwidth of a machine that
others use, too, drifts by half within an hour. Each figure is the best of several tries. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.echo import Echo
from grokmoe.packed_linear import PackedLinear

WORKING_SETS = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 512 << 20)
"""Bytes gone round over again and again: from what the caches of a core hold to what none does."""

MESSAGES = (256, 4 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20)
"""Bytes of a message."""

PRODUCT_ROWS, PRODUCT_INPUTS, PRODUCT_OUTPUTS = 1024, 1024, 4096
"""A product large enough that nothing but multiplying takes time."""

TRIES = 9

COLD_TRIES = 60


@dataclasses.dataclass(frozen=True)
class Limits:
    """bandwidth: (bytes of the working set, bytes/s). flops: per second, of laid-out products in the model's type.

    sockets, grpc: (bytes of a message, seconds until it has come back), over a Unix socket, bare and with grpc.aio.
    cold: by how much longer a piece of Python takes if between two runs of it so many bytes are read that nothing of it
    is left in the caches.
    """

    bandwidth: tuple[tuple[int, float], ...]
    flops: float
    sockets: tuple[tuple[int, float], ...]
    grpc: tuple[tuple[int, float], ...]
    cold: float = 1.0

    def read_seconds(self, num_bytes: float, working_set: float) -> float:
        """Least time to read so many bytes of a working set of so many."""
        rate = next((rate for size, rate in self.bandwidth if size >= working_set), self.bandwidth[-1][1])
        return num_bytes / rate

    def multiply_seconds(self, flops: float) -> float:
        """Least time for products with so many operations."""
        return flops / self.flops

    def hop_seconds(self, num_bytes: float) -> float:
        """Least time for a message of so many bytes to another process and one of the same size back."""
        return between(self.sockets, num_bytes)

    def grpc_seconds(self, num_bytes: float) -> float:
        """The same by gRPC's asynchronous streams."""
        return between(self.grpc, num_bytes)


def between(points: tuple[tuple[int, float], ...], x: float) -> float:
    """The value at x, on straight lines between points of ascending x; beyond the last in proportion to x."""
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1] * x / points[-1][0]


def best_seconds(run: Callable[[], object], tries: int = TRIES) -> float:
    """The shortest of several tries; one before them does not count."""
    run()
    return min(_seconds(run) for _ in range(tries))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.inference_mode()
def read_rate(working_set: int) -> float:
    """Bytes per second, all threads, of a sum over so many bytes."""
    data = torch.ones(working_set // 4)
    return working_set / best_seconds(data.sum, max(TRIES, (64 << 20) // working_set))


@torch.inference_mode()
def product_rate(dtype: torch.dtype) -> float:
    """Operations per second, all threads, of a large product with weights that are laid out."""
    linear = PackedLinear(torch.randn(PRODUCT_OUTPUTS, PRODUCT_INPUTS).to(dtype))
    x_NI = torch.randn(PRODUCT_ROWS, PRODUCT_INPUTS).to(dtype)
    return 2 * PRODUCT_ROWS * PRODUCT_INPUTS * PRODUCT_OUTPUTS / best_seconds(lambda: linear(x_NI))


@torch.inference_mode()
def cold_factor() -> float:
    """See Limits; of medians, since what is compared is the usual and not the best. In one process: one that sleeps
    meanwhile would have to be woken, too."""
    data, x = torch.ones(WORKING_SETS[-1] // 8), torch.ones(8, 64)

    def code() -> None:
        """Of the kind that there is between products: objects, and small operations of torch."""
        table = {str(number): [number] * 4 for number in range(200)}
        json.loads(json.dumps(table))
        for _ in range(5):
            torch.cat([torch.softmax(x, -1), x])

    warm, cold = (_usual_seconds(code, between) for between in (code, data.sum))
    return max(1.0, cold / warm)


def _usual_seconds(run: Callable[[], object], between: Callable[[], object]) -> float:
    seconds = []
    for _ in range(COLD_TRIES):
        between()
        seconds.append(_seconds(run))
    return statistics.median(seconds)


async def measure(dtype: torch.dtype) -> Limits:
    """A few seconds. The threads are torch's, as they are set."""
    async with Echo() as echo:
        sockets = tuple((size, echo.socket_seconds(size)) for size in MESSAGES)
        grpc = tuple([(size, await echo.grpc_seconds(size)) for size in MESSAGES])
    bandwidth = tuple((size, read_rate(size)) for size in WORKING_SETS)
    return Limits(bandwidth, product_rate(dtype), sockets, grpc, cold_factor())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    limits = asyncio.run(measure(getattr(torch, parser.parse_args().dtype)))
    for size, rate in limits.bandwidth:
        print(f"read, working set {size / 2**20:5.0f} MiB   {rate / 1e9:8.1f} GB/s")
    print(f"products                     {limits.flops / 1e9:8.1f} GFLOP/s")
    for (size, bare), (_, grpc) in zip(limits.sockets, limits.grpc, strict=True):
        print(f"there and back, {size / 1024:7.2f} KiB   {bare * 1e6:8.0f} us bare, {grpc * 1e6:8.0f} us by gRPC")
    print(f"cold caches                  {limits.cold:8.2f} times as long for Python")
    print(json.dumps({"benchmark": "limits", **dataclasses.asdict(limits)}))


if __name__ == "__main__":
    main()
