"""The backend interface: one way to protect and evaluate the linear maps of outsourced layers.

A backend has two halves that run in different places and trust each other with nothing:
the client half holds the keys, the worker half holds the weights. They exchange named
buffers (tensors of plain numbers), never objects.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ciphertune._support.options import build_options
from ciphertune.callers import Owners
from ciphertune.errors import PrecisionError

INTERFACE_VERSION = 1
"""The version of this interface. It grows with every change that a backend which is written for the one before would
not stand; ``Backend.interface`` says which one a backend is written for."""

FLOAT32_ROUNDING = 1e-6
"""Standard deviation of an output's error from sums in float32, over the norms of what is multiplied; see
``Backend.rounding``."""

Buffers = dict[str, Tensor]
"""Named buffers of one request or reply: tensors of fixed-size numbers, any device."""

Direction = Literal["forward", "backward"]
"""``forward`` is ``x Wᵀ``, ``backward`` is ``g W``."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
"""Both of them."""
WeightBits = Literal[8, 16]
"""Bits of a code, by which weights are stored as integers."""

WORST_RELATIVE_ERROR = 0.25
"""Expected error over signal above which a product is refused rather than returned as noise."""


@dataclasses.dataclass(frozen=True)
class SecurityStatement:
    """Statement of what a backend protects, in words that a user reads before choosing it.

    Attributes:
        encrypted: whether a worker sees only ciphertext.
        bits: classical security in bits, None where nothing is encrypted. Where several cost models are known, that of
            the most cautious one that counts classical operations.
        summary: one sentence for tables and reports.
        assumption: the hardness assumption and where its figures come from.
        estimates: bits of the cheapest known attack by cost model, where they are known.
    """

    encrypted: bool
    bits: float | None
    summary: str
    assumption: str = ""
    estimates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def level(self) -> str:
        """The security in few words, with the cost models that bits are counted by.

        >>> SecurityStatement(False, None, "").level
        'none'
        >>> SecurityStatement(True, 130.2, "", estimates={"MATZOV": 156.0, "core-SVP classical": 130.2}).level
        '156 bits by MATZOV, 130 by core-SVP classical'
        >>> SecurityStatement(True, 128, "").level
        '128 bits'
        """
        if not self.encrypted:
            return "none"
        if self.bits is None:
            return "encrypted"
        found = self.estimates
        first, *others = [f"{bits:.0f}{{}} by {model}" for model, bits in found.items()] or [f"{self.bits:.0f}{{}}"]
        return ", ".join([first.format(" bits"), *(each.format("") for each in others)])


