"""Which pairs a router offers to its expert workers, and what has become of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from grokmoe.errors import ConfigError, FailedPrecondition
from grokmoe.pairs import GLOO, NCCL, Rendezvous, check_backend
from grokmoe.settings import setting
from grokmoe.telemetry import RouterMetrics
from grokmoe.v1 import expert_pb2

GRPC = "grpc"

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until another pair is offered after one has broken; doubled each time, until rows have gone by one. What
breaks a pair, a network or a peer, is rarely gone in less, and rows travel meanwhile, only slower."""

REFUSED_PAUSE = 60.0
"""Seconds until a worker that has refused is asked again: it may have been replaced by a newer one."""


@dataclasses.dataclass(frozen=True)
class ExpertTransportSettings:
    """How rows travel to expert workers and back."""

    expert_transport: str = setting(
        GRPC,
        "how rows travel to expert workers: in gRPC's messages, or beside them by gloo (CPU) or NCCL (GPU to GPU), "
        "where a worker takes that; in messages still while it does not work",
        choices=(GRPC, GLOO, NCCL),
    )
    pair_host: str = setting("127.0.0.1", "where this process is reached by workers that use gloo or NCCL with it")
    pair_port: int = setting(0, "port there, where they find each other; 0: any free one")
    pair_device: str = setting("cuda", "the GPU that rows leave from with NCCL: cuda or cuda:N")

    def __post_init__(self) -> None:
        if not 0 <= self.pair_port < 65536:
            raise ConfigError(f"pair_port is {self.pair_port}, must be between 0 and 65535")


class PairOffers:
    """Makes offers. One for all links of a router."""

    def __init__(self, settings: ExpertTransportSettings, metrics: RouterMetrics) -> None:
        """Raises ConfigError when this process cannot use the transport."""
        self._backend, self.metrics = settings.expert_transport, metrics
        self.device = torch.device(settings.pair_device if self._backend == NCCL else "cpu")
        try:
            check_backend(self._backend, self.device)
        except FailedPrecondition as error:
            raise ConfigError(f"expert_transport is {self._backend}: {error.message}") from error
        self._rendezvous = Rendezvous(settings.pair_host, settings.pair_port)

    def new(self) -> expert_pb2.PairOffer:
        """An offer that nobody has had."""
        return self._rendezvous.offer(self._backend)


class Pauses:
    """When a worker may be offered a pair again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds."""
        self._clock = clock
        self._next_at, self._pause = -float("inf"), FIRST_PAUSE

    @property
    def is_over(self) -> bool:
        """Whether it is time."""
        return self._clock() >= self._next_at

    def refused(self) -> None:
        """The worker takes none."""
        self._next_at = self._clock() + REFUSED_PAUSE

    def broken(self) -> None:
        """A pair has broken, or could not be opened."""
        self._next_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def used(self) -> None:
        """Rows have gone there and back."""
        self._pause = FIRST_PAUSE
