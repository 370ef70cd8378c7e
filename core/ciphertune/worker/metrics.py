"""Metrics of a worker for Prometheus."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from typing import Any

from ciphertune.errors import ConfigError
from ciphertune.worker.service import Service

_NEEDED = 'metrics need prometheus-client: pip install "ciphertune[worker]"'


def check_metrics(host: str, port: int) -> None:
    """Say now whether metrics can be served at an address, before there is a worker to measure.

    Raises:
        ConfigError: prometheus-client is missing, or the port cannot be used.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(_NEEDED)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics at {host}:{port}: {error.strerror or error}") from error


def serve_metrics(service: Service, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer ``GET /metrics`` in the text format of Prometheus, on a thread of its own.

    Args:
        service: what is measured.
        host: address to listen on.
        port: 0 for any free one.

    Returns:
        The port, and a function that stops the server.

    Raises:
        ConfigError: prometheus-client is missing, or the port cannot be used.
    """
    try:
        import prometheus_client
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise ConfigError(_NEEDED) from error

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
            seconds = CounterMetricFamily("ciphertune_seconds", "Time of products by phase.", labels=["phase"])
            for phase in ("queue", "evaluate", "pack"):
                seconds.add_metric([phase], getattr(counters, f"{phase}_seconds"))
            yield seconds
            size = CounterMetricFamily("ciphertune_bytes", "Bytes of messages.", labels=["direction"])
            size.add_metric(["in"], counters.bytes_in)
            size.add_metric(["out"], counters.bytes_out)
            yield size
            yield CounterMetricFamily("ciphertune_sessions_expired", "Sessions closed for idleness.", counters.expired)
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
    try:
        server, thread = prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics at {host}:{port}: {error}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
