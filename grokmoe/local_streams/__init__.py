"""Streams between processes of one host, without gRPC: the same messages, in a third of the time.

A worker that listens on a Unix socket in the clear also listens beside it (SUFFIX), for the streams of rows alone. Who
finds that socket uses it; who does not (another host, a proxy in between, TLS) has gRPC, which carries everything else
in any case. What a stream carries, how it ends and what that means are the same on both.

A connection is one stream. Frames both ways: length, kind, content.

    client: OPEN method and authorization, then MESSAGE ...; closing is the end
    server: MESSAGE ..., then END with a google.rpc.Status
"""

from grokmoe.local_streams.client import LocalCall, find_socket
from grokmoe.local_streams.frames import SUFFIX
from grokmoe.local_streams.server import LocalServer

__all__ = ["SUFFIX", "LocalCall", "LocalServer", "find_socket"]
