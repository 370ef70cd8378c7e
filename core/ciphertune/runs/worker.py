"""A worker as its configuration describes it: started, watched, told anew what to serve, and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ciphertune._support.bundle_names import WORKER_MANIFEST
from ciphertune._support.notify import notify, notify_reloading, watchdog_seconds
from ciphertune.bundle.worker import load_worker, read_blocks
from ciphertune.errors import CipherTuneError, ConfigError
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed
from ciphertune.protocol import Limits
from ciphertune.runs.worker_config import BindSection, WorkerConfig
from ciphertune.transport import Listener
from ciphertune.worker import Entrance, Quota, Service, SessionLimits, WeightStore, Worker
from ciphertune.worker.audit import AuditLog
from ciphertune.worker.metrics import Monitor
from ciphertune.worker.service import Waiting

log = logging.getLogger("ciphertune.worker")

_AUDIT_SECONDS = 5.0
_LINGER_SECONDS = 1.0
_END_SECONDS = 5.0
"""Time that products under way have to end in after the drain, before the process ends without them."""
_FIXED = ("device", "threads", "evaluators", "audit", "metrics", "log")

_Source = tuple[str, tuple[str, ...] | None, str]
"""A bundle as it was loaded: folder, layers, and digest of its manifest."""


class Signals:
    """What the operator asked for by signals. SIGTERM asks to stop, and SIGHUP to read the configuration again.

    A second SIGTERM, SIGINT, and the first SIGTERM before ``ready`` was called, end the process at once.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Literal["stop", "reload"]] = queue.SimpleQueue()
        self._stop_at_once = True
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: self._asked.put("reload"))

    def ready(self) -> None:
        """Take the next SIGTERM as a wish to finish what is under way."""
        self._stop_at_once = False

    def next(self, seconds: float) -> Literal["stop", "reload"] | None:
        """Wait for so long at most; what was asked for, or None."""
        try:
            return self._asked.get(timeout=seconds)
        except queue.Empty:
            return None

    def _stop(self, number: int, _: object) -> None:
        if self._stop_at_once or number == signal.SIGINT:
            os.write(2, b"stopped at once\n")
            os._exit(128 + number)
        self._stop_at_once = True
        self._asked.put("stop")


def serve_worker(config: WorkerConfig, ready: Callable[[str], object], reread: Callable[[], WorkerConfig]) -> None:
    """Serve until SIGTERM. To be called on the main thread.

    Args:
        config: what to serve.
        ready: called with each address that requests are taken at.
        reread: reads the configuration again, at SIGHUP; its errors are logged, and change nothing.

    Raises:
        CipherTuneError: it cannot be served.
    """
    signals = Signals()
    serving = _Serving(config)
    try:
        serving.start()
        signals.ready()
        for address in serving.addresses:
            ready(address)
        serving.run(signals, reread)
        serving.drain()
    finally:
        serving.close()


