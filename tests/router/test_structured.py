"""Structured output: whatever is drawn from what the masks allow has the form that was asked for."""

from __future__ import annotations

import json
import random
import re
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

import launcher
from grokmoe.errors import InvalidRequest, Reason
from grokmoe.tokenizer import Tokenizer
from router.structured import Format, GrammarCompiler, Matcher
from router.structured.vocabulary import Vocabulary

DEMO = Tokenizer.from_file(Path(launcher.__file__).parent / "demo_model" / "tokenizer.json")
DEMO_VOCAB, DEMO_EOS = 2048, 2


def byte_fallback() -> Tokenizer:
    """A vocabulary as SentencePiece makes it, with pieces for common words and a control symbol that is no special."""
    words = ["▁", "a", "b", "e", "y", "n", "o", "s", "m", "ab", "▁a", "▁b", "▁yes", "yes", '{"', '":', "▁{", "▁▁", "}"]
    pieces = ["<unk>", "[EOS]", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<|sep|>"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "[EOS]"])
    return Tokenizer(backend)


FALLBACK = byte_fallback()
FALLBACK_EOS = 1
COMPILERS = {
    "byte-level": GrammarCompiler(DEMO, DEMO_VOCAB, [DEMO_EOS]),
    "byte-fallback": GrammarCompiler(FALLBACK, FALLBACK.vocab_size + 37, [FALLBACK_EOS]),
    "no-eos": GrammarCompiler(DEMO, DEMO_VOCAB, []),
}
TOKENIZERS = {"byte-level": DEMO, "byte-fallback": FALLBACK, "no-eos": DEMO}
EOS = {"byte-level": DEMO_EOS, "byte-fallback": FALLBACK_EOS, "no-eos": None}

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", 'b"l']}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "leaf": {"type": "boolean"}}}
    },
    "$ref": "#/$defs/tree",
}
REGEX = r"[A-Z][a-zé]{1,8} <[a-z0-9.]{1,10}@[a-z]{2,6}\.(com|org)>"
CHOICES = ["yes", "no", "maybe so", "a", "ab", " abc", 'q"\\/(+[é🙂', "line\nend"]
LARK = 'start: "(" start ")" | "x" ("+" "x")*\n'
GBNF = 'root ::= "(" root ")" | "x" ("+" "x")*\n'


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value["tags"]) <= 3
        and all(tag in ("red", "grün", 'b"l') for tag in value["tags"])
    )


