"""SentencePiece models as tokenizers: the same ids and the same text as SentencePiece itself, or a refusal."""

import itertools
import json
import random
import shutil

import jinja2
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.sentencepiece_model import ModelProto, SentencePieceModel
from grokmoe.tokenizer import Tokenizer
from launcher.__main__ import main
from tests.shared.trained_sentencepiece import SCRIPTS, SYMBOLS, train

NORMAL, CONTROL, UNUSED = (getattr(ModelProto.SentencePiece, name) for name in ("NORMAL", "CONTROL", "UNUSED"))


class Pair:
    """A model, in SentencePiece and converted."""

    def __init__(self, proto):
        self.proto = proto
        self.original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.converted = Tokenizer(SentencePieceModel(proto).to_backend())

    def check(self, text):
        ids = self.original.encode(text)
        assert self.converted.encode(text) == ids
        assert self.converted.decode(ids) == self.original.decode(ids)


GROK_LIKE = Pair(train())
PAIRS = {
    "like Grok-1": GROK_LIKE,
    "no dummy prefix": Pair(train(add_dummy_prefix=False)),
    "no symbols": Pair(train(user_defined_symbols=[])),
    # Where digits are ordinary, the text "<0x41>" between two symbols is a word that is spelled like a byte piece.
    "few symbols": Pair(train(user_defined_symbols=["\n", "<|a|>", "ab", "abc", "▁▁"], split_digits=False)),
    "letters as symbols": Pair(train(user_defined_symbols=["a", "aaa", " a"], character_coverage=1.0)),
}
NOT_CONTROL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
FRAGMENTS = st.sampled_from(
    [*SYMBOLS, *SCRIPTS.values(), "<|a|>", "ab", "abc", "aaaa", "<0x41>", "<0xAB>", "[PA", "D]", "▁", " ", "<|", "|>"]
)
TEXT = st.one_of(st.text(max_size=60), st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(pair, script):
    text = SCRIPTS[script]
    pair.check(text)
    for start, end in itertools.combinations(range(0, len(text), 7), 2):
        pair.check(text[start:end])


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@given(text=TEXT)
@example(text="")
@example(text="\n<0x41>\n<0xAB>")
@example(text="<|a|><0x41><|a|>x")
@settings(max_examples=300, deadline=None)
def test_any_text(pair, text):
    if not any(piece in text for piece in NOT_CONTROL):
        pair.check(text)


def test_pieces_of_any_scores():
    """Hand-made models over two letters, where everything overlaps: the order of merges is that of the scores."""
    drawn = random.Random(5)
    for _ in range(150):
        proto = ModelProto()
        proto.CopyFrom(GROK_LIKE.proto)
        del proto.pieces[:]
        proto.pieces.extend(piece for piece in GROK_LIKE.proto.pieces if piece.type != NORMAL)
        pieces = {"a": None, "b": None, "▁": None}
        for _ in range(drawn.randint(3, 40)):
            piece = drawn.choice(list(pieces)) + drawn.choice(list(pieces))
            if len(piece) <= 10:
                pieces[piece] = None
        scores = [-float(rank) for rank in range(len(pieces))]
        drawn.shuffle(scores)
        for piece, score in zip(pieces, scores, strict=True):
            proto.pieces.add(piece=piece, score=score, type=NORMAL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        pair = Pair(proto)
        for _ in range(30):
            pair.check("".join(drawn.choices("ab \n", [5, 5, 1, 1], k=drawn.randint(1, 40))))
        for piece in pieces:  # each as a word of its own, also where merging makes something else of it
            pair.check(f"\n{piece}\n".replace("▁", " "))


@given(st.lists(st.integers(4, GROK_LIKE.proto.trainer_spec.vocab_size - 1), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_alike(ids):
    """But for invalid bytes, which SentencePiece writes as one U+FFFD each, and a first space not spelled as U+2581.

    Text is never encoded as either.
    """
    expected = GROK_LIKE.original.decode(ids)
    begins_with_space = GROK_LIKE.converted.pieces(ids[:1])[0].startswith((" ", "<0x20>")) if ids else False
    if "\ufffd" not in expected and not begins_with_space:
        assert GROK_LIKE.converted.decode(ids) == expected


def test_text_that_spells_a_control_piece_is_that_piece():
    """The one difference: to SentencePiece it is text. `find_control_symbol` tells."""
    tokenizer = GROK_LIKE.converted
    assert tokenizer.encode("[EOS]") == [2]
    assert 2 not in GROK_LIKE.original.encode("[EOS]")
    assert tokenizer.decode([2]) == GROK_LIKE.original.decode([2]) == ""
    assert tokenizer.control_symbols == {*NOT_CONTROL, "<|separator|>", "<|mask|>", "<|control1|>"}
    assert tokenizer.find_control_symbol("a <|mask|> [EOS]") == "<|mask|>"


REFUSED = {
    "model_type is UNIGRAM": {"model_type": "unigram"},
    "normalizer_spec is nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "remove_extra_whitespaces": {"remove_extra_whitespaces": True},
    "byte_fallback": {"byte_fallback": False},
    "treat_whitespace_as_suffix": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_exact_is_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        SentencePieceModel(train(**REFUSED[reason]))


def edited(edit):
    proto = ModelProto()
    proto.CopyFrom(GROK_LIKE.proto)
    edit(proto)
    return proto


def use(field, value):
    return lambda proto: setattr(proto.normalizer_spec, field, value)


EDITS = {
    "escape_whitespaces": use("escape_whitespaces", False),
    "denormalizer_spec": lambda proto: setattr(proto.denormalizer_spec, "precompiled_charsmap", b"x"),
    "UNUSED": lambda proto: setattr(proto.pieces[-1], "type", UNUSED),
    "equal scores": lambda proto: setattr(proto.pieces[-1], "score", proto.pieces[-2].score),
    "1 are repeated": lambda proto: setattr(proto.pieces[-1], "piece", proto.pieces[-2].piece),
    "byte pieces": lambda proto: proto.pieces.remove(next(p for p in proto.pieces if p.piece == "<0x41>")),
    "0 unknown pieces": lambda proto: setattr(proto.pieces[3], "type", CONTROL),
    "'¿', which is not a piece": lambda proto: setattr(proto.pieces[-1], "piece", "a¿"),
}


@pytest.mark.parametrize("reason", EDITS)
def test_models_that_contradict_the_rules_are_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        SentencePieceModel(edited(EDITS[reason]))


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(GROK_LIKE.proto.SerializeToString())
    return tmp_path


def test_a_directory_with_a_model_only_is_enough(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint)
    for text in SCRIPTS.values():
        assert tokenizer.encode(text) == GROK_LIKE.original.encode(text)


def test_a_tokenizer_json_comes_first(checkpoint):
    assert Tokenizer.from_directory(checkpoint / "nothing") is None
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(checkpoint / "tokenizer.json"))
    assert Tokenizer.from_directory(checkpoint).vocab_size == 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"{}"])
def test_a_file_that_is_no_model_is_named(checkpoint, content):
    path = checkpoint / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a SentencePiece model") as raised:
        Tokenizer.from_directory(checkpoint)
    assert raised.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_the_command_writes_what_the_server_would_use(checkpoint, name, capsys):
    assert main(["checkpoint", "convert-tokenizer", str(checkpoint / name)]) == 0
    assert str(checkpoint / "tokenizer.json") in capsys.readouterr().out
    written = Tokenizer.from_file(checkpoint / "tokenizer.json")
    for text in [*SCRIPTS.values(), "\n<0x41>\n", *NOT_CONTROL]:
        assert written.encode(text) == GROK_LIKE.converted.encode(text)
    assert written.control_symbols == GROK_LIKE.converted.control_symbols


def test_the_command_writes_a_config_for_gateways(checkpoint):
    assert main(["checkpoint", "convert-tokenizer", str(checkpoint)]) == 0
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("[BOS]", "[EOS]", "[PAD]")
    messages = [{"role": "user", "content": "one\n"}, {"role": "assistant", "content": "two"}]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])
    assert template.render(messages=messages, add_generation_prompt=True) == "one\n\ntwo"


