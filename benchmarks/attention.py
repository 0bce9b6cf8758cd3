"""How fast and how exact is paged attention on this CPU, next to the plain formula on contiguous caches?

    python benchmarks/attention.py [--help]

Prints a table and, as the last line, one JSON object. The formula is what one would write without pages: one
product over the whole contiguous cache. It needs no gather, and in bfloat16 it rounds its scores, so the error of
both is shown, relative to the float32 definition. Runs alternate between the two. Where other programs take the
cores, every torch call waits for the slower thread and times mean little: use --cpu-time there.

GF/s counts both products over the pairs that the causal mask leaves; GB/s one read of every key and value.

Shapes: T tokens, H query heads, K KV heads, P pages, S slots of a page, d head size, B sequences, L keys,
D = H * d.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention_worker.kernels import cpu, reference
from attention_worker.kernels.tiles import TileShape
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk

CAP = 30.0
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

HEADER = (
    "                           median ms            minimum ms     plan                  relative rms\n"
    "case               dtype   paged formula ratio    paged formula     ms  GF/s   GB/s   paged  formula"
)
LINE = (
    "{case:18} {dtype:5} {paged_ms:7.3f} {formula_ms:7.3f} {ratio:5.2f}  {paged_min_ms:7.3f} {formula_min_ms:7.3f} "
    "{plan_ms:6.2f} {gflops:5.0f} {gbytes:6.1f} {paged_rms:7.1e}  {formula_rms:7.1e}"
)


@dataclass(frozen=True)
class Case:
    name: str
    num_sequences: int
    num_keys: int
    num_new: int

    @property
    def pairs(self) -> int:
        """Query-key pairs that the mask leaves, per head."""
        before = self.num_keys - self.num_new
        return self.num_sequences * (self.num_new * before + self.num_new * (self.num_new + 1) // 2)


CASES = [Case(f"prefill {n}", 1, n, n) for n in (512, 2048)] + [
    Case(f"decode B={b} kv {n}", b, n, 1) for n in (512, 2048) for b in (1, 8, 32)
]


def formula(q_THd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, num_new: int) -> torch.Tensor:
    """Softcapped attention of B sequences with `num_new` tokens each, straight from the equation: [T, D]."""
    num_heads, d = q_THd.shape[1:]
    K, L = k_BKLd.shape[1:3]
    if num_new == 1:
        scores = (q_THd.view(-1, K, num_heads // K, d) @ k_BKLd.transpose(-1, -2)).float() * d**-0.5
        scores = CAP * torch.tanh(scores / CAP)
        return (scores.softmax(-1).to(q_THd.dtype) @ v_BKLd).reshape(len(q_THd), -1)
    out_TD = torch.empty_like(q_THd).flatten(1)
    k_KLd, v_KLd = k_BKLd[0], v_BKLd[0]
    for begin in range(0, num_new, 256):
        end = min(num_new, begin + 256)
        rows, keys = end - begin, L - num_new + end
        q = q_THd[begin:end].view(rows, K, -1, d).permute(1, 2, 0, 3).reshape(K, -1, d)
        scores = (q @ k_KLd[:, :keys].transpose(1, 2)).mul_(d**-0.5 / CAP).tanh_().mul_(CAP)
        scores = scores.view(K, -1, rows, keys)
        hidden = torch.ones(rows, keys, dtype=torch.bool).triu_(keys - rows + 1)
        weights = scores.masked_fill_(hidden, -1e9).softmax(-1).view(K, -1, keys)
        out = (weights @ v_KLd[:, :keys]).view(K, -1, rows, d)
        out_TD[begin:end] = out.permute(2, 0, 1, 3).reshape(rows, -1)
    return out_TD


def time_ms(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """(median, minimum) of alternating runs, two of each uncounted."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, took in zip(runs, times, strict=True):
            begin = clock()
            run()
            if repeat >= 2:
                took.append(1e3 * (clock() - begin))
    return [(statistics.median(took), min(took)) for took in times]


def relative_rms(out: torch.Tensor, expected: torch.Tensor) -> float:
    error = out.flatten().float() - expected.flatten()
    return float(error.square().mean().sqrt() / expected.square().mean().sqrt())


def measure(case: Case, dtype: str, args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    K, d, S = args.kv_heads, args.head_dim, args.page_size
    B, L = case.num_sequences, -(-case.num_keys // S) * S
    num_pages = B * L // S
    page_ids = torch.randperm(num_pages)
    k_KPSd, v_KPSd = torch.randn(2, K, num_pages, S, d).to(DTYPES[dtype])
    q_THd = (args.query_scale * torch.randn(B * case.num_new, args.heads, d)).to(DTYPES[dtype])
    k_BKLd, v_BKLd = (
        x[:, page_ids].view(K, B, L, d).transpose(0, 1)[:, :, : case.num_keys].contiguous() for x in (k_KPSd, v_KPSd)
    )
    chunks = [
        SequenceChunk((0,) * case.num_new, case.num_keys - case.num_new, tuple(pages))
        for pages in page_ids.view(B, -1).tolist()
    ]

    def plan() -> StepBatch:
        batch = StepBatch.build(chunks, S)
        batch.tile_groups(TileShape(args.heads, K, d, num_pages, S, q_THd.element_size()))
        return batch

    batch = plan()
    clock = time.thread_time if args.cpu_time else time.perf_counter

    def paged() -> torch.Tensor:
        return cpu.paged_attention(q_THd, k_KPSd, v_KPSd, batch, d**-0.5, CAP)

    def contiguous() -> torch.Tensor:
        return formula(q_THd, k_BKLd, v_BKLd, case.num_new)

    expected = reference.paged_attention(q_THd.float(), k_KPSd.float(), v_KPSd.float(), batch, d**-0.5, CAP)
    (paged_ms, paged_min), (formula_ms, formula_min) = time_ms((paged, contiguous), args.repeats, clock)
    return {
        "case": case.name,
        "dtype": dtype,
        "paged_ms": paged_ms,
        "formula_ms": formula_ms,
        "ratio": paged_ms / formula_ms,
        "paged_min_ms": paged_min,
        "formula_min_ms": formula_min,
        "plan_ms": time_ms((plan,), args.repeats, clock)[0][0],
        "gflops": 4 * case.pairs * args.heads * d / paged_ms / 1e6,
        "gbytes": 2 * B * case.num_keys * K * d * q_THd.element_size() / paged_ms / 1e6,
        "paged_rms": relative_rms(paged(), expected),
        "formula_rms": relative_rms(contiguous(), expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--heads", type=int, default=8, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="size of a head (default %(default)s)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page (default %(default)s)")
    parser.add_argument("--query-scale", type=float, default=2.0, help="spread of scores (default %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, for a machine in use")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(HEADER)
    rows = []
    for dtype in args.dtypes:
        for case in CASES:
            row = measure(case, dtype, args)
            rows.append(row)
            print(LINE.format(**row), flush=True)
    print(json.dumps({"benchmark": "attention", "settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