@dataclasses.dataclass(frozen=True)
class Work:
    """Amounts that the phases of a product grow with, to scale times measured with a smaller one.

    Attributes:
        encrypt, evaluate, decrypt: amounts, each in a unit of its own.
        by: what they count, in words.
        ahead: amount of ``ClientHalf.compute_ahead``; 0 where nothing is computed ahead.
    """

    encrypt: float
    evaluate: float
    decrypt: float
    by: str
    ahead: float = 0.0


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A client's view of one outsourced product ``y = x Mᵀ``, M of shape (out_features, in_features).

    Attributes:
        label: the layers and direction, for messages.
        direction: which product of the layer this is.
        in_features: K, columns of M.
        out_features: N, rows of M.
        max_norm: an upper bound of the Euclidean norm of every row of M as the worker stores it.
        identity: SHA-256 of the direction and of the weights in their order, hexadecimal: equal where M is. Empty for
            a map that is made from sizes alone.
        rows: (start, stop) of the rows of the group's stacked weight that M is of, in M's order; empty for all of
            them. Of a forward map they are outputs, of a backward map inputs.
        peak: where every input has one value that is not zero at most, as a lookup's has, an upper bound of the size of
            M's entries as the worker stores them; 0 for other inputs.
    """

    label: str
    direction: Direction
    in_features: int
    out_features: int
    max_norm: float
    identity: str = ""
    rows: tuple[tuple[int, int], ...] = ()
    peak: float = 0.0


@dataclasses.dataclass(frozen=True)
class NoiseModel:
    """Model of the errors that encryption adds to a product, for encoding, simulation and predictions.

    A token is encoded as ``m = scale_t · x``; decoding divides outputs by scale_t again. This fits any scheme whose
    errors are added to encoded values and whose outputs wrap beyond some size: for one that packs values into a
    polynomial, ``half_range`` is the size of a value below which no coefficient can wrap.

    Attributes:
        half_range: encoded outputs wrap at ±half_range.
        input_variance: of the error added to every encoded input value.
        output_variance: of the error added to every encoded output value.
        digits: base-256 digits in which a weight is evaluated, each a product of its own that may use the whole
            range; more than one for weights of more than 8 bits.
        correlation: between output errors of neighbouring outputs of a token. It falls linearly along the outputs, to
            its negative ``period`` outputs on, and those of different periods are independent. Encryption that packs
            outputs into the coefficients of a rounded polynomial under a secret of bits has this.
        period: see ``correlation``.
    """

    half_range: float
    input_variance: float
    output_variance: float
    digits: int = 1
    correlation: float = 0.0
    period: int = 0

    @property
    def returned_variance(self) -> float:
        """Variance that ``output_variance`` adds once the digits are put together."""
        return self.output_variance * 65536.0 ** (self.digits - 1)

    def error_deviation(self, norm: float) -> float:
        """Standard deviation of an encoded output's error, for a row of weight codes of this Euclidean norm."""
        return math.sqrt(self.input_variance * norm**2 + self.returned_variance)

    def relative_error(self, linear_map: LinearMap) -> float:
        """Expected error over signal for inputs that are independent of the weights (root mean squares).

        0 for a map of zeros, whose outputs count for nothing: scales of such channels are zero.
        """
        if linear_map.max_norm == 0:
            return 0.0
        usable = self._usable_range(linear_map)
        if usable <= 0:
            return math.inf
        signal = usable / self._digit_gain(linear_map) * linear_map.max_norm / math.sqrt(linear_map.in_features)
        return self.error_deviation(linear_map.max_norm) / max(signal, 1e-300)

    def token_scale(self, x: Tensor, linear_map: LinearMap, norm: Tensor | None = None) -> Tensor:
        """The largest real scale per token for which no output can wrap: that of ``encoded_norm``.

        Args:
            x: (tokens, features), floating point.
            linear_map: the map it is for.
            norm: (tokens,) float64, Euclidean norms of x where they are known.

        Returns:
            (tokens,) float64. A token of zeros gets a huge one, so that its outputs decode to zeros and not to noise:
            gradients have such tokens wherever the loss ignores a position.
        """
        if norm is None:
            norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        # Norms under 1e-30 would ask for a scale whose inverse float32 outputs cannot carry.
        return norm.clamp_min(1e-30).reciprocal_().mul_(self.encoded_norm(linear_map))

    def encoded_norm(self, linear_map: LinearMap) -> float:
        """The Euclidean norm of every encoded token: the largest for which no output can wrap, by Cauchy-Schwarz."""
        return self._usable_range(linear_map) / self._digit_gain(linear_map)

    def _digit_gain(self, linear_map: LinearMap) -> float:
        """A bound of one digit's outputs over the norm of their input."""
        if linear_map.peak == 0:
            return self._digit_norm(linear_map)
        return max(linear_map.peak, 1.0) if self.digits == 1 else 128.0

    def _digit_norm(self, linear_map: LinearMap) -> float:
        """A bound of the norm of one digit's rows; low digits take any value, whatever the weight's norm is."""
        if self.digits == 1:
            return max(linear_map.max_norm, 1.0)
        return 128.0 * math.sqrt(linear_map.in_features)

    def _usable_range(self, linear_map: LinearMap) -> float:
        """What is left for the signal when eight standard deviations of error must not wrap either."""
        norm = self._digit_norm(linear_map)
        return self.half_range - 8 * math.sqrt(self.input_variance * norm**2 + self.output_variance) - 1


class Preparation(abc.ABC):
    """What a client half makes of a group's codes before the group's first product, from one pass over them."""

    @abc.abstractmethod
    def absorb(self, row: int, codes: Tensor) -> None:
        """Take some rows of the group's stacked codes. They were held against the hashes that the client knows.

        Args:
            row: where they stand; calls come from the top, each row once.
            codes: (rows, K), int8 or int16, on any device; not to be kept.
        """

    @abc.abstractmethod
    def finish(self) -> None:
        """Take notice that all rows came. A preparation that is given up is dropped without this."""


StateT = TypeVar("StateT")


