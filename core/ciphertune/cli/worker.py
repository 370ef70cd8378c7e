"""The command ``ciphertune worker``."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import click

from ciphertune.cli.offered import backends_option, offered_backends
from ciphertune.cli.pairs import name_values

log = logging.getLogger("ciphertune.worker")


class _JsonFormatter(logging.Formatter):
    """Formatter of one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bind", "address", default="tcp://127.0.0.1:5555", show_default=True, help="Address to listen on.")
@click.option("--transport", default="zmq", show_default=True, help="Transport to serve over.")
@click.option("--curve", default=None, help="Folder with worker.key and clients/; see 'ciphertune keys'.")
@click.option("--insecure", is_flag=True, help="Plain TCP, on a loopback address only.")
@click.option(
    "--no-authentication",
    is_flag=True,
    help="Plain TCP on any address: anyone who can reach it can use this worker, and alter traffic unnoticed.",
)
@click.option("-o", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Any option of the transport.")
@backends_option()
@click.option("--layers", multiple=True, help="Serve only layers that match; may be repeated.")
@click.option("--verify/--no-verify", default=True, help="Check the weights against their hashes first.")
@click.option("--device", default="cpu", show_default=True, help="Device that evaluates products.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads of a product.  [default: all cores]")
@click.option(
    "--evaluators", type=click.IntRange(1, 64), default=1, show_default=True, help="Products evaluated at a time."
)
@click.option(
    "--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Requests of one client under way."
)
@click.option(
    "--max-client-mb",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Memory of one client's requests and replies.",
)
@click.option("--max-message-mb", type=click.IntRange(1), default=1024, show_default=True, help="Size of one message.")
@click.option("--max-sessions", type=click.IntRange(1), default=4, show_default=True, help="Sessions of one client.")
@click.option(
    "--max-key-mb",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Evaluation keys of one client's sessions; of all clients' eight times that.",
)
@click.option(
    "--idle", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds a session may idle."
)
@click.option(
    "--withhold-weights",
    is_flag=True,
    help="Let no client read codes. One that has to prepare itself from them, as mlwe does, then needs them from "
    "elsewhere.",
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=None, help="Prometheus metrics; 0: any port.")
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address of the metrics.")
@click.option(
    "--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish in on SIGTERM."
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the log."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Least level of the log.",
)
def worker(
    bundle: Path,
    address: str,
    transport: str,
    curve: str | None,
    insecure: bool,
    no_authentication: bool,
    extra: tuple[str, ...],
    backends: str,
    layers: tuple[str, ...],
    verify: bool,
    device: str,
    threads: int | None,
    evaluators: int,
    max_requests: int,
    max_client_mb: int,
    max_message_mb: int,
    max_sessions: int,
    max_key_mb: int,
    idle: float,
    withhold_weights: bool,
    metrics_port: int | None,
    metrics_host: str,
    drain: float,
    log_format: str,
    log_level: str,
) -> None:
    """Serve the layers of BUNDLE, a worker folder that 'ciphertune split' wrote.

    Prints one line 'ready ADDRESS' on standard output when it takes requests. SIGTERM finishes the requests that are
    under way and ends it with status 0; a second one, or SIGINT, ends it at once.
    """
    _log_to_stderr(log_format, log_level)
    options: dict[str, Any] = {**name_values(extra)}
    flags = {"curve": curve, "insecure": insecure or None, "no_authentication": no_authentication or None}
    options |= {name: value for name, value in flags.items() if value is not None}

    import torch

    from ciphertune.bundle.worker import load_worker, read_blocks
    from ciphertune.errors import ConfigError
    from ciphertune.plugins import registry
    from ciphertune.protocol import Limits
    from ciphertune.worker import Entrance, Quota, Service, SessionLimits, Worker

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {device!r} cannot be used: {error}") from error
    listen = registry.load(registry.TRANSPORTS, transport).listen
    read_blocks(bundle)
    offered = offered_backends(backends)
    size = max_message_mb << 20
    message = Limits(buffer_bytes=size, total_bytes=size)
    # Keys, address and ports are looked at first: weights take minutes to read.
    if metrics_port is not None:
        from ciphertune.worker.metrics import check_metrics

        check_metrics(metrics_host, metrics_port)
    entrance = Entrance(message)
    listener = listen(entrance, address, options)
    try:
        store = load_worker(bundle, device=device, layers=layers or None, verify=verify)
    except BaseException:
        listener.close()
        raise
    _say("weights loaded", layers=len(store), megabytes=round(store.nbytes / 1e6, 1), verified=verify)
    keys = max_key_mb << 20
    readings = 0 if withhold_weights else SessionLimits.readings
    limits = SessionLimits(max_sessions, idle_seconds=idle, nbytes=keys, all_nbytes=8 * keys, readings=readings)
    service = Service(
        Worker(store, place, limits, backends=offered),
        Quota(max_requests, max_client_mb << 20),
        message,
        evaluators,
    )
    stop_metrics = None
    try:
        try:
            if metrics_port is not None:
                from ciphertune.worker.metrics import serve_metrics

                port, stop_metrics = serve_metrics(service, metrics_host, metrics_port)
                _say("metrics", address=f"http://{metrics_host}:{port}/metrics")
            asked = _signals()
            entrance.open(service)
            _say("ready", address=listener.address)
            click.echo(f"ready {listener.address}")
            asked.wait()
            _say("draining", seconds=drain)
            clean = service.drain(drain)
            _say("stopped", requests=sum(service.counters.requests.values()), drained=clean)
        finally:
            listener.close(linger=1.0)
            if stop_metrics is not None:
                stop_metrics()
    finally:
        service.close()


def _signals() -> threading.Event:
    """Event that the first SIGTERM or SIGINT sets; the next one of either ends the process at once."""
    asked = threading.Event()

    def handler(number: int, frame: object) -> None:
        if asked.is_set() or number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return asked


def _say(message: str, **fields: object) -> None:
    text = message if not fields else f"{message}: " + ", ".join(f"{k} {v}" for k, v in fields.items())
    structured = any(isinstance(h.formatter, _JsonFormatter) for h in logging.getLogger().handlers)
    log.info(message if structured else text, extra={"fields": fields})


def _log_to_stderr(form: str, level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
