"""What does choosing tokens cost on this CPU, setting by setting?

    python benchmarks/sampler.py [--help]

Prints a table and, as the last line, one JSON object. A case is a batch whose rows all have the same settings; "greedy"
and "temperature" are what others are compared with. "mixed" has all settings in turn. Logits are normally distributed;
"flat" leaves them so, which makes nuclei of thousands of tokens, and "peaked" has a few tokens that stand out, as after
most of a text. Runs alternate between the cases; times are medians, and minima for a machine that others use, too.
Where other programs take the cores, every torch call waits for the slower thread: use --cpu-time there.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from attention_worker.logprobs import score_drawn
from attention_worker.sampler import sample
from grokmoe.step_plan import Penalties, TokenSampling

HEADER = f"{'case':28} {'logits':7} {'ms':>9} {'min ms':>9} {'us per row':>11}"
LINE = "{case:28} {logits:7} {ms:9.3f} {min_ms:9.3f} {us_per_row:11.1f}"
SPREAD = 3.0
"""Standard deviation of logits."""


def settings(vocab_size: int, num_prompt: int, num_output: int) -> dict[str, TokenSampling]:
    """Case -> how its rows are sampled."""
    random = np.random.default_rng(0)
    greedy, drawn = TokenSampling(), TokenSampling(0.8)
    ids = tuple(random.choice(vocab_size, 100, replace=False).tolist())
    prompt, output = (random.integers(0, vocab_size, num, np.uint32).tobytes() for num in (num_prompt, num_output))
    allowed = random.bytes(4 * -(-vocab_size // 32))
    penalties = Penalties(1.1, 0.2, 0.1, prompt, output)
    return {
        "greedy": greedy,
        "temperature": drawn,
        "min_p": dataclasses.replace(drawn, min_p=0.05),
        "top_k 50": dataclasses.replace(drawn, top_k=50),
        "top_k 1000": dataclasses.replace(drawn, top_k=1000),
        "top_p 0.9": dataclasses.replace(drawn, top_p=0.9),
        "top_p 0.999": dataclasses.replace(drawn, top_p=0.999),
        "top_k 50, top_p 0.9": dataclasses.replace(drawn, top_k=50, top_p=0.9),
        "min_p, top_p 0.9": dataclasses.replace(drawn, min_p=0.05, top_p=0.9),
        "greedy, bias of 100": dataclasses.replace(greedy, bias_ids=ids, bias=(1.0,) * 100),
        "greedy, allowed": dataclasses.replace(greedy, allowed=allowed),
        "greedy, penalties": dataclasses.replace(greedy, penalties=penalties),
        "greedy, logprobs 0": dataclasses.replace(greedy, num_logprobs=0),
        "greedy, logprobs 20": dataclasses.replace(greedy, num_logprobs=20),
        "greedy, logprobs all": dataclasses.replace(greedy, num_logprobs=-1),
    }


def run(logits_RV: torch.Tensor, hows: Sequence[TokenSampling], positions: Sequence[int]) -> None:
    """What follows the forward of a step."""
    tokens = sample(logits_RV, hows, positions)
    rows = [row for row, how in enumerate(hows) if how.num_logprobs is not None]
    if rows:
        score_drawn(
            logits_RV if len(rows) == len(hows) else logits_RV[rows],
            [tokens[row] for row in rows],
            [hows[row] for row in rows],
        )


def measure(
    cases: dict[tuple[str, str], tuple[torch.Tensor, list[TokenSampling]]], repeats: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case, (logits_RV, hows) in cases.items():
            began = clock()
            run(logits_RV, hows, range(len(hows)))
            if repeat:
                times[case].append(1e3 * (clock() - began))
    return [
        {
            "case": case,
            "logits": logits,
            "ms": statistics.median(took),
            "min_ms": min(took),
            "us_per_row": 1e3 * statistics.median(took) / len(cases[case, logits][1]),
        }
        for (case, logits), took in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vocab", type=int, default=131072, help="vocabulary size (default %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="prompt tokens to penalise (default %(default)s)")
    parser.add_argument("--output", type=int, default=512, help="output tokens to penalise (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, for a machine in use")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    flat_RV = SPREAD * torch.randn(args.rows, args.vocab)
    peaked_RV = flat_RV.scatter_add(1, torch.randint(args.vocab, (args.rows, 20)), torch.full((args.rows, 20), 15.0))
    cases: dict[tuple[str, str], tuple[torch.Tensor, list[TokenSampling]]] = {}
    kinds = settings(args.vocab, args.prompt, args.output)
    for name, how in kinds.items():
        hows = [dataclasses.replace(how, seed=seed) for seed in range(args.rows)]
        if "top_p" in name:
            cases[name, "peaked"] = peaked_RV, hows
        cases[name, "flat"] = flat_RV, hows
    every = list(kinds.values())
    cases["mixed", "peaked"] = (
        peaked_RV,
        [dataclasses.replace(every[row % len(every)], seed=row) for row in range(args.rows)],
    )
    rows = measure(cases, args.repeats, time.thread_time if args.cpu_time else time.perf_counter)
    print(HEADER)
    for row in rows:
        print(LINE.format(**row))
    print(json.dumps({"benchmark": "sampler", "settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
