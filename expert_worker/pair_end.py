"""The worker's end of a stream's pair (grokmoe.pairs): taken when the router offers it, used when it says so.

Letters: N rows, D hidden.
"""

from __future__ import annotations

import asyncio
import logging

import torch

from grokmoe.errors import FailedPrecondition, InvalidRequest
from grokmoe.pairs import Pair, PairBroken, Rank, check_backend
from grokmoe.v1 import expert_pb2

logger = logging.getLogger(__name__)

MAX_NAME = 64
"""Characters of a pair's name."""


class PairEnd:
    """At most one pair at a time."""

    def __init__(self, device: torch.device, width: int, dtype: torch.dtype, is_welcome: bool = True) -> None:
        """device: where experts compute. width, dtype: of rows. is_welcome: whether offers are taken at all."""
        self._device, self._width, self._dtype, self._is_welcome = device, width, dtype, is_welcome
        self._pair: Pair | None = None
        self._opening: asyncio.Task[None] | None = None

    def take(self, offer: expert_pb2.PairOffer) -> None:
        """From now on the pair is this one. It is opened in the background; who uses it waits for that.

        Raises InvalidRequest for what is no offer, FailedPrecondition for one that this worker does not take.
        """
        if not offer.name or len(offer.name) > MAX_NAME:
            raise InvalidRequest("pair_offer.name", f"has {len(offer.name)} characters, must have 1 to {MAX_NAME}")
        if not offer.host:
            raise InvalidRequest("pair_offer.host", "is empty")
        if not 0 < offer.port < 65536:
            raise InvalidRequest("pair_offer.port", f"is {offer.port}, must be between 1 and 65535")
        if not self._is_welcome:
            raise FailedPrecondition("this worker takes rows in messages only")
        check_backend(offer.backend, self._device)
        self.close()
        self._pair = Pair(offer, Rank.WORKER, self._device)
        self._opening = asyncio.create_task(self._open(self._pair))

    @staticmethod
    async def _open(pair: Pair) -> None:
        try:
            await pair.open()
        except PairBroken as error:  # kept in the pair
            logger.info("%s was not opened: %s", pair.name, error.message)

    async def receive(self, num_rows: int, num_bytes: int, max_rows: int) -> tuple[Pair, torch.Tensor]:
        """The pair, and rows_ND as the router sends them by it, on its device. Raises PairBroken when they have not
        come. The answer goes by the same pair, whatever has taken its place meanwhile.

        num_bytes: that the router says it sends. Gloo ends the process whose buffer has another size than what comes.
        """
        pair, opening = self._pair, self._opening
        if pair is None:
            raise PairBroken("there is no pair on this stream")
        expected = num_rows * self._width * self._dtype.itemsize
        if num_bytes != expected or num_rows > max_rows:
            self.close()
            raise PairBroken(f"{num_bytes} bytes announced, {num_rows} rows have {expected}; limit is {max_rows} rows")
        if opening is not None:
            await asyncio.wait((opening,))
        return pair, await pair.receive((num_rows, self._width), self._dtype)

    def close(self) -> None:
        """Ends the pair, if there is one."""
        if self._opening is not None:
            self._opening.cancel()
        if self._pair is not None:
            self._pair.close()
        self._pair = self._opening = None
