"""Ways for the ranks of an attention worker to add up their parts: their cost, and whether a row's bits are its own.

python -m benchmarks.ranks [--ranks 2,4] [--width 1024] [--rows 1,32,512]

Every rank is a process, over loopback, with one thread. Of each way: microseconds a sum (median and the worst tenth),
and how many of 64 rows have other bits than when they are summed alone. Sums are of float32 parts [rows, width].

    all_reduce    gloo's own, in the order of its ring
    all_gather    gloo's all-gather, then added up in the order of the ranks
    exchange      messages from rank to rank, then added up in the order of the ranks
    shares        messages: each rank adds up a share of the rows, then all exchange the sums

An attention worker takes the third for small parts and two ranks, and the fourth otherwise
(attention_worker/sharding/ranks.py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from attention_worker.ranks.meeting import Meeting
from attention_worker.sharding import Shard
from attention_worker.sharding import ranks as sharded
from attention_worker.sharding.messages import DeviceMessages, Messages
from attention_worker.sharding.ranks import Ranks
from grokmoe.model_config import GROK1

LOOPBACK = "127.0.0.1"
SECONDS = 1.5
"""How long each way is measured."""

NUM_LOOKED_AT = 64
"""Rows whose bits are compared."""

Way = Callable[[torch.Tensor], torch.Tensor]


def ways(host: Messages, group: Any) -> dict[str, Way]:
    """By name. host: messages among all ranks; group: the gloo group below them."""
    collectives = DeviceMessages(group, host.timeout)
    shard = Shard.of(GROK1, host.rank, host.size)

    def all_reduce(part_TD: torch.Tensor) -> torch.Tensor:
        total_TD = part_TD.clone()
        group.allreduce([total_TD]).wait()
        return total_TD

    def ours(messages: Messages, share_bytes: int) -> Way:
        ranks = Ranks(messages, shard, GROK1.vocab_size)

        def add(part_TD: torch.Tensor) -> torch.Tensor:
            sharded.SHARE_BYTES = share_bytes
            return ranks.sum(part_TD, torch.float32)

        return add

    found = {"all_reduce": all_reduce, "all_gather": ours(collectives, 1 << 60), "exchange": ours(host, 1 << 60)}
    # Of two ranks each has half of the rows either way.
    return found if host.size == 2 else found | {"shares": ours(host, 0)}


def rank_process(rank: int, size: int, port: Any, sizes: list[tuple[int, int]], answer: Any) -> None:
    """One rank. port: where they meet, set by the first. sizes: (rows, width). answer: a queue for the first's."""
    torch.set_num_threads(1)
    if rank:
        while not port.value:
            time.sleep(0.01)
    meeting = Meeting(rank, size, LOOPBACK, port.value)
    port.value = int(meeting.address.rpartition(":")[2])
    host = meeting.connect(torch.device("cpu")).host
    group = host._group  # type: ignore[attr-defined]
    for num_rows, width in sizes:
        for name, way in ways(host, group).items():
            part_TD = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(rank))
            figures = (*_measure(way, part_TD, host, group), _num_moved(way, width, rank))
            if rank == 0:
                answer.put((num_rows, width, name, *figures))
    host.all(torch.zeros(1))


def _measure(way: Way, part_TD: torch.Tensor, host: Messages, group: Any) -> tuple[float, float]:
    """(median, worst tenth) in seconds. All ranks do as many."""
    for _ in range(10):
        way(part_TD)
    spent: list[float] = []
    end = time.perf_counter() + SECONDS
    while True:
        for _ in range(10):
            begin = time.perf_counter()
            way(part_TD)
            spent.append(time.perf_counter() - begin)
        is_over = torch.tensor([time.perf_counter() > end])
        if host.all(is_over)[0].item():
            return statistics.median(spent), statistics.quantiles(spent, n=10)[-1]


def _num_moved(way: Way, width: int, rank: int) -> int:
    """Rows that have other bits alone than among others."""
    parts_TD = torch.randn(NUM_LOOKED_AT, width, generator=torch.Generator().manual_seed(rank))
    together_TD = way(parts_TD)
    return sum(
        not torch.equal(way(parts_TD[row : row + 1]), together_TD[row : row + 1]) for row in range(NUM_LOOKED_AT)
    )


def measure(size: int, sizes: list[tuple[int, int]]) -> list[dict[str, object]]:
    """A row of figures per size and way."""
    context = multiprocessing.get_context("spawn")
    port, answer = context.Value("i", 0), context.Queue()
    processes = [
        context.Process(target=rank_process, args=(rank, size, port, sizes, answer), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    names = len(sizes) * (3 if size == 2 else 4)
    found = [answer.get(timeout=300) for _ in range(names)]
    for process in processes:
        process.join()
    keys = ("rows", "width", "way", "seconds", "seconds_p90", "rows_moved")
    return [{"ranks": size, **dict(zip(keys, figures, strict=True))} for figures in found]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--width", type=int, default=1024, help="of a row")
    parser.add_argument("--rows", default="1,32,512", help="numbers of rows")
    options = parser.parse_args()
    sizes = [(int(num_rows), options.width) for num_rows in options.rows.split(",")]
    assert dist.is_gloo_available()
    found = [each for size in options.ranks.split(",") for each in measure(int(size), sizes)]
    print(f"{'ranks':>5} {'rows':>5} {'way':<11} {'us':>7} {'p90':>7}  rows with other bits alone")
    for each in found:
        print(
            f"{each['ranks']:>5} {each['rows']:>5} {each['way']:<11} {1e6 * each['seconds']:7.0f} "  # type: ignore[operator]
            f"{1e6 * each['seconds_p90']:7.0f}  {each['rows_moved']} of {NUM_LOOKED_AT}"  # type: ignore[operator]
        )
    print(json.dumps({"benchmark": "ranks", "figures": found}))


if __name__ == "__main__":
    main()
