"""Text of a stream: any cut of the ids gives the same, and nothing is sent that a stop string then takes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.sentencepiece_model import SentencePieceModel
from grokmoe.tokenizer import IncrementalDecoder, Tokenizer
from launcher.paths import DEMO_MODEL
from router import text as text_module
from router.text import TextPiece, TextSettings, TextStream
from tests.shared.trained_sentencepiece import train

DEMO = Tokenizer.from_file(DEMO_MODEL / "tokenizer.json")
CONVERTED = Tokenizer(SentencePieceModel(train()).to_backend())
BOTH = pytest.mark.parametrize("tokenizer", [DEMO, CONVERTED], ids=["byte-level", "byte-fallback"])

ALPHABETS = st.sampled_from(["ab", "abé🙂 \n\ufffd"])
LETTERS = ALPHABETS.flatmap(lambda alphabet: st.text(alphabet, max_size=30))
STOPS = ALPHABETS.flatmap(lambda alphabet: st.lists(st.text(alphabet, min_size=1, max_size=5), max_size=4).map(tuple))
SETTINGS = st.builds(
    TextSettings,
    stop_strings=STOPS,
    include_stop_string=st.booleans(),
    skip_special_tokens=st.booleans(),
    min_tokens=st.integers(0, 12),
    prompt_text=st.sampled_from(["", "ab", "🙂"]),
)
CUTS = st.lists(st.integers(0, 6), max_size=10)


def some_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of text over few letters, with broken characters, special tokens and ids beyond the vocabulary between."""
    few = sorted({*tokenizer.encode("aabb éé🙂🙂 \n\n ab"), 0, 2, tokenizer.vocab_size})
    return st.one_of(LETTERS.map(tokenizer.encode), st.lists(st.sampled_from(few), max_size=40))


CASES = st.sampled_from([DEMO, CONVERTED]).flatmap(lambda tokenizer: st.tuples(st.just(tokenizer), some_ids(tokenizer)))


def pushed(
    tokenizer: Tokenizer, ids: Sequence[int], wanted: TextSettings, cuts: Sequence[int] = (), **end: bool
) -> list[TextPiece]:
    """Pushes ids in groups of these sizes and then one by one, the last with `ended`, until a stop string is found."""
    groups, at = [], 0
    for size in [*cuts, *[1] * len(ids)]:
        groups.append(ids[at : at + size])
        at += size
        if at >= len(ids):
            break
    stream, pieces = TextStream(tokenizer, wanted), []
    for group in groups[:-1]:
        pieces.append(stream.push(group))
        if pieces[-1].stop_string is not None:
            return pieces
    return [*pieces, stream.push(groups[-1] if groups else [], ended=True, **end)]


def joined(pieces: Sequence[TextPiece]) -> TextPiece:
    """All pieces as one."""
    return TextPiece(
        "".join(piece.text for piece in pieces), sum(piece.num_tokens for piece in pieces), pieces[-1].stop_string
    )


def expected(tokenizer: Tokenizer, ids: Sequence[int], wanted: TextSettings, num_void: int = 0) -> TextPiece:
    """What a request gets, told slowly: the text after each token is searched from its beginning.

    num_void: ids at the end that are no text.
    """
    text, searched = "", 0
    decoder = IncrementalDecoder(tokenizer, wanted.skip_special_tokens, continues=True)
    visible = ids[: len(ids) - num_void]
    for num_tokens in range(1, len(visible) + 2):
        is_flush = num_tokens > len(visible)
        text += decoder.finish() if is_flush else decoder.push([visible[num_tokens - 1]])
        num_tokens = min(num_tokens, len(visible))
        if num_tokens > wanted.min_tokens:
            found = [
                (start, len(stop), stop)
                for stop in wanted.stop_strings
                for start in range(len(text))
                if text.startswith(stop, start) and start + len(stop) > searched
            ]
            if found:
                start, length, stop = min(found)
                end = start + length if wanted.include_stop_string else start
                return TextPiece(wanted.prompt_text + text[:end], num_tokens, stop)
        searched = len(text)
    return TextPiece(wanted.prompt_text + text, len(ids), None)


