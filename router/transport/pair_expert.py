"""An expert worker behind gRPC whose rows travel beside it, by gloo or NCCL, as long as that works.

Letters: N rows, D hidden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from grokmoe.errors import DeadlineExceeded
from grokmoe.telemetry import RouterMetrics
from router.transport.base import ExpertLink, ExpertReply
from router.transport.grpc_expert import GrpcExpertLink, make_reply, make_request
from router.transport.pair_lane import PairLane
from router.transport.pair_offers import GRPC, ExpertTransportSettings, PairOffers, Pauses
from router.transport.worker_access import PLAIN, WorkerAccess

logger = logging.getLogger(__name__)


class PairExpertLink(GrpcExpertLink):
    """A GrpcExpertLink, and a pair beside each of its streams."""

    def __init__(self, address: str, offers: PairOffers, access: WorkerAccess = PLAIN) -> None:
        super().__init__(address, access)
        self._offers, self._pauses = offers, Pauses()
        self._pairs: dict[int, PairLane] = {}

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        """See ExpertLink. Rows that the pair has lost are sent again at once, in messages."""
        pair = self._pair(lane)
        if pair.is_free and rows_ND.numel():
            until = None if timeout is None else time.monotonic() + timeout
            answer = await pair.call(make_request(layer, expert_ids, counts, timeout), rows_ND)
            if answer is not None:
                return make_reply(answer, rows_ND)
            timeout = None if until is None else until - time.monotonic()
            if timeout is not None and timeout <= 0:
                raise DeadlineExceeded("no time is left to send the rows another way")
        else:
            pair.want()
        return await super().forward(lane, layer, expert_ids, counts, rows_ND, timeout)

    def _pair(self, lane: int) -> PairLane:
        stream, pair = self.stream(lane), self._pairs.get(lane)
        if pair is None or pair.stream is not stream:
            if pair is not None:
                pair.close()
            pair = self._pairs[lane] = PairLane(stream, self._offers, self._pauses, self.address)
        return pair

    def reset(self, lane: int) -> None:
        """See ExpertLink."""
        pair = self._pairs.pop(lane, None)
        if pair is not None:
            pair.close()
        super().reset(lane)

    async def close(self) -> None:
        """See ExpertLink."""
        for pair in self._pairs.values():
            pair.close()
        await super().close()


def expert_links(
    settings: ExpertTransportSettings, access: WorkerAccess, metrics: RouterMetrics
) -> Callable[[str], ExpertLink]:
    """How a router reaches the expert worker at an address. Raises ConfigError when it cannot use the transport."""
    if settings.expert_transport == GRPC:
        return lambda address: GrpcExpertLink(address, access)
    offers = PairOffers(settings, metrics)
    if access.tls is not None:
        logger.warning("rows cross the network in the clear: %s has no TLS", settings.expert_transport)
    return lambda address: PairExpertLink(address, offers, access)
