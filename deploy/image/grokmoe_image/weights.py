"""A checkpoint over HTTP into a folder, every file compared with its SHA-256; and waiting until that has happened.

The list is what `sha256sum` writes: a digest, two spaces, a path relative to the folder. A file that has the right
digest is not fetched again, one that was begun is continued, and `.complete` names the list that is whole.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from grokmoe_image.usage import UsageError

COMPLETE = ".complete"
"""File in the folder that holds the digest of the list, once all of the list is there."""

BLOCK_BYTES = 4 * 1024 * 1024
TIMEOUT = 60.0
"""Seconds without a byte after which a connection is given up."""

ATTEMPTS = 8
"""Of one file. A break in the middle of 631 GB is normal, and an attempt goes on where the last one ended."""

POLL = 5.0
"""Seconds between two looks for `.complete`."""


@dataclasses.dataclass(frozen=True)
class WantedFile:
    """path: relative, with slashes. sha256: 64 hex digits."""

    path: str
    sha256: str


class FetchError(Exception):
    """A file could not be fetched, or is not what the list says."""


def parse_list(text: str) -> list[WantedFile]:
    """The files of a list. Raises UsageError, also for a path that leaves the folder."""
    found = []
    for line in text.splitlines():
        if not line.strip():
            continue
        digest, _, path = line.strip().partition(" ")
        path = path.strip().removeprefix("*")
        parts = PurePosixPath(path).parts
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise UsageError(f"no SHA-256: {line!r}")
        if not parts or path.startswith("/") or ".." in parts:
            raise UsageError(f"no path within the folder: {line!r}")
        found.append(WantedFile(str(PurePosixPath(path)), digest.lower()))
    if not found:
        raise UsageError("the list of files is empty")
    return found


def digest_of_list(files: Sequence[WantedFile]) -> str:
    """What `.complete` holds; the order of the list does not matter."""
    return hashlib.sha256("".join(sorted(f"{file.sha256} {file.path}\n" for file in files)).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(base_url: str, files: Sequence[WantedFile], folder: Path, token: str = "", parallel: int = 4) -> None:
    """Makes the folder hold all files. token: sent as a bearer token if there is one. Raises FetchError."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / COMPLETE
    if is_complete(folder, files):
        return
    mark.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for _ in pool.map(lambda file: _fetch_file(base_url, file, folder, token), files):
            pass
    _write_whole(mark, digest_of_list(files))


def is_complete(folder: Path, files: Sequence[WantedFile]) -> bool:
    """Whether a fetch of this very list has ended well."""
    try:
        return (folder / COMPLETE).read_text().strip() == digest_of_list(files)
    except OSError:
        return False


def _fetch_file(base_url: str, file: WantedFile, folder: Path, token: str) -> None:
    target = folder / file.path
    if target.exists() and digest_of_file(target) == file.sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    url = f"{base_url.rstrip('/')}/{urllib.parse.quote(file.path)}"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(url, part, token)
            break
        except (OSError, urllib.error.URLError) as error:
            if attempt == ATTEMPTS or (isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500):
                raise FetchError(f"{url}: {error}") from error
            print(f"{url}: {error}; once more", file=sys.stderr, flush=True)
            time.sleep(min(30.0, 2.0**attempt / 2))
    found = digest_of_file(part)
    if found != file.sha256:
        part.unlink()
        raise FetchError(f"{url}: SHA-256 is {found}, must be {file.sha256}")
    os.replace(part, target)
    print(f"{file.path}: {target.stat().st_size} bytes", file=sys.stderr, flush=True)


def _download(url: str, part: Path, token: str) -> None:
    """Continues `part` if the server lets us, otherwise begins anew."""
    begin = part.stat().st_size if part.exists() else 0
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if begin and error.code == 416:  # nothing is left to send
            return
        raise
    with response, part.open("ab" if response.status == 206 else "wb") as out:
        expected = response.headers.get("Content-Length")
        got = 0
        while block := response.read(BLOCK_BYTES):
            out.write(block)
            got += len(block)
        out.flush()
        os.fsync(out.fileno())
    if expected is not None and got != int(expected):
        raise OSError(f"ended after {got} of {expected} bytes")


def _write_whole(path: Path, text: str) -> None:
    """Whoever reads the file sees all of it or the one before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n")
    os.replace(beside, path)


def wait(folder: Path, files: Sequence[WantedFile], sleep: Callable[[float], None]) -> None:
    """Returns when the folder is complete."""
    print(f"waiting for {len(files)} files in {folder}", file=sys.stderr, flush=True)
    while not is_complete(folder, files):
        sleep(POLL)


def fetch_main(arguments: Sequence[str]) -> int:
    """The command `fetch-weights`. Returns the exit code: 1 with a message when a file cannot be had."""
    parser = argparse.ArgumentParser("fetch-weights", description="Fetches a checkpoint and checks every file.")
    parser.add_argument("--base-url", required=True, metavar="URL", help="the files' paths come after it")
    parser.add_argument("--token-file", metavar="FILE", help="file with a bearer token for the server")
    parser.add_argument("--parallel", type=int, default=4, help="files at the same time")
    folder, files, namespace = _parse(parser, arguments)
    token = Path(namespace.token_file).read_text().strip() if namespace.token_file else ""
    try:
        fetch(namespace.base_url, files, folder, token, namespace.parallel)
    except FetchError as error:
        print(f"fetch-weights: error: {error}", file=sys.stderr)
        return 1
    return 0


def await_main(arguments: Sequence[str]) -> int:
    """The command `await-weights`."""
    parser = argparse.ArgumentParser("await-weights", description="Waits until `fetch-weights` has ended well.")
    folder, files, _ = _parse(parser, arguments)
    wait(folder, files, time.sleep)
    return 0


def _parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Path, list[WantedFile], argparse.Namespace]:
    parser.add_argument("--checksums", required=True, metavar="FILE", help="what sha256sum has written of the files")
    parser.add_argument("--folder", required=True, metavar="DIR", help="where the checkpoint is to be")
    namespace = parser.parse_args(arguments)
    try:
        files = parse_list(Path(namespace.checksums).read_text())
    except OSError as error:
        raise UsageError(f"--checksums {namespace.checksums}: {error}") from error
    return Path(namespace.folder), files, namespace
