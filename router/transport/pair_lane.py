"""The pair beside one stream to an expert worker: offered, opened, used by one call at a time, given up.

One call at a time keeps both ends in step without counting: the worker takes the rows of a request whatever becomes of
it, and an answer that nobody waits for any more is fetched all the same before the next call goes by the pair. Who
finds it at work, or not there, sends rows in messages.

Letters: N rows, D hidden.
"""

from __future__ import annotations

import asyncio
import logging

import torch

from grokmoe.errors import GrokmoeError, Unavailable
from grokmoe.pairs import Pair, PairBroken, Rank
from grokmoe.status import from_failure
from grokmoe.v1 import expert_pb2
from router.transport.grpc_expert import Answer, ExpertStream
from router.transport.pair_offers import PairOffers, Pauses

logger = logging.getLogger(__name__)

OFFER_TIMEOUT = 5.0
"""Seconds that a worker has to say whether it takes a pair."""


class PairLane:
    """One stream's."""

    def __init__(self, stream: ExpertStream, offers: PairOffers, pauses: Pauses, name: str) -> None:
        """pauses: of the worker, whatever its stream. name: for the log."""
        self.stream = stream
        self._offers, self._pauses, self._name = offers, pauses, name
        self._pair: Pair | None = None
        self._opening: asyncio.Task[None] | None = None
        self._call: asyncio.Task[Answer | None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a pair."""
        return self._pair is not None and self._pair.error is None

    @property
    def is_free(self) -> bool:
        """Whether a call can go by it now."""
        return self.is_open and self._call is None

    def want(self) -> None:
        """Offers a pair where there is none, in the background, if it is time."""
        if not self.is_open and self._opening is None and self._call is None and self._pauses.is_over:
            self._opening = asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        """Offers a pair and opens it. Never raises: it is only a faster way."""
        offer = self._offers.new()
        pair = None
        try:
            request = expert_pb2.ForwardRequest(pair_offer=offer)
            header, _ = await asyncio.wait_for(self.stream.call(request, None), OFFER_TIMEOUT)
            if header.HasField("failure"):
                self._pauses.refused()
                why = from_failure(header.failure).message
                logger.info("%s takes no %s: %s", self._name, offer.backend, why)
                return
            pair = Pair(offer, Rank.ROUTER, self._offers.device)
            await pair.open()
            self._pair = pair
            logger.info("rows to %s go by %s", self._name, offer.backend)
        except (GrokmoeError, TimeoutError) as error:
            self._lose(str(error) or "no answer to the offer")
        finally:
            self._opening = None
            if pair is not None and self._pair is not pair:
                pair.close()

    async def call(self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor) -> Answer | None:
        """Sends rows and fetches those of the answer. The lane is free.

        None: the pair has broken, and nothing is known of the rows. A call that is cancelled goes on by itself; the
        lane is free when that is over. Raises what `ExpertStream.call` does, Unavailable after `close`.
        """
        assert self._pair is not None and self._call is None, "is_free was asked"  # noqa: PT018
        call = self._call = asyncio.ensure_future(self._exchange(self._pair, request, rows_ND))
        call.add_done_callback(self._over)
        await asyncio.wait((call,))
        if call.cancelled():
            raise Unavailable("the stream was closed")
        return call.result()

    def _over(self, call: asyncio.Task[Answer | None]) -> None:
        self._call = None
        if not call.cancelled():
            call.exception()  # looked at: its caller may be gone

    async def _exchange(self, pair: Pair, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor) -> Answer | None:
        request.pair_bytes = rows_ND.nbytes
        asked = asyncio.ensure_future(self.stream.call(request, None))
        try:
            await pair.send(rows_ND)
            header, out_ND = await asked
            if header.pair_lost:
                raise PairBroken("the worker has not got the rows")
            if header.pair_bytes:
                if header.pair_bytes != rows_ND.nbytes:
                    raise PairBroken(f"the worker announces {header.pair_bytes} bytes for {rows_ND.nbytes}")
                out_ND = (await pair.receive(rows_ND.shape, rows_ND.dtype)).to(rows_ND.device)
        except PairBroken as error:
            self._lose(error.message)
            return None
        except Unavailable:  # the stream is over, and with it the pair
            pair.close()
            raise
        finally:
            asked.cancel()
        self._pauses.used()
        self._offers.metrics.pair_calls.inc()
        return header, out_ND

    def _lose(self, why: str) -> None:
        """Rows go in messages until another pair is there."""
        self._pauses.broken()
        self._offers.metrics.pair_losses.inc()
        logger.warning("rows to %s go in messages: %s", self._name, why)
        if self._pair is not None:
            self._pair.close()

    def close(self) -> None:
        """Ends the pair, with the stream. What is under way fails."""
        call, opening = self._call, self._opening
        if opening is not None:
            opening.cancel()
        if call is not None:
            self._lose("the worker has kept a call waiting")
            call.cancel()
        elif self._pair is not None:
            self._pair.close()
