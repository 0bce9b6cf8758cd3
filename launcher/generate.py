"""`grokmoe generate`: text on a terminal, token by token, through the SDK."""

from __future__ import annotations

import dataclasses
import sys

from grokmoe import AsyncClient
from grokmoe.settings import setting
from launcher.paths import DEFAULT_ADDRESS


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """What `grokmoe generate` takes beside the prompt."""

    address: str = setting(DEFAULT_ADDRESS, "where the service is")
    max_tokens: int = setting(128, "most tokens to generate")
    temperature: float = setting(0.8, "0 is greedy")
    top_k: int = setting(0, "keep the k most likely tokens; 0: all")
    top_p: float = setting(0.95, "keep the smallest set of tokens with this probability")
    seed: int | None = setting(None, "the same seed gives the same text", metavar="N")
    stats: bool = setting(True, "print tokens and times to standard error at the end")


async def generate(prompt: str, settings: GenerateSettings) -> int:
    """Prints the prompt and its continuation as it comes. Returns the exit code. Raises GrokmoeError."""
    async with AsyncClient(settings.address) as client:
        stream = client.stream(
            prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        shown = prompt  # not before the service has accepted it
        async for delta in stream:
            print(shown + delta.text, end="", flush=True)
            shown = ""
        print(flush=True)
        if settings.stats:
            done = await stream.completion()
            usage, timing = done.usage, done.timing
            seconds = timing.total_seconds if timing else 0.0
            first = timing.first_token_seconds if timing else 0.0
            print(
                f"[{usage.prompt_tokens} + {usage.completion_tokens} tokens, finish {done.finish_reason}, "
                f"first after {first * 1e3:.0f} ms, {usage.completion_tokens / max(seconds, 1e-9):.1f} tokens/s]",
                file=sys.stderr,
            )
    return 0