def test_the_command_replaces_nothing_unasked(checkpoint, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_text("mine")
    assert main(["checkpoint", "convert-tokenizer", str(checkpoint)]) == 1
    assert "--output" in capsys.readouterr().err
    assert (checkpoint / "tokenizer.json").read_text() == "mine"
    output = checkpoint / "tokenizer.json"
    assert main(["checkpoint", "convert-tokenizer", str(checkpoint), "--output", str(output)]) == 0
    assert Tokenizer.from_file(output).encode("a b") == GROK_LIKE.converted.encode("a b")
    assert (checkpoint / "tokenizer_config.json").read_text() == "mine"
    assert {path.name for path in checkpoint.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }


def test_the_command_says_what_is_wrong(checkpoint, capsys):
    missing = checkpoint / "none" / "tokenizer.json"
    for arguments in ([str(checkpoint), "--output", str(missing)], [str(checkpoint / "none")]):
        assert main(["checkpoint", "convert-tokenizer", *arguments]) == 1
        assert str(checkpoint / "none") in capsys.readouterr().err
    shutil.copy(__file__, checkpoint / "tokenizer.model")
    assert main(["checkpoint", "convert-tokenizer", str(checkpoint)]) == 1
    assert "not a SentencePiece model" in capsys.readouterr().err
