"""A worker's figures for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ciphertune.errors import ConfigError
from ciphertune.worker.service import Service


def serve_metrics(service: Service, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer ``GET /metrics`` in the text format of Prometheus, on a thread of its own.

    Args:
        service: whose figures.
        host: address to listen on.
        port: 0 for any free one.

    Returns:
        The port, and what stops it.

    Raises:
        ConfigError: prometheus-client is missing, or the port cannot be used.
    """
    try:
        import prometheus_client
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise ConfigError('metrics need prometheus-client: pip install "ciphertune[worker]"') from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            stats, load = service.stats, service.load
            requests = CounterMetricFamily("ciphertune_requests", "Requests answered.", labels=["kind"])
            for kind, count in list(stats.requests.items()):
                requests.add_metric([kind], count)
            yield requests
            errors = CounterMetricFamily("ciphertune_errors", "Error replies.", labels=["code"])
            for code, count in list(stats.errors.items()):
                errors.add_metric([code], count)
            yield errors
            seconds = CounterMetricFamily("ciphertune_seconds", "Time of products by phase.", labels=["phase"])
            for phase in ("queue", "evaluate", "pack"):
                seconds.add_metric([phase], getattr(stats, f"{phase}_seconds"))
            yield seconds
            size = CounterMetricFamily("ciphertune_bytes", "Bytes of messages.", labels=["direction"])
            size.add_metric(["in"], stats.bytes_in)
            size.add_metric(["out"], stats.bytes_out)
            yield size
            yield CounterMetricFamily("ciphertune_sessions_expired", "Sessions closed for idleness.", stats.expired)
            yield GaugeMetricFamily("ciphertune_sessions", "Open sessions.", load.sessions)
            yield GaugeMetricFamily(
                "ciphertune_session_key_bytes", "Evaluation keys of open sessions.", service.worker.session_bytes
            )
            yield GaugeMetricFamily("ciphertune_clients", "Clients known.", load.clients)
            yield GaugeMetricFamily("ciphertune_queue_depth", "Requests that wait.", load.queued)
            yield GaugeMetricFamily("ciphertune_requests_under_way", "Requests not yet answered.", load.under_way)
            yield GaugeMetricFamily("ciphertune_bytes_under_way", "Their bytes, and of replies not taken.", load.nbytes)
            yield GaugeMetricFamily("ciphertune_layers", "Layers held.", len(service.worker.weights))
            yield GaugeMetricFamily("ciphertune_weight_bytes", "Bytes of weights held.", service.worker.weights.nbytes)
            yield GaugeMetricFamily("ciphertune_uptime_seconds", "Time since the start.", time.time() - service.started)

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
