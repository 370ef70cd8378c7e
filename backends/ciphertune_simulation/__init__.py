"""The errors of a real backend without its cryptography: what people test and tune with. Protects nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ciphertune.backend import (
    DIRECTIONS,
    Backend,
    Buffers,
    ClientHalf,
    Direction,
    Encrypted,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    WeightBits,
    WorkerHalf,
    columns_of,
)
from ciphertune.callers import Owners
from ciphertune.errors import ProtocolError, ReplyError, SelectionError
from ciphertune.plugins import registry


@dataclasses.dataclass(frozen=True)
class SimulationOptions:
    """Options of the simulation backend, beside those of the simulated one.

    Attributes:
        of: the backend to simulate; it must declare a noise model.
        seed: of the simulated noise; the same seed and the same product give the same result, in whatever order
            products come, so that a run that is resumed goes on as if it had never stopped.
    """

    of: str = "mlwe"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise SelectionError(f"option seed={self.seed} must be between 0 and 2^63 - 1")


def _simulated(name: str) -> type[Backend]:
    if name == "simulation":
        raise SelectionError("a simulation of the simulation is not a thing: name a backend in of=…")
    found: type[Backend] = registry.load(registry.BACKENDS, name)
    return found


_ANY = LinearMap("any", "forward", 64, 64, 1000.0)
"""A map to ask a backend whether it declares errors at all."""


class SimulationClient(ClientHalf[Tensor]):
    """Encodes tokens as the simulated backend does and sends them in the clear.

    Args:
        noise: the errors of a group's product.
        seed: of the simulated noise.
        whole: whether a product is one ciphertext (``Backend.whole_products``).
    """

    def __init__(self, noise: Callable[[LinearMap], NoiseModel], seed: int, whole: bool = False) -> None:
        self._noise = noise
        self._seed = seed
        self._whole = whole

    def open_fields(self) -> Mapping[str, Any]:
        """The seed."""
        return {"seed": self._seed}

    def encrypt_owned(
        self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap], owners: Owners
    ) -> list[Encrypted[Tensor]]:
        """See ``ClientHalf.encrypt_owned``: there are no secrets."""
        return self.encrypt_pieces(x, whole, pieces)

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Tensor]:
        """See ``ClientHalf.encrypt``; nothing is encrypted. ``noise`` says which errors are drawn, see ``_Noise``."""
        noise = self._noise(linear_map)
        return self._encoded(x, noise, noise.token_scale(x, linear_map), 1)

    def encrypt_pieces(self, x: Tensor, whole: LinearMap, pieces: Sequence[LinearMap]) -> list[Encrypted[Tensor]]:
        """See ``ClientHalf.encrypt_pieces``.

        Pieces of one ciphertext have the scale of the whole, and the sum of backward pieces is decrypted once: each
        brings a share of that error.
        """
        if not self._whole or whole.direction == "forward":
            return super().encrypt_pieces(x, whole, pieces)
        noise = self._noise(whole)
        scale = noise.token_scale(x, whole)
        return [self._encoded(columns_of(x, piece.rows), noise, scale, len(pieces)) for piece in pieces]

    def _encoded(self, x: Tensor, noise: NoiseModel, scale: Tensor, pieces: int) -> Encrypted[Tensor]:
        errors = _Noise(noise.input_variance, noise.returned_variance / pieces, noise.correlation, noise.period)
        drawn = torch.tensor(errors, dtype=torch.float64)
        return Encrypted({"x": x, "scale": scale, "noise": drawn}, scale)

    def decrypt(self, reply: Buffers, state: Tensor, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        y = reply.get("y")
        if y is None or y.dtype != torch.float32 or y.shape != (len(state), linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: expected float32 ({len(state)}, {linear_map.out_features})")
        return y


class _Noise(NamedTuple):
    """Errors of a product as a request states them; see ``NoiseModel``."""

    input_variance: float
    output_variance: float
    correlation: float
    period: float

    @classmethod
    def read(cls, noise: Tensor | None) -> _Noise:
        """What a request's buffer says. Raises ``ProtocolError``."""
        if noise is None or noise.dtype != torch.float64 or noise.shape != (len(cls._fields),):
            raise ProtocolError(f"expected a float64 buffer 'noise' of {len(cls._fields)} values")
        read = cls(*noise.tolist())
        sizes = read.input_variance, read.output_variance
        if not all(0 <= size < 1e30 for size in sizes) or not 0 <= read.correlation <= 1:
            raise ProtocolError("the noise of a request is out of range")
        whole = 0 <= read.period < 1 << 31 and read.period == int(read.period)
        if not whole or (read.correlation > 0 and read.period == 0):
            raise ProtocolError("a correlation needs a period, between 1 and 2^31")
        return read


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A matrix, the norms of its rows, and what sets its products apart from those of others."""

    matrix: Tensor
    norms: Tensor
    label: bytes


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class SimulationWorker(WorkerHalf):
    """A float32 product with integer codes, plus Gaussian noise of the variance that each request states."""

    def __init__(self, fields: Mapping[str, Any], device: torch.device) -> None:
        seed = fields.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
            raise ProtocolError("expected the field seed")
        self._device = device
        self._seed = seed

    def prepare(self, weight: Tensor) -> dict[Direction, _Prepared]:
        """See ``WorkerHalf.prepare``: the codes, and the norms of the outputs of either direction."""
        values = weight.to(torch.float32)
        found: dict[Direction, _Prepared] = {}
        for direction, matrix, floats in zip(DIRECTIONS, (weight, weight.t()), (values, values.t()), strict=True):
            norms = torch.linalg.vector_norm(floats, dim=1)
            found[direction] = _Prepared(matrix, norms, direction.encode() + bytes(_bytes(norms)))
        return found

    def prepared_nbytes(self, prepared: dict[Direction, _Prepared]) -> int:
        """See ``WorkerHalf.prepared_nbytes``: norms, and their bytes once more."""
        return 2 * sum(each.norms.nbytes for each in prepared.values())

    def reply_bytes(self, prepared: dict[Direction, _Prepared], direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        x = request.get("x")
        return 0 if x is None or x.dim() != 2 else 4 * len(x) * len(prepared[direction].matrix)

    def evaluate(self, prepared: dict[Direction, _Prepared], direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        matrix, norms = prepared[direction].matrix, prepared[direction].norms
        x, scale = request.get("x"), request.get("scale")
        if x is None or x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != matrix.shape[1]:
            raise ProtocolError(f"expected a float32 buffer 'x' of shape (tokens, {matrix.shape[1]})")
        if scale is None or scale.dtype != torch.float64 or scale.shape != (len(x),):
            raise ProtocolError("expected a float64 buffer 'scale' of shape (tokens,)")
        errors = _Noise.read(request.get("noise"))
        y = torch.nn.functional.linear(x.to(self._device), matrix.to(torch.float32))
        unit = scale.to(self._device).reciprocal().to(torch.float32)
        draw = self._generator(prepared[direction].label, x, scale)
        own = (1 - errors.correlation) * errors.output_variance
        noise = self._normal(draw, *y.shape).mul_(torch.sqrt(errors.input_variance * norms**2 + own))
        if errors.correlation:
            shared = math.sqrt(errors.correlation * errors.output_variance)
            noise.add_(self._along(draw, int(errors.period), *y.shape), alpha=shared)
        return {"y": y.add_(noise.mul_(unit[:, None]))}

    def _generator(self, label: bytes, x: Tensor, scale: Tensor) -> torch.Generator:
        """Generator of the noise of one product, seeded from the weight, the direction and the input."""
        digest = hashlib.blake2b(self._seed.to_bytes(8, "little") + label, digest_size=7)
        digest.update(_bytes(scale))
        # Sums of the bit patterns, since hashing every value would take as long as the product.
        digest.update(_bytes(x.contiguous().view(torch.int32).sum(dim=0, dtype=torch.int64)))
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest.digest(), "little"))

    def _normal(self, draw: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32, device=self._device)

    def _along(self, draw: torch.Generator, period: int, tokens: int, outputs: int) -> Tensor:
        """Normal values whose correlation falls linearly along the outputs, from 1 to -1 a period on.

        As in the scheme: half the sum of a period's roundings, of which those behind an output count with the other
        sign.
        """
        parts = []
        for start in range(0, outputs, period):
            count = min(period, outputs - start)
            sums = self._normal(draw, tokens, count).mul_(2 / math.sqrt(period)).cumsum(1)
            rest = self._normal(draw, tokens, 1).mul_(2 * math.sqrt((period - count) / period))
            parts.append(sums - (sums[:, -1:] + rest) / 2)
        return torch.cat(parts, dim=1)


class SimulationBackend(Backend):
    """Encoding, weight quantization and noise of another backend, from a seed, at about the plain product's speed."""

    name = "simulation"
    interface = 1
    Options = SimulationOptions
    separates_callers = True
    states_traffic = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        own = {field.name for field in dataclasses.fields(SimulationOptions)}
        given = {name: value for name, value in vars(self.options).items() if name not in own}
        simulated = _simulated(self.options.of)
        self._simulated = simulated(simulated.Options(**given))
        if self._simulated.noise(_ANY) is None:
            raise SelectionError(f"{self.options.of!r} declares no noise model, so it cannot be simulated")

    @classmethod
    def options_class(cls, options: Mapping[str, str]) -> type:
        """Options of the simulation and of the simulated backend. Raises ``SelectionError`` for an unknown one."""
        simulated = _simulated(options.get("of", SimulationOptions.of)).Options
        if dataclasses.fields(simulated) == ():
            return SimulationOptions
        return dataclasses.make_dataclass("SimulationOptions", [], bases=(SimulationOptions, simulated), frozen=True)

    @property
    def security(self) -> SecurityStatement:
        """Nothing is protected."""
        return SecurityStatement(False, None, f"no protection: the errors of {self.options.of}, without its encryption")

    @property
    def whole_products(self) -> bool:  # type: ignore[override]
        """That of the simulated backend."""
        return self._simulated.whole_products

    @property
    def weight_bits(self) -> WeightBits | None:
        """That of the simulated backend."""
        return self._simulated.weight_bits

    def noise(self, linear_map: LinearMap) -> NoiseModel:
        """That of the simulated backend."""
        noise = self._simulated.noise(linear_map)
        assert noise is not None
        return noise

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int] | None:
        """See ``Backend.traffic``: what the simulated backend would send."""
        return self._simulated.traffic(linear_map, tokens)

    def piece_traffic(self, whole: LinearMap, piece: LinearMap, tokens: int) -> tuple[int, int] | None:
        """See ``Backend.piece_traffic``: what the simulated backend would send."""
        return self._simulated.piece_traffic(whole, piece, tokens)

    def reply_bytes(self, whole: LinearMap, piece: LinearMap, tokens: int) -> int:
        """See ``Backend.reply_bytes``: float32, whatever is simulated."""
        return 4 * tokens * piece.out_features

    def client(self, device: torch.device) -> SimulationClient:
        """See ``Backend.client``."""
        return SimulationClient(self.noise, self.options.seed, self.whole_products)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> SimulationWorker:
        """See ``Backend.worker``."""
        return SimulationWorker(fields, device)
