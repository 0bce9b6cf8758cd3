"""Where a client connects to, and how calls are spread if that is several servers."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import socket
from collections.abc import Sequence

from grokmoe.errors import ConfigError, Unavailable
from grokmoe.v1 import generation_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["Generation"].full_name

_BALANCING = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # A server that does not serve, or is about to end, gets no calls.
        "healthCheckConfig": {"serviceName": SERVICE},
    }
)
"""Has no retryPolicy on purpose: gRPC's own retries do not know RetryInfo, and would multiply with grokmoe.retry's."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One server, or several whose calls are balanced. Made by `parse_target`."""

    addresses: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether nothing leaves this host."""
        return all(map(_is_local, self.addresses))

    @property
    def is_list(self) -> bool:
        """Whether it is a list of addresses; gRPC has no server name for one."""
        return len(self.addresses) > 1

    @property
    def options(self) -> tuple[tuple[str, str | int], ...]:
        """Channel options. One server is asked even when it says that it is not ready, several are not."""
        disabled = ("grpc.service_config_disable_resolution", 1)
        if self.is_list or self.addresses[0].startswith(("dns:", "ipv4:", "ipv6:")):
            return (disabled, ("grpc.service_config", _BALANCING))
        return (disabled,)

    def uri(self) -> str:
        """What gRPC connects to. Names in a list are looked up now and once. Unavailable if that fails."""
        if not self.is_list:
            return self.addresses[0]
        found = [_look_up(*_split(address)) for address in self.addresses]
        for version, scheme in ((4, "ipv4"), (6, "ipv6")):
            if all(version in each for each in found):
                return f"{scheme}:{','.join(each[version] for each in found)}"
        raise ConfigError(f"{','.join(self.addresses)}: neither all have an IPv4 address nor all an IPv6 address")


def parse_target(address: str | Sequence[str]) -> Target:
    """Reads `host:port`, `unix:/path`, `dns:///name:port`, any gRPC target, or a list: a sequence, or with commas.

    ConfigError for a list of anything but `host:port`: gRPC cannot balance over Unix sockets.
    """
    if isinstance(address, str):
        # The schemes that have a list of their own are gRPC's to read.
        has_own_list = address.startswith(("ipv4:", "ipv6:", "unix:"))
        addresses = (address,) if has_own_list else tuple(part.strip() for part in address.split(","))
    else:
        addresses = tuple(address)
    if not all(addresses) or not addresses:
        raise ConfigError(f"address is {address!r}, must be host:port, a gRPC target, or a list of host:port")
    if len(addresses) > 1:
        for each in addresses:
            _split(each)
    return Target(addresses)


def _split(address: str) -> tuple[str, int]:
    """Host and port of one address of a list."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdigit() or (":" in host and not is_bracketed):
        raise ConfigError(f"{address!r} in a list of addresses: must be host:port")
    return host.strip("[]"), int(port)


def _look_up(host: str, port: int) -> dict[int, str]:
    """By IP version, the first address of a host."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"{host}: {error.strerror or error}") from error
    found: dict[int, str] = {}
    for family, _, _, _, sockaddr in infos:
        if family == socket.AF_INET:
            found.setdefault(4, f"{sockaddr[0]}:{port}")
        elif family == socket.AF_INET6:
            found.setdefault(6, f"[{sockaddr[0]}]:{port}")
    return found


def _is_local(address: str) -> bool:
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    if address.startswith(("ipv4:", "ipv6:")):
        return all(_is_local(part) for part in address[5:].split(","))
    host = address.removeprefix("dns:").lstrip("/").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
