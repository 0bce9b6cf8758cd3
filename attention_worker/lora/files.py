"""The files of an adapter as PEFT saves it: what they hold, and a digest of every byte.

adapter_config.json          ranks, scales
adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]; with added
                             tokens also base_model.model.model.embed_tokens.weight [V + X, D], ...lm_head.weight
new_embeddings.safetensors   added tokens alone, as vLLM has them: input_embeddings, output_embeddings [X, D]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from attention_worker.lora.config import CONFIG_FILE, AdapterConfig
from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error
from grokmoe.layouts.safetensors_header import read_header
from grokmoe.layouts.source import TORCH_DTYPES, StoredRows

MODEL_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
ADDED_FILE = "new_embeddings.safetensors"

MAX_CONFIG_BYTES = 2**20

SLICE_BYTES = 2**20
"""Read and digested at a time: a larger slice would hold the interpreter's lock for long (docs/log.md)."""

DIGEST_BYTES = 16

Tensors = dict[str, StoredRows]
"""By stored name. One whose file has changed since the digest was made raises CheckpointError when it is read."""


@dataclass(frozen=True)
class StoredAdapter:
    """tensors, added: of MODEL_FILE and of ADDED_FILE. id: of the name and of every byte of the files."""

    config: AdapterConfig
    tensors: Tensors
    added: Tensors
    id: str


def read_adapter(name: str, directory: Path) -> StoredAdapter:
    """Looks at a folder. Raises CheckpointError, naming file and tensor, for what cannot be or is not supported."""
    digest = hashlib.blake2b(name.encode() + b"\0", digest_size=DIGEST_BYTES)
    path = directory / CONFIG_FILE
    with _open(path) as file:
        size = MappedFile.of(path, file.fileno()).size
        if size > MAX_CONFIG_BYTES:
            raise file_error(path, f"at most {MAX_CONFIG_BYTES} bytes", size)
        raw = file.read(MAX_CONFIG_BYTES)
    digest.update(len(raw).to_bytes(8, "little") + raw)
    config = AdapterConfig.read(path, raw)
    path = directory / MODEL_FILE
    if not path.exists() and (directory / PICKLED_FILE).exists():
        raise file_error(directory, MODEL_FILE, f"{PICKLED_FILE}, which is pickled and never read; convert it")
    tensors = _tensors(path, digest)
    added_path = directory / ADDED_FILE
    added = _tensors(added_path, digest) if added_path.exists() else {}
    return StoredAdapter(config, tensors, added, digest.hexdigest())


def _tensors(path: Path, digest: hashlib.blake2b) -> Tensors:
    with _open(path) as file:
        mapped = MappedFile.of(path, file.fileno())
        tensors = read_header(file, mapped)
        file.seek(0)
        digest.update(mapped.size.to_bytes(8, "little"))
        while part := file.read(SLICE_BYTES):
            digest.update(part)
    for name, tensor in tensors.items():
        if tensor.values is None:
            raise tensor_error(name, path, f"dtype {' or '.join(TORCH_DTYPES)}", tensor.dtype)
    return tensors


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise file_error(path, "a file of an adapter", found) from error
