"""What one rank of a tensor-parallel worker holds: query heads, the KV heads that they read, rows of the vocabulary.

Query heads are shared out evenly, in their order. A rank holds the KV heads that its query heads read: where the ranks
divide them, each has its own; where there are more ranks than KV heads, several hold the same one; in between, the two
ranks at whose border a KV head's group is cut hold it both. The vocabulary is filled up to a multiple, so that all
ranks have as many rows.

Pure: counts and ranges, no tensors. H query heads, K KV heads, G = H / K.
"""

from __future__ import annotations

import dataclasses
import itertools

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig

VOCABULARY_MULTIPLE = 64
"""A rank's rows of the vocabulary are a multiple of this, as in vLLM: products like it, and it is little to waste."""


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Query heads of a rank that divide evenly among KV heads, which is what attention kernels take. Both ranges are
    the rank's own numbers."""

    query_heads: range
    kv_heads: range


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of rank `rank` of `size`.

    query_heads, kv_heads: by their numbers in the model. groups: one, or up to three where the rank's share begins or
    ends between the query heads of a KV head.
    vocabulary: rows of the padded table.
    """

    rank: int
    size: int
    query_heads: range
    kv_heads: range
    groups: tuple[HeadGroup, ...]
    vocabulary: range

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> Shard:
        """Raises ConfigError for a number of ranks that does not divide the query heads."""
        if config.num_heads % size:
            fitting = [str(count) for count in range(1, config.num_heads + 1) if config.num_heads % count == 0]
            raise ConfigError(
                f"tensor_parallel is {size}, must divide the model's {config.num_heads} query heads: "
                f"{', '.join(fitting)} do"
            )
        each, group = config.num_heads // size, config.num_heads // config.num_kv_heads
        query_heads = range(rank * each, (rank + 1) * each)
        kv_heads = range(query_heads[0] // group, query_heads[-1] // group + 1)
        num_rows = -(-config.vocab_size // (size * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE
        return cls(
            rank, size, query_heads, kv_heads, _groups(query_heads, group),
            range(rank * num_rows, (rank + 1) * num_rows),
        )  # fmt: skip

    @classmethod
    def whole(cls, config: ModelConfig) -> Shard:
        """That of a worker of one rank: everything, and no row more."""
        heads, kv_heads = range(config.num_heads), range(config.num_kv_heads)
        return cls(0, 1, heads, kv_heads, (HeadGroup(heads, kv_heads),), range(config.vocab_size))

    def known_rows(self, vocab_size: int) -> range:
        """Those of `vocabulary` that the model has; may be empty."""
        return range(min(self.vocabulary.start, vocab_size), min(self.vocabulary.stop, vocab_size))


def most_kv_heads(config: ModelConfig, size: int) -> int:
    """KV heads of the rank that holds most of them: all ranks have as many pages, and those must fit there, too."""
    return max(len(Shard.of(config, rank, size).kv_heads) for rank in range(size))


def _groups(query_heads: range, group: int) -> tuple[HeadGroup, ...]:
    """group: G of the model."""
    per_kv_head = [len(list(heads)) for _, heads in itertools.groupby(query_heads, lambda head: head // group)]
    groups: list[HeadGroup] = []
    first_head = first_kv = 0
    for count, run in itertools.groupby(per_kv_head):
        num = len(list(run))
        groups.append(HeadGroup(range(first_head, first_head + num * count), range(first_kv, first_kv + num)))
        first_head, first_kv = first_head + num * count, first_kv + num
    return tuple(groups)
