"""The store through which the two ends of a pair find each other: addresses for gloo, a key for NCCL."""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed

from grokmoe.errors import ConfigError
from grokmoe.v1 import expert_pb2

dist: Any = torch.distributed  # its stubs leave the stores out

Store = Any
"""A torch.distributed.Store."""

STORE_TIMEOUT = timedelta(seconds=10)
"""For one question to the store, and for being reachable at all."""


class Rendezvous:
    """A store that this process serves, for all of its pairs. Nobody who has not been told a pair's name finds it."""

    def __init__(self, host: str, port: int = 0) -> None:
        """host: a name or address of this machine at which the other ends reach it; nothing else is listened on.

        port: 0: any free one. Raises ConfigError when that cannot be.
        """
        try:
            listener = socket.create_server((host, port))
            self.host, self.port = host, listener.getsockname()[1]
            self._store = dist.TCPStore(
                host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=STORE_TIMEOUT,
                master_listen_fd=listener.fileno(),
            )
            listener.detach()  # the store closes it
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"pairs of processes cannot meet at {host}:{port}: {error}") from error

    def offer(self, backend: str) -> expert_pb2.PairOffer:
        """A pair that does not exist yet."""
        return expert_pb2.PairOffer(backend=backend, host=self.host, port=self.port, name=uuid.uuid4().hex)


def meet(offer: expert_pb2.PairOffer) -> Store:
    """The pair's part of its store, over a connection of its own: the store's questions wait for one another.

    Blocks until the store is reached. Raises RuntimeError when it is not.
    """
    store = dist.TCPStore(offer.host, offer.port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
    return dist.PrefixStore(offer.name, store)
