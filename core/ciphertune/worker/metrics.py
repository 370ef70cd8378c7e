"""A worker's figures for Prometheus, and whether it is alive and ready, over HTTP."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

from ciphertune.errors import ConfigError
from ciphertune.worker.service import Service

_NEEDED = 'metrics need prometheus-client: pip install "ciphertune[worker]"'
_REQUEST_SECONDS = 10.0


class Monitor:
    """Answers ``GET /metrics``, ``/live`` and ``/ready``, on threads of its own.

    ``/live`` is 200 unless the worker hangs, also while it reads its weights. ``/ready`` is 200 while it takes
    requests, and 503 before, and once it is about to stop.

    Args:
        host: address to listen on.
        port: 0 for any free one.

    Attributes:
        port: that it listens on.

    Raises:
        ConfigError: prometheus-client is missing, or the port cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigError(_NEEDED) from error
        self._exposition = prometheus_client.exposition
        self._registry: Any = None
        self._service: Service | None = None
        try:
            self._server = _server(self, host, port)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics at {host}:{port}: {error.strerror or error}") from error
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="ciphertune-metrics", daemon=True)
        self._thread.start()

    def open(self, service: Service) -> None:
        """Tell of a service, which takes requests, from now on."""
        self._registry = _registry(service)
        self._service = service

    def close(self) -> None:
        """Stop. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path."""
        service = self._service
        if path == "/live":
            return _state(service is None or service.alive, "live", "hangs")
        if path == "/ready":
            ready = service is not None and service.alive and not service.draining
            return _state(ready, "ready", "starts" if service is None else "stops")
        if path != "/metrics":
            return 404, "text/plain", b"/metrics, /live and /ready are here\n"
        if self._registry is None:
            return _state(False, "", "starts")
        encode, kind = self._exposition.choose_encoder(accept)
        return 200, kind, encode(self._registry)


def _state(good: bool, yes: str, no: str) -> tuple[int, str, bytes]:
    return (200 if good else 503), "text/plain", f"{yes if good else no}\n".encode()


def _server(monitor: Monitor, host: str, port: int) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = _REQUEST_SECONDS

        def do_GET(self) -> None:
            status, kind, body = monitor.answer(self.path.partition("?")[0], self.headers.get("Accept", ""))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Write nothing: a probe every few seconds is no news."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, *_: Any) -> None:
            """Write nothing: a probe that went away is no news."""

    return Server((host, port), Handler)


def _registry(service: Service) -> Any:
    """Make a registry of prometheus-client that collects a service's figures."""
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Collector:
        def collect(self) -> Iterator[Any]:
            counters, load = service.counters, service.load
            requests = CounterMetricFamily("ciphertune_requests", "Requests answered.", labels=["kind"])
            for kind, count in list(counters.requests.items()):
                requests.add_metric([kind], count)
            yield requests
            errors = CounterMetricFamily("ciphertune_errors", "Error replies.", labels=["code"])
            for code, count in list(counters.errors.items()):
                errors.add_metric([code], count)
            yield errors
            yield CounterMetricFamily(
                "ciphertune_joined_products", "Products that were evaluated together with another.", counters.joined
            )
            seconds = CounterMetricFamily("ciphertune_seconds", "Time of products by phase.", labels=["phase"])
            for phase in ("queue", "evaluate", "pack"):
                seconds.add_metric([phase], getattr(counters, f"{phase}_seconds"))
            yield seconds
            size = CounterMetricFamily("ciphertune_bytes", "Bytes of messages.", labels=["direction"])
            size.add_metric(["in"], counters.bytes_in)
            size.add_metric(["out"], counters.bytes_out)
            yield size
            yield CounterMetricFamily("ciphertune_sessions_expired", "Sessions closed for idleness.", counters.expired)
            yield CounterMetricFamily("ciphertune_refusals", "Refused connections.", service.refusals.total)
            yield GaugeMetricFamily("ciphertune_sessions", "Open sessions.", load.sessions)
            yield GaugeMetricFamily(
                "ciphertune_session_key_bytes", "Evaluation keys of open sessions.", service.worker.session_bytes
            )
            yield GaugeMetricFamily(
                "ciphertune_prepared_bytes", "Prepared weights beside those held.", service.worker.prepared_bytes
            )
            yield GaugeMetricFamily("ciphertune_clients", "Clients known.", load.clients)
            yield GaugeMetricFamily("ciphertune_queue_depth", "Requests that wait.", load.queued)
            yield GaugeMetricFamily("ciphertune_requests_under_way", "Requests under way.", load.under_way)
            yield GaugeMetricFamily("ciphertune_bytes_under_way", "Their bytes, and of replies not taken.", load.nbytes)
            yield GaugeMetricFamily("ciphertune_layers", "Layers held.", service.worker.held.layers)
            yield GaugeMetricFamily("ciphertune_weight_bytes", "Bytes of weights held.", service.worker.held.nbytes)
            yield GaugeMetricFamily("ciphertune_uptime_seconds", "Time since the start.", service.uptime)

    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector())
    prometheus_client.ProcessCollector(registry=registry)
    return registry
