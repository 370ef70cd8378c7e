"""A client's session: encrypts, sends, decrypts, and counts what crossed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune import registry
from ciphertune.backend import Backend, Direction, LinearMap, SecurityStatement
from ciphertune.errors import InputError, ReplyError, SecurityError, WorkerError
from ciphertune.plugins import PluginManager, plugin_manager
from ciphertune.protocol import Message
from ciphertune.selection import Selection, build_options, split_options
from ciphertune.transport import Handler, Transport
from ciphertune.weights import LayerInfo, group_map


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """Options that every selection string takes.

    Attributes:
        allow_insecure: let a backend that does not encrypt send data out of this process.
        share_inputs: evaluate layers that read the same input (q/k/v, gate/up) as one product.
    """

    allow_insecure: bool = False
    share_inputs: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection string with its plugins found and its options read."""

    selection: Selection
    backend: Backend
    transport: Transport
    options: SessionOptions


def choose(to: str) -> Choice:
    """Find the plugins a selection string names and read its options.

    Raises:
        SelectionError: a malformed string, an unknown name or option, or an endpoint where none is taken.
        PluginError: a named plugin is installed but cannot be imported.
        SecurityError: data would leave this process unencrypted and ``allow_insecure`` is not set.
    """
    selection = Selection.parse(to)
    backend_class = registry.load(registry.BACKENDS, selection.backend)
    transport_class = registry.load(registry.TRANSPORTS, selection.transport)
    common, of_backend, of_transport = split_options(
        selection.options, SessionOptions, backend_class.Options, transport_class.Options
    )
    options = build_options(SessionOptions, common)
    backend = backend_class.from_text(of_backend)
    transport = transport_class(build_options(transport_class.Options, of_transport))
    if transport.remote and not backend.security.encrypted and not options.allow_insecure:
        raise SecurityError(
            f"{selection.backend!r} does not encrypt, and {selection.transport!r} sends data to other processes; "
            "choose a backend that encrypts, or say allow_insecure=1 to send it in the clear"
        )
    return Choice(selection, backend, transport, options)


@dataclasses.dataclass
class Exchange:
    """One product: what it was, and once answered, what it cost.

    Attributes:
        layers: names of the layers it serves.
        direction: forward or backward.
        tokens: rows of the input.
        bytes_up, bytes_down: buffer bytes sent and received.
        encrypt_seconds, wait_seconds, evaluate_seconds, decrypt_seconds: time by phase; waiting covers the
            transport and the worker, and evaluation is the part of it that the worker reports.
    """

    layers: tuple[str, ...]
    direction: Direction
    tokens: int
    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    decrypt_seconds: float = 0.0


@dataclasses.dataclass
class Traffic:
    """Totals over the products of a session; fields as in ``Exchange``."""

    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    decrypt_seconds: float = 0.0

    def add(self, exchange: Exchange) -> None:
        """Count one exchange."""
        self.requests += 1
        for field in dataclasses.fields(self):
            if field.name != "requests":
                setattr(self, field.name, getattr(self, field.name) + getattr(exchange, field.name))

    def since(self, earlier: Traffic) -> Traffic:
        """The difference to an earlier copy."""
        return Traffic(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in dataclasses.fields(Traffic)}
        )


