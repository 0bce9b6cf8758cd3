"""A checkpoint as llama.cpp takes it: a GGUF file, written by the `gguf` package.

What its tensors and numbers are called: `grokmoe.layouts.gguf_names`. It has a vocabulary because it must; only token
ids are used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.child import PeerFailed
from grokmoe.checkpoint import Checkpoint
from grokmoe.layouts.gguf_names import ARCHITECTURE, fields, tensors
from grokmoe.model_config import ModelConfig

TYPES = ("bf16", "q8_0", "f32")
"""Of matrices. Norms and the router's matrix are float32 in every file, as in llama.cpp's own conversion."""

SPECIAL = ("<unk>", "<s>", "</s>")


def vocabulary(size: int) -> list[str]:
    """As many different pieces; none is ever shown. Bytes have the place a SentencePiece vocabulary gives them."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return [*pieces[:size], *(f"▁{number}" for number in range(len(pieces), size))]


def path_for(model: Path, config: ModelConfig, kind: str, directory: Path) -> Path:
    """Where the file of this model and type is kept."""
    return directory / f"{model.resolve().name}-{config.content_hash}-{kind}.gguf"


def convert(model: Path, kind: str, directory: Path) -> Path:
    """The file, written if it is not there. Raises PeerFailed without the package that writes it."""
    with Checkpoint.open(model) as checkpoint:
        path = path_for(model, checkpoint.config, kind, directory)
        if path.exists():
            return path
        try:
            import gguf
        except ImportError:
            raise PeerFailed(f"{path} is not there, and to write it needs: pip install gguf") from None
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        _write(gguf, checkpoint, kind, unfinished)
        unfinished.replace(path)
        return path


def _write(gguf: Any, checkpoint: Checkpoint, kind: str, path: Path) -> None:
    """Tensor by tensor."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    types = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    for name, value in fields(config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{ARCHITECTURE}.{name}", value)
    _add_vocabulary(gguf, writer, config.vocab_size)
    float32, matrices = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[kind.upper()]
    wanted = list(tensors(config))
    for tensor in wanted:
        stored = float32 if tensor.is_float32 else matrices
        shape = checkpoint.tensors[tensor.ours[0]].shape
        shape = (len(tensor.ours), *shape) if tensor.is_stacked else shape
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(shape, stored))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in wanted:
        parts = [checkpoint.read(source, torch.float32) for source in tensor.ours]
        whole = torch.stack(parts) if tensor.is_stacked else parts[0]
        stored = float32 if tensor.is_float32 else matrices
        writer.write_tensor_data(gguf.quants.quantize(whole.numpy(), stored))
    writer.close()


def _add_vocabulary(gguf: Any, writer: Any, size: int) -> None:
    kinds = gguf.TokenType
    known = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece in vocabulary(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*known[:size], *[kinds.NORMAL] * (size - len(known))])
    writer.add_unk_token_id(SPECIAL.index("<unk>"))
    writer.add_bos_token_id(SPECIAL.index("<s>"))
    writer.add_eos_token_id(SPECIAL.index("</s>"))
