"""A client's session: encrypts, sends, decrypts, and counts what crossed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ciphertune import registry, turns
from ciphertune.backend import Backend, Buffers, Direction, LinearMap, SecurityStatement
from ciphertune.errors import InputError, ReplyError, SecurityError, SelectionError, UnsupportedLayerError
from ciphertune.fleet import Call, Fleet, Newcomers, Patience
from ciphertune.placement import Piece
from ciphertune.plugins import PluginManager, plugin_manager
from ciphertune.protocol import Message
from ciphertune.selection import Selection, build_options, split_options
from ciphertune.transport import Handler, Link, Transport
from ciphertune.weights import LayerInfo, group_map


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """Options that every selection string takes.

    Attributes:
        allow_insecure: let a backend that does not encrypt send data out of this process.
        share_inputs: evaluate layers that read the same input (q/k/v, gate/up) as one product.
        timeout, deadline, hedge, connect_timeout: seconds; see ``ciphertune.fleet.Patience``.
    """

    allow_insecure: bool = False
    share_inputs: bool = True
    timeout: float = Patience.timeout
    deadline: float = Patience.deadline
    hedge: float = Patience.hedge
    connect_timeout: float = Patience.connect_timeout

    def __post_init__(self) -> None:
        for name, least in (("timeout", 0.001), ("deadline", 0.001), ("hedge", 0.0), ("connect_timeout", 0.001)):
            if not least <= getattr(self, name) < math.inf:
                raise SelectionError(f"option {name}={getattr(self, name)} must be a number of seconds above 0")

    @property
    def patience(self) -> Patience:
        """The times alone."""
        return Patience(self.timeout, self.deadline, self.hedge, self.connect_timeout)


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
        selection.options, SessionOptions, backend_class.options_class(selection.options), transport_class.Options
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
        requests: messages it took: one for every part of the layers that another worker holds.
        retries: messages sent again, because a worker failed or was late.
        bytes_up, bytes_down: buffer bytes sent and received, without those of retries.
        encrypt_seconds, wait_seconds, evaluate_seconds, decrypt_seconds: time by phase; waiting covers the
            transport and the worker, and evaluation is what the worker reports of it.
        turn_seconds: time in which other tasks computed while this product was under way (``ciphertune.interleave``);
            no part of ``wait_seconds``, which is time in which nothing was computed here.
    """

    layers: tuple[str, ...]
    direction: Direction
    tokens: int
    requests: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    decrypt_seconds: float = 0.0
    turn_seconds: float = 0.0


