"""The HTTP port of a role: metrics for Prometheus, and pages to look at. It only answers; nothing can be done here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

logger = logging.getLogger(__name__)

Page = tuple[str, Callable[[], bytes]]
"""Content type, and what gives the content; called on a thread of its own, for every request anew."""

HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     "connect-src 'self'; img-src data:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
]  # fmt: skip
"""A page has nothing from elsewhere, and is part of nobody else's."""

REQUEST_TIMEOUT = 10.0
"""Seconds that a connection may take for its request. One that says nothing must not keep a thread for ever."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


def start_http(host: str, port: int, registry: CollectorRegistry, pages: Mapping[str, Page]) -> int:
    """Serves `pages` by their paths and the metrics at every other. Returns the port. Raises OSError: it is taken."""
    kind: type[WSGIServer] = _Server
    if ":" in host:
        import socket

        kind = type("_Server6", (_Server,), {"address_family": socket.AF_INET6})
    server = make_server(host, port, _app(registry, pages), kind, _Handler)
    threading.Thread(target=server.serve_forever, name="metrics-http", daemon=True).start()
    return server.server_port


def _app(registry: CollectorRegistry, pages: Mapping[str, Page]) -> Callable[..., Iterable[bytes]]:
    metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        page = pages.get(environ.get("PATH_INFO", ""))
        if page is None:
            return metrics(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
            return []
        kind, content = page
        try:
            body = content()
        except Exception as error:
            logger.warning("page %s: %r", environ["PATH_INFO"], error)
            start_response("503 Service Unavailable", [("Content-Type", "text/plain"), *HEADERS])
            return [b"not to be had now\n"]
        start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), *HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app
