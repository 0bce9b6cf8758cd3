"""SHA-256 of a checkpoint's files, in the form of `sha256sum`: a digest, two spaces, a name beside the list."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from grokmoe.layouts.mapped_file import file_error

FILE = "SHA256SUMS"

BLOCK_BYTES = 4 * 1024 * 1024


def to_text(digests: Mapping[str, str]) -> str:
    """The list. digests: hex digits by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def from_text(text: str, path: Path) -> dict[str, str]:
    """File name -> digest. path: of the list, for the error. Raises CheckpointError for what is no such list."""
    digests: dict[str, str] = {}
    for line in text.splitlines():
        digest, separator, name = line.partition("  ")
        is_name = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
        if not separator or len(digest) != 64 or set(digest) - set("0123456789abcdef") or not is_name:
            raise file_error(path, "lines of a SHA-256, two spaces and the name of a file beside it", repr(line[:200]))
        digests[name] = digest
    return digests


def read(directory: Path) -> dict[str, str]:
    """The list of a directory. Raises CheckpointError when there is none."""
    path = directory / FILE
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise file_error(path, "the list that `checkpoint convert` writes", str(error)) from error
    return from_text(text, path)


def of_file(path: Path, on_bytes: Callable[[int], None] = lambda size: None) -> str:
    """A file's digest in hex digits. on_bytes: told of all bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def check(
    directory: Path, digests: Mapping[str, str], report: Callable[[str, int], None] = lambda file, done: None
) -> list[str]:
    """What is wrong with the files, a sentence each; nothing when they are as the list says.

    report: told of the file and of the bytes read so far of all.
    """
    wrong: list[str] = []
    done = 0
    for name, digest in digests.items():
        path = directory / name

        def on_bytes(size: int, name: str = name) -> None:
            nonlocal done
            done += size
            report(name, done)

        try:
            found = of_file(path, on_bytes)
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
            continue
        if found != digest:
            wrong.append(f"{path}: SHA-256 is {found}, must be {digest}")
    return wrong
