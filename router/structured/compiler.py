"""Text to a compiled grammar: bounded in time and memory, and remembered."""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance

from grokmoe.errors import InvalidRequest, Reason
from grokmoe.tokenizer import Tokenizer
from router.structured.matcher import Grammar, one_line
from router.structured.probe import ProbeError, parser_limits, probe
from router.structured.vocabulary import Vocabulary

MAX_BYTES = 64 * 1024
"""Of a schema, an expression, a grammar, or all choices together."""
MAX_CACHED_GRAMMARS = 64
JSON_WHITE_SPACE = r" |\n {0,24}"
"""What may stand between two parts of JSON: a space, or the end of a line and an indentation. Without a bound a weak
model writes nothing but white space."""

_REGEX_SYNTAX = frozenset(r"\.+*?()|[]{}^$#&-~/")


class Format(enum.StrEnum):
    """What the text of a structured output is; named as the fields of StructuredOutput."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


class GrammarCompiler:
    """Compiles for one model and its tokenizer. Thread-safe; blocks, so not for the event loop.

    What the library needs to know of the vocabulary is made at the first use: about a second for 131072 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: of the model; ids that the tokenizer lacks are never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(id_ for id_ in eos_token_ids if id_ < vocab_size)
        self._lock = threading.Lock()
        self._table: _Table | None = None
        self._grammars: OrderedDict[tuple[Format, str | tuple[str, ...]], Grammar] = OrderedDict()

    def compile(self, fmt: Format, text: str | Sequence[str]) -> Grammar:
        """text: for CHOICE the texts, for JSON_OBJECT ignored.

        InvalidRequest: INVALID_GRAMMAR if it cannot be compiled, costs too much or matches nothing.
        """
        text = "" if fmt is Format.JSON_OBJECT else text if isinstance(text, str) else tuple(text)
        field = f"structured.{fmt}"
        _check_size(field, text)
        key = (fmt, text)
        with self._lock:
            if key in self._grammars:
                self._grammars.move_to_end(key)
                return self._grammars[key]
            if self._table is None:
                self._table = _Table(self._tokenizer, self._vocab_size, self._eos_token_ids)
        grammar = self._compile(field, self._table, _to_library(field, fmt, text))
        with self._lock:
            self._grammars[key] = grammar
            while len(self._grammars) > MAX_CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
        return grammar

    def _compile(self, field: str, table: _Table, grammar: str) -> Grammar:
        prototype = llguidance.LLMatcher(table.library, grammar, log_level=0, limits=parser_limits())
        if prototype.is_error():
            raise _invalid(field, prototype.get_error())
        compiled = Grammar(prototype, field, table.text_mask, self._vocab_size, self._eos_token_ids)
        compiled.start().allowed()  # raises if there is not even a first token
        return compiled


class _Table:
    """The vocabulary as the library keeps it. Its id `vocab_size` stands for the end of the output.

    So it works the same for models with no, one or several end-of-sequence ids.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self.tokens = [*vocabulary.token_bytes, b"<end of output>"]
        self.special_token_ids = [vocab_size]
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self._encode = vocabulary.encode
        self.library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))
        self.text_mask = int("".join("1" if token else "0" for token in reversed(vocabulary.token_bytes)), 2)

    def __call__(self, text: str) -> list[int]:
        """How the library tokenises what a grammar leaves no choice about."""
        return self._encode(text)


def _check_size(field: str, text: str | tuple[str, ...]) -> None:
    if not isinstance(text, str) and not (text and all(text)):
        raise InvalidRequest(field, "must be at least one text, and none empty")
    size = len(text.encode()) if isinstance(text, str) else sum(len(each.encode()) for each in text)
    if size > MAX_BYTES:
        raise InvalidRequest(field, f"has {size} bytes, limit is {MAX_BYTES}")


def _to_library(field: str, fmt: Format, text: str | tuple[str, ...]) -> str:
    """The grammar as the library takes it. What the caller wrote goes through the probe; what is made here need not."""
    if fmt is Format.CHOICE:
        return llguidance.LLMatcher.grammar_from_regex("|".join(map(_literal, text)))
    assert isinstance(text, str), "only choices are several texts"
    try:
        if fmt is Format.JSON_OBJECT:
            return _json('{"type": "object"}')
        if fmt is Format.JSON_SCHEMA:
            return probe(_json(text))
        if fmt is Format.REGEX:
            return probe(llguidance.LLMatcher.grammar_from_regex(text))
        return probe(text, convert=True)
    except (ValueError, ProbeError) as error:
        raise _invalid(field, str(error)) from error


def _json(schema: str) -> str:
    """ValueError when it is not JSON."""
    if schema.strip() == "true":
        schema = "{}"  # the same, and an object, which options need
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITE_SPACE})


def _literal(text: str) -> str:
    """An expression that matches this text only."""
    return "".join(f"\\{character}" if character in _REGEX_SYNTAX else character for character in text)


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(field, one_line(message), reason=Reason.INVALID_GRAMMAR)
