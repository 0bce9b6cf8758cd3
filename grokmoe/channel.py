"""How this project opens gRPC channels: options, limits and time-outs in one place. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Limit of one message, both ways and for every role. gRPC's own default is 4 MiB. Data-plane messages stay far
below it because they are cut (grokmoe.tensors.MAX_CHUNK_BYTES); full-vocabulary logits of a long prompt may not."""

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Limit of one message that a client may send: until it has been read, the caller decides what memory it takes. The
largest request that is valid, a full context of token ids with every list at its limit, has some 400 KiB."""

MAX_METADATA_BYTES = 8 * 1024
"""Of one call, names and values. From here on calls are refused at random, from twice as much on always."""

MAX_HANDSHAKE_MS = 10_000
"""A connection that is not set up by then, TLS included, is closed."""

MAX_PING_STRIKES = 2
"""Probes that come too early, see MIN_PING_INTERVAL_MS, before the connection is closed."""

KEEPALIVE_MS = 30_000
"""A connection that has been silent this long is probed."""

KEEPALIVE_TIMEOUT_MS = 10_000
"""A probe unanswered this long closes the connection."""

MIN_PING_INTERVAL_MS = 10_000
"""Servers accept probes this often. Must stay below KEEPALIVE_MS: the default of five minutes would answer a client
that waits for a long prefill with GOAWAY."""

COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The one that gRPC's core heeds, see tests/security/test_connections.py.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Two clients of one process must not share a connection: a lane's traffic would queue behind another's.
    ("grpc.use_local_subchannel_pool", 1),
    # Proxies from the environment have no business between workers, nor before a loopback address.
    ("grpc.enable_http_proxy", 0),
)

RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)
"""gRPC's own pauses between attempts grow to two minutes: a restarted server would stay unreachable for as long. And it
looks a name up once in 30 s: a pod that was started again has another address."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *COMMON_OPTIONS,
    # Two servers on one port would share its calls without a word.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.server_handshake_timeout_ms", MAX_HANDSHAKE_MS),
)

CLIENT_FACING_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.max_receive_message_length", MAX_REQUEST_BYTES),)
"""Of servers whose callers are not the cluster's own."""


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Deadlines of control calls, seconds."""

    describe: float = 5.0
    status: float = 5.0
    tokenize: float = 10.0
    connect: float = 10.0


TIMEOUTS = Timeouts()


def open_channel(
    address: str, options: Sequence[tuple[str, Any]] = (), credentials: grpc.ChannelCredentials | None = None
) -> grpc.aio.Channel:
    """Opens a channel on the running event loop. address: `host:port`, `unix:/path` or any gRPC target.

    credentials: for TLS; None: in the clear.
    """
    options = [*CLIENT_OPTIONS, *options]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)
