"""Do a row's bits depend on its company, operation by operation, and what does `--deterministic` cost?

    python benchmarks/invariance.py                     operations at the sizes of the bench model: seconds
    python benchmarks/invariance.py --cost DIR          tokens/s of a checkpoint with the mode off and on;
                                                        `benchmarks/step.py --preset bench` makes one

Operations: each row's result in a reference batch of 8 rows is compared with its result in batches of other row counts
and at other places; the table has the row counts that give other bits. "plain" is the operation as torch has it,
"ours" as the workers call it, "mode" with the mode on. Cost: both engines are in one process, all roles fused, and take
turns, so the ratio is worth more than its parts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable

from grokmoe.process_tuning import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from attention_worker.config import AttentionWorkerSettings  # noqa: E402
from attention_worker.device_kernels import select_kernels  # noqa: E402
from attention_worker.layers import Rope, rms_norm  # noqa: E402
from attention_worker.loading import load_engine  # noqa: E402
from attention_worker.step_batch import StepBatch  # noqa: E402
from expert_worker import weights  # noqa: E402
from expert_worker.experts import ExpertSet  # noqa: E402
from expert_worker.kernels import cpu  # noqa: E402
from grokmoe.checkpoint import Checkpoint  # noqa: E402
from grokmoe.device_thread import DeviceThread  # noqa: E402
from grokmoe.expert_spec import ALL, parse_experts  # noqa: E402
from grokmoe.model_config import TINY, Gelu  # noqa: E402
from grokmoe.packed_linear import PackedLinear  # noqa: E402
from grokmoe.step_plan import SequenceChunk  # noqa: E402
from grokmoe.telemetry import AttentionMetrics, RouterMetrics, new_registry  # noqa: E402
from launcher.serve import describe  # noqa: E402
from router.config import RouterSettings  # noqa: E402
from router.engine import Engine  # noqa: E402
from router.gating import gate  # noqa: E402
from router.loading import build_engine, load_model  # noqa: E402
from router.request import Request, SamplingSettings  # noqa: E402
from router.transport.local import LocalAttentionLink  # noqa: E402

Rows = Callable[[int, int], torch.Tensor]
"""(begin, end) -> the results of these rows of a fixed input."""

NUM_ROWS = 256
COUNTS = (*range(1, 10), 12, 16, 17, 31, 33, 64, 128)
H, K, D, S = 8, 2, 128, 32
"""Query heads, KV heads, head size, page size of the attention cases."""


def differing(compute: Rows) -> list[int]:
    """Row counts at which some row at some place has other bits than in a batch of 8."""
    expected = torch.cat([compute(begin, begin + 8) for begin in range(0, NUM_ROWS, 8)])
    places = {count: {0, min(3, NUM_ROWS - count), NUM_ROWS - count} for count in COUNTS}
    return [
        count
        for count in COUNTS
        if any(not torch.equal(compute(b, b + count), expected[b : b + count]) for b in places[count])
    ]


def linear_cases(dtype: torch.dtype) -> dict[str, Rows]:
    cases: dict[str, Rows] = {}
    for name, num_in, num_out in (("qkv", 1024, 1536), ("o_proj", 1024, 1024), ("head", 1024, 8000)):
        weight = torch.randn(num_out, num_in).mul_(num_in**-0.5).to(dtype)
        x = torch.randn(NUM_ROWS, num_in).to(dtype)
        packed, exact = PackedLinear(weight), PackedLinear(weight, deterministic=True)
        cases[f"{name}, plain"] = lambda a, b, x=x, w=weight: functional.linear(x[a:b], w)
        cases[f"{name}, ours"] = lambda a, b, x=x, f=packed: f(x[a:b])
        cases[f"{name}, mode"] = lambda a, b, x=x, f=exact: f(x[a:b])
    gate_FD, up_FD, down_DF = (torch.randn(*shape).mul_(shape[1] ** -0.5).to(dtype) for shape in
                               ((4096, 1024), (4096, 1024), (1024, 4096)))  # fmt: skip
    x = torch.randn(NUM_ROWS, 1024).to(dtype)
    for name, mode in (("ours", False), ("mode", True)):
        expert = cpu.PackedExpert()
        expert.gate, expert.up = PackedLinear(gate_FD, mode), PackedLinear(up_FD, mode)
        expert.down = PackedLinear(down_DF, mode)
        cases[f"expert, {name}"] = lambda a, b, x=x, f=expert: f(x[a:b], Gelu.ERF)
    down = expert.down
    h = torch.randn(NUM_ROWS, 4096).to(dtype)
    cases["expert down, one product"] = lambda a, b: down.product(h[a:b], None, None)
    return cases


def small_cases(dtype: torch.dtype) -> dict[str, Rows]:
    x, gain = torch.randn(NUM_ROWS, 1024), torch.randn(1024)
    gate_ED = torch.randn(8, 1024) / 32
    rope, positions = Rope(D, 8192, 10000.0), torch.randint(0, 8192, (NUM_ROWS,))
    q = torch.randn(NUM_ROWS, H, D).to(dtype)
    return {
        "rms_norm": lambda a, b: rms_norm(x[a:b], gain, 1e-5, dtype),
        "rope": lambda a, b: Rope.rotate(q[a:b], rope.angles(positions[a:b])),
        "gate": lambda a, b: gate(x[a:b].to(dtype), gate_ED, TINY)[0],
        "sigmoid, plain": lambda a, b: x[a:b, :33].contiguous().sigmoid(),
        "exp2, plain": lambda a, b: x[a:b, :33].contiguous().exp2(),
    }


def attention_cases(dtype: torch.dtype) -> dict[str, Rows]:
    """The rows are the last ones of a long prompt; as a chunk of it, and as a decode beside shorter sequences."""
    cases: dict[str, Rows] = {}
    for length in (512, 2048):
        pages = tuple(range(length // S))
        k, v = (torch.randn(K, len(pages), S, D).to(dtype) for _ in range(2))
        q = torch.randn(length, H, D).to(dtype)
        for name, mode in (("ours", False), ("mode", True)):
            kernel = select_kernels("cpu", mode).attend

            def compute(
                a: int, b: int, length: int = length, q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v,
                kernel: object = kernel, pages: tuple[int, ...] = pages,
            ) -> torch.Tensor:  # fmt: skip
                first = length - NUM_ROWS
                chunks = [SequenceChunk((0,) * (b - a), first + a, pages)]
                batch = StepBatch.build([*chunks, SequenceChunk((0,), length - 1, pages)], S)
                rows = torch.cat([q[first + a : first + b], q[-1:]])
                return kernel(rows, k, v, batch, D**-0.5, 30.0)[:-1]  # type: ignore[operator]

            cases[f"attention, {length} keys, {name}"] = compute
    return cases


def measure_operations() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            torch.manual_seed(0)
            for make in (linear_cases, small_cases, attention_cases):
                for name, compute in make(dtype).items():
                    counts = differing(compute)
                    case = {"dtype": str(dtype).removeprefix("torch."), "threads": num_threads, "operation": name}
                    found.append({**case, "differing": counts})
                    shown = ",".join(map(str, counts)) or "-"
                    print(f"{case['dtype']:9} {num_threads} {name:28} {shown}", flush=True)
    return found


@contextlib.asynccontextmanager
async def fused(model: str, dtype: str, deterministic: bool, threads: int) -> AsyncIterator[Engine]:
    """All roles in this process."""
    common = {"model": model, "dtype": dtype}
    settings = AttentionWorkerSettings(**common, threads=threads, deterministic=deterministic)
    began = time.perf_counter()
    attention = load_engine(settings, AttentionMetrics(new_registry()), DeviceThread())
    with Checkpoint.open(model) as checkpoint:
        config = checkpoint.config
        held = parse_experts(ALL, config.num_experts, config.num_layers)
        experts = ExpertSet(config, held, getattr(torch, dtype), torch.device("cpu"), deterministic)
        attention.device.call(weights.load, experts, checkpoint)
    print(f"{dtype} deterministic={deterministic}: loaded in {time.perf_counter() - began:.1f} s", flush=True)
    router = RouterSettings(**common)
    link = LocalAttentionLink(attention, describe(attention))
    engine = build_engine(load_model(router), router, [link], RouterMetrics(new_registry()), experts.forward)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        attention.device.stop()


async def generate(engine: Engine, name: str, prompt: list[int], num_tokens: int) -> list[int]:
    sampling = SamplingSettings(temperature=0)
    request = Request(request_id=name, prompt_ids=tuple(prompt), sampling=sampling, max_tokens=num_tokens)
    generation = engine.submit(request)
    tokens: list[int] = []
    while True:
        for delivery in await generation.take():
            tokens += delivery.token_ids
            if delivery.finish_reason is not None:
                return tokens


async def measure_cost(model: str, dtype: str, rounds: int, threads: int) -> list[dict[str, object]]:
    loads = (("prefill 512", 1, 512, 1), ("decode 1", 1, 32, 16), ("decode 8", 8, 32, 16), ("decode 32", 32, 32, 16))
    rates: dict[tuple[str, bool], list[float]] = {}
    async with fused(model, dtype, False, threads) as off, fused(model, dtype, True, threads) as on:
        for turn in range(rounds + 1):
            for name, batch, length, new in loads:
                for mode, engine in ((False, off), (True, on))[:: 1 if turn % 2 else -1]:  # no mode is always first
                    draw = random.Random(f"{name} {turn}")
                    prompts = [[draw.randrange(4, 500) for _ in range(length)] for _ in range(batch)]
                    began = time.perf_counter()
                    calls = (generate(engine, f"{name} {turn} {i}", p, new) for i, p in enumerate(prompts))
                    await asyncio.gather(*calls)
                    if turn:
                        rate = batch * (length if new == 1 else new) / (time.perf_counter() - began)
                        rates.setdefault((name, mode), []).append(rate)
    found: list[dict[str, object]] = []
    for name, *_ in loads:
        off_rates, on_rates = rates[name, False], rates[name, True]
        ratio = statistics.median(b / a for a, b in zip(off_rates, on_rates, strict=True))
        medians = statistics.median(off_rates), statistics.median(on_rates)
        print(f"{dtype} {name:12} off {medians[0]:8.1f}  on {medians[1]:8.1f} tokens/s  ratio {ratio:.3f}", flush=True)
        found.append({"load": name, "dtype": dtype, "off": off_rates, "on": on_rates, "ratio": ratio})
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", metavar="DIR", help="a checkpoint: measure what the mode costs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of --cost")
    parser.add_argument("--rounds", type=int, default=3, help="of --cost (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of --cost (default: torch's)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.cost:
        found = asyncio.run(measure_cost(options.cost, options.dtype, options.rounds, options.threads))
    else:
        found = measure_operations()
    print(json.dumps({"benchmark": "invariance", "settings": vars(options), "rows": found}))


if __name__ == "__main__":
    main()
