"""Which files of a converted checkpoint somebody needs, by its index: the tensors themselves need not be here."""

from __future__ import annotations

from pathlib import Path

from grokmoe import checksums
from grokmoe.checkpoint import read_config
from grokmoe.checkpoint_part import Part
from grokmoe.layouts.names_of_others import canonical
from grokmoe.layouts.safetensors_files import INDEX_FILE, read_index


def digests_of(directory: Path, part: Part) -> dict[str, str]:
    """File name -> SHA-256 of the files with a tensor of the part, and of all that have no tensors.

    Raises ConfigError and CheckpointError for a directory without config.json, index and list of checksums.
    """
    digests, index = checksums.read(directory), read_index(directory / INDEX_FILE)
    _, config = read_config(directory)
    needs = part(config)
    shards = {path.name for path in index.values()}
    needed = {path.name for name, path in index.items() if needs(canonical(name))}
    return {name: digest for name, digest in digests.items() if name in needed or name not in shards}
