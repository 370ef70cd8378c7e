"""A client's session with the workers of one model: open it, ask it for products, close it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ciphertune._support.denormals import flushing
from ciphertune._support.finite import all_finite
from ciphertune._support.own_modes import own_modes
from ciphertune.backend import DIRECTIONS, ClientHalf, Direction, LinearMap, SecurityStatement
from ciphertune.callers import Owners, owners_of
from ciphertune.client.choice import Choice
from ciphertune.client.clear import ClearProducts, stand_ins
from ciphertune.client.connecting import connect
from ciphertune.client.connection import Opening
from ciphertune.client.noise_checks import NoiseChecks, checkable, decrypts_pieces
from ciphertune.client.placement import Piece
from ciphertune.client.pool import JoiningWorkers, WorkerPool
from ciphertune.client.preparing import Preparer, prepare
from ciphertune.client.product import Keys, Product, Rejected
from ciphertune.client.reading import WorkerCodes
from ciphertune.client.request import KeysReplaced
from ciphertune.errors import (
    InputError,
    NotPreparedError,
    SecurityError,
    UnsupportedLayerError,
    WeightsError,
    WrongReplyError,
)
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed, wrong_result
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.protocol import buffers_fault
from ciphertune.selection import Selection
from ciphertune.traffic import Exchange, SetUp, Traffic
from ciphertune.transport import Link, LocalWorker
from ciphertune.weights import CodeSource, LayerInfo, group_map, lookup_map, model_digest

log = logging.getLogger(__name__)

_FRUITLESS = 100
"""Times in a row that a product finds too little prepared, though the client half wants to prepare nothing more."""

Checked = Literal["before decryption", "after decryption", "no"]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Layers that are evaluated as one product, and the maps of both directions.

    Attributes:
        layers: the layers.
        maps: of both directions; of a table backward alone, for lookups.
        parent: the group that a layer alone belongs to, and the layer's first row in it; None for any other group.
        names: of the layers.
        precise: directions that the backend was asked about and does not refuse as imprecise.
    """

    layers: tuple[LayerInfo, ...]
    maps: dict[Direction, LinearMap]
    parent: tuple[int, int] | None = None
    precise: set[Direction] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


