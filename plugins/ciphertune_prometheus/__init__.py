"""A client's figures for Prometheus: products, bytes and seconds by phase, and how training stands."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ciphertune import PluginError, SelectionError
from ciphertune.hookspecs import hookimpl
from ciphertune.tracker import Tracker

if TYPE_CHECKING:
    from ciphertune import Session
    from ciphertune.traffic import Exchange, SetUp

_GAUGES = {
    "loss": "Loss of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "grad_norm": "Norm of the last step's gradient, before clipping.",
    "eval_loss": "Loss of the last evaluation.",
}
_SET_UP = {
    "weights": "Weights read by set-ups.",
    "bytes_down": "Bytes of weights that workers sent for set-ups.",
    "seconds": "Time of set-ups.",
}
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclasses.dataclass(frozen=True)
class PrometheusOptions:
    """Options of the prometheus plugin.

    Attributes:
        port: 0 for any free one.
        host: address to listen on. Whoever can reach it sees the figures: they are not protected.
    """

    port: int = 9101
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SelectionError(f"option port={self.port} must be from 0 to 65535")


class Prometheus(Tracker):
    """Answers ``GET /metrics`` while a session is open or training goes on.

    Attributes:
        port: the port it listens on; None while it does not.

    Raises:
        PluginError: prometheus-client is missing.
    """

    interface = 1
    Options = PrometheusOptions

    def __init__(self, options: PrometheusOptions) -> None:
        super().__init__()
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise PluginError('needs prometheus-client: pip install "ciphertune[prometheus]"') from error
        self.options = options
        self.port: int | None = None
        self.registry = CollectorRegistry()
        self._stop: Callable[[], None] | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._training = False

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"ciphertune_client_{name}", text, ["direction", *labels], registry=self.registry)

        self._requests = counter("requests", "Messages sent and answered.")
        self._retries = counter("retries", "Messages sent again.")
        self._tokens = counter("tokens", "Tokens of products.")
        self._bytes = counter("bytes", "Bytes of products.", "way")
        self._seconds = counter("phase_seconds", "Time of products by phase; evaluation is part of waiting.", "phase")
        self._products = Histogram(
            *("ciphertune_client_product_seconds", "Time of whole products.", ["direction"]),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._step = Gauge("ciphertune_training_step", "Optimizer steps done.", registry=self.registry)
        self._total = Gauge("ciphertune_training_total_steps", "Optimizer steps of the run.", registry=self.registry)
        self._set_ups: list[SetUp] = []
        for name, text in _SET_UP.items():
            gauge = Gauge(f"ciphertune_client_set_up_{name}", text, registry=self.registry)
            gauge.set_function(functools.partial(self._set_up, name))
        self._gauges = {
            name: Gauge(f"ciphertune_training_{name}", text, registry=self.registry) for name, text in _GAUGES.items()
        }

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """Start the listener."""
        self._total.set(total_steps)
        self._step.set(start_step)
        self._training = True
        self._serve()

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges."""
        self._step.set(step)
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(metrics[name])

    def end(self, step: int, reason: str) -> None:
        """Stop, unless a session is open."""
        self._training = False
        self._rest()

    def close(self) -> None:
        """Stop the listener."""
        stop, self._stop, self.port = self._stop, None, None
        if stop is not None:
            stop()

    @hookimpl
    def ciphertune_session_opened(self, session: Session) -> None:
        """Start the listener."""
        self._sessions.add(session)
        self._set_ups.append(session.set_up)
        self._serve()

    @hookimpl
    def ciphertune_session_closed(self, session: Session) -> None:
        """Stop, unless something else goes on."""
        self._sessions.discard(session)
        self._rest()

    @hookimpl
    def ciphertune_after_reply(self, exchange: Exchange) -> None:
        """Count the exchange."""
        super().ciphertune_after_reply(exchange)
        direction = exchange.direction
        self._requests.labels(direction).inc(exchange.requests)
        self._retries.labels(direction).inc(exchange.retries)
        self._tokens.labels(direction).inc(exchange.tokens)
        self._bytes.labels(direction, "up").inc(exchange.bytes_up)
        self._bytes.labels(direction, "down").inc(exchange.bytes_down)
        for phase in ("encrypt", "wait", "evaluate", "decrypt"):
            self._seconds.labels(direction, phase).inc(getattr(exchange, f"{phase}_seconds"))
        whole = exchange.encrypt_seconds + exchange.wait_seconds + exchange.decrypt_seconds + exchange.turn_seconds
        self._products.labels(direction).observe(whole)

    def _set_up(self, name: str) -> float:
        """The sum over sessions so far; workers that join add to it."""
        return float(sum(getattr(costs, name) for costs in self._set_ups))

    def _rest(self) -> None:
        if not self._training and not self._sessions:
            self.close()

    def _serve(self) -> None:
        if self._stop is not None:
            return
        from prometheus_client import start_http_server

        options = self.options
        try:
            server, thread = start_http_server(options.port, options.host, self.registry)
        except OSError as error:
            raise PluginError(f"cannot serve metrics at {options.host}:{options.port}: {error}") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self.port, self._stop = server.server_port, stop
