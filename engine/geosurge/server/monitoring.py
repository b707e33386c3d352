"""Metrics and probes of a server, over HTTP on a port of its own.

| path | answer |
|---|---|
| `/metrics` | the numbers that `geosurge.server.metrics` lists, in Prometheus' text format or OpenMetrics |
| `/livez` | 200 while the event loop turns, 503 otherwise: restart the process |
| `/readyz` | 200 while requests are answered, 503 otherwise: send them elsewhere |

It has threads of its own, so that it answers while the event loop is stuck and never keeps it waiting. It has neither
encryption nor credentials; its answers hold nothing of what clients asked.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client import MetricsHandler

from geosurge.errors import ConfigurationError
from geosurge.server.metrics import Metrics

logger = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.1
"""Longest that `Monitoring.stop` waits for the thread that listens to notice."""


class Monitoring:
    """The endpoint of one server.

    Args:
        metrics: What ``/metrics`` answers with.
        is_ready: Answers ``/readyz``; like ``is_alive`` called on the endpoint's threads, so that it must not wait for
            the event loop.
        is_alive: Answers ``/livez``.
    """

    def __init__(self, metrics: Metrics, *, is_ready: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
        self._handler = _handler(metrics, {"/readyz": is_ready, "/livez": is_alive})
        self._server: _HttpServer | None = None

    def start(self, host: str, port: int) -> int:
        """Listens until `stop`.

        Args:
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.

        Returns:
            The port.

        Raises:
            ConfigurationError: The address cannot be listened on.
        """
        try:
            self._server = _HttpServer((host, port), self._handler)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host} port {port} for monitoring: {error.strerror}; choose another metrics_port, "
                "or 0 for a free one, and as metrics_host an address of this machine"
            ) from error
        threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="geosurge-monitoring", daemon=True
        ).start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Stops listening; does nothing when it has not been started, or has been stopped."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class _HttpServer(ThreadingHTTPServer):
    # A scraper that never ends its request must not keep the process from ending.
    daemon_threads = True
    # Two servers must not share a port without noticing.
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the network for the host's name, which can take long and which nobody needs.
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        level = logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR
        logger.log(level, "a request to the monitoring endpoint failed", exc_info=True)


def _handler(metrics: Metrics, probes: dict[str, Callable[[], bool]]) -> type[MetricsHandler]:
    class Handler(MetricsHandler):
        registry = metrics.registry
        timeout = 10.0
        server_version = "geosurge"
        sys_version = ""

        def do_GET(self) -> None:  # noqa: N802
            path = urlsplit(self.path).path
            if path == "/metrics":
                super().do_GET()
            elif path not in probes:
                self._answer(HTTPStatus.NOT_FOUND)
            else:
                self._answer(HTTPStatus.OK if probes[path]() else HTTPStatus.SERVICE_UNAVAILABLE)

        def _answer(self, status: HTTPStatus) -> None:
            body = f"{status.phrase}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
