"""What do fewer bits cost? The perplexity of a model on a text that it never saw, by what it computes in.

    python -m benchmarks.quality [--help]

Prints a table and, as the last line, one JSON object. By default it is the embedded model and the play that was held
out of its training to report (`tools/demo_corpus.py`), which pip fetches unless `--corpus` names it. The contenders are
engines with all roles fused, so what computes is what serves; all of them score the same windows of tokens:

    float32     weights, rows and KV
    bfloat16    the same in bfloat16
    int8        bfloat16, and experts as `--expert-dtype int8` has them
    fp8_...     the same for the types of eight bits that GPUs have

Every token but the first is predicted once, from those before it in its window. "nats" are per token, "loss" is the
perplexity's growth over bfloat16's, and "error" the standard error of that growth over the windows, which share their
text: smaller than either perplexity's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from grokmoe.process_tuning import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402

from attention_worker.config import AttentionWorkerSettings  # noqa: E402
from attention_worker.loading import load_engine  # noqa: E402
from grokmoe.device_thread import DeviceThread  # noqa: E402
from grokmoe.model_config import ModelConfig  # noqa: E402
from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, RouterMetrics, new_registry  # noqa: E402
from grokmoe.tokenizer import Tokenizer  # noqa: E402
from launcher.paths import DEMO_MODEL  # noqa: E402
from launcher.serve import ServeSettings, describe, load_experts  # noqa: E402
from router.config import RouterSettings  # noqa: E402
from router.engine import Engine  # noqa: E402
from router.loading import build_engine, load_model  # noqa: E402
from router.request import Request  # noqa: E402
from router.transport.local import LocalAttentionLink  # noqa: E402
from tools.demo_corpus import TEST_WORK, fetch_package, load_corpus  # noqa: E402

BASELINE = "bfloat16"
CONTENDERS = {
    "float32": {"dtype": "float32"},
    BASELINE: {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "expert_dtype": "int8"},
    "fp8_e4m3": {"dtype": "bfloat16", "expert_dtype": "fp8_e4m3"},
    "fp8_e4m3_rows": {"dtype": "bfloat16", "expert_dtype": "fp8_e4m3_rows"},
}


@dataclasses.dataclass(frozen=True)
class Score:
    """nats: of each window, summed. num_predicted: tokens of each window that were predicted."""

    nats: tuple[float, ...]
    num_predicted: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.num_predicted)

    def growth(self, base: Score) -> tuple[float, float]:
        """Of the perplexity over another one's on the same windows, and its standard error."""
        more = [ours - theirs for ours, theirs in zip(self.nats, base.nats, strict=True)]
        spread = statistics.stdev(more) * math.sqrt(len(more)) if len(more) > 1 else 0.0
        num = sum(self.num_predicted)
        return math.expm1(sum(more) / num), spread / num


def windows_of(token_ids: Sequence[int], length: int, limit: int) -> list[tuple[int, ...]]:
    """Windows of `length` predicted tokens, the token before them first; at most `limit`, 0: all."""
    begins = list(range(0, len(token_ids) - 1, length))
    return [tuple(token_ids[begin : begin + length + 1]) for begin in begins[: limit or None]]


@contextlib.asynccontextmanager
async def fused(model: str, threads: int, **settings: str) -> AsyncIterator[Engine]:
    """All roles in this process."""
    serve = ServeSettings(model=model, **settings)
    common = {"model": model, "variant": serve.variant, "dtype": serve.dtype}
    attention = load_engine(
        AttentionWorkerSettings(**common, threads=threads), AttentionMetrics(new_registry()), DeviceThread()
    )
    experts = load_experts(serve, attention.device, ExpertMetrics(new_registry()))
    router = RouterSettings(**common)
    link = LocalAttentionLink(attention, describe(attention))
    engine = build_engine(load_model(router), router, [link], RouterMetrics(new_registry()), experts)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        attention.device.stop()


async def score(engine: Engine, windows: Sequence[tuple[int, ...]]) -> Score:
    nats = []
    for index, window in enumerate(windows):
        generation = engine.submit(Request(request_id=str(index), prompt_ids=window, max_tokens=0, prompt_logprobs=0))
        while not any(delivery.finish_reason for delivery in await generation.take()):
            pass
        logprobs = [value for table in generation.prompt_logprobs() for value in table.logprobs]
        assert len(logprobs) == len(window) - 1, (len(logprobs), len(window))
        nats.append(-math.fsum(logprobs))
    return Score(tuple(nats), tuple(len(window) - 1 for window in windows))


async def measure(model: str, windows: Sequence[tuple[int, ...]], names: Sequence[str], threads: int) -> list[dict]:
    scores = {}
    for name in names:
        async with fused(model, threads, **CONTENDERS[name]) as engine:
            scores[name] = await score(engine, windows)
    print("| computed in | perplexity | nats | loss | error |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for name, found in scores.items():
        growth, error = found.growth(scores[BASELINE])
        row = {"contender": name, "nats": found.loss, "perplexity": math.exp(found.loss), "growth": growth}
        rows.append({**row, "error": error})
        print(f"| {name} | {math.exp(found.loss):.3f} | {found.loss:.4f} | {growth:+.2%} | {error:.2%} |", flush=True)
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), metavar="DIR", help="default: the embedded model")
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="the package's archive, or a folder of its texts")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text of your own instead")
    parser.add_argument("--window", type=int, default=1000, help="tokens predicted (default %(default)s)")
    parser.add_argument("--windows", type=int, default=0, help="most of them; 0: all (default)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = Tokenizer.from_directory(options.model)
    if tokenizer is None:
        parser.error(f"{options.model} has no tokenizer")
    end = ModelConfig.from_file(options.model).eos_token_ids[:1]
    if options.text:
        documents = [options.text.read_text()]
    else:
        folder = Path(tempfile.gettempdir()) / "grokmoe-demo-corpus"
        documents = load_corpus(options.corpus or fetch_package(folder)).test
        print(f"{TEST_WORK}: {len(documents)} documents")
    token_ids = [token for document in documents for token in (*tokenizer.encode(document), *end)]
    windows = windows_of(token_ids, options.window, options.windows)
    names = [BASELINE, *(name for name in options.contenders if name != BASELINE)]
    rows = asyncio.run(measure(options.model, windows, names, options.threads))
    num_tokens = sum(len(window) - 1 for window in windows)
    print(json.dumps({"benchmark": "quality", "windows": len(windows), "tokens": num_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