@given(CASES, SETTINGS, CUTS, st.booleans())
@settings(max_examples=1000, deadline=None)
def test_any_cut_gives_the_text_up_to_the_first_stop(case, wanted, cuts, ends_with_stop_token):
    tokenizer, ids = case
    ends_with_stop_token &= bool(ids)
    pieces = pushed(tokenizer, ids, wanted, cuts, ends_with_stop_token=ends_with_stop_token)
    assert joined(pieces) == expected(tokenizer, ids, wanted, int(ends_with_stop_token))


@given(CASES, SETTINGS, CUTS)
@settings(max_examples=300, deadline=None)
def test_no_text_wanted_but_the_same_stops(case, wanted, cuts):
    tokenizer, ids = case
    silent = dataclasses.replace(wanted, wants_text=False)
    whole = joined(pushed(tokenizer, ids, wanted, cuts))
    assert joined(pushed(tokenizer, ids, silent, cuts)) == dataclasses.replace(whole, text="")


@given(CASES, SETTINGS)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_could_be_a_stop_string(case, wanted):
    tokenizer, ids = case
    stream, sent = TextStream(tokenizer, wanted), ""
    decoder, drawn = IncrementalDecoder(tokenizer, wanted.skip_special_tokens, continues=True), wanted.prompt_text
    for token_id in ids:
        piece = stream.push([token_id])
        if piece.stop_string is not None:
            return
        sent += piece.text
        drawn += decoder.push([token_id])
        held = drawn.removeprefix(sent)
        assert sent + held == drawn
        assert not held or any(stop.startswith(held) and stop != held for stop in wanted.stop_strings)


def texts(tokenizer: Tokenizer, pieces: Sequence[str], **wanted: object) -> list[TextPiece]:
    """Pushes the ids of each piece of text in turn, until a stop string is found."""
    stream = TextStream(tokenizer, TextSettings(**wanted))
    ids = [tokenizer.encode(piece) for piece in pieces]
    taken = []
    for at, group in enumerate(ids, 1):
        taken.append(stream.push(group, ended=at == len(ids)))
        if taken[-1].stop_string is not None:
            break
    return taken


def test_a_beginning_waits_for_its_end():
    assert texts(DEMO, ["a", "b", "c"], stop_strings=("bd",)) == [
        TextPiece("a", 1, None),
        TextPiece("", 1, None),
        TextPiece("bc", 1, None),
    ]
    assert [piece.text for piece in texts(DEMO, ["a", "b"], stop_strings=("bd",))] == ["a", "b"]


def test_a_later_beginning_waits_too():
    assert joined(texts(DEMO, ["a", "a", "b", "c"], stop_strings=("abc",))) == TextPiece("a", 4, "abc")


def test_a_token_that_completes_a_stop_string_counts_and_what_follows_is_void():
    (piece,) = texts(DEMO, ["abcabc"], stop_strings=("bc",))
    ids = DEMO.encode("abcabc")
    completing = next(count for count in range(1, len(ids) + 1) if "bc" in DEMO.decode(ids[:count]))
    assert completing < len(ids)
    assert piece == TextPiece("a", completing, "bc")


def test_after_the_end_everything_is_void():
    stream = TextStream(DEMO, TextSettings(stop_strings=("b",)))
    ids = DEMO.encode("b")
    assert stream.push(ids).stop_string == "b"
    assert stream.push(ids, ended=True) == TextPiece("", 0, None)


@pytest.mark.parametrize(
    ("stops", "found", "text"),
    [
        (("b", "abc"), "b", "xa"),  # "b" is complete one token earlier
        (("bc", "abc"), "abc", "x"),  # both at once: the one that begins first
        (("abc", "ab"), "ab", "x"),  # the same beginning: the shorter one is complete first
        (("d", "e"), None, "xabc"),
    ],
)
def test_which_of_several(stops, found, text):
    whole = joined(texts(DEMO, ["x", "a", "b", "c"], stop_strings=stops))
    assert (whole.stop_string, whole.text) == (found, text)


