"""What is known of an adapter, to and from the wire."""

from __future__ import annotations

from collections.abc import Iterable

from grokmoe.adapter import AdapterInfo
from grokmoe.v1 import adapter_pb2


def adapter_to_proto(info: AdapterInfo) -> adapter_pb2.Adapter:
    """Renders one for the wire."""
    return adapter_pb2.Adapter(
        name=info.name,
        id=info.id,
        rank=info.rank,
        targets=info.targets,
        added_tokens=info.num_added_tokens,
        bytes=info.num_bytes,
    )


def adapter_from_proto(message: adapter_pb2.Adapter) -> AdapterInfo:
    """Reads one from the wire."""
    targets = tuple(message.targets)
    return AdapterInfo(message.name, message.id, message.rank, targets, message.added_tokens, message.bytes)


def adapters_from_proto(messages: Iterable[adapter_pb2.Adapter]) -> tuple[AdapterInfo, ...]:
    """Reads several."""
    return tuple(map(adapter_from_proto, messages))
