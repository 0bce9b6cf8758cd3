"""One adapter in memory: the corrections of its projections, and the rows of the tokens that it adds.

A projection's correction is scale * B A x. It is kept beside the packed product of q, k and v as three parts, each with
its place among the product's outputs.

Letters: L layers, D hidden, V vocabulary, X added tokens, I inputs, O outputs, R rank, padded.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from attention_worker.kernels.low_rank import Ints
from attention_worker.lora.files import StoredAdapter, Tensors
from attention_worker.lora.names import Factor, TokenRows, factor_of, rows_of
from attention_worker.sharding import Shard
from grokmoe import tensor_names as names
from grokmoe.adapter import AdapterInfo
from grokmoe.errors import CheckpointError
from grokmoe.layouts.mapped_file import tensor_error
from grokmoe.layouts.source import StoredRows
from grokmoe.linear import Linear
from grokmoe.model_config import ModelConfig

RANK_STEP = 16
"""Ranks are padded with zeros to a multiple of this: the least that a product on a GPU takes, and what a CPU's loop
adds up without a remainder. Zeros change no sum."""


@dataclass(frozen=True)
class LowRank:
    """One projection's correction. a_RI, b_RO: A, and B transposed, in the model's type. first_out: where its outputs
    begin among those of the product that it corrects."""

    a_RI: torch.Tensor
    b_RO: torch.Tensor
    scale: float
    first_out: int


@dataclass(frozen=True)
class AddedTokens:
    """embedding_XD: rows behind the model's own, where the embedding is. head: to their logits, where the head is."""

    embedding_XD: torch.Tensor | None
    head: Linear | None


@dataclass(frozen=True)
class Adapter:
    """parts: per layer held, in the order of `names.PROJECTIONS`; None where the adapter changes nothing.

    table_LPW: the same for kernels: addresses of A and B, and what kernels.low_rank names; an absent
        part has rank 0.
    """

    info: AdapterInfo
    parts: tuple[tuple[LowRank | None, ...], ...]
    table_LPW: Ints
    added: AddedTokens | None


@dataclass(frozen=True)
class Base:
    """What an adapter is for: a model, and what of it is here.

    held: the layers. shard: the part of each that this rank has. read: one of the model's tensors by its name, in
        `dtype`. make_linear: packs the head of added tokens.
    """

    config: ModelConfig
    held: range
    shard: Shard
    dtype: torch.dtype
    device: torch.device
    read: Callable[[str], torch.Tensor]
    make_linear: Callable[[torch.Tensor], Linear]


Factors = dict[Factor, StoredRows]


def build_adapter(name: str, stored: StoredAdapter, base: Base) -> Adapter:
    """Checks every tensor against the model and packs it. Raises CheckpointError, naming the tensor, for what does not
    fit; nothing of it is loaded then."""
    factors = _factors(stored, base)
    parts = _parts(factors, stored, base)
    rows = _added(stored, base)
    low_ranks = [part for layer in parts for part in layer if part is not None]
    added = None if rows is None else _keep(*rows, base)
    num_bytes = sum(part.a_RI.nbytes + part.b_RO.nbytes for part in low_ranks)
    if rows is not None and added is not None:
        num_here = (added.embedding_XD is not None) + (added.head is not None)
        num_bytes += num_here * rows[0].numel() * base.dtype.itemsize
    info = AdapterInfo(
        name=name,
        id=stored.id,
        rank=max(stored.config.rank_of(factor.module) for factor in factors),
        targets=tuple(each for each in names.PROJECTIONS if any(factor.projection == each for factor in factors)),
        num_added_tokens=0 if rows is None else len(rows[0]),
        num_bytes=num_bytes,
    )
    return Adapter(info, parts, table_of(parts), added)


def _factors(stored: StoredAdapter, base: Base) -> Factors:
    found: Factors = {}
    for tensor in stored.tensors.values():
        factor = factor_of(tensor)
        if factor is None:
            continue
        if factor.layer >= base.config.num_layers:
            raise tensor_error(tensor.stored_name, tensor.path, f"a layer below {base.config.num_layers}", factor.layer)
        if factor in found:
            raise tensor_error(tensor.stored_name, tensor.path, "one tensor of this meaning", "two")
        found[factor] = tensor
    if not found:
        raise CheckpointError("the adapter changes no projection")
    for factor, tensor in found.items():
        if factor.twin not in found:
            raise tensor_error(tensor.stored_name, tensor.path, "both factors, A and B", "one of them")
    return found


def _parts(factors: Factors, stored: StoredAdapter, base: Base) -> tuple[tuple[LowRank | None, ...], ...]:
    found = {
        (factor.layer, factor.projection): _low_rank(factor, tensor, factors[factor.twin], stored, base)
        for factor, tensor in factors.items()
        if factor.side == "A"
    }
    return tuple(tuple(found.get((layer, each)) for each in names.PROJECTIONS) for layer in base.held)