def test_one_token_with_two_stop_strings():
    token_id = DEMO.backend.token_to_id("the")
    for stops, found in ((("e", "h"), "h"), (("h", "e"), "h"), (("e", "he"), "he"), (("the", "th", "h"), "th")):
        stream = TextStream(DEMO, TextSettings(stop_strings=stops, include_stop_string=True))
        assert stream.push([token_id]) == TextPiece("the"[: "the".index(found) + len(found)], 1, found)


def test_min_tokens():
    """The second token completes the stop string, the third continues another one that began before."""
    assert joined(texts(DEMO, ["a", "b", "c"], stop_strings=("ab",), min_tokens=1)) == TextPiece("", 2, "ab")
    assert joined(texts(DEMO, ["a", "b", "c"], stop_strings=("ab",), min_tokens=2)) == TextPiece("abc", 3, None)
    assert joined(texts(DEMO, ["a", "b", "c"], stop_strings=("ab", "abc"), min_tokens=2)) == TextPiece("", 3, "abc")


def test_the_prompt_is_echoed_once_and_not_searched():
    pieces = texts(DEMO, ["b", "c"], stop_strings=("ab",), prompt_text="xaba")
    assert joined(pieces) == TextPiece("xababc", 2, None)
    assert pieces[0].text == "xaba" + "b"


def test_a_stop_token_is_counted_and_not_written():
    ids = DEMO.encode("ab")
    stream = TextStream(DEMO, TextSettings(stop_strings=("ab",)))
    assert stream.push(ids[-1:], ended=True, ends_with_stop_token=True) == TextPiece("", 1, None)
    stream = TextStream(DEMO, TextSettings(skip_special_tokens=False))
    assert stream.push([*DEMO.encode("ab"), 2], ended=True, ends_with_stop_token=True).text == "ab"


def test_special_tokens_are_text_if_asked_for():
    for skip, text in ((True, "ab"), (False, "a<eos>b")):
        stream = TextStream(DEMO, TextSettings(skip_special_tokens=skip))
        assert stream.push([*DEMO.encode("a"), 2, *DEMO.encode("b")], ended=True).text == text


@BOTH
def test_a_continuation_begins_with_its_space(tokenizer):
    ids = tokenizer.encode("to the")
    cut = next(count for count in range(1, len(ids)) if tokenizer.decode(ids[:count]) == "to")
    assert TextStream(tokenizer, TextSettings(prompt_text="to")).push(ids[cut:], ended=True).text == "to the"


def test_without_text_and_stops_nothing_is_decoded(monkeypatch):
    monkeypatch.setattr(IncrementalDecoder, "push", None)
    monkeypatch.setattr(IncrementalDecoder, "finish", None)
    stream = TextStream(DEMO, TextSettings(wants_text=False, prompt_text="a"))
    assert stream.push([5, 6, 7], ended=True) == TextPiece("", 3, None)


@BOTH
@pytest.mark.parametrize("letter", ["a", "é", "b"])
def test_what_is_kept_stays_small(tokenizer, letter, monkeypatch):
    """A token costs the same however long the text is: only what waits is searched again."""
    sizes = []
    possible_start = text_module._possible_start
    monkeypatch.setattr(
        text_module, "_possible_start", lambda text, stop: sizes.append(len(text)) or possible_start(text, stop)
    )
    stream = TextStream(tokenizer, TextSettings(stop_strings=("a" * 20 + "b", "éa"), min_tokens=10_000))
    for token_id in tokenizer.encode(letter * 500) * 4:
        stream.push([token_id])
    assert len(sizes) > 100
    assert max(sizes) <= 20 + max(len(tokenizer.decode([i], continues=True)) for i in range(tokenizer.vocab_size))