def is_tree(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    left = is_tree(value["left"]) if "left" in value else True
    return left and isinstance(value.get("leaf", True), bool)


def is_nested(text: str) -> bool:
    depth = len(text) - len(text.lstrip("("))
    inner = text[depth : len(text) - depth]
    return text == "(" * depth + inner + ")" * depth and re.fullmatch(r"x(\+x)*", inner) is not None


CASES = {
    "json_schema": (Format.JSON_SCHEMA, json.dumps(SCHEMA), is_person),
    "json_schema, recursive": (Format.JSON_SCHEMA, json.dumps(TREE), lambda text: is_tree(json.loads(text))),
    "json_schema, true": (Format.JSON_SCHEMA, " true", lambda text: json.loads(text) is not ...),
    "json_object": (Format.JSON_OBJECT, "", lambda text: isinstance(json.loads(text), dict)),
    "regex": (Format.REGEX, REGEX, lambda text: re.fullmatch(REGEX, text) is not None),
    "regex with anchors": (Format.REGEX, "^(a|b{2})$", lambda text: text in ("a", "bb")),
    "lark": (Format.GRAMMAR, LARK, is_nested),
    "gbnf": (Format.GRAMMAR, GBNF, is_nested),
    "choice": (Format.CHOICE, CHOICES, CHOICES.__contains__),
}


def ids_in(mask: bytes) -> list[int]:
    bits = int.from_bytes(mask, "little")
    return [token_id for token_id in range(bits.bit_length()) if bits >> token_id & 1]


def walk(matcher: Matcher, tokenizer: Tokenizer, eos: int | None, rng: random.Random) -> list[int]:
    """Draws tokens evenly until the end; after a while, whatever closes something, so that there is one."""
    ids: list[int] = []
    for step in range(3000):
        allowed = ids_in(matcher.allowed())
        if matcher.is_complete:
            assert allowed == ([] if eos is None else [eos])
            return ids
        assert allowed
        token_id = rng.choice(allowed)
        if step > 30:
            by_text = {tokenizer.token_bytes.of(each): each for each in allowed}
            in_string = b"%" in by_text
            ends = [each for each in allowed if each == eos]
            closing = [
                by_text[each] for each in ((b'"',) if in_string else (b"}", b"]", b")", b'"')) if each in by_text
            ]
            token_id = (ends + closing + [token_id])[0]
        assert matcher.accept(token_id)
        if token_id == eos:
            assert matcher.is_complete
            return ids
        ids.append(token_id)
    raise AssertionError(f"no end: {tokenizer.decode(ids)[-200:]!r}")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_has_the_form(name: str, kind: str) -> None:
    fmt, text, holds = CASES[name]
    grammar = COMPILERS[kind].compile(fmt, text)
    outputs = set()
    for seed in range(12):
        ids = walk(grammar.start(), TOKENIZERS[kind], EOS[kind], random.Random(seed))
        output = TOKENIZERS[kind].decode(ids, continues=True)
        assert holds(output), output
        outputs.add(output)
    assert len(outputs) > 1


@pytest.mark.parametrize("name", ["json_schema", "json_object", "regex"])
def test_without_an_eos_id_it_ends_when_complete(name: str) -> None:
    fmt, text, holds = CASES[name]
    grammar = COMPILERS["no-eos"].compile(fmt, text)
    for seed in range(10):
        assert holds(DEMO.decode(walk(grammar.start(), DEMO, None, random.Random(seed)), continues=True))


def test_without_an_eos_id_an_open_expression_never_completes() -> None:
    matcher = COMPILERS["no-eos"].compile(Format.REGEX, "a*").start()
    for _ in range(100):
        assert not matcher.is_complete
        assert matcher.accept(ids_in(matcher.allowed())[0])


@pytest.mark.parametrize("kind", COMPILERS)
def test_an_empty_output_is_complete_at_once(kind: str) -> None:
    matcher = COMPILERS[kind].compile(Format.REGEX, "").start()
    assert matcher.is_complete
    assert ids_in(matcher.allowed()) == [each for each in [EOS[kind]] if each is not None]


def test_eos_is_allowed_where_the_output_may_end() -> None:
    compiler = GrammarCompiler(DEMO, DEMO_VOCAB, [2, 0])
    matcher = compiler.compile(Format.CHOICE, ["a", "ab"]).start()
    letters = {letter: DEMO.encode(letter)[0] for letter in "ab"}
    assert not {0, 2} & set(ids_in(matcher.allowed()))
    assert matcher.accept(letters["a"])
    assert not matcher.is_complete
    assert set(ids_in(matcher.allowed())) == {0, 2, letters["b"]}
    assert matcher.accept(letters["b"])
    assert matcher.is_complete
    assert ids_in(matcher.allowed()) == [0, 2]
    assert matcher.accept(0)
    assert matcher.is_complete
    assert ids_in(matcher.allowed()) == []


@given(st.sampled_from(sorted(CASES)), st.sampled_from(["byte-level", "byte-fallback"]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_exactly_what_the_mask_allows_is_accepted(name: str, kind: str, seed: int) -> None:
    fmt, text, _ = CASES[name]
    rng = random.Random(seed)
    grammar = COMPILERS[kind].compile(fmt, text)
    vocab_size = DEMO_VOCAB if kind == "byte-level" else FALLBACK.vocab_size + 37
    matcher, path = grammar.start(), []
    for _ in range(rng.randrange(12)):
        allowed = [each for each in ids_in(matcher.allowed()) if each != EOS[kind]]
        if not allowed:
            break
        path.append(rng.choice(allowed))
        assert matcher.accept(path[-1])
    mask = matcher.allowed()
    allowed = ids_in(mask)
    others = sorted(set(range(-1, vocab_size + 3)) - set(allowed))
    for token_id in (*rng.sample(allowed, min(4, len(allowed))), *rng.sample(others, 4)):
        branch = grammar.start()
        assert all(branch.accept(each) for each in path)
        assert branch.allowed() == mask
        assert branch.accept(token_id) == (token_id in allowed)
        if token_id not in allowed:
            assert not branch.is_complete
            assert ids_in(branch.allowed()) == []
            assert not any(branch.accept(each) for each in allowed[:2])


def begins_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


BEGINNINGS = [each for each in range(4, DEMO_VOCAB) if begins_text(DEMO.token_bytes.of(each) or b"")]
"""Every token of the demo model that UTF-8 text can begin with; its first four are special."""


class TestMask:
    def test_length_and_bounds(self) -> None:
        for vocab_size in (2048, 2049, 2050, 2080, 2081):
            mask = GrammarCompiler(DEMO, vocab_size, [2]).compile(Format.REGEX, "(?s).*").start().allowed()
            assert len(mask) == 4 * ((vocab_size + 31) // 32)
            assert ids_in(mask) == [2, *BEGINNINGS]

    def test_a_model_smaller_than_its_tokenizer(self) -> None:
        mask = GrammarCompiler(DEMO, 300, [2, 1999]).compile(Format.REGEX, "(?s).*").start().allowed()
        assert ids_in(mask) == [2, *(each for each in BEGINNINGS if each < 300)]

    def test_control_symbols_are_never_allowed(self) -> None:
        matcher = COMPILERS["byte-fallback"].compile(Format.REGEX, r"(<unk>|\[EOS\]|<\|sep\|>)*").start()
        special = {0, FALLBACK.backend.token_to_id("<|sep|>")}
        for _ in range(40):
            allowed = ids_in(matcher.allowed())
            assert not special & set(allowed)
            assert matcher.accept(next(each for each in reversed(allowed) if each != FALLBACK_EOS))

    def test_nor_in_the_middle(self) -> None:
        matcher = COMPILERS["byte-level"].compile(Format.GRAMMAR, 'start: "a" <[1]> "b"').start()
        assert matcher.accept(DEMO.encode("a")[0])
        with pytest.raises(InvalidRequest, match="no token"):
            matcher.allowed()
        assert ids_in(matcher.allowed()) == []
        assert not matcher.is_complete

    @pytest.mark.parametrize("symbol", ["<bos>", "<[1]>", "<[0-3]>"])
    def test_nor_where_a_grammar_names_them(self, symbol: str) -> None:
        with pytest.raises(InvalidRequest) as raised:
            COMPILERS["byte-level"].compile(Format.GRAMMAR, f"start: {symbol}")
        assert raised.value.field == "structured.grammar"
        assert raised.value.reason is Reason.INVALID_GRAMMAR

    def test_white_space_in_json_is_bounded(self) -> None:
        matcher = COMPILERS["byte-level"].compile(Format.JSON_OBJECT, "").start()
        assert matcher.accept(DEMO.encode("{")[0])
        new_line = DEMO.encode("\n")[0]
        assert matcher.accept(new_line)
        assert new_line not in ids_in(matcher.allowed())
        assert DEMO.encode('"')[0] in ids_in(matcher.allowed())


def draw_all(matcher: Matcher) -> None:
    while not matcher.is_complete:
        matcher.accept(ids_in(matcher.allowed())[0])


def text_of(error: InvalidRequest) -> str:
    assert error.reason is Reason.INVALID_GRAMMAR
    assert "\n" not in error.description
    assert 0 < len(error.description) <= 300
    return error.description


HOSTILE = {
    "no JSON": (Format.JSON_SCHEMA, "{"),
    "no schema": (Format.JSON_SCHEMA, "[]"),
    "false": (Format.JSON_SCHEMA, "false"),
    "unknown type": (Format.JSON_SCHEMA, '{"type": "person"}'),
    "keyword that cannot be kept": (Format.JSON_SCHEMA, '{"not": {"type": "string"}}'),
    "reference to a URL": (Format.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/schema.json"}'),
    "reference to a file": (Format.JSON_SCHEMA, '{"$ref": "file:///etc/passwd"}'),
    "deep schema": (Format.JSON_SCHEMA, '{"items":' * 7000 + "{}" + "}" * 500),
    "schema that multiplies": (
        Format.JSON_SCHEMA,
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(20)]}),
    ),
    "schema that compiles without end": (Format.JSON_SCHEMA, '{"type": "integer", "multipleOf": 99999999}'),
    "expression that is none": (Format.REGEX, "a("),
    "look-ahead": (Format.REGEX, "(?=a)a"),
    "deep expression": (Format.REGEX, "(" * 30000 + "a" + ")" * 30000),
    "bytes that are no UTF-8": (Format.REGEX, r"(?-u)\xff"),
    "no grammar": (Format.GRAMMAR, "hello"),
    "empty grammar": (Format.GRAMMAR, ""),
    "rule that is missing": (Format.GRAMMAR, "start: other"),
    "deep grammar": (Format.GRAMMAR, "start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "deep GBNF": (Format.GRAMMAR, "root ::= " + "(" * 30000 + '"a"' + ")" * 30000),
    "grammar that matches nothing": (Format.GRAMMAR, "start: start"),
    "schema of nothing but itself": (Format.JSON_SCHEMA, '{"$ref": "#"}'),
    "rules deeper than the stack": (
        Format.GRAMMAR,
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n',
    ),
    "terminals that double": (
        Format.GRAMMAR,
        "start: R0\n" + "".join(f'R{i}: R{i + 1} "x" R{i + 1}\n' for i in range(60)) + 'R60: "a"\n',
    ),
    "expressions all at once": (
        Format.GRAMMAR,
        "start: R\nR: " + " & ".join(f"/.*{i:x}.*/" for i in range(200)),
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_what_cannot_be_compiled_is_named(self, name: str) -> None:
        fmt, text = HOSTILE[name]
        with pytest.raises(InvalidRequest) as raised:
            COMPILERS["byte-level"].compile(fmt, text)
        assert raised.value.field == f"structured.{fmt}"
        text_of(raised.value)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("reference to a URL", "does not fetch"),
            ("expression that is none", "unclosed group"),
            ("unknown type", "person"),
            ("schema that compiles without end", "takes more than 2 s"),
            ("rules deeper than the stack", "the stack to compile"),
        ],
    )
    def test_the_reason_is_told(self, name: str, words: str) -> None:
        with pytest.raises(InvalidRequest) as raised:
            COMPILERS["byte-level"].compile(*HOSTILE[name])
        assert words in text_of(raised.value)

    @pytest.mark.parametrize("choices", [[], ["a", ""]])
    def test_choices_without_text(self, choices: list[str]) -> None:
        with pytest.raises(InvalidRequest) as raised:
            COMPILERS["byte-level"].compile(Format.CHOICE, choices)
        assert raised.value.field == "structured.choice"

    @pytest.mark.parametrize(
        ("fmt", "text"), [(Format.REGEX, "é" * 32769), (Format.CHOICE, ["a" * 32768, "é" * 16385])]
    )
    def test_size(self, fmt: Format, text: str | list[str]) -> None:
        with pytest.raises(InvalidRequest, match="bytes, limit is 65536") as raised:
            COMPILERS["byte-level"].compile(fmt, text)
        assert raised.value.reason is Reason.INVALID_FIELD

    def test_a_character_that_no_token_spells(self) -> None:
        backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
        backend.decoder = decoders.Fuse()
        compiler = GrammarCompiler(Tokenizer(backend), 2, [])
        for expression in ("ac|ad", "acd"):  # one where the character is forced, one where it is not
            with pytest.raises(InvalidRequest) as raised:
                draw_all(compiler.compile(Format.REGEX, expression).start())
            assert "no token" in text_of(raised.value)

    def test_64_kib_of_choices(self) -> None:
        rng = random.Random(0)
        choices = [f"{rng.getrandbits(64):016x}" for _ in range(4096)]
        grammar = COMPILERS["byte-level"].compile(Format.CHOICE, choices)
        for seed in range(3):
            assert DEMO.decode(walk(grammar.start(), DEMO, DEMO_EOS, random.Random(seed)), continues=True) in choices


class TestCompiler:
    def test_equal_texts_are_compiled_once(self) -> None:
        compiler = COMPILERS["byte-level"]
        assert compiler.compile(Format.REGEX, "abc") is compiler.compile(Format.REGEX, "abc")
        assert compiler.compile(Format.CHOICE, ["abc"]) is not compiler.compile(Format.REGEX, "abc")
        assert compiler.compile(Format.CHOICE, ["a", "b"]) is compiler.compile(Format.CHOICE, ("a", "b"))

    def test_what_was_used_least_recently_is_forgotten(self) -> None:
        compiler = GrammarCompiler(DEMO, DEMO_VOCAB, [2])
        first, second = (compiler.compile(Format.CHOICE, [text]) for text in ("first", "second"))
        for i in range(63):
            compiler.compile(Format.CHOICE, [f"text {i}"])
            assert compiler.compile(Format.CHOICE, ["first"]) is first
        assert compiler.compile(Format.CHOICE, ["second"]) is not second

    def test_candidates_do_not_disturb_one_another(self) -> None:
        """Threads that walk through one grammar at once draw what each would draw alone."""
        grammar = GrammarCompiler(DEMO, DEMO_VOCAB, [2]).compile(Format.JSON_SCHEMA, json.dumps(SCHEMA))
        drawn: dict[int, list[int]] = {}

        def draw(seed: int) -> None:
            drawn[seed] = walk(grammar.start(), DEMO, DEMO_EOS, random.Random(seed))

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        again = GrammarCompiler(DEMO, DEMO_VOCAB, [2]).compile(Format.JSON_SCHEMA, json.dumps(SCHEMA))
        for seed in range(8):
            assert drawn[seed] == walk(again.start(), DEMO, DEMO_EOS, random.Random(seed))

    def test_threads_that_compile_at_once(self) -> None:
        compiler = GrammarCompiler(DEMO, DEMO_VOCAB, [2])
        grammars: list[object] = []
        threads = [
            threading.Thread(target=lambda: grammars.append(compiler.compile(Format.JSON_OBJECT, ""))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(grammars) == 4


class TestVocabulary:
    @pytest.mark.parametrize("tokenizer", [DEMO, FALLBACK], ids=["byte-level", "byte-fallback"])
    def test_bytes_are_those_of_the_library_inside_a_text(self, tokenizer: Tokenizer) -> None:
        backend = tokenizer.backend
        before, after = backend.token_to_id("a"), backend.token_to_id("b")
        checked = 0
        for token_id, token in enumerate(Vocabulary(tokenizer, tokenizer.vocab_size, []).token_bytes):
            text = token.decode(errors="ignore")
            if not text or text.encode() != token:
                continue
            assert backend.decode([before, token_id, after], skip_special_tokens=True) == f"a{text}b"
            checked += 1
        assert checked > 100

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def test_bytes_in_a_row_are_the_text(self, text: str) -> None:
        for tokenizer in (DEMO, FALLBACK):
            vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [])
            assert b"".join(vocabulary.token_bytes[each] for each in vocabulary.encode(text)) == text.encode()

    @pytest.mark.parametrize("text", ["<eos>", "[EOS]", "<|sep|>", "<unk> a"])
    @pytest.mark.parametrize("tokenizer", [DEMO, FALLBACK], ids=["byte-level", "byte-fallback"])
    def test_a_text_that_spells_a_control_symbol_is_spelled(self, tokenizer: Tokenizer, text: str) -> None:
        vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [])
        assert b"".join(vocabulary.token_bytes[each] for each in vocabulary.encode(text)) == text.encode()

    def test_the_tokenizers_own_choice_where_it_is_exact(self) -> None:
        text = "To be, or not to be"
        assert Vocabulary(DEMO, DEMO_VOCAB, [2]).encode(text) == DEMO.encode(text)
        pieces = [FALLBACK.backend.id_to_token(each) for each in Vocabulary(FALLBACK, 300, [1]).encode("ab a")]
        assert pieces == ["ab", "▁a"], "without the space that the tokenizer puts before a text"
