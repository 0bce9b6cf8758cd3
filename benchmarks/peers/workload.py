"""What is measured of every contender, and what each number is called."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number. unit: "tokens/s", of which more is better, or "ms", of which less is."""

    name: str
    unit: str = "tokens/s"

    @property
    def more_is_better(self) -> bool:
        """Which of two values is the better one."""
        return self.unit != "ms"


def prefill(num_tokens: int) -> Metric:
    """One prompt of this length: its tokens by the time until its first output token."""
    return Metric(f"prefill {num_tokens}")


def decode(batch: int) -> Metric:
    """`batch` sequences at once: what they draw after the first token, by the time of that.

    The time is a difference: of the run with one token more than `new`, and of a run with one token.
    """
    return Metric(f"decode {batch}")


def served(clients: int) -> Metric:
    """Output tokens of `clients` closed-loop streaming clients, by the time of all."""
    return Metric(f"{clients} clients")


def first_token(clients: int) -> Metric:
    """Median time to the first token of those clients' requests."""
    return Metric(f"{clients} clients, TTFT p50", "ms")


def gap(clients: int) -> Metric:
    """99th percentile of the gaps between two pieces of one stream, of those clients."""
    return Metric(f"{clients} clients, ITL p99", "ms")


def gap_beside(clients: int, long_prompt: int) -> Metric:
    """The same while prompts of `long_prompt` tokens arrive."""
    return Metric(f"{clients} clients beside prompts of {long_prompt}, ITL p99", "ms")


@dataclasses.dataclass(frozen=True)
class Workload:
    """The loads of one round.

    prefills: lengths of single prompts. batches: sequences that decode at once, `prompt` tokens in, `new` out; each
    load is done `repeats` times, and the median is the round's value.
    clients: how many stream at once, each `requests` one after another, `prompt` tokens in and `new` out.
    long_every: seconds between two prompts of `long_prompt` tokens that disturb them.
    """

    prefills: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new: int = 64
    repeats: int = 2
    clients: tuple[int, ...] = (8, 32)
    requests: int = 2
    long_prompt: int = 2048
    long_every: float = 4.0

    def metrics(self) -> list[Metric]:
        """All there are, in the order of the table."""
        found = [*map(prefill, self.prefills), *map(decode, self.batches)]
        for clients in self.clients:
            found += [served(clients), first_token(clients), gap(clients)]
        if self.clients:
            found.append(gap_beside(max(self.clients), self.long_prompt))
        return found

    def most_tokens(self) -> int:
        """The longest sequence, its output included."""
        return max(self.prompt + self.new + 1, self.long_prompt + 1, *(n + 1 for n in self.prefills), 1)
