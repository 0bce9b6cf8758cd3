"""What does structured output cost: compiling a form, and the mask of each token?

    python benchmarks/structured.py [--help]

Prints a table and, as the last line, one JSON object. Per form, of the demo tokenizer, or of --tokenizer, or of a
vocabulary made up of --synthetic pieces:

    compile   text to grammar, without the one-off cost of the vocabulary, which stands above the table
    start     one more candidate
    mask      which tokens may come next: the median, and what one token in a hundred exceeds
    accept    taking the token drawn

Tokens are drawn evenly from the mask, --outputs times up to --tokens each. "compile" is dominated by the process that
tries the grammar first (router/structured/probe.py); choice and json_object need none. Medians over --repeats.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import launcher
from grokmoe.tokenizer import Tokenizer
from router.structured import Format, Grammar, GrammarCompiler

DEMO_TOKENIZER = Path(launcher.__file__).parent / "demo_model" / "tokenizer.json"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
FORMS: list[tuple[str, Format, str | Sequence[str]]] = [
    ("json_schema", Format.JSON_SCHEMA, json.dumps(SCHEMA)),
    ("json_object", Format.JSON_OBJECT, ""),
    ("regex", Format.REGEX, r"[A-Z][a-z]{2,20} [A-Z][a-z]{2,20} <[a-z0-9._]{1,30}@[a-z0-9]{1,20}\.(com|org|net)>"),
    ("grammar", Format.GRAMMAR, 'start: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" start ")"\n'),
    ("choice", Format.CHOICE, [f"choice number {i}" for i in range(200)]),
]

HEADER = f"{'form':12} {'compile ms':>10} {'start us':>9} {'mask us':>8} {'p99 us':>8} {'accept us':>9} {'tokens':>7}"
LINE = "{form:12} {compile_ms:10.1f} {start_us:9.1f} {mask_us:8.1f} {mask_p99_us:8.1f} {accept_us:9.1f} {num_tokens:7d}"


def synthetic_tokenizer(num_pieces: int) -> Tokenizer:
    """A byte-level vocabulary: bytes, marks of JSON, and random words, half of them after a space."""
    rng = random.Random(1)
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), '{"', '":', '",', '"}', "true", "false"])
    while len(pieces) < num_pieces:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxzETAOIN0123456789_-.,", k=rng.randint(2, 9)))
        pieces[("Ġ" if rng.random() < 0.5 else "") + word] = None
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def ids_in(mask: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]


def draw(grammar: Grammar, max_tokens: int, rng: random.Random, masks: list[float], accepts: list[float]) -> None:
    """One output; adds the seconds of each call."""
    matcher = grammar.start()
    for _ in range(max_tokens):
        began = time.perf_counter()
        mask = matcher.allowed()
        masks.append(time.perf_counter() - began)
        if matcher.is_complete:
            return
        token_id = rng.choice(ids_in(mask))
        began = time.perf_counter()
        matcher.accept(token_id)
        accepts.append(time.perf_counter() - began)


def seconds_of(call: object, repeats: int) -> float:
    assert callable(call)
    times = []
    for repeat in range(repeats):
        began = time.perf_counter()
        call(repeat)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(
    compiler: GrammarCompiler, form: str, fmt: Format, text: str | Sequence[str], args: argparse.Namespace
) -> dict[str, object]:
    def compile_anew(repeat: int) -> Grammar:
        # White space that says nothing, so that the text is another one and not found in the cache.
        if fmt is Format.CHOICE:
            return compiler.compile(fmt, [*text, f"number {repeat}"])
        extra = {Format.REGEX: f"|{repeat}", Format.JSON_OBJECT: ""}.get(fmt, " " * repeat)
        return compiler.compile(fmt, str(text) + extra)

    compile_seconds = seconds_of(compile_anew, 1 if fmt is Format.JSON_OBJECT else args.repeats)
    grammar = compiler.compile(fmt, text)
    start_seconds = seconds_of(lambda repeat: grammar.start(), 100)
    masks: list[float] = []
    accepts: list[float] = []
    rng = random.Random(0)
    for _ in range(args.outputs):
        draw(grammar, args.tokens, rng, masks, accepts)
    return {
        "form": form,
        "compile_ms": compile_seconds * 1e3,
        "start_us": start_seconds * 1e6,
        "mask_us": statistics.median(masks) * 1e6,
        "mask_p99_us": sorted(masks)[int(0.99 * (len(masks) - 1))] * 1e6,
        "accept_us": statistics.median(accepts) * 1e6,
        "num_tokens": len(accepts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokenizer", type=Path, default=DEMO_TOKENIZER, help="a tokenizer.json (default: the demo's)")
    source.add_argument("--synthetic", type=int, metavar="N", help="make up a vocabulary of N pieces instead")
    parser.add_argument("--outputs", type=int, default=20, help="per form (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="of an output, at most (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of compiling (default %(default)s)")
    args = parser.parse_args()
    tokenizer = synthetic_tokenizer(args.synthetic) if args.synthetic else Tokenizer.from_file(args.tokenizer)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [])
    began = time.perf_counter()
    compiler.compile(Format.CHOICE, ["first"])
    vocabulary_seconds = time.perf_counter() - began
    print(f"{tokenizer.vocab_size} tokens; {vocabulary_seconds:.2f} s once for the vocabulary\n\n{HEADER}")
    table = []
    for form, fmt, text in FORMS:
        row = measure(compiler, form, fmt, text, args)
        table.append(row)
        print(LINE.format(**row), flush=True)
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"benchmark": "structured", "settings": shown, "seconds": vocabulary_seconds, "rows": table}))


if __name__ == "__main__":
    main()