class _Serving:
    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._device = _device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        for bundle in config.bundles:
            read_blocks(Path(bundle))
        size = config.quotas.message_mb << 20
        self._entrance = Entrance(Limits(buffer_bytes=size, total_bytes=size))
        self._listeners: dict[int, tuple[BindSection, Listener]] = {}
        self._stores: dict[_Source, WeightStore] = {}
        self._service: Service | None = None
        self._monitor: Monitor | None = None
        self._audit: AuditLog | None = None

    @property
    def addresses(self) -> list[str]:
        return [listener.address for _, listener in self._listeners.values()]

    def start(self) -> None:
        """Take requests. Keys, addresses and ports are looked at first: weights take minutes to read."""
        config = self.config
        offered = _offered(config)
        if config.metrics.port is not None:
            self._monitor = Monitor(config.metrics.host, config.metrics.port)
            address = f"http://{config.metrics.host}:{self._monitor.port}"
            _say("metrics", address=f"{address}/metrics", live=f"{address}/live", ready=f"{address}/ready")
        if config.audit is not None:
            self._audit = AuditLog(Path(config.audit))
        self._listen(config.bind)
        self._stores = self._load(config)
        worker = Worker(next(iter(self._stores.values())), self._device, _limits(config), backends=offered)
        worker.held.replace(_named(self._stores))
        self._service = Service(worker, _quota(config), self._entrance.limits, config.evaluators)
        self._entrance.open(self._service)
        if self._monitor is not None:
            self._monitor.open(self._service)
        _say("ready", addresses=" ".join(self.addresses))
        notify("READY=1", f"STATUS=serving at {' '.join(self.addresses)}")

    def run(self, signals: Signals, reread: Callable[[], WorkerConfig]) -> None:
        """Serve until SIGTERM."""
        seconds = watchdog_seconds()
        if seconds is not None:
            # On a thread of its own: a bundle that is read takes this one minutes.
            watch = threading.Thread(target=self._watch, args=(seconds,), name="ciphertune-watchdog", daemon=True)
            watch.start()
        while (asked := signals.next(_AUDIT_SECONDS)) != "stop":
            self._record()
            if asked == "reload":
                notify_reloading()
                self._reload(reread)
                notify("READY=1", f"STATUS=serving at {' '.join(self.addresses)}")

    def drain(self) -> None:
        """Finish what is under way, within the time for it."""
        assert self._service is not None
        _say("draining", seconds=self.config.drain)
        notify("STOPPING=1")
        clean = self._service.drain(self.config.drain, self._tell)
        _say("stopped", requests=sum(self._service.counters.requests.values()), drained=clean)

    def close(self) -> None:
        """End everything; the process itself where a product does not end."""
        ended = True
        with contextlib.ExitStack() as stack:
            if self._monitor is not None:
                stack.callback(self._monitor.close)
            end = time.monotonic() + _LINGER_SECONDS
            for _, listener in self._listeners.values():
                listener.close(linger=max(0.0, end - time.monotonic()))
            self._listeners.clear()
            if self._service is not None:
                ended = self._service.close(_END_SECONDS)
                self._service.worker.opened.stop()
                self._record()
            if self._audit is not None:
                self._audit.close()
        if not ended:
            log.warning("products under way did not end in time: the process ends without them")
            logging.shutdown()
            os._exit(0)

    def _watch(self, seconds: float) -> None:
        """Tell systemd that the worker is alive, until it is not."""
        while self._service is not None and self._service.alive:
            notify("WATCHDOG=1")
            time.sleep(seconds)

    def _tell(self, waiting: Waiting) -> None:
        self._record()
        fields = {**waiting._asdict(), "seconds": round(waiting.seconds, 1)}
        _say("waiting", **fields)
        told = f"{waiting.evaluated} evaluated, {waiting.queued} queued, {waiting.replies} replies not taken"
        notify(f"STATUS=stopping: {told}")

    def _record(self) -> None:
        if self._service is not None:
            records = self._service.worker.opened.take_records()
            if self._audit is not None:
                self._audit.write(records)

    def _listen(self, binds: Sequence[BindSection]) -> None:
        """Serve at these addresses, and at no others; those that stay the same are left alone."""
        kept = {key: each for key, each in self._listeners.items() if each[0] in binds}
        new: dict[int, tuple[BindSection, Listener]] = {}
        try:
            for bind in binds:
                if all(bind != known for known, _ in (*kept.values(), *new.values())):
                    transport: Any = registry.load(registry.TRANSPORTS, bind.transport)
                    with blamed(registry.TRANSPORTS, bind.transport, "'serve'", quote=True):
                        listener = transport.listen(self._entrance, bind.address, bind.listen_options)
                    new[id(listener)] = bind, listener
        except BaseException:
            for _, listener in new.values():
                listener.close()
            raise
        gone = [listener for key, (_, listener) in self._listeners.items() if key not in kept]
        self._listeners = {**kept, **new}
        for listener in gone:
            listener.close(linger=_LINGER_SECONDS)

    def _load(self, config: WorkerConfig) -> dict[_Source, WeightStore]:
        """The weights of all bundles; those that are loaded already stay as they are."""
        stores: dict[_Source, WeightStore] = {}
        for bundle in config.bundles:
            source = _source(bundle, config.layers)
            if source not in stores:
                stores[source] = self._stores.get(source) or self._read(bundle, config)
        return stores

    def _read(self, bundle: str, config: WorkerConfig) -> WeightStore:
        store = load_worker(bundle, device=self._device, layers=config.layers, verify=config.verify)
        size = round(store.nbytes / 1e6, 1)
        _say("weights loaded", bundle=bundle, layers=len(store), megabytes=size, verified=config.verify)
        return store

    def _reload(self, reread: Callable[[], WorkerConfig]) -> None:
        assert self._service is not None
        worker = self._service.worker
        try:
            config = reread()
            offered = _offered(config)
            stores = self._load(config)
            self._listen(config.bind)
        except CipherTuneError as error:
            log.error("the configuration cannot be used, and nothing has changed: %s", error)
            return
        later = [name for name in _FIXED if getattr(config, name) != getattr(self.config, name)]
        if config.quotas.message_mb != self.config.quotas.message_mb:
            later.append("quotas.message_mb")
        if later:
            log.warning("takes effect at the next start: %s", ", ".join(later))
        self._stores = stores
        worker.held.replace(_named(stores))
        worker.offer(offered)
        worker.opened.limits = _limits(config)
        self._service.quota = _quota(config)
        self.config = dataclasses.replace(config, **{name: getattr(self.config, name) for name in _FIXED})
        sessions = self._service.load.sessions
        _say("configuration read", bundles=len(stores), addresses=" ".join(self.addresses), sessions=sessions)


def _device(name: str) -> torch.device:
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {name!r} cannot be used: {error}") from error
    return place


def _offered(config: WorkerConfig) -> tuple[str, ...] | None:
    for name in config.offered or ():
        registry.load(registry.BACKENDS, name)
    return config.offered


def _limits(config: WorkerConfig) -> SessionLimits:
    quotas, keys = config.quotas, config.quotas.key_mb << 20
    all_keys = 8 * keys if quotas.all_key_mb is None else quotas.all_key_mb << 20
    return SessionLimits(quotas.sessions, quotas.all_sessions, quotas.idle, keys, all_keys, quotas.readings)


def _quota(config: WorkerConfig) -> Quota:
    return Quota(config.quotas.requests, config.quotas.client_mb << 20)


def _source(bundle: str, layers: tuple[str, ...] | None) -> _Source:
    try:
        digest = (Path(bundle) / WORKER_MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{Path(bundle) / WORKER_MANIFEST} cannot be read: {error}") from None
    return bundle, layers, digest


def _named(stores: dict[_Source, WeightStore]) -> dict[str, WeightStore]:
    """Weights by names for the records: those of the bundles' folders, or their paths where two have one name."""
    paths = [Path(bundle).resolve() for bundle, _, _ in stores]
    short = [path.parent.name if path.name == "worker" else path.name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return dict(zip(names, stores.values(), strict=True))


def _say(message: str, **fields: object) -> None:
    log.info(message, extra={"fields": fields})