def _low_rank(
    factor: Factor,
    a: StoredRows,
    b: StoredRows,
    stored: StoredAdapter,
    base: Base,
) -> LowRank:
    rank, (ins, outs) = stored.config.rank_of(factor.module), _part_of(factor.projection, base)
    for tensor, shape in ((a, (rank, ins.size)), (b, (outs.size, rank))):
        if tensor.shape != shape:
            meaning = f"shape {list(shape)} (rank {rank} of adapter_config.json, {factor.projection} of the model)"
            raise tensor_error(tensor.stored_name, tensor.path, meaning, f"shape {list(tensor.shape)}")
    padded = -(-rank // RANK_STEP) * RANK_STEP
    a_RI = torch.zeros(padded, ins.here.stop - ins.here.start, dtype=base.dtype)
    b_RO = torch.zeros(padded, outs.here.stop - outs.here.start, dtype=base.dtype)
    a_RI[:rank], b_RO[:rank] = _finite(a)[:, ins.here], _finite(b)[outs.here].T
    scale, first_out = stored.config.scale_of(factor.module), outs.place
    return LowRank(a_RI.to(base.device), b_RO.to(base.device), scale, first_out)


class _Span(NamedTuple):
    """Inputs or outputs of a projection. size: how many it has. here: this rank's. place: where these begin among those
    of the product that the projection is part of."""

    size: int
    here: slice
    place: int = 0


def _part_of(projection: names.Projection, base: Base) -> tuple[_Span, _Span]:
    """(inputs, outputs)."""
    config, shard, d = base.config, base.shard, base.config.head_dim
    everything = _Span(config.hidden_size, slice(0, config.hidden_size))
    query = _Span(config.query_size, slice(shard.query_heads.start * d, shard.query_heads.stop * d))
    if projection == "o_proj":
        return query, everything
    if projection == "q_proj":
        return everything, query
    here = slice(shard.kv_heads.start * d, shard.kv_heads.stop * d)
    num_before = len(shard.query_heads) + (len(shard.kv_heads) if projection == "v_proj" else 0)
    return everything, _Span(config.kv_size, here, num_before * d)


def _finite(tensor: StoredRows, first: int = 0) -> torch.Tensor:
    """The rows from the first on. A value that is not finite would make every token of its requests so."""
    values = tensor.rows(first, tensor.shape[0])
    if not values.isfinite().all():
        raise tensor_error(tensor.stored_name, tensor.path, "finite values", "one that is not")
    return values


def table_of(parts: tuple[tuple[LowRank | None, ...], ...]) -> Ints:
    """See Adapter.table_LPW."""

    def entry(part: LowRank | None) -> tuple[int, ...]:
        if part is None:
            return (0,) * 6
        (bits,) = struct.unpack("<I", struct.pack("<f", part.scale))
        rank, num_out = part.b_RO.shape
        return part.a_RI.data_ptr(), part.b_RO.data_ptr(), rank, part.first_out, num_out, bits

    return np.array([[entry(part) for part in layer] for layer in parts], np.int64)


def _added(stored: StoredAdapter, base: Base) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rows of added tokens for the embedding and for the head, from either file."""
    inputs, outputs = _new_rows(stored.added, base)
    whole = [_behind_the_base(stored.tensors, base, kind) for kind in ("embed_tokens", "lm_head")]
    if inputs is not None and whole[0] is not None:
        raise CheckpointError("the adapter has rows of added tokens in both of its files")
    inputs = whole[0] if inputs is None else inputs
    outputs = whole[1] if outputs is None else outputs
    if inputs is None and outputs is None:
        return None
    if base.config.tie_word_embeddings and outputs is None:
        outputs = inputs
    if inputs is None or outputs is None or inputs.shape != outputs.shape:
        sizes = [0 if rows is None else len(rows) for rows in (inputs, outputs)]
        raise CheckpointError(
            f"the adapter adds {sizes[0]} rows to the embedding and {sizes[1]} to the head; an added token needs both"
        )
    return (inputs, outputs) if len(inputs) else None


def _keep(inputs_XD: torch.Tensor, outputs_XD: torch.Tensor, base: Base) -> AddedTokens:
    """Of the rows what is used here."""
    has_embedding = base.held.start == 0
    has_head = base.held.stop == base.config.num_layers and base.shard.rank == 0  # which alone draws tokens
    embedding_XD = inputs_XD.to(base.device, base.dtype, copy=True) if has_embedding else None
    return AddedTokens(embedding_XD, base.make_linear(outputs_XD.to(base.device, base.dtype)) if has_head else None)


def _new_rows(tensors: Tensors, base: Base) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name not in ("input_embeddings", "output_embeddings"):
            raise tensor_error(name, tensor.path, "input_embeddings or output_embeddings", "another tensor")
        if tensor.shape[1:] != (base.config.hidden_size,):
            raise tensor_error(name, tensor.path, f"rows of {base.config.hidden_size}", f"shape {list(tensor.shape)}")
        found[name] = _finite(tensor)
    return found.get("input_embeddings"), found.get("output_embeddings")


COMPARED_ROWS = 8192
"""Rows of a vocabulary that are compared at a time."""


def _behind_the_base(tensors: Tensors, base: Base, kind: TokenRows) -> torch.Tensor | None:
    """Of a table of all tokens the rows behind the model's own, which must be what the model has."""
    name = rows_of(tensors, kind)
    if name is None:
        return None
    tensor = tensors[name]
    base_VD = base.read(names.embed() if kind == "embed_tokens" else names.head(base.config))
    num_base, width = base_VD.shape
    if tensor.shape[1:] != (width,) or tensor.shape[0] < num_base:
        raise tensor_error(name, tensor.path, f"{num_base} or more rows of {width}", f"shape {list(tensor.shape)}")
    for begin in range(0, num_base, COMPARED_ROWS):
        end = min(begin + COMPARED_ROWS, num_base)
        if not torch.equal(tensor.rows(begin, end).to(base_VD), base_VD[begin:end]):
            raise tensor_error(
                name,
                tensor.path,
                f"the model's own {num_base} rows, then those of added tokens",
                f"others between rows {begin} and {end}: changed rows of the model's tokens are not supported",
            )
    return _finite(tensor, num_base)


def describe(adapter: Adapter) -> str:
    """For the log."""
    fields = dataclasses.asdict(adapter.info)
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value)
