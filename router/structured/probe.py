"""Compiles a grammar in a process of its own, where it may hang, or end the process, without harm.

The library bounds most of what a grammar costs, but not all: some schemas compile without end, and rules nested a
thousand deep overflow the stack, which ends the process. `probe` finds out where that costs nothing. The stack there
is smaller than that of any thread that compiles later, so what passes there passes here.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading

import llguidance

CPU_SECONDS = 2
WALL_SECONDS = 20
"""More than the CPU time, for a machine that is busy with other things."""
MEMORY_BYTES = 1 << 30
STACK_BYTES = 2 << 20
"""A quarter of what Linux gives a thread."""
NUM_STEPS = 24
"""Tokens to walk into the grammar: what a mask costs shows only there."""

_TOO_COSTLY = f"takes more than {CPU_SECONDS} s, {MEMORY_BYTES >> 20} MiB or the stack to compile"


class ProbeError(Exception):
    """The grammar cannot be compiled; the text says why, in one line."""


def parser_limits() -> llguidance.LLParserLimits:
    """The library's own limits, of compiling and of each step."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,  # some 15 ms
        step_max_items=50_000,  # some 3 ms
        max_lexer_states=50_000,  # of up to 2 kB
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def probe(grammar: str, *, convert: bool = False) -> str:
    """Returns the grammar, ready for the library. ProbeError when it cannot be compiled or costs too much.

    convert: it is Lark or GBNF as the caller wrote it, not what the library takes.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps({"grammar": grammar, "convert": convert}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(_TOO_COSTLY) from error
    if done.returncode != 0:
        raise ProbeError(_TOO_COSTLY)
    answer = json.loads(done.stdout)
    if answer["error"]:
        raise ProbeError(answer["error"])
    return str(answer["grammar"])


def _compile(grammar: str, convert: bool) -> dict[str, str]:
    if convert:
        try:
            grammar = llguidance.grammar_from("grammar", grammar)
        except (ValueError, RecursionError) as error:
            return {"error": str(error)}
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=parser_limits())
    if matcher.is_error():
        return {"error": matcher.get_error()}
    for step in range(NUM_STEPS):
        mask = matcher.compute_bitmask()
        ids = [i for i in range(8 * len(mask)) if mask[i // 8] >> (i % 8) & 1]
        if not ids or not matcher.consume_token(ids[step % len(ids)]) or matcher.is_stopped():
            break
    return {"error": "", "grammar": grammar}


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    answers: list[dict[str, str]] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: answers.append(_compile(request["grammar"], request["convert"])))
    thread.start()
    thread.join()
    json.dump(answers[0], sys.stdout)


if __name__ == "__main__":
    _main()
