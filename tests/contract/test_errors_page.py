"""docs/errors.md names exactly the reasons there are, each with the code it comes with."""

from __future__ import annotations

import re
from pathlib import Path

from grokmoe import Code, GrokmoeError, Reason

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text()
ROWS = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)


def subclasses(kind: type[GrokmoeError]) -> list[type[GrokmoeError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in subclasses(child))]


def test_the_page_lists_exactly_the_reasons() -> None:
    assert [reason for reason, *_ in ROWS] == [reason.value for reason in Reason]


def test_every_row_says_something() -> None:
    assert all(meaning.strip().endswith(".") and "." in advice for _, _, meaning, advice in ROWS)


def test_codes_exist_and_those_of_the_types_are_right() -> None:
    codes = {reason: code for reason, code, *_ in ROWS}
    assert set(codes.values()) <= Code.__members__.keys()
    for kind in subclasses(GrokmoeError):
        assert codes[kind.default_reason] == kind.code.name, kind
