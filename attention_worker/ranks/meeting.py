"""How the ranks of a worker find each other: at an address where rank 0 listens, before they load anything.

Each says what it is to compute, and all compare: ranks that differ would give wrong sums, or wait for each other for
ever. When their parts are loaded they connect, every rank with every other, over the network by which they met.
"""

from __future__ import annotations

import datetime
import json
import logging
import socket
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from attention_worker.ranks.orders import Orders
from attention_worker.sharding.messages import DeviceMessages, HostMessages, Messages
from grokmoe.errors import ConfigError, StartupError

logger = logging.getLogger(__name__)

START_TIMEOUT = 1800.0
"""Seconds that ranks wait for each other until they serve: one may have to load hundreds of gigabytes from a slow disk,
or be on a host that is not up yet."""

SEEK_PAUSE = 0.2
"""Seconds between two looks whether rank 0 listens."""

TELL_AFTER = 10.0
"""Seconds between two lines of the log about ranks that are not there yet."""


class Meeting:
    """One rank at the place where all meet."""

    def __init__(self, rank: int, size: int, host: str, port: int, timeout: float = START_TIMEOUT) -> None:
        """Rank 0 listens at host:port, port 0 for any free one; the others come as soon as it does. timeout: seconds.

        Raises StartupError when rank 0 cannot listen there, or is not there in time.
        """
        self.rank, self.size, self.timeout = rank, size, timeout
        limit = datetime.timedelta(seconds=timeout)
        self._deadline = time.monotonic() + timeout
        try:
            if rank == 0:
                # Our own socket: the store's would listen on all interfaces.
                with self._listen(host, port) as listener:
                    self._own_host, port = listener.getsockname()[:2]
                    self._store = dist.TCPStore(
                        host, port, None, True, limit, wait_for_workers=False, master_listen_fd=listener.detach()
                    )
            else:
                self._own_host = self._seek(host, port)
                self._store = dist.TCPStore(host, port, None, False, limit, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            what = "listen" if rank == 0 else "meet rank 0"
            raise StartupError(f"rank {rank} cannot {what} at {host}:{port}: {_first_line(error)}") from error
        self.address = f"{host}:{port}"

    def _listen(self, host: str, port: int) -> socket.socket:
        """At the name by which the others find this host, as soon as it is known. Raises OSError."""
        while True:
            try:
                family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
                return socket.create_server((host, port), family=family, backlog=128)
            except socket.gaierror:  # a cluster makes a pod's name a moment after the pod
                if time.monotonic() > self._deadline:
                    raise
            time.sleep(SEEK_PAUSE)

    def _seek(self, host: str, port: int) -> str:
        """Returns when rank 0 listens, with the address that this host has on the way there. Raises OSError."""
        told = time.monotonic()
        while True:
            try:
                with socket.create_connection((host, port), SEEK_PAUSE) as connection:
                    return str(connection.getsockname()[0])
            except OSError:  # it is not up yet, or has no name yet
                if time.monotonic() > self._deadline:
                    raise
            if time.monotonic() > told + TELL_AFTER:
                told = time.monotonic()
                logger.info("waiting for rank 0 at %s:%d", host, port)
            time.sleep(SEEK_PAUSE)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Compares what the ranks say of themselves; returns when all have said the same.

        Raises ConfigError that names the rank and the fact, StartupError when a rank does not come in time.
        """
        own = {name: str(value) for name, value in facts.items()}
        self._store.set(f"facts/{self.rank}", json.dumps(own))
        for rank in range(self.size):
            theirs = json.loads(self._wait_for(f"facts/{rank}", rank))
            for name in sorted(own.keys() | theirs.keys()):
                mine, found = own.get(name, "nothing"), theirs.get(name, "nothing")
                if mine != found:
                    raise ConfigError(f"rank {self.rank} has {name} {mine}, rank {rank} has {found}: must be the same")

    def _wait_for(self, key: str, rank: int) -> bytes:
        while True:
            try:
                self._store.wait([key], datetime.timedelta(seconds=TELL_AFTER))
                return self._store.get(key)
            except RuntimeError as error:  # its class for a timeout
                if time.monotonic() > self._deadline:
                    raise StartupError(f"rank {rank} of {self.size} did not come to {self.address}") from error
                if not isinstance(error, dist.DistStoreError):
                    raise StartupError(f"rank 0 at {self.address} is gone: {_first_line(error)}") from error
                logger.info("waiting for rank %d of %d at %s", rank, self.size, self.address)

    def connect(self, device: torch.device) -> Orders:
        """Returns when all ranks have come this far, each connected with each. Raises StartupError."""
        try:
            host = HostMessages(self._gloo(), self.timeout)
            return Orders(host, host if device.type == "cpu" else self._device_messages(device), device)
        except RuntimeError as error:
            raise StartupError(f"the {self.size} ranks cannot connect: {_first_line(error)}") from error

    def _gloo(self) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._own_host)]
        options._timeout = datetime.timedelta(seconds=self.timeout)
        options._threads = 1  # for collectives, which are not used
        return dist.ProcessGroupGloo(dist.PrefixStore("gloo", self._store), self.rank, self.size, options)

    def _device_messages(self, device: torch.device) -> Messages:
        if not dist.is_nccl_available():
            raise StartupError(f"device is {device}, and this torch has no NCCL for {self.size} ranks")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=self.timeout)
        torch.cuda.set_device(device)
        store = dist.PrefixStore("nccl", self._store)
        return DeviceMessages(dist.ProcessGroupNCCL(store, self.rank, self.size, options), self.timeout)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
