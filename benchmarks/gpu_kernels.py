"""How fast are the Triton kernels on this GPU, next to what torch offers?

    python -m benchmarks.gpu_kernels [--help]

Grouped GEMM at Grok-1's sizes, for a range of rows per expert: the MLP of all experts, next to a loop of cuBLAS
products over them and, where torch has it, its own grouped product. Attention of one layer: decode and prefill, next to
torch's attention without a cap, which is the least that a kernel could take. Prints a table and, as the last line, one
JSON object. Times are medians over runs that alternate between the candidates, by events on the stream.

TB/s counts one read of everything that must be read; TF/s the products' operations.
--tiny runs everything once at small sizes on whatever device there is, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from attention_worker.step_batch import StepBatch
from grokmoe.model_config import GROK1, Gelu
from grokmoe.step_plan import SequenceChunk

HEADER = "case                           candidate        median ms   TB/s   TF/s  ratio"
LINE = "{case:30} {candidate:14} {ms:11.4f} {tbs:6.2f} {tfs:6.0f} {ratio:6.2f}"

Candidates = dict[str, Callable[[], object]]


def medians(candidates: Candidates, runs: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()  # compiles
    for _ in range(runs):
        for name, run in candidates.items():
            times[name].append(milliseconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, on the device's own clock where it has one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event))


def report(case: str, times: dict[str, float], num_bytes: float, flop: float) -> list[dict[str, object]]:
    """Prints a line per candidate; the ratio is to the first."""
    first = next(iter(times.values()))
    rows: list[dict[str, object]] = []
    for candidate, ms in times.items():
        row = {
            "case": case, "candidate": candidate, "ms": ms,
            "tbs": num_bytes / ms / 1e9, "tfs": flop / ms / 1e9, "ratio": ms / first,
        }  # fmt: skip
        print(LINE.format(**row), flush=True)
        rows.append(row)
    return rows


def expert_candidates(rows: int, sizes: tuple[int, int, int], device: torch.device) -> tuple[Candidates, float, float]:
    """(candidates, bytes, operations) of the MLPs of all experts, `rows` rows each."""
    E, D, F = sizes

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[-1] ** 0.5

    x_ND, gate, up, down = draw(E * rows, D), draw(E, F, D), draw(E, F, D), draw(E, D, F)
    counts = [rows] * E

    def loop() -> torch.Tensor:
        parts = []
        for expert, x in enumerate(x_ND.split(rows)):
            h = functional.gelu(functional.linear(x, gate[expert])) * functional.linear(x, up[expert])
            parts.append(functional.linear(h, down[expert]))
        return torch.cat(parts)

    def grouped_mm() -> torch.Tensor:
        ends = torch.arange(rows, E * rows + 1, rows, device=device, dtype=torch.int32)
        a, b = (functional.grouped_mm(x_ND, w.transpose(1, 2), offs=ends) for w in (gate, up))
        return functional.grouped_mm(functional.gelu(a) * b, down.transpose(1, 2), offs=ends)

    candidates: Candidates = {}
    if device.type == "cuda":
        from expert_worker.kernels.grouped_gemm import expert_mlp

        candidates["triton"] = lambda: expert_mlp(x_ND, counts, gate, up, down, Gelu.ERF)
    candidates["cuBLAS loop"] = loop
    if hasattr(functional, "grouped_mm"):
        candidates["grouped_mm"] = grouped_mm
    return candidates, 2.0 * 3 * E * F * D, 2.0 * 3 * E * rows * F * D


def attention_candidates(
    num: int, length: int, num_keys: int, heads: tuple[int, int, int], device: torch.device
) -> tuple[Candidates, float, float]:
    """The same of one layer's attention: `num` sequences with `length` new tokens and `num_keys` keys each."""
    H, K, d = heads
    num_pages = -(-num_keys // 32)
    pages = torch.randperm(num * num_pages).view(num, -1).tolist()
    chunks = [SequenceChunk((1,) * length, num_keys - length, tuple(own)) for own in pages]
    batch = StepBatch.build(chunks, 32).to(device)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    q_THd, k, v = draw(num * length, H, d), draw(K, num * num_pages, 32, d), draw(K, num * num_pages, 32, d)
    q_BHnd = q_THd.view(num, length, H, d).transpose(1, 2)
    k_BKLd, v_BKLd = draw(num, K, num_keys, d), draw(num, K, num_keys, d)
    candidates: Candidates = {}
    if device.type == "cuda":
        from attention_worker.kernels.triton_attention import paged_attention

        for name, fixed in (("triton", False), ("deterministic", True)):
            candidates[name] = lambda fixed=fixed: paged_attention(q_THd, k, v, batch, d**-0.5, 30.0, fixed)
    # Where all keys are new the mask is causal, where one token is, there is none: both of torch's own forms.
    candidates["torch, no cap"] = lambda: functional.scaled_dot_product_attention(
        q_BHnd, k_BKLd, v_BKLd, is_causal=length > 1, enable_gqa=True
    )
    pairs = num * (length * (num_keys - length) + length * (length + 1) / 2)
    return candidates, 2.0 * 2 * num * K * num_keys * d, 4.0 * pairs * H * d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("no GPU here; --tiny shows on a CPU that the programs run")
    runs = 1 if arguments.tiny else arguments.runs
    rows_per_expert = (1, 16) if arguments.tiny else (1, 4, 16, 32, 64, 128, 512)
    sizes = (2, 64, 128) if arguments.tiny else (GROK1.num_experts, GROK1.hidden_size, GROK1.intermediate_size)
    heads = (6, 2, 64) if arguments.tiny else (GROK1.num_heads, GROK1.num_kv_heads, GROK1.head_dim)
    steps = (
        [(2, 1, 64), (1, 48, 48)] if arguments.tiny else [(1, 1, 8192), (32, 1, 2048), (256, 1, 1024), (1, 4096, 4096)]
    )
    print(HEADER)
    found = []
    with torch.inference_mode():
        for rows in rows_per_expert:
            candidates, num_bytes, flop = expert_candidates(rows, sizes, device)
            found += report(f"experts, {rows} rows each", medians(candidates, runs, device), num_bytes, flop)
        for num, length, num_keys in steps:
            candidates, num_bytes, flop = attention_candidates(num, length, num_keys, heads, device)
            case = f"attention {num} x {length} of {num_keys}"
            found += report(case, medians(candidates, runs, device), num_bytes, flop)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "rows": found}))


if __name__ == "__main__":
    main()
