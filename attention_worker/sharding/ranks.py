"""The parts of a tensor-parallel worker's ranks made whole, in an order that nothing but the number of ranks decides.

A sum is taken in the order of the ranks, element by element: ((part 0 + part 1) + part 2) + ... So a row's bits depend
neither on who came first nor on the rows beside it. Ring reductions, gloo's and NCCL's, begin each piece of a message
at another rank: the same row would have other bits in another batch.

Shapes: S ranks, T tokens, D hidden, V rows of the vocabulary held, R rows of logits.
"""

from __future__ import annotations

import torch

from attention_worker.row_passes import times
from attention_worker.sharding.messages import Messages
from attention_worker.sharding.shard import Shard

SHARE_BYTES = 2**20
"""Parts larger than this are summed by rows, each rank a share, and the sums exchanged: two exchanges instead of one,
and 2 (S - 1) / S parts on the wire instead of S - 1. The bits are the same either way."""


class Ranks:
    """See Sharding."""

    def __init__(self, messages: Messages, shard: Shard, vocab_size: int) -> None:
        """messages: for tensors on the model's device."""
        self._messages, self._shard, self._vocab_size = messages, shard, vocab_size

    def embed(self, table_VD: torch.Tensor, token_ids_T: torch.Tensor, factor: float) -> torch.Tensor:
        """See Sharding. Each token is in one rank's part and zero in the others': the sum rounds nothing."""
        own_T = token_ids_T - self._shard.vocabulary.start
        is_here_T = (own_T >= 0) & (own_T < len(table_VD))
        rows_TD = table_VD.index_select(0, own_T.clamp_(0, len(table_VD) - 1))
        return times(self.sum(rows_TD.masked_fill_(~is_here_T[:, None], 0.0), torch.float32), factor)

    def sum(self, part_TD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See Sharding. Added up in the type of the parts."""
        messages, num_rows = self._messages, len(part_TD)
        if messages.size == 2 or part_TD.nbytes <= SHARE_BYTES:
            return _added(messages.all(part_TD)).to(dtype)
        share = -(-num_rows // messages.size)
        padded_TD = torch.nn.functional.pad(part_TD, (0, 0, 0, share * messages.size - num_rows))
        shares = messages.swap(padded_TD.view(messages.size, share, -1))
        return messages.all(_added(shares).to(dtype)).flatten(0, 1)[:num_rows]

    def join(self, part_RV: torch.Tensor) -> torch.Tensor:
        """See Sharding."""
        parts = self._messages.collect(part_RV)
        if parts is None:
            return part_RV
        # The rows that fill the table up are at its end.
        return torch.cat([*parts], dim=1)[:, : self._vocab_size]


def _added(parts_S: torch.Tensor) -> torch.Tensor:
    """Into the first, and never by a reduction of the library's, whose order is its own."""
    total = parts_S[0]
    for part in parts_S[1:]:
        total += part
    return total