@dataclasses.dataclass(frozen=True)
class Encrypted(Generic[StateT]):
    """An encrypted request: the buffers to send and what only this client needs to decrypt the reply."""

    buffers: Buffers = dataclasses.field(repr=False)
    state: StateT = dataclasses.field(repr=False)


class ClientHalf(abc.ABC, Generic[StateT]):
    """Keys, encryption and decryption. Runs at the data owner; never imports the worker half.

    Several threads may have products under way at once, and several requests may be encrypted before the first reply
    comes: what belongs to a request is in its ``state``. Buffers are of the types that the protocol carries: uint8,
    int8, int16, int32, int64, float32, float64.
    """

    def open_fields(self) -> Mapping[str, Any]:
        """Public parameters that the worker half needs, as plain numbers and text."""
        return {}

    def evaluation_key(self) -> Buffers:
        """Public key material the worker needs to evaluate; sent once per worker and session."""
        return {}

    def begin(self, model: bytes, remote: bool) -> None:
        """Take notice of the model that products will be of and of who computes them, once and before anything else.

        A client half that keeps what it prepares between sessions finds it by the model. One that computes ahead of the
        data has idle processors for that while workers elsewhere compute.

        Args:
            model: SHA-256 over the names, sizes and weights of the outsourced layers.
            remote: whether the workers are elsewhere, and not in this process.
        """
        return

    def compute_ahead(self, linear_map: LinearMap, tokens: int) -> float:
        """Compute what the next product needs whatever its data are, so that ``encrypt_pieces`` finds it.

        A client half does so by itself, in its own time; plans ask for it to tell these seconds from the others.

        Args:
            linear_map: of the product, which was prepared for.
            tokens: T.

        Returns:
            Seconds that it took; of what serves several products a share. 0 where nothing is computed ahead.
        """
        return 0.0

    def preparation(
        self, forward: LinearMap | None, backward: LinearMap, pieces: Sequence[LinearMap] = ()
    ) -> Preparation | None:
        """What is to be made of a group's codes before its first product; None where nothing is.

        Asked for each group when a session opens, and again when its products are cut otherwise, as when a worker
        joins, or when encryption raised ``NotPreparedError``. The client streams the codes for a preparation, in memory
        that does not grow with the model.

        Args:
            forward: the group's map; None for a table, whose rows are looked up by backward products alone.
            backward: the same transposed.
            pieces: forward maps of the pieces that products are cut into; none for products in one piece.
        """
        return None

    def encrypt_pieces(self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap]) -> list[Encrypted[StateT]]:
        """Encrypt x of shape (tokens, whole.in_features) for workers that each hold some rows of the group.

        As it stands, forward pieces share one request, and each backward piece gets the columns of x that belong to
        its rows in a ciphertext of its own. A scheme whose ciphertexts can be cut does better.

        Args:
            x: float32, finite, tokens ≥ 1.
            whole: the group's map.
            pieces: maps of the pieces, whose ``rows`` say where they stand. Forward pieces may leave out rows, backward
                pieces may not.

        Returns:
            A request for each piece, in order; they may be one and the same.

        Raises:
            NotPreparedError: what was prepared for this product is used up.
        """
        if whole.direction == "forward":
            return [self.encrypt(x, whole)] * len(pieces)
        return [self.encrypt(columns_of(x, piece.rows), piece) for piece in pieces]

    def encrypt_owned(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap], owners: Owners
    ) -> list[Encrypted[StateT]]:
        """Encrypt as ``encrypt_pieces`` does, under no secret that masks tokens of two callers, now or at another time.

        Called in its place where a session keeps callers apart (``Session.keep_apart``), and only for a backend whose
        ``separates_callers`` says that it is there.

        Args:
            x: as for ``encrypt_pieces``.
            whole: as for ``encrypt_pieces``.
            pieces: as for ``encrypt_pieces``.
            owners: callers and their numbers of tokens, in the order of x.
        """
        raise NotImplementedError

    def check_reply(self, reply: Buffers, state: StateT, piece: LinearMap) -> None:
        """Hold one piece's reply against what was asked for, before anything is decrypted. Called once as it comes.

        A reply that fails is asked of another worker, and whoever gave it is asked no more.

        Raises:
            WrongReplyError: it is another product.
            ReplyError: it cannot belong to the request.
        """
        return

    def take_reply(self, reply: Buffers, state: StateT, piece: LinearMap) -> Any:
        """What is kept of one piece's reply until ``put_together`` has those of all; as it stands, its decryption.

        Called as replies come.

        Raises:
            ReplyError: the reply cannot belong to the request.
        """
        return self.decrypt(reply, state, piece)

    def put_together(
        self, parts: Sequence[Any], states: Sequence[StateT], whole: LinearMap, pieces: Sequence[LinearMap]
    ) -> Tensor:
        """The product from what ``take_reply`` kept of each piece.

        Returns:
            float32 of any strides. Forward: (tokens, rows of the pieces), in the order in which the rows stand in the
            group. Backward: (tokens, whole.out_features).
        """
        if whole.direction == "forward":
            return in_order(parts, [piece.rows for piece in pieces])
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    @abc.abstractmethod
    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[StateT]:
        """Encrypt x of shape (tokens, linear_map.in_features), float32, finite, tokens ≥ 1."""

    @abc.abstractmethod
    def decrypt(self, reply: Buffers, state: StateT, linear_map: LinearMap) -> Tensor:
        """The product as float32 of shape (tokens, linear_map.out_features), of any strides.

        One encrypted request may go to several workers that each hold some rows of the map it was encrypted for;
        ``linear_map`` is then the part of the map that this reply is for.

        Raises:
            ReplyError: the reply cannot belong to the request.
        """

    def close(self) -> None:
        """Forget key material and scratch memory."""
        return