@dataclasses.dataclass
class Traffic:
    """Totals over the products of a session; fields as in ``Exchange``."""

    requests: int = 0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    decrypt_seconds: float = 0.0
    turn_seconds: float = 0.0

    def add(self, exchange: Exchange) -> None:
        """Count one exchange."""
        for field in dataclasses.fields(self):
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
            for linear_map in maps.values():
                if (why := choice.backend.refuse(linear_map)) is not None:
                    raise UnsupportedLayerError(f"{linear_map.label}: {choice.selection.backend} refuses it: {why}")
            choice.backend.refuse_imprecise(maps["forward"])
        self._client = choice.backend.client(device)
        self._counting = threading.Lock()
        self.closed = False
        links: Sequence[Link] = ()
        try:
            links = choice.transport.connect(choice.selection.endpoints, worker)
            opening = Message(
                "open",
                {"backend": choice.selection.backend, "public": dict(self._client.open_fields())},
                self._client.evaluation_key(),
            )
            self._fleet = Fleet(
                links, self._members, opening, choice.options.patience, self._watch_key, self._newcomers()
            )
        except BaseException:
            with contextlib.ExitStack() as stack:
                stack.callback(self._client.close)
                for link in links:
                    stack.callback(link.close)
            raise
        try:
            self.plugins.observe("ciphertune_session_opened", session=self)
        except BaseException:  # Ctrl-C, or warnings that are errors
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Session({str(self.choice.selection)!r}, {len(self.layers)} layers)"

    @property
    def security(self) -> SecurityStatement:
        """The backend's security statement."""
        return self.choice.backend.security

    def _newcomers(self) -> Newcomers | None:
        transport, endpoints = self.choice.transport, self.choice.selection.endpoints
        if not transport.elastic:
            return None
        return lambda links: transport.newcomers(endpoints, links)

    def _watch_key(self, worker: str, nbytes: int, done: bool) -> None:
        self.plugins.observe("ciphertune_sending_key", worker=worker, nbytes=nbytes, done=done)

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
        self.plugins.gate("ciphertune_before_request", session=self, exchange=exchange)
        pieces = self._fleet.pieces(unit)
        if direction == "forward":
            y = self._forward(pieces, x, linear_map, exchange)
        else:
            y = self._backward(pieces, x, exchange)
        with self._counting:
            self.traffic.add(exchange)
        self.plugins.observe("ciphertune_after_reply", session=self, exchange=exchange)
        return y

    def close(self) -> None:
        """Close the session at the workers, forget the keys and drop the links. Idempotent."""
        with self._counting:
            if self.closed:
                return
            self.closed = True
        try:
            self._fleet.close()
        finally:
            self._client.close()
            self.plugins.observe("ciphertune_session_closed", session=self)

    def _forward(self, pieces: Sequence[Piece], x: Tensor, whole: LinearMap, exchange: Exchange) -> Tensor:
        """One ciphertext for all pieces, their outputs side by side."""
        start = time.perf_counter()
        encrypted = self._client.encrypt(x, whole)
        exchange.encrypt_seconds += time.perf_counter() - start
        with contextlib.ExitStack() as stack:
            calls = [self._start(piece, "forward", encrypted.buffers, exchange, stack) for piece in pieces]
            if len(pieces) == 1 and pieces[0].whole:
                return self._finish(calls[0], encrypted.state, pieces[0].forward, len(x), exchange)
            # Feature-major, as products come.
            y = torch.empty(whole.out_features, len(x), dtype=torch.float32, device=self.device)
            for piece, call in zip(pieces, calls, strict=True):
                part = self._finish(call, encrypted.state, piece.forward, len(x), exchange).t()
                row = 0
                for segment in piece.segments:
                    rows = segment.stop - segment.start
                    y[segment.row : segment.row + rows] = part[row : row + rows]
                    row += rows
            return y.t()

    def _backward(self, pieces: Sequence[Piece], g: Tensor, exchange: Exchange) -> Tensor:
        """A ciphertext for each piece's columns of g, their products summed."""
        with contextlib.ExitStack() as stack:
            calls = []
            for piece in pieces:
                start = time.perf_counter()
                part = g
                if not piece.whole:
                    part = torch.cat([g[:, s.row : s.row + s.stop - s.start] for s in piece.segments], dim=1)
                encrypted = self._client.encrypt(part, piece.backward)
                exchange.encrypt_seconds += time.perf_counter() - start
                call = self._start(piece, "backward", encrypted.buffers, exchange, stack)
                calls.append((call, encrypted.state, piece))
            parts = (self._finish(call, state, piece.backward, len(g), exchange) for call, state, piece in calls)
            total = next(parts)
            for part in parts:
                total = total + part
            return total

    def _start(
        self, piece: Piece, direction: Direction, buffers: Buffers, exchange: Exchange, stack: contextlib.ExitStack
    ) -> Call:
        start = time.perf_counter()
        linear_map = piece.forward if direction == "forward" else piece.backward
        allowance = self.choice.backend.allowance(linear_map, exchange.tokens)
        call = self._fleet.start(piece, {"direction": direction}, buffers, allowance)
        stack.callback(call.forget)
        exchange.wait_seconds += time.perf_counter() - start
        exchange.requests += 1
        exchange.bytes_up += sum(t.nbytes for t in buffers.values())
        return call

    def _finish(self, call: Call, state: Any, linear_map: LinearMap, tokens: int, exchange: Exchange) -> Tensor:
        clock = time.perf_counter
        start = clock()
        reply, elsewhere = turns.waiting(call.result)
        answered = clock()
        exchange.retries += call.attempts - 1
        exchange.bytes_down += reply.nbytes
        exchange.turn_seconds += elsewhere
        exchange.wait_seconds += answered - start - elsewhere
        exchange.evaluate_seconds += _seconds(reply)
        y = self._client.decrypt(reply.buffers, state, linear_map)
        if y.shape != (tokens, linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: the reply decrypts to the wrong shape {tuple(y.shape)}")
        exchange.decrypt_seconds += clock() - answered
        return y


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
