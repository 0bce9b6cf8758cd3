"""What do laid-out weights and fused activations bring to the expert MLPs on this CPU, in time and exactness?

    python benchmarks/experts.py [--help]

Prints a table and, as the last line, one JSON object. The contenders:

    fused N   the worker's path: weights laid out for N rows, GELU and multiplication inside the products
    int8      weights in int8, as `--expert-dtype int8` has them
    apart     the same weights, GELU and multiplication as operations of their own
    linear    weights as in the checkpoint: what one would write in plain torch

"one expert" calls go round over all experts, so that weights come from memory and not from a cache; "all experts" is
one call with the rows spread evenly. Runs alternate between the contenders; times are medians over the rounds, and
minima for a machine that others use, too. GF/s counts 6 N D F. The error is the RMS relative to float64's, over the
same weights and rows.

Shapes: N rows, E experts, D hidden, F ffn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from expert_worker.kernels import cpu, cpu_int8
from grokmoe import packed_linear
from grokmoe.model_config import Gelu
from grokmoe.packed_linear import PackedLinear

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Mlp = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

HEADER = f"{'case':16} {'rows':>5} {'dtype':5} {'contender':10} {'ms':>9} {'min ms':>9} {'GF/s':>6} {'error':>8}"
LINE = "{case:16} {rows:5d} {dtype:5} {contender:10} {ms:9.3f} {min_ms:9.3f} {gflops:6.0f} {error:8.1e}"


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int
    num_busy: int
    """Experts that get rows in one call, each as many."""

    def calls(self, num_experts: int) -> list[list[int]]:
        """Counts of the calls of one round."""
        each = self.num_rows // self.num_busy
        if self.num_busy == num_experts:
            return [[each] * num_experts]
        return [[each if e == busy else 0 for e in range(num_experts)] for busy in range(num_experts)]


class Apart:
    """One expert on laid-out weights, with nothing fused."""

    def __init__(self, weights: Weights) -> None:
        self._gate, self._up, self._down = map(PackedLinear, weights)

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self._down(functional.gelu(self._gate(x_ND)).mul_(self._up(x_ND)))


class Linear:
    """One expert in plain torch."""

    def __init__(self, weights: Weights) -> None:
        self._gate_FD, self._up_FD, self._down_DF = weights

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        h_NF = functional.gelu(functional.linear(x_ND, self._gate_FD)).mul_(functional.linear(x_ND, self._up_FD))
        return functional.linear(h_NF, self._down_DF)


def looped(experts: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Mlp:
    def run(rows_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        parts = rows_ND.split(list(counts))
        return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True) if len(part)])

    return run


def fused(weights: Sequence[Weights], pack_rows: int) -> Mlp:
    packed_linear.PACK_ROWS = pack_rows
    experts = []
    for gate_FD, up_FD, down_DF in weights:
        expert = cpu.PackedExpert()
        expert.gate, expert.up, expert.down = PackedLinear(gate_FD), PackedLinear(up_FD), PackedLinear(down_DF)
        experts.append(expert)
    return lambda rows_ND, counts: cpu.expert_mlp(rows_ND, counts, experts, Gelu.ERF)


def quantised(weights: Sequence[Weights]) -> Mlp:
    experts = []
    for gate_FD, up_FD, down_DF in weights:
        expert = cpu_int8.QuantisedExpert(*down_DF.shape)
        expert.gate_up.put(gate_FD, cpu_int8.GATE)
        expert.gate_up.put(up_FD, cpu_int8.UP)
        expert.down.put(down_DF)
        experts.append(expert)
    ffn_size = weights[0][0].shape[0]
    tables = cpu_int8.tables_of(experts)
    return lambda rows_ND, counts: cpu_int8.expert_mlp(rows_ND, torch.tensor(counts), tables, ffn_size, Gelu.ERF)


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def measure(
    case: Case, dtype: str, weights: Sequence[Weights], contenders: dict[str, Mlp], repeats: int
) -> list[dict[str, object]]:
    D, F = weights[0][0].shape[1], weights[0][0].shape[0]
    rows_ND = torch.randn(case.num_rows, D, dtype=DTYPES[dtype])
    calls = case.calls(len(weights))
    exact = looped([Linear((gate.double(), up.double(), down.double())) for gate, up, down in weights[:1]])
    first = calls[0][0]
    expected = exact(rows_ND[:first].double(), [first])
    errors = {name: relative_rms(run(rows_ND, calls[0])[:first], expected) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            began = time.perf_counter()
            for counts in calls:
                run(rows_ND, counts)
            times[name].append((time.perf_counter() - began) / len(calls))
    return [
        {
            "case": case.name,
            "rows": case.num_rows,
            "dtype": dtype,
            "contender": name,
            "ms": statistics.median(spent) * 1e3,
            "min_ms": min(spent) * 1e3,
            "gflops": 6 * case.num_rows * D * F / statistics.median(spent) / 1e9,
            "error": errors[name],
        }
        for name, spent in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=1024, help="D (default %(default)s)")
    parser.add_argument("--ffn", type=int, default=4096, help="F (default %(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="E (default %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128], help="of one expert")
    parser.add_argument("--grouped-rows", type=int, nargs="*", default=[8, 64, 256, 1024], help="of all experts")
    parser.add_argument(
        "--pack-rows", type=int, nargs="+", default=[packed_linear.PACK_ROWS], help="row counts to lay weights out for"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    D, F, E = args.hidden, args.ffn, args.experts
    cases = [Case("one expert", n, 1) for n in args.rows]
    cases += [Case("all experts", n, E) for n in args.grouped_rows]
    print(HEADER)
    table = []
    for dtype in args.dtypes:
        weights: list[Weights] = [
            (
                torch.randn(F, D).mul_(D**-0.5).to(DTYPES[dtype]),
                torch.randn(F, D).mul_(D**-0.5).to(DTYPES[dtype]),
                torch.randn(D, F).mul_(F**-0.5).to(DTYPES[dtype]),
            )
            for _ in range(E)
        ]
        contenders = {f"fused {n}": fused(weights, n) for n in args.pack_rows}
        contenders["int8"] = quantised(weights)
        contenders["apart"] = looped([Apart(each) for each in weights])
        contenders["linear"] = looped([Linear(each) for each in weights])
        for case in cases:
            for row in measure(case, dtype, weights, contenders, args.repeats):
                table.append(row)
                print(LINE.format(**row), flush=True)
    print(json.dumps({"benchmark": "experts", "settings": vars(args), "rows": table}))


if __name__ == "__main__":
    main()
