"""A checkpoint as llama.cpp takes it: which of its tensors become which of a GGUF file's, and how the file is written.

What the file must have is what llama.cpp's loader of the architecture `grok` asks for. It has a vocabulary because it
must; only token ids are used. The `gguf` package writes the file (`pip install gguf`); what is written is decided
without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.child import PeerFailed
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.model_config import ModelConfig

TYPES = ("bf16", "q8_0", "f32")
"""Of matrices. Norms and the router's matrix are float32 in every file, as in llama.cpp's own conversion."""

SPECIAL = ("<unk>", "<s>", "</s>")

NORMS: dict[str, names.Norm] = {
    "attn_norm": "pre_attn_norm",
    "attn_output_norm": "post_attn_norm",
    "ffn_norm": "pre_moe_norm",
    "layer_output_norm": "post_moe_norm",
}
PROJECTIONS: dict[str, names.Projection] = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
}
EXPERTS: dict[str, names.ExpertLinear] = {
    "ffn_gate_exps": "linear",
    "ffn_up_exps": "linear_v",
    "ffn_down_exps": "linear_1",
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: of one of the checkpoint's, or of one per expert, stacked."""

    name: str
    sources: tuple[str, ...]
    is_stacked: bool = False
    is_float32: bool = False


def tensors(config: ModelConfig) -> Iterator[GgufTensor]:
    """All of them, in the order of the forward pass."""
    yield GgufTensor("token_embd.weight", (names.embed(),))
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        for name, norm in NORMS.items():
            yield GgufTensor(f"{prefix}{name}.weight", (names.norm(layer, norm),), is_float32=True)
        for name, projection in PROJECTIONS.items():
            yield GgufTensor(f"{prefix}{name}.weight", (names.attention(layer, projection),))
        yield GgufTensor(f"{prefix}ffn_gate_inp.weight", (names.gate(layer),), is_float32=True)
        for name, linear in EXPERTS.items():
            experts = tuple(names.expert(layer, expert, linear) for expert in range(config.num_experts))
            yield GgufTensor(f"{prefix}{name}.weight", experts, is_stacked=True)
    yield GgufTensor("output_norm.weight", (names.final_norm(),), is_float32=True)
    yield GgufTensor("output.weight", (names.head(config),))


def fields(config: ModelConfig) -> dict[str, int | float]:
    """The numbers of the file's header, by the last part of their names: `grok.` stands before each."""
    return {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.output_scale": config.attention_logit_scale,
        "attn_logit_softcapping": config.attention_cap,
        "router_logit_softcapping": config.router_cap or 0.0,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_base,
        "embedding_scale": config.embedding_multiplier,
        "logit_scale": config.output_multiplier,
    }


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
    writer = gguf.GGUFWriter(path, "grok")
    types = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    for name, value in fields(config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"grok.{name}", value)
    _add_vocabulary(gguf, writer, config.vocab_size)
    float32, matrices = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[kind.upper()]
    wanted = list(tensors(config))
    for tensor in wanted:
        stored = float32 if tensor.is_float32 else matrices
        shape = checkpoint.tensors[tensor.sources[0]].shape
        shape = (len(tensor.sources), *shape) if tensor.is_stacked else shape
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(shape, stored))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), num_bytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in wanted:
        parts = [checkpoint.read(source, torch.float32) for source in tensor.sources]
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
