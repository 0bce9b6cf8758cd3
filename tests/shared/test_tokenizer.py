"""Text to ids and back, whole and in pieces."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

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
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


TOKENIZER = Tokenizer(byte_level())
FALLBACK = Tokenizer(byte_fallback())
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def pieces_of(tokenizer, ids, cuts=None):
    """Pushes ids in groups: `cuts` gives their sizes in turn, one id each by default."""
    decoder, pieces, at, turn = IncrementalDecoder(tokenizer), [], 0, 0
    while at < len(ids):
        size = cuts[turn % len(cuts)] if cuts else 1
        pieces.append(decoder.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, decoder.finish()]


@given(TEXT)
def test_decode_is_the_inverse_of_encode(text):
    if not any(special in text for special in ("<pad>", "<s>", "</s>")):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, 330), max_size=120), st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=300)
def test_pieces_of_random_ids_make_the_whole(ids, cuts):
    """Random ids are mostly bytes that are no UTF-8; ids from 320 on are beyond the vocabulary."""
    assert "".join(pieces_of(TOKENIZER, ids, cuts)) == TOKENIZER.decode(ids)


@given(st.lists(st.sampled_from([*TOKENIZER.encode("é€🙂 ok"), 0, 1, 2]), max_size=150))
@settings(max_examples=200)
def test_pieces_of_broken_characters_make_the_whole(ids):
    assert "".join(pieces_of(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(TEXT, st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=200)
def test_pieces_of_text_make_the_text(text, cuts):
    ids = TOKENIZER.encode(text)
    assert "".join(pieces_of(TOKENIZER, ids, cuts)) == TOKENIZER.decode(ids)


@given(st.text("ab é€🙂\ufffd", max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=200)
def test_pieces_with_byte_fallback_make_the_text(text, cuts):
    ids = FALLBACK.encode(text)
    assert "".join(pieces_of(FALLBACK, ids, cuts)) == FALLBACK.decode(ids)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_character_comes_whole_or_not_at_all(tokenizer):
    text = "ab 🙈 a"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_at_once_when_nothing_is_open():
    assert pieces_of(TOKENIZER, TOKENIZER.encode("abc"))[-1] == ""


def test_an_unfinished_character_comes_out_at_the_end():
    ids = TOKENIZER.encode("a🙈")[:-1]
    pieces = pieces_of(TOKENIZER, ids)
    assert "".join(pieces[:-1]) == "a"
    assert "".join(pieces) == TOKENIZER.decode(ids) == "a\ufffd"


@pytest.mark.parametrize("ids", [TOKENIZER.encode("ab 🙂 "), TOKENIZER.encode("🙈")[-1:], [1]], ids=str)
def test_the_window_stays_small(ids, monkeypatch):
    """Also where no character ever ends: the last byte of a character over and over."""
    sizes = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    decoder = IncrementalDecoder(TOKENIZER)
    for token_id in ids * 300:
        decoder.push([token_id])
    assert max(sizes, default=0) <= 40


def test_special_tokens_are_skipped_and_none_is_added():
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode("a</s>")[-1] == 2
    assert TOKENIZER.decode([1, *TOKENIZER.encode("dog"), 2]) == "dog"


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
