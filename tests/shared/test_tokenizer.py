"""Text to ids and back, whole and in pieces."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from grokmoe.errors import ConfigError
from grokmoe.tokenizer import IncrementalDecoder, Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, Übergröße",
    "日本語のテキスト",
    "🙂🙃 👩‍👩‍👧 ok",
] * 3


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback():
    """A vocabulary as SentencePiece makes it: pieces with a mark for the space, and bytes for what is in no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


TOKENIZER = Tokenizer(byte_level())
FALLBACK = Tokenizer(byte_fallback())
BOTH = pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte-level", "byte-fallback"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CUTS = st.lists(st.integers(0, 9), max_size=12)


def pieces_of(tokenizer, ids, cuts=(), **options):
    """Pushes ids in groups of these sizes, then one by one."""
    decoder, pieces, at = IncrementalDecoder(tokenizer, **options), [], 0
    for size in cuts:
        pieces.append(decoder.push(ids[at : at + size]))
        at += size
    return [*pieces, *(decoder.push([token_id]) for token_id in ids[at:]), decoder.finish()]


@BOTH
@given(text=TEXT)
def test_decode_is_the_inverse_of_encode(tokenizer, text):
    if not any(special in text for special in tokenizer.control_symbols) and "▁" not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 330), max_size=120), st.booleans())
@settings(max_examples=300)
def test_byte_level_text_is_that_of_the_library(ids, skip_special):
    """Random ids are mostly bytes that are no UTF-8; ids from 320 on are beyond the vocabulary."""
    expected = TOKENIZER.backend.decode(ids, skip_special_tokens=skip_special)
    assert TOKENIZER.decode(ids, skip_special) == expected


@given(st.lists(st.sampled_from([*FALLBACK.encode("é€🙂 \ufffda b"), 0, 1, 2, 999]), max_size=40), st.booleans())
@settings(max_examples=300)
def test_byte_fallback_text_is_that_of_the_library(ids, skip_special):
    """But for invalid bytes: the library then drops the valid ones beside them too."""
    text = FALLBACK.decode(ids, skip_special)
    expected = FALLBACK.backend.decode(ids, skip_special_tokens=skip_special)
    if "\ufffd" in expected:
        assert text.count("\ufffd") <= expected.count("\ufffd")
    else:
        assert text == expected


def test_sound_characters_survive_a_bad_byte():
    ids = FALLBACK.encode("é🙂")
    bad = FALLBACK.encode("é")[-1:]
    assert FALLBACK.decode([*ids, *bad, *ids[1:]]) == "é🙂\ufffdé🙂"


@BOTH
@given(ids=st.lists(st.integers(0, 330), max_size=120), cuts=CUTS, skip_special=st.booleans(), continues=st.booleans())
@settings(max_examples=300)
def test_pieces_make_the_whole(tokenizer, ids, cuts, skip_special, continues):
    pieces = pieces_of(tokenizer, ids, cuts, skip_special=skip_special, continues=continues)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special, continues)


@BOTH
def test_a_character_comes_whole_or_not_at_all(tokenizer):
    text = "ab 🙈 a"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@BOTH
def test_text_comes_at_once_when_nothing_is_open(tokenizer):
    assert pieces_of(tokenizer, tokenizer.encode("abab"))[-1] == ""


@BOTH
def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("a🙈")[:-1]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces[:-1]) == "a"
    assert "".join(pieces) == tokenizer.decode(ids) == "a\ufffd"


@BOTH
@given(first=TEXT.filter(bool), second=TEXT)
def test_a_continuation_keeps_its_space(tokenizer, first, second):
    ids = tokenizer.encode(f"{first} {second}")
    for cut in range(1, len(ids)):
        if "\ufffd" not in (head := tokenizer.decode(ids[:cut])):
            assert head + tokenizer.decode(ids[cut:], continues=True) == tokenizer.decode(ids)


def test_the_space_before_a_text_is_left_out():
    assert FALLBACK.pieces(FALLBACK.encode("a b")) == ["▁a", "▁b"]
    assert FALLBACK.decode(FALLBACK.encode("a b")) == "a b"
    assert FALLBACK.decode(FALLBACK.encode("a b"), continues=True) == " a b"


def test_special_tokens_are_skipped_and_none_is_added():
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode("a</s>")[-1] == 2
    ids = [1, *TOKENIZER.encode("dog"), 2]
    assert TOKENIZER.decode(ids) == "dog"
    assert TOKENIZER.decode(ids, skip_special=False) == "<s>dog</s>"


def test_added_tokens_are_text_as_they_are_spelled():
    backend = byte_level()
    backend.add_tokens(["a\u00e9 b", "Ġx"])
    tokenizer = Tokenizer(backend)
    ids = [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    assert tokenizer.decode(ids) == backend.decode(ids) == "a\u00e9 b x"


def test_without_a_decoder_tokens_are_words():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert Tokenizer(backend).decode([0, 1, 0]) == backend.decode([0, 1, 0]) == "a b a"


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Strip(" ", 1, 1), decoders.BPEDecoder()], ids=repr)
def test_decoders_whose_tokens_are_no_bytes_are_refused(decoder, tmp_path):
    backend = byte_level()
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the tokenizer's decoder"):
        Tokenizer.from_directory(tmp_path)


def test_pieces_are_spelled_as_in_the_vocabulary():
    ids = TOKENIZER.encode("the dog")
    assert TOKENIZER.pieces([*ids, 2, 999]) == [*TOKENIZER.backend.encode("the dog").tokens, "</s>", ""]


def test_control_symbols():
    backend = byte_level()
    backend.add_special_tokens(["<|a|>", "<|ab|>"])
    backend.add_tokens(["<|tool|>", "<|>", "plain"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.control_symbols == {"<pad>", "<s>", "</s>", "<|a|>", "<|ab|>", "<|tool|>"}
    assert tokenizer.find_control_symbol("<|b|> <|> plain <|a |>") is None
    assert tokenizer.find_control_symbol("x</s><|ab|>") == "</s>"
    assert tokenizer.find_control_symbol("x<|ab|></s>") == "<|ab|>"


@given(st.text("<|ab>/s", max_size=12))
def test_the_first_and_longest_control_symbol_is_found(text):
    tokenizer = Tokenizer(TOKENIZER.backend)
    tokenizer.control_symbols = frozenset({"<s>", "</s>", "<|a|>", "<|", "<|a"})
    spelled = [
        (start, -length, text[start : start + length])
        for start in range(len(text))
        for length in range(1, 6)
        if text[start : start + length] in tokenizer.control_symbols
    ]
    assert tokenizer.find_control_symbol(text) == (min(spelled)[2] if spelled else None)


def test_many_threads_may_use_one_tokenizer():
    tokenizer = Tokenizer(byte_level())
    texts = [text * 20 for text in CORPUS]

    def round_trip(text):
        return tokenizer.decode(tokenizer.encode(text))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(round_trip, texts * 20)) == texts * 20


def test_from_file(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "the lazy dog sleeps"
    assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_errors_of_the_file_name_it(tmp_path):
    for content, word in ((None, "no such file"), ("{}", "not a tokenizer.json")):
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError) as raised:
            Tokenizer.from_file(path)
        assert str(path) in str(raised.value)
        assert word in str(raised.value)
