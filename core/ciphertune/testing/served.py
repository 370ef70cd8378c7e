"""A worker on threads of the test's process, served over any transport that can serve."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, urlencode

from torch import nn

from ciphertune.backend import WeightBits
from ciphertune.bundle.worker import load_worker
from ciphertune.outsourcing.convert import quantize_all
from ciphertune.outsourcing.layers import choose_layers, sibling_groups
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.protocol import DEFAULT_LIMITS, Limits
from ciphertune.transport import Listener, Transport
from ciphertune.worker import Service, WeightStore, Worker


class ServedWorker:
    """A worker that serves a model's linear layers until it is closed; also a context manager.

    Args:
        model: a module, all of whose linear layers are served, or the worker's folder of a bundle.
        transport: name of an installed transport that can serve.
        folder: where keys and certificates may be made.
        options: of the transport in the client's selection string, as they stand in it.
        weight_bits: 8 or 16 bits, or None for float32; what the client's backend expects. For a module.
        limits: on messages.
        address: where to serve; that of the transport's ``loopback`` if empty.

    Attributes:
        address: in a selection string; the same after a restart.
        service: answers the requests.

    Raises:
        SelectionError: the transport cannot serve.
    """

    def __init__(
        self,
        model: nn.Module | Path,
        transport: str,
        folder: Path,
        *,
        options: str = "",
        weight_bits: WeightBits | None = 8,
        limits: Limits = DEFAULT_LIMITS,
        address: str = "",
    ) -> None:
        self._held = load_worker(model) if isinstance(model, Path) else _all_layers(model, weight_bits)
        self._limits = limits
        self._transport: type[Transport] = registry.load(registry.TRANSPORTS, transport)
        self._name = transport
        given = dict(parse_qsl(options))
        here = self._transport.loopback(folder, given)
        self._serve = here.serve
        self._connect = {**given, **here.connect}
        self.address = address or here.address
        self._listener: Listener | None = None
        self.start()

    def selection(self, backend: str = "mlwe", **options: object) -> str:
        """A selection string for this worker: a backend over its transport, with these options."""
        query = urlencode({**self._connect, **{name: str(value) for name, value in options.items()}})
        return f"{backend}+{self._name}://{self.address}" + (f"?{query}" if query else "")

    def start(self) -> None:
        """Serve, with no session open. Idempotent."""
        if self._listener is None:
            self.service = Service(Worker(self._held), limits=self._limits)
            try:
                self._listener = self._transport.listen(self.service, self.address, self._serve)
            except BaseException:
                self.service.close()
                raise
            self.address = self._listener.address

    def stop(self) -> None:
        """Stop serving, as a machine that is switched off; after ``start`` the sessions are gone."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            self.service.close()

    close = stop

    def __enter__(self) -> ServedWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _all_layers(model: nn.Module, bits: WeightBits | None) -> WeightStore:
    chosen = choose_layers(model, "all", PluginManager())
    groups = sibling_groups(chosen, [candidate.weight().shape[1] for candidate in chosen])
    return quantize_all(chosen, groups, bits, keep=True)[1]
