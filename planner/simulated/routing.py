"""Which experts the tokens of a step go to: drawn, even or skewed, as the tensors that the router's dispatch takes.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

NO_WEIGHTS = torch.empty(0)
"""Of the sum over a token's experts, which is not taken here."""

NUM_KEPT = 32
"""Draws of a size that are kept."""


class Routing:
    """Draws for every layer, of a popularity that is the layer's own.

    skew: the r-th of a layer's experts in popularity is drawn r ** -skew as often as the first; 0 is even. Which is
    first is drawn for every layer. Draws of a size are kept, and taken at random from those that are kept.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, skew: float, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])
        self._top_k = top_k
        ranks_E = np.arange(1, num_experts + 1, dtype=float) ** -skew
        self._weights_LE = np.stack([self._rng.permutation(ranks_E) for _ in range(num_layers)])
        self._is_even = skew == 0
        self._kept: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._picks: Iterator[int] = iter(())

    def draw(self, layer: int, num_tokens: int) -> torch.Tensor:
        """expert_ids_TK, no expert twice for a token."""
        key = (0 if self._is_even else layer, num_tokens)
        kept = self._kept.setdefault(key, [])
        if len(kept) < NUM_KEPT:
            kept.append(torch.from_numpy(self._draw(key[0], num_tokens)))
            return kept[-1]
        return kept[self._pick()]

    def _draw(self, layer: int, num_tokens: int) -> npt.NDArray[np.int64]:
        # The K smallest of exponential times with these rates are K draws without putting back.
        weights_E = self._weights_LE[layer]
        times_TE = self._rng.exponential(1.0, (num_tokens, len(weights_E))) / weights_E
        return np.argpartition(times_TE, self._top_k - 1, axis=1)[:, : self._top_k].astype(np.int64)

    def _pick(self) -> int:
        """One random number at a time out of many: drawing one alone takes ten times as long."""
        try:
            return next(self._picks)
        except StopIteration:
            self._picks = iter(self._rng.integers(0, NUM_KEPT, 4096).tolist())
            return next(self._picks)
