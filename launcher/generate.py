"""`grokmoe generate`: text on a terminal, token by token, through the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grokmoe import AsyncClient, ClientOptions, Completion, ConfigError, GenerateOptions, TokenLogprob
from grokmoe.settings import setting
from grokmoe.tracing import ExportSettings, Tracing
from launcher.connection import ConnectionSettings


@dataclasses.dataclass(frozen=True)
class GenerateSettings(ConnectionSettings, ExportSettings):
    """What `grokmoe generate` takes beside the prompt."""

    max_tokens: int = setting(128, "most tokens to generate")
    temperature: float = setting(0.8, "0 is greedy")
    top_k: int = setting(0, "keep the k most likely tokens; 0: all")
    top_p: float = setting(0.95, "keep the smallest set of tokens with this probability")
    min_p: float = setting(0.0, "keep tokens at least this likely relative to the most likely one")
    repetition_penalty: float = setting(1.0, "above 1: what is in the text already becomes less likely")
    seed: int | None = setting(None, "the same seed gives the same text", metavar="N")
    stop: str | None = setting(None, "end where this text appears", metavar="TEXT")
    json_schema: str | None = setting(None, "make JSON of the schema in this file", metavar="FILE")
    regex: str | None = setting(None, "make what this regular expression matches", metavar="EXPRESSION")
    logprobs: int | None = setting(None, "show how likely each token was, and the N most likely ones", metavar="N")
    echo: bool = setting(True, "print the prompt before its continuation")
    stats: bool = setting(True, "print tokens and times to standard error at the end")

    def __post_init__(self) -> None:
        self.check_traces()

    @property
    def share_begun(self) -> float:
        """Every call: who says where to wants to see it."""
        return 1.0

    @contextlib.contextmanager
    def traced_client_options(self) -> Iterator[ClientOptions]:
        """What to make a client with whose calls begin traces, if `traces` says where they go. ConfigError."""
        options, tracing = self.client_options(), Tracing.open(self, "grokmoe-generate")
        if tracing is None:
            yield options
            return
        try:
            yield {**options, "tracer_provider": tracing.provider}
        finally:
            tracing.close()

    def options(self) -> GenerateOptions:
        """What to ask for. ConfigError: the schema cannot be read."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k or None,
            "top_p": self.top_p,
            "min_p": self.min_p or None,
            "repetition_penalty": None if self.repetition_penalty == 1 else self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
            "json_schema": None if self.json_schema is None else _read(self.json_schema),
            "regex": self.regex,
            "logprobs": self.logprobs,
        }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"json_schema {path}: {error}") from error


async def generate(prompt: str, settings: GenerateSettings) -> int:
    """Prints the prompt and its continuation as it comes. Returns the exit code. Raises GrokmoeError."""
    with settings.traced_client_options() as options:
        async with AsyncClient(settings.address, **options) as client:
            return await _generate(client, prompt, settings)


async def _generate(client: AsyncClient, prompt: str, settings: GenerateSettings) -> int:
    stream = client.stream(prompt, **settings.options())
    shown = prompt if settings.echo else ""  # not before the service has accepted it
    async for delta in stream:
        print(shown + delta.text, end="", flush=True)
        shown = ""
    print(flush=True)
    done = await stream.completion()
    if done.logprobs:
        print("\n".join(await logprob_table(client, done.logprobs)))
    if settings.stats:
        print(describe(done), file=sys.stderr)
    if stream.trace_id:
        print(f"[trace {stream.trace_id}]", file=sys.stderr)
    return 0


def describe(done: Completion) -> str:
    """Tokens and times in one line."""
    usage, timing = done.usage, done.timing
    return (
        f"[{usage.prompt_tokens} + {usage.completion_tokens} tokens, finish {done.finish_reason}, "
        f"first after {timing.first_token_seconds * 1e3:.0f} ms, "
        f"{usage.completion_tokens / max(timing.total_seconds, 1e-9):.1f} tokens/s]"
    )


MAX_SHOWN = 20
"""Most likely tokens in a row of the table; a vocabulary does not fit."""


async def logprob_table(client: AsyncClient, logprobs: Sequence[TokenLogprob]) -> list[str]:
    """Lines: the token, its log-probability and rank, and the most likely tokens with theirs."""
    tops = [each.top.most_likely(MAX_SHOWN) for each in logprobs]
    ids = sorted({each.token_id for each in logprobs} | {token_id for top in tops for token_id, _ in top})
    texts = await asyncio.gather(*(client.detokenize([token_id], skip_special_tokens=False) for token_id in ids))
    shown = dict(zip(ids, map(repr, texts), strict=True))
    width = max(len("token"), *(len(shown[each.token_id]) for each in logprobs))
    lines = [f"{'token':{width}}  logprob   rank  most likely"]
    for each, top in zip(logprobs, tops, strict=True):
        others = "  ".join(f"{shown[token_id]} {logprob:.2f}" for token_id, logprob in top)
        lines.append(f"{shown[each.token_id]:{width}} {each.logprob or 0.0:8.3f} {each.rank:6}  {others}".rstrip())
    return lines
