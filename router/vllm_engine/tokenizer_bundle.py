"""The tokenizer files of a checkpoint as one archive: a gateway on another machine tokenises as we do."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from grokmoe.errors import FailedPrecondition, Reason

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
"""What a Hugging Face tokenizer is made of. The first must be there, the others may."""

CHUNK_BYTES = 64 * 1024

_EPOCH = (1980, 1, 1, 0, 0, 0)


def bundle(directory: Path) -> bytes:
    """A zip archive, the same bytes for the same files. FailedPrecondition without a tokenizer."""
    if not (directory / FILES[0]).is_file():
        raise FailedPrecondition(f"this model has no {FILES[0]}", reason=Reason.NO_TOKENIZER)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            path = directory / name
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def in_chunks(data: bytes) -> Iterator[tuple[bytes, str]]:
    """Pieces of at least one byte, each with the SHA-256 of them all if it is the last, else with an empty text."""
    digest = hashlib.sha256(data).hexdigest()
    for begin in range(0, len(data), CHUNK_BYTES):
        end = begin + CHUNK_BYTES
        yield data[begin:end], digest if end >= len(data) else ""