def in_order(parts: Sequence[Tensor], rows: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Outputs of forward pieces, put together in the order in which their rows stand in the group.

    Args:
        parts: (tokens, rows) each.
        rows: of each piece, as ``LinearMap.rows``; empty for a piece that is the whole group.

    Returns:
        (tokens, rows of all pieces), of any strides; a single piece in order as it is.
    """
    if sum(map(len, rows)) <= 1:
        return parts[0]
    blocks: list[tuple[int, Tensor]] = []
    for part, places in zip(parts, rows, strict=True):
        taken = 0
        for start, stop in places:
            blocks.append((start, part[:, taken : taken + stop - start].t()))
            taken += stop - start
    # Feature-major, as products come.
    return torch.cat([block for _, block in sorted(blocks, key=lambda each: each[0])]).t()


def columns_of(x: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    """The columns of x, (tokens, features), that belong to a backward piece with these rows; none for all of them."""
    return torch.cat([x[:, start:stop] for start, stop in rows], dim=1) if rows else x


class Joint(NamedTuple):
    """How a request can be evaluated together with others for the same piece and direction.

    Attributes:
        key: what all of them have in common, beside the piece and the direction.
        size: of this request, in any unit: time is shared by it.
        most: size of all of them.
    """

    key: Hashable
    size: int
    most: int


class WorkerHalf(abc.ABC):
    """Evaluation on ciphertext. Runs at the worker; never sees a secret."""

    divisible: ClassVar[bool] = False
    """Whether ``part`` cuts a prepared weight. A worker then prepares each weight once for all sessions of a form and
    all groups. Else each group is prepared alone, and what that takes counts against its client's quota."""

    @abc.abstractmethod
    def prepare(self, weight: Tensor) -> Any:
        """Take a weight of shape (N, K): int8 codes in ±127, int16 in ±32639, or float32 where ``weight_bits`` is None.

        What it returns is handed to ``evaluate``, also of other sessions of the same ``form``, so it must hold nothing
        of this session. It should keep a reference to ``weight`` rather than a copy.
        """

    @abc.abstractmethod
    def evaluate(self, prepared: Any, direction: Direction, request: Buffers) -> Buffers:
        """Evaluate ``x Wᵀ`` (forward) or ``g W`` (backward) on an encrypted request.

        Several threads may evaluate at once, also with one prepared weight.

        Raises:
            ProtocolError: the request's buffers are not what this backend sends.
        """

    def evaluate_in_parts(
        self, prepared: Any, direction: Direction, request: Buffers, pause: Callable[[], object]
    ) -> Buffers:
        """Evaluate as ``evaluate`` does, and call ``pause`` after every few milliseconds.

        A worker lets small products of other clients in between, which this half may be asked for within ``pause``, on
        the same thread. As it stands all in one part.

        Raises:
            ProtocolError: as of ``evaluate``.
        """
        return self.evaluate(prepared, direction, request)

    def joint(self, prepared: Any, direction: Direction, request: Buffers) -> Joint | None:
        """How a request can be evaluated together with others; None for alone, as it stands, and for a bad request.

        Asked from sizes alone, before anything is evaluated, and only of halves that are ``divisible``.
        """
        return None

    def evaluate_together(self, prepared: Any, direction: Direction, requests: Sequence[Buffers]) -> list[Buffers]:
        """Evaluate several requests at once, with the same bits as ``evaluate`` gives for each.

        Args:
            prepared: the piece that all of them are for.
            direction: of all of them.
            requests: for which ``joint`` gave one key, and sizes that are ``most`` at most in all. They may be of other
                sessions of the same ``form``.
        """
        raise NotImplementedError

    @property
    def form(self) -> Hashable:
        """What of the session's fields ``prepare`` depends on. Sessions of the same form share what it returns."""
        return None

    def part(self, prepared: Any, start: int, stop: int) -> Any:
        """What rows ``start`` to ``stop`` of a prepared weight are prepared as, sharing its memory.

        Only called where ``divisible`` says so.
        """
        raise NotImplementedError

    def prepared_nbytes(self, prepared: Any) -> int:
        """Memory of what ``prepare`` returned, beside the weight that it was given."""
        return 0

    def reply_bytes(self, prepared: Any, direction: Direction, request: Buffers) -> int | None:
        """Bytes of the reply's buffers, from sizes alone: reserved before ``evaluate``. Any value for a bad request.

        As it stands None, for not known: the reply then counts once it is there.
        """
        return None

    @property
    def nbytes(self) -> int:
        """Memory that the session's keys take, if more than they took on the wire; counts against a client's quota."""
        return 0

    def close(self) -> None:
        """Forget the session's keys and scratch memory."""
        return


class Backend(abc.ABC):
    """One way to protect and evaluate outsourced linear maps. Registered in ``ciphertune.backends``.

    Subclasses set ``name`` and ``Options`` (a frozen dataclass whose fields are the options that the selection
    string may carry) and keep imports that only one half needs inside ``client`` and ``worker``.

    Args:
        options: an instance of ``Options``; one with all defaults if not given. A subclass needs no ``__init__``. One
            that has its own takes ``options=None`` and hands it to ``super().__init__``.

    Attributes:
        options: as above, defaults filled in.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    interface: ClassVar[int | None] = None
    """The ``INTERFACE_VERSION`` that this backend is written for, as a number; None where it does not say. One that is
    written for another is refused when it is loaded."""
    licence: ClassVar[str] = ""
    """What a user must know of the licence of a package that this backend needs, for tables; empty for nothing."""
    prepares: ClassVar[bool] = False
    """Whether the client half makes something of each group's codes before the first product (``preparation``)."""
    whole_products: ClassVar[bool] = False
    """Whether each product is one ciphertext of its group's whole input, of which pieces get parts.

    A layer that is evaluated alone is then some rows of its group's product, and its gradient the group's with zeros
    for the other layers."""
    separates_callers: ClassVar[bool] = False
    """Whether the client half encrypts for several callers under secrets of their own (``encrypt_owned``)."""
    states_traffic: ClassVar[bool] = False
    """Whether sessions count the bytes that ``piece_traffic`` states and not those of buffers: for simulations."""
    measured_size: ClassVar[tuple[int, int, int]] = (2048, 2048, 4096)
    """Tokens, inputs and outputs of the largest product that a plan measures to estimate the time of others."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @classmethod
    def options_class(cls, options: Mapping[str, str]) -> type:
        """The dataclass that reads these options: ``Options``, unless one of them brings others along."""
        return cls.Options

    @classmethod
    def problem(cls) -> str | None:
        """Why this backend cannot run here: a package is missing, or of another version; None where it can.

        Asked by lists, so that nothing heavy is imported for it. Whoever is used all the same raises ``PluginError``.
        """
        return None

    @classmethod
    def from_text(cls, options: Mapping[str, Any]) -> Backend:
        """Make the backend from option text, as in a selection string. Raises ``SelectionError``."""
        return cls(build_options(cls.options_class(options), options))

    @property
    @abc.abstractmethod
    def security(self) -> SecurityStatement:
        """What this backend, with these options, protects."""

    @property
    def weight_bits(self) -> WeightBits | None:
        """How weights are stored at the worker: 8 or 16 bit integers per output channel, or None for float32."""
        return 8

    @property
    def checks_answers(self) -> bool:
        """Whether the client half holds every answer against what was asked for (``ClientHalf.check_reply``)."""
        return False

    def noise(self, linear_map: LinearMap) -> NoiseModel | None:
        """The error model of a group's product with these options, or None where it has no closed form."""
        return None

    def rounding(self, linear_map: LinearMap) -> float | None:
        """How far an honest answer is off beside ``noise``: standard deviation of an output over ‖x‖ · ``max_norm``.

        By this and ``noise`` a session holds answers of other processes against what was asked for, once they are
        decrypted, where the client half does not do so before (``checks_answers``). None for a backend whose answers
        are not to be held against anything. As it stands that of float32 sums for a backend with a noise model.
        """
        return None if self.checks_answers or self.noise(linear_map) is None else FLOAT32_ROUNDING

    def refuse(self, linear_map: LinearMap) -> str | None:
        """Why this backend cannot evaluate a map at all, with the largest that it can, or None where it can.

        Asked before anything is sent, and by plans, which know sizes but no norms.
        """
        return None

    def advise(self, linear_map: LinearMap) -> str | None:
        """What speaks for another backend for such a map, None where nothing does. A session that opens warns of it."""
        return None

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int] | None:
        """Bytes of the buffers of a request and of its reply, for plans; None where it is not known before."""
        return None

    def piece_traffic(self, whole: LinearMap, piece: LinearMap, tokens: int) -> tuple[int, int] | None:
        """Bytes of the request and of the reply of one piece of a product, as ``ClientHalf.encrypt_pieces`` cuts it.

        As it stands, forward pieces get the request of the whole, and backward pieces one of their own.
        """
        sent = self.traffic(whole if whole.direction == "forward" else piece, tokens)
        returned = self.traffic(piece, tokens)
        return None if sent is None or returned is None else (sent[0], returned[1])

    def reply_bytes(self, whole: LinearMap, piece: LinearMap, tokens: int) -> int | None:
        """Bytes of the buffers of one piece's reply: a client takes no more. None for as many as a message may have.

        As it stands those of ``piece_traffic``, unless that is of another backend (``states_traffic``).
        """
        known = None if self.states_traffic else self.piece_traffic(whole, piece, tokens)
        return None if known is None else known[1]

    def kept_bytes(self, forward: LinearMap | None, backward: LinearMap) -> int:
        """Memory of what a client half makes of a group's codes, for plans; 0 where it prepares nothing.

        ``forward`` is None for a table, as in ``ClientHalf.preparation``.
        """
        return 0

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        """What the phases of a product grow with; by default the numbers sent, multiplied and returned."""
        sent, returned = tokens * linear_map.in_features, tokens * linear_map.out_features
        by = "tokens × inputs to encrypt, tokens × inputs × outputs to evaluate, tokens × outputs to decrypt"
        return Work(sent, sent * linear_map.out_features, returned, by)

    def allowance(self, linear_map: LinearMap, tokens: int) -> float:
        """Seconds that a worker may take for a product beyond what the option ``timeout`` allows any request."""
        return 0.0

    def refuse_imprecise(self, linear_map: LinearMap) -> None:
        """Raise ``PrecisionError`` for a map whose outputs would be mostly noise under these options."""
        noise = self.noise(linear_map)
        error = 0.0 if noise is None else noise.relative_error(linear_map)
        if error > WORST_RELATIVE_ERROR:
            raise PrecisionError(
                f"{linear_map.label}: with {linear_map.in_features} inputs and weight norms up to "
                f"{linear_map.max_norm:.3g}, {self.name} leaves an expected relative error of {error:.2g} "
                f"(limit {WORST_RELATIVE_ERROR}): choose options that keep more bits (see 'ciphertune backends'), or "
                "leave this layer at the client"
            )

    @abc.abstractmethod
    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with fresh keys (or those that the options name)."""

    def renewed_client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with keys that nothing was sent under. Asked for when a decrypted answer was found wrong.

        As it stands ``client``. A backend that keeps a key on disk gives that one up.
        """
        return self.client(device)

    @classmethod
    @abc.abstractmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """A worker half for one session, from what ``open_fields`` and ``evaluation_key`` gave and nothing else.

        Both came over the wire. Raises ``ProtocolError`` for anything this backend does not send.
        """

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """What ``ciphertune doctor`` should show of this backend on this machine: names and figures with units."""
        return {}