class Session:
    """An open session with the workers of one model.

    Args:
        choice: what ``choose`` made of the selection string.
        layers: the outsourced layers.
        groups: layers evaluated together, as indices into ``layers``; each group is one unit at the worker.
        worker: the embedded worker, for a transport that stays in this process.
        device: where the client encrypts and decrypts.
        plugins: hook plugins; those of the process unless given.

    Attributes:
        traffic: totals since the session opened.
        worker: the embedded worker, None where the workers are remote.
    """

    def __init__(
        self,
        choice: Choice,
        layers: Sequence[LayerInfo],
        groups: Sequence[tuple[int, ...]],
        worker: Handler | None,
        device: torch.device,
        plugins: PluginManager | None = None,
    ) -> None:
        self.choice = choice
        self.layers = tuple(layers)
        self.worker = worker
        self.device = device
        self.traffic = Traffic()
        self.plugins = plugins if plugins is not None else plugin_manager()
        self._members = [tuple(self.layers[i] for i in group) for group in groups]
        self._maps: list[dict[Direction, LinearMap]] = [
            {"forward": group_map(members, "forward"), "backward": group_map(members, "backward")}
            for members in self._members
        ]
        for maps in self._maps:
            choice.backend.refuse_imprecise(maps["forward"])
        self._client = choice.backend.client(device)
        self._counting = threading.Lock()
        self.closed = False
        self._link = choice.transport.connect(choice.selection.endpoints, worker)
        try:
            self._id = self._open()
        except BaseException:
            self._client.close()
            self._link.close()
            raise
        self.plugins.observe("ciphertune_session_opened", session=self)

    def __repr__(self) -> str:
        return f"Session({str(self.choice.selection)!r}, {len(self.layers)} layers)"

    @property
    def security(self) -> SecurityStatement:
        """The backend's security statement."""
        return self.choice.backend.security

    def members(self, unit: int) -> tuple[LayerInfo, ...]:
        """The layers of one unit."""
        return self._members[unit]

    def product(self, unit: int, direction: Direction, x: Tensor) -> Tensor:
        """One outsourced product.

        Args:
            unit: index into the groups the session was opened with.
            direction: forward ``x Wᵀ`` or backward ``g W``, W being the unit's stacked integer codes.
            x: (tokens, features), float32.

        Returns:
            (tokens, features of the other side), float32, of any strides, not yet scaled per channel.

        Raises:
            PrecisionError: the backend cannot evaluate this map well enough. Nothing was sent.
            InputError: x is empty, of the wrong shape, or not finite. Nothing was sent.
            VetoError: a plugin refused the request. Nothing was sent.
            TransportError, WorkerError, ReplyError: the product could not be had.
        """
        linear_map = self._maps[unit][direction]
        _check_input(x, linear_map)
        if self.closed:
            raise SecurityError(f"the session is closed; {linear_map.label} cannot be evaluated any more")
        self.choice.backend.refuse_imprecise(linear_map)
        exchange = Exchange(tuple(layer.name for layer in self._members[unit]), direction, len(x))
        self.plugins.gate("ciphertune_before_request", exchange=exchange)
        clock = time.perf_counter
        start = clock()
        encrypted = self._client.encrypt(x, linear_map)
        encoded = clock()
        request = Message("evaluate", {"session": self._id, "unit": unit, "direction": direction}, encrypted.buffers)
        exchange.bytes_up = request.nbytes
        reply = self._ask(request)
        answered = clock()
        exchange.bytes_down = reply.nbytes
        y = self._client.decrypt(reply.buffers, encrypted.state, linear_map)
        if y.shape != (len(x), linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: the reply decrypts to the wrong shape {tuple(y.shape)}")
        exchange.encrypt_seconds = encoded - start
        exchange.wait_seconds = answered - encoded
        exchange.evaluate_seconds = _seconds(reply)
        exchange.decrypt_seconds = clock() - answered
        with self._counting:
            self.traffic.add(exchange)
        self.plugins.observe("ciphertune_after_reply", exchange=exchange)
        return y

    def close(self) -> None:
        """Close the session at the worker, forget the keys and drop the link. Idempotent."""
        if self.closed:
            return
        self.closed = True
        try:
            self._ask(Message("close", {"session": self._id}))
        finally:
            self._client.close()
            self._link.close()
            self.plugins.observe("ciphertune_session_closed", session=self)

    def _open(self) -> Any:
        fields = {
            "backend": self.choice.selection.backend,
            "public": dict(self._client.open_fields()),
            "groups": [[layer.name for layer in members] for members in self._members],
        }
        return self._ask(Message("open", fields, self._client.evaluation_key())).fields.get("session")

    def _ask(self, request: Message) -> Message:
        reply = self._link.submit(request).result()
        if reply.kind == "error":
            code, text = reply.fields.get("code"), reply.fields.get("message")
            raise WorkerError(f"the worker refused a request of kind {request.kind!r}: {text}", str(code))
        if reply.kind != "ok":
            raise ReplyError(f"the worker answered a {request.kind!r} request with {reply.kind!r}")
        return reply


def _seconds(reply: Message) -> float:
    value: Any = reply.fields.get("seconds", 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _check_input(x: Tensor, linear_map: LinearMap) -> None:
    if x.dim() != 2 or x.shape[1] != linear_map.in_features:
        raise InputError(f"{linear_map.label}: expected (tokens, {linear_map.in_features}), got shape {tuple(x.shape)}")
    if len(x) == 0:
        raise InputError(f"{linear_map.label}: the input has no tokens")
    # A sum is one cheap pass; only if it is not finite is it worth looking at every value.
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(
            f"{linear_map.label}: {bad} of {x.numel()} values are NaN or infinite; nothing was sent. "
            "Lower the learning rate, clip gradients, or look at the batch that gave them"
        )
