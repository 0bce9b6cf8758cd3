"""The largest entries of every row; equal ones count in the order of their ids. What is found in a row does not depend
on the rows beside it.

A vocabulary is long and few of its tokens matter, so it is looked at in blocks: the k largest entries lie in the k
blocks with the largest maxima, and a maximum is the cheapest thing to know of a block.

Letters: R rows, V vocabulary, B blocks, S entries of a block, C candidates, K entries wanted.
"""

from __future__ import annotations

import torch

BLOCKS = ((64, 4), (16, 2))
"""(Entries per block, how many times the candidates must fit into the vocabulary for the blocks to pay)."""


def largest(x_RV: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, ids) [R, K] of the largest entries, largest first.

    x_RV: float32 without NaN. num: K, at least 1 and at most V.
    """
    vocab_size = x_RV.shape[1]
    candidates_RC, ids_RC = x_RV, torch.arange(vocab_size, device=x_RV.device).expand_as(x_RV)
    for size, margin in BLOCKS:
        if vocab_size % size == 0 and num * size * margin <= vocab_size:
            candidates_RC, ids_RC = _candidates(x_RV, num, size)
            break
    order_RC = _order(candidates_RC, ids_RC)
    at_RK = (order_RC.sort(dim=-1, descending=True) if num == vocab_size else order_RC.topk(num, dim=-1)).indices
    return candidates_RC.gather(1, at_RK), ids_RC.gather(1, at_RK)


def without_nan(logits_RV: torch.Tensor) -> torch.Tensor:
    """A copy in which NaN is minus infinity and infinity the largest number."""
    return logits_RV.nan_to_num(float("-inf"), torch.finfo(logits_RV.dtype).max, float("-inf"))


def _candidates(x_RV: torch.Tensor, num: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and ids [R, C] of the blocks that hold the `num` largest. Of equal maxima the first block counts as the
    larger, so the entries with the lowest ids are among them, too."""
    x_RBS = x_RV.view(len(x_RV), -1, size)
    maxima_RB = x_RBS.amax(-1)
    block_ids_B = torch.arange(maxima_RB.shape[1], device=x_RV.device)
    blocks_RK = _order(maxima_RB, block_ids_B).topk(num, dim=-1, sorted=False).indices
    rows_R = torch.arange(len(x_RV), device=x_RV.device)
    ids_RKS = blocks_RK[:, :, None] * size + torch.arange(size, device=x_RV.device)
    return x_RBS[rows_R[:, None], blocks_RK].flatten(1), ids_RKS.flatten(1)


def _order(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 that grows with the float32 entry and, among equals, falls with its id: no two of a row are the same.

    A positive float's bits grow with it, a negative one's fall; adding zero makes one zero of the two.
    """
    bits = (x + 0.0).view(torch.int32)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) - ids
