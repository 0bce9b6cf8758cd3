"""Small SentencePiece models, trained when asked for and shaped like Grok-1's."""

from __future__ import annotations

import io
from typing import Any

import sentencepiece

from grokmoe.sentencepiece_model import ModelProto

SCRIPTS = {
    "latin": "The quick brown fox jumps over the lazy dog. Zażółć gęślą jaźń, naïve Übergrößen, Iñtërnâtiônàl.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Щастя, їжак, ґанок.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, και αύριο πάλι θάλασσα.",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले",
    "han": "我能吞下玻璃而不伤身体。天地玄黃、宇宙洪荒。日月盈昃、辰宿列張。",
    "kana": "いろはにほへと ちりぬるを わかよたれそ つねならむ。イロハニホヘト",
    "hangul": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "emoji": "👩‍👩‍👧 🙂🙃 🇫🇷 👍🏽 ❤️ 🏴‍☠️",
    "combining": "e\u0301a\u0308 o\u0302\u0323 Z\u0351\u036b a\u030a\u0327 क\u094dषि",
    "code": "def f(x: int) -> int:\n    if x <= 0x1F:\n\t\treturn {'a': [x * 2]}  # ok\n\n\nprint(f(10_000))\r\n",
    "whitespace": "a  b   c    d\n\n\ne\t\tf \u00a0 g\u3000h\u200b  ",
    "controls": "one<|separator|>two <|mask|><|mask|> <|sep arator|> <|separator| >",
    "odd": "\ufffd \u0000 \u202e \uffff \U0010ffff ﬁ ﷺ Ⅷ ǅ \u2581 x",
}
"""A line or two of each, of our own making or pangrams."""

SYMBOLS = [
    *("\n" * count for count in range(1, 5)),
    *"0123456789",
    *("\t" * count for count in range(1, 4)),
    "  ",
    "   ",
    "<|separator|>",
    "<|mask|>",
    "<|control1|>",
]
"""User-defined, as Grok-1 has them: runs of newlines and tabs, digits, runs of spaces that never match, controls."""


def train(**options: Any) -> Any:
    """A ModelProto of some hundred pieces; options: of SentencePieceTrainer, in place of those like Grok-1's."""
    grok = {
        "model_type": "bpe",
        "vocab_size": 900,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": SYMBOLS,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": "[PAD]",
        "bos_piece": "[BOS]",
        "eos_piece": "[EOS]",
        "unk_piece": "[UNK]",
        "unk_surface": "[UNK]",
    }
    lines = [line for text in SCRIPTS.values() for line in text.splitlines()] * 4
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, num_threads=1, minloglevel=2, **grok | options
    )
    proto = ModelProto()
    proto.ParseFromString(written.getvalue())
    return proto