class Session:
    """An open session with the workers of one model.

    Args:
        choice: what ``choose`` made of the selection string.
        layers: the outsourced layers.
        groups: layers evaluated together, as indices into ``layers``.
        worker: the embedded worker, for a transport that stays in this process.
        device: where the client encrypts and decrypts.
        plugins: hook plugins; those of the process unless given.
        codes: where the layers' codes can be read, for an encryption that prepares itself from them; the workers if
            not given, and later on, unless the codes are lasting.
        tables: layers whose rows are looked up, as indices into ``layers``: groups of their own after the others, for
            backward products of inputs that name one row each.

    Attributes:
        traffic: totals since the session opened.
        set_up: costs of preparations from the weights' codes.
        pool: the workers.
        worker: the embedded worker, None where the workers are remote.
        closed: whether it was closed.

    Raises:
        UnsupportedLayerError, PrecisionError: the backend refuses a layer. Nothing was sent.
        SecurityError, TransportError, UnknownLayerError, WorkerError, ReplyError: as ``WorkerPool``.
        WeightsError: the encryption prepares itself from the codes, and they cannot be had.
        CacheError: there is no room for what it prepares.
        PluginError: the backend or the transport raised what it does not declare, or gave something of another form.
    """

    @own_modes()
    def __init__(
        self,
        choice: Choice,
        layers: Sequence[LayerInfo],
        groups: Sequence[tuple[int, ...]],
        worker: LocalWorker | None,
        device: torch.device,
        plugins: PluginManager | None = None,
        codes: CodeSource | None = None,
        tables: Sequence[int] = (),
    ) -> None:
        self.choice = choice
        self.layers = tuple(layers)
        self.worker = worker
        self.device = device
        self.traffic = Traffic()
        self.set_up = SetUp()
        self.closed = False
        self._apart = False
        self._clear: ClearProducts | None = None
        self._process = os.getpid()
        self.plugins = plugins if plugins is not None else plugin_manager()
        self._above: dict[int, tuple[int, int]] | None = None
        self._groups = [self._group(groups, number) for number in range(len(groups))]
        self._groups += [self._table(self.layers[i]) for i in tables]
        self._tell_advice()
        client = self._client()
        self._checks = self._checking(client)
        self._counting = threading.Lock()
        links: Sequence[Link] = ()
        try:
            model = model_digest(self.layers)
            with blamed(registry.BACKENDS, choice.selection.backend, "'begin'"):
                client.begin(model, choice.transport.remote)
            links = connect(choice, worker)
            self._keys = self._keys_of(client)
            members = [group.layers for group in self._groups]
            seconds = choice.transport.joining_seconds
            self.pool = WorkerPool(
                links,
                members,
                self._keys.opening,
                choice.options,
                self._joining(),
                seconds,
                remote=choice.transport.remote,
                model=model.hex(),
                excluded=self._watch_exclusions,
                silence=self._watch_silence,
            )
        except BaseException:
            with contextlib.ExitStack() as stack:
                stack.callback(client.close)
                for link in links:
                    stack.callback(link.close)
            raise
        self._codes = codes if codes is not None and codes.lasting else None
        self._retired: list[ClientHalf[Any]] = []
        self._renewing = threading.Lock()
        self._covering = threading.Lock()
        self._covered: dict[int, tuple[Piece, ...]] = {}
        # Of the pieces of a product, as ``_cut`` gives them.
        self._maps: dict[tuple[int, Direction], tuple[tuple[Piece, ...], list[LinearMap]]] = {}
        try:
            self._prepare(list(range(len(self._groups))), codes)
            self.plugins.observe("ciphertune_session_opened", session=self)
        except BaseException:  # Ctrl-C, or warnings that are errors
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Session({str(self.selection)!r}, {len(self.layers)} layers)"

    @property
    def selection(self) -> Selection:
        """The selection string that the session was opened with."""
        return self.choice.selection

    @property
    def security(self) -> SecurityStatement:
        """The backend's security statement."""
        return self.choice.backend.security

    @property
    def checked(self) -> Checked:
        """When answers are held against what was asked for: before decryption, after decryption, or no.

        ``after decryption`` tells what lies beyond the backend's declared error, and means new keys after each failure.
        """
        if self.choice.backend.checks_answers:
            return "before decryption"
        return "no" if self._checks is None else "after decryption"

    def members(self, group: int) -> tuple[LayerInfo, ...]:
        """The layers of one group."""
        return self._groups[group].layers

    @own_modes()
    def product(
        self, group: int, direction: Direction, x: Tensor, owners: Owners | None = None, *, finite: bool = False
    ) -> Tensor:
        """Evaluate one product at the workers.

        Args:
            group: index into the groups the session was opened with.
            direction: forward ``x Wᵀ`` or backward ``g W``, W being the group's stacked integer codes.
            x: (tokens, features), float32.
            owners: callers and their numbers of tokens, in order, for a session that keeps callers apart; of all
                tokens the caller that ``batch_of`` names if not given.
            finite: whether the caller has seen that x is finite; it is not looked through again then.

        Returns:
            (tokens, features of the other side), float32, of any strides, not yet scaled per channel.

        Raises:
            PrecisionError: the backend cannot evaluate this map well enough. Nothing was sent.
            InputError: x is empty, of the wrong shape, or not finite. Nothing was sent.
            SecurityError: the session is closed, or of another process, or keeps callers apart and was not told whose
                the tokens are. Nothing was sent.
            VetoError: a plugin refused the request. Nothing was sent.
            TransportError, WorkerError, ReplyError: the product could not be had.
            WrongReplyError: no worker is left that answers rightly.
            WeightsError: the encryption has to prepare itself again, and codes cannot be had.
            PluginError: the backend or the transport failed in a way that no other attempt would mend.
        """
        linear_map = self._groups[group].maps[direction]
        # Before anything is computed: a forked process can hang in that, and has this one's keys and connections.
        if os.getpid() != self._process:
            raise SecurityError(
                f"the session was opened in another process, of which this is a fork; {linear_map.label} cannot be "
                "evaluated here. Start processes by 'spawn', and outsource or load the model in each"
            )
        larger = max(linear_map.in_features, linear_map.out_features)
        with flushing(x.numel() * larger // linear_map.in_features):
            return self._product(group, direction, x, owners, finite)

    def _product(self, group: int, direction: Direction, x: Tensor, owners: Owners | None, finite: bool) -> Tensor:
        linear_map = self._groups[group].maps[direction]
        _check_input(x, linear_map, finite)
        if self.closed:
            raise SecurityError(f"the session is closed; {linear_map.label} cannot be evaluated any more")
        if (here := stand_ins() or self._clear) is not None:
            with flushing():
                return here.product(self.members(group), direction, x)
        if self._apart:
            owners = self._owners(linear_map, x, owners)
        self._refuse_imprecise(self._groups[group], direction)
        exchange = Exchange(layers=self._groups[group].names, direction=direction, tokens=x.shape[0])
        self.plugins.gate("ciphertune_before_request", session=self, exchange=exchange)
        y = self._evaluate(group, direction, x, exchange, owners if self._apart else None)
        with self._counting:
            self.traffic.add(exchange)
        self.plugins.observe("ciphertune_after_reply", session=self, exchange=exchange)
        return y

    @contextlib.contextmanager
    def computing(self, products: ClearProducts) -> Iterator[None]:
        """Compute every product here and in the clear within a ``with`` block; see ``ciphertune.in_the_clear``."""
        before, self._clear = self._clear, products
        try:
            yield
        finally:
            self._clear = before

    @own_modes()
    def compute_ahead(self, group: int, direction: Direction, tokens: int) -> float:
        """Let the encryption compute what the next product needs whatever its data are.

        Args:
            group: index into the groups the session was opened with.
            direction: of the product.
            tokens: T.

        Returns:
            Seconds that it took; of what serves several products a share. 0 where nothing is computed ahead.

        Raises:
            SecurityError: the session is closed.
            PluginError: the client half raised what it does not declare.
        """
        if self.closed:
            raise SecurityError("the session is closed; nothing can be computed any more")
        parent, _ = self._evaluated_in(group)
        with blamed(registry.BACKENDS, self.choice.selection.backend, "computing ahead"), flushing():
            return self._keys.client.compute_ahead(self._groups[parent].maps[direction], tokens)

    @own_modes()
    def prepare(self) -> int:
        """Let the encryption make ahead of time what was used up of it, for all groups. May be called at any moment.

        Returns:
            How many of the weights' codes were read for that; 0 where nothing was missing.

        Raises:
            SecurityError: the session is closed.
            WeightsError, TransportError: the codes cannot be had now.
        """
        if self.closed:
            raise SecurityError("the session is closed; nothing can be prepared any more")
        with self._covering:
            return self._prepare(list(range(len(self._groups))), None)

    def keep_apart(self) -> None:
        """Keep callers apart from now on: no secret of the encryption masks tokens of two of them.

        Every product then needs to be told whose its tokens are, by ``ciphertune.callers.batch_of``.

        Raises:
            SecurityError: the backend has one secret for all.
        """
        if not self.choice.backend.separates_callers:
            raise SecurityError(
                f"{self.selection.backend} has one secret for all who use this session, so that a caller who works "
                "together with a worker could learn of the others: use mlwe, or a session for each caller"
            )
        self._apart = True

    @own_modes()
    def close(self) -> None:
        """Close the session at the workers, forget the keys and drop the links. Idempotent."""
        with self._counting:
            if self.closed:
                return
            self.closed = True
        try:
            self.pool.close()
        finally:
            for client in (*self._retired, self._keys.client):
                client.close()
            self.plugins.observe("ciphertune_session_closed", session=self)

    def _evaluate(
        self, number: int, direction: Direction, x: Tensor, exchange: Exchange, owners: Owners | None
    ) -> Tensor:
        """The product, encrypted anew as often as the session's keys had to be replaced meanwhile."""
        check = None if self._checks is None else functools.partial(self._right, number, direction)
        fruitless = 0
        while True:
            keys = self._keys
            product = Product(self.choice.backend, keys, self.pool, exchange, check)
            try:
                return product.evaluate(*self._cut(number, direction, x), owners)
            except KeysReplaced:
                continue
            except NotPreparedError:
                # What was prepared now may be used up by other threads' products before this one comes.
                fruitless = 0 if self._prepare_again(number) else fruitless + 1
                if fruitless >= _FRUITLESS:
                    raise
            except Rejected as rejected:
                # What was decrypted decides what is sent next: nothing more under this key.
                self._renew(keys)
                exchange.retries += 1
                if not self.pool.others(rejected.piece):
                    raise WrongReplyError(
                        f"{rejected.worker.name}: {' + '.join(rejected.piece.names)} ({direction}): the answer is not "
                        "the product that was asked for, and no other worker holds these rows. Nothing of it was used: "
                        "resume from the last checkpoint with a worker that computes rightly"
                    ) from None

    def _right(
        self,
        number: int,
        direction: Direction,
        piece: LinearMap,
        x: Tensor,
        y: Tensor,
        encrypted: LinearMap,
        whole_x: Tensor,
    ) -> bool:
        """Whether a decrypted piece of a group's product is right; its vectors are those of the group's parent."""
        assert self._checks is not None
        parent, offset = self._groups[number].parent or (number, 0)
        if self.choice.backend.whole_products:
            offset = 0  # ``_cut`` counted from the parent's top
        whole = self._groups[parent].maps[direction]
        return self._checks.right(whole, _moved(piece, offset), x, y, encrypted, whole_x)

    def _checking(self, client: ClientHalf[Any]) -> NoiseChecks | None:
        """Checks of decrypted answers, where a worker elsewhere gives them and nothing checks them before."""
        backend = self.choice.backend
        if backend.checks_answers or not self.choice.transport.remote:
            return None
        if not self.choice.options.check_answers:
            why = "check_answers=0"
        elif not all(checkable(backend, group.maps) for group in self._groups):
            why = f"{backend.name} states no bound of its errors"
        elif not decrypts_pieces(client, backend):
            why = f"{backend.name} does not decrypt the pieces of a product one by one"
        else:
            return NoiseChecks(backend, self.device)
        log.warning("answers of workers are not checked (%s): a wrong one is believed", why)
        return None

    def _keys_of(self, client: ClientHalf[Any]) -> Keys:
        name = self.choice.selection.backend
        with blamed(registry.BACKENDS, name, "making its public parameters and key"):
            fields, key = {"backend": name, "public": dict(client.open_fields())}, client.evaluation_key()
        if why := buffers_fault(key):
            raise wrong_result(registry.BACKENDS, name, "the evaluation key:", f"it {why}")
        return Keys(client, Opening(fields, key, self._watch_key))

    def _client(self, *, renewed: bool = False) -> ClientHalf[Any]:
        """A client half of the backend, with fresh keys or with keys that nothing was sent under."""
        backend = self.choice.backend
        with blamed(registry.BACKENDS, self.choice.selection.backend, "making its client half"):
            client: object = backend.renewed_client(self.device) if renewed else backend.client(self.device)
        if not isinstance(client, ClientHalf):
            why = f"gave a {type(client).__name__}, and must give a ciphertune.backend.ClientHalf"
            raise wrong_result(registry.BACKENDS, self.choice.selection.backend, "'client'", why)
        return client

    def _renew(self, keys: Keys) -> None:
        """Replace the session's keys, unless another thread did. What is under way ends under the old ones."""
        with self._renewing:
            if self._keys is not keys:
                return
            log.warning("a decrypted answer was wrong: the session goes on with new keys")
            client = self._client(renewed=True)
            client.begin(model_digest(self.layers), self.choice.transport.remote)
            if self.choice.backend.prepares:
                self._prepare(list(range(len(self._groups))), None, [client])
            self._retired.append(keys.client)
            self._keys = self._keys_of(client)
            self.pool.opening = self._keys.opening

    @staticmethod
    def _owners(linear_map: LinearMap, x: Tensor, owners: Owners | None) -> Owners:
        found = owners_of(x.shape) if owners is None else owners
        if found is None or sum(tokens for _, tokens in found) != len(x):
            raise SecurityError(
                f"{linear_map.label}: this session keeps callers apart, and nobody said whose these {len(x)} tokens "
                "are: call the model within ciphertune.callers.batch_of(…). Nothing was sent"
            )
        return found

    def _cut(
        self, number: int, direction: Direction, x: Tensor
    ) -> tuple[Sequence[Piece], Sequence[LinearMap], Tensor, LinearMap]:
        """How a product is evaluated: the pieces, their maps, what is sent, and the map that it is encrypted for.

        With ``Backend.whole_products`` a layer alone has nothing of its own: its product is some rows of its group's,
        and its gradient the group's with zeros for the siblings.
        """
        parent, offset = self._evaluated_in(number)
        whole = self._groups[parent].maps[direction]
        if parent != number and direction == "backward":
            columns = slice(offset, offset + x.shape[1])
            x, alone = x.new_zeros(len(x), whole.in_features), x
            x[:, columns] = alone
            number, offset = parent, 0
        pieces = self._prepared_pieces(number)
        known = self._maps.get((number, direction))
        if known is None or known[0] is not pieces:
            maps = [_moved(dataclasses.replace(piece.map(direction), peak=whole.peak), offset) for piece in pieces]
            known = self._maps[number, direction] = pieces, maps
        return pieces, known[1], x, whole

    def _prepared_pieces(self, number: int) -> tuple[Piece, ...]:
        """The pieces of a group's products, for which the client half is prepared."""
        pieces = self.pool.pieces(number)
        if self._preparers and pieces is not self._covered[number]:
            with self._covering:
                # A worker joined. Where rows are cut otherwise for it, codes are read once more.
                if [each.shards for each in pieces] != [each.shards for each in self._covered[number]]:
                    self._prepare([number], None)
                self._covered[number] = pieces
        return pieces

    def _prepare_again(self, number: int) -> bool:
        """Let the client half replace what is used up of a group; whether it wanted the codes for that."""
        with self._covering:
            return self._prepare([number], None) > 0

    @property
    def _preparers(self) -> list[Preparer]:
        """What prepares itself from codes."""
        found: list[Preparer] = [self._keys.client] if self.choice.backend.prepares else []
        return found if self._checks is None else [*found, self._checks]

    def _prepare(
        self, numbers: Sequence[int], codes: CodeSource | None, preparers: Sequence[Preparer] | None = None
    ) -> int:
        """Let what prepares itself do so for groups, each as a part of the group that it belongs to, if any.

        Returns:
            How many codes were read.
        """
        preparers = self._preparers if preparers is None else preparers
        if not preparers:
            return 0
        wanted: dict[int, list[LinearMap]] = {}
        for number in numbers:
            parent, offset = self._groups[number].parent or (number, 0)
            pieces = self._covered[number] = self.pool.pieces(number)
            wanted.setdefault(parent, []).extend(_moved(piece.forward, offset) for piece in pieces)
        codes = codes or self._codes
        if codes is None:
            names = {layer.name: i for i in wanted for layer in self.members(i)}
            codes = WorkerCodes(self.pool, names)
        begun = time.monotonic()
        groups = [(self.members(i), self._groups[i].maps, pieces) for i, pieces in wanted.items()]
        try:
            read = prepare(preparers, groups, codes, self._watch_codes)
        except WeightsError as error:
            if self.choice.backend.prepares:
                raise
            raise WeightsError(
                f"{error}. The codes are needed to check answers; check_answers=0 does without, and believes any answer"
            ) from error
        self.set_up.weights += read
        self.set_up.seconds += (seconds := time.monotonic() - begun)
        if isinstance(codes, WorkerCodes):
            self.set_up.bytes_down += codes.bytes_down
        if read:
            log.info("prepared for the products of %.1f million weights in %.1f s", read / 1e6, seconds)
        return read

    def _evaluated_in(self, number: int) -> tuple[int, int]:
        """The group whose product serves a group, and the row that it begins at there."""
        parent = self._groups[number].parent if self.choice.backend.whole_products else None
        return parent or (number, 0)

    def _group(self, groups: Sequence[tuple[int, ...]], number: int) -> _Group:
        layers = tuple(self.layers[i] for i in groups[number])
        maps = {direction: group_map(layers, direction) for direction in DIRECTIONS}
        group = _Group(layers, maps, self._parent(groups, number))
        self._refuse(group)
        self._refuse_imprecise(group, "forward")
        return group

    def _table(self, table: LayerInfo) -> _Group:
        group = _Group((table,), {"backward": lookup_map(table)})
        self._refuse(group)
        self._refuse_imprecise(group, "backward")
        return group

    def _refuse(self, group: _Group) -> None:
        for linear_map in group.maps.values():
            if (why := self.choice.backend.refuse(linear_map)) is not None:
                raise UnsupportedLayerError(f"{linear_map.label}: {self.selection.backend} refuses it: {why}")

    def _tell_advice(self) -> None:
        """Say once what the backend advises for each kind of map."""
        told: dict[str, list[str]] = {}
        for group in self._groups:
            for linear_map in group.maps.values():
                if (advice := self.choice.backend.advise(linear_map)) is not None:
                    told.setdefault(advice, []).append(linear_map.label)
        for advice, labels in told.items():
            log.warning("%s: %s (%s and %d more)", self.selection.backend, advice, labels[0], len(labels) - 1)

    def _parent(self, groups: Sequence[tuple[int, ...]], number: int) -> tuple[int, int] | None:
        """The larger group that a layer alone belongs to, and its first row there."""
        first, *others = groups[number]
        if others:
            return None
        if self._above is None:
            self._above = {}
            for place, members in enumerate(groups):
                row = 0
                for i in members if len(members) > 1 else ():
                    self._above.setdefault(i, (place, row))
                    row += self.layers[i].out_features
        return self._above.get(first)

    def _refuse_imprecise(self, group: _Group, direction: Direction) -> None:
        if direction not in group.precise:
            self.choice.backend.refuse_imprecise(group.maps[direction])
            group.precise.add(direction)

    def _joining(self) -> JoiningWorkers | None:
        transport, endpoints = self.choice.transport, self.selection.endpoints
        if not transport.elastic:
            return None
        return lambda links: transport.joining_workers(endpoints, links)

    def _watch_codes(self, done: int, total: int) -> None:
        self.plugins.observe("ciphertune_preparing", session=self, done=done, total=total)

    def _watch_exclusions(self, worker: str, layers: tuple[str, ...], direction: Direction) -> None:
        self.plugins.observe(
            "ciphertune_worker_excluded", session=self, worker=worker, layers=layers, direction=direction
        )

    def _watch_silence(self, worker: str, problem: str | None, seconds: float) -> None:
        if problem is None:
            self.plugins.observe("ciphertune_worker_back", session=self, worker=worker, seconds=seconds)
        else:
            told = {"session": self, "worker": worker, "problem": problem, "seconds": seconds}
            self.plugins.observe("ciphertune_worker_silent", **told)

    def _watch_key(self, worker: str, nbytes: int, done: bool) -> None:
        self.plugins.observe("ciphertune_sending_key", worker=worker, nbytes=nbytes, done=done)


def _moved(linear_map: LinearMap, offset: int) -> LinearMap:
    """A piece's map with its rows counted from a larger group's top."""
    if offset == 0:
        return linear_map
    rows = tuple((start + offset, stop + offset) for start, stop in linear_map.rows)
    return dataclasses.replace(linear_map, rows=rows)


def _check_input(x: Tensor, linear_map: LinearMap, finite: bool) -> None:
    if x.dim() != 2 or x.shape[1] != linear_map.in_features:
        raise InputError(f"{linear_map.label}: expected (tokens, {linear_map.in_features}), got shape {tuple(x.shape)}")
    if len(x) == 0:
        raise InputError(f"{linear_map.label}: the input has no tokens")
    if not (finite or all_finite(x)):
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(
            f"{linear_map.label}: {bad} of {x.numel()} values are NaN or infinite; nothing was sent. "
            "Lower the learning rate, clip gradients, or look at the batch that gave them"
        )
