"""The errors of a real backend without its cryptography: what people test and tune with. Protects nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import (
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
)
from ciphertune.errors import ProtocolError, ReplyError, SelectionError
from ciphertune.plugins import registry


@dataclasses.dataclass(frozen=True)
class SimulationOptions:
    """Options of the simulation backend, beside those of the simulated one.

    Attributes:
        of: the backend to simulate; it must declare a noise model.
        seed: of the simulated noise; the same seed and the same sequence of products give the same results.
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


class SimulationClient(ClientHalf[Tensor]):
    """Encodes tokens as the simulated backend does and sends them in the clear."""

    def __init__(self, noise: NoiseModel, seed: int) -> None:
        self._noise = noise
        self._seed = seed

    def open_fields(self) -> Mapping[str, Any]:
        """The noise model and the seed."""
        return {
            "seed": self._seed,
            "input_variance": self._noise.input_variance,
            "output_variance": self._noise.returned_variance,
            "correlation": self._noise.correlation,
            "period": self._noise.period,
        }

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Tensor]:
        """See ``ClientHalf.encrypt``; nothing is encrypted."""
        scale = self._noise.token_scale(x, linear_map)
        return Encrypted({"x": x, "scale": scale}, scale)

    def decrypt(self, reply: Buffers, state: Tensor, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        y = reply.get("y")
        if y is None or y.dtype != torch.float32 or y.shape != (len(state), linear_map.out_features):
            raise ReplyError(f"{linear_map.label}: expected float32 ({len(state)}, {linear_map.out_features})")
        return y


class SimulationWorker(WorkerHalf):
    """A float32 product with integer codes, plus Gaussian noise of the simulated backend's variance."""

    def __init__(self, fields: Mapping[str, Any], device: torch.device) -> None:
        values: list[Any] = [fields.get(name) for name in ("input_variance", "output_variance")]
        seed, correlation, period = (fields.get(name) for name in ("seed", "correlation", "period"))
        if not isinstance(seed, int) or not all(isinstance(v, float) and 0 <= v < 1e30 for v in values):
            raise ProtocolError("expected the fields seed, input_variance and output_variance")
        if not isinstance(correlation, float) or not isinstance(period, int) or not 0 <= correlation <= 1:
            raise ProtocolError("expected the fields correlation and period")
        if not 0 <= period < 1 << 31 or (correlation > 0 and period == 0):
            raise ProtocolError("a correlation needs a period, between 1 and 2^31")
        self._input_variance, self._output_variance = values
        self._shared_deviation = math.sqrt(correlation * self._output_variance)
        self._own_variance = (1 - correlation) * self._output_variance
        self._period = period
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def prepare(self, weight: Tensor) -> dict[Direction, tuple[Tensor, Tensor]]:
        """See ``WorkerHalf.prepare``: the codes, and the noise per output for either direction."""
        values = weight.to(torch.float32)
        return {"forward": (weight, self._deviation(values)), "backward": (weight.t(), self._deviation(values.t()))}

    def evaluate(
        self, prepared: dict[Direction, tuple[Tensor, Tensor]], direction: Direction, request: Buffers
    ) -> Buffers:
        """See ``WorkerHalf.evaluate``."""
        matrix, deviation = prepared[direction]
        x, scale = request.get("x"), request.get("scale")
        if x is None or x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != matrix.shape[1]:
            raise ProtocolError(f"expected a float32 buffer 'x' of shape (tokens, {matrix.shape[1]})")
        if scale is None or scale.dtype != torch.float64 or scale.shape != (len(x),):
            raise ProtocolError("expected a float64 buffer 'scale' of shape (tokens,)")
        y = torch.nn.functional.linear(x.to(self._device), matrix.to(torch.float32))
        unit = scale.to(self._device).reciprocal().to(torch.float32)
        noise = self._normal(*y.shape).mul_(deviation)
        if self._shared_deviation:
            noise.add_(self._along(*y.shape), alpha=self._shared_deviation)
        return {"y": y.add_(noise.mul_(unit[:, None]))}

    def _deviation(self, matrix: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(matrix, dim=1)
        return torch.sqrt(self._input_variance * norm**2 + self._own_variance)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device=self._device)

    def _along(self, tokens: int, outputs: int) -> Tensor:
        """Normal values whose correlation falls linearly along the outputs, from 1 to -1 a period on.

        As in the scheme: half the sum of a period's roundings, of which those behind an output count with the other
        sign.
        """
        parts = []
        for start in range(0, outputs, self._period):
            count = min(self._period, outputs - start)
            sums = self._normal(tokens, count).mul_(2 / math.sqrt(self._period)).cumsum(1)
            rest = self._normal(tokens, 1).mul_(2 * math.sqrt((self._period - count) / self._period))
            parts.append(sums - (sums[:, -1:] + rest) / 2)
        return torch.cat(parts, dim=1)


class SimulationBackend(Backend):
    """Encoding, weight quantization and noise of another backend, from a seed, at about the plain product's speed."""

    name = "simulation"
    Options = SimulationOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        own = {field.name for field in dataclasses.fields(SimulationOptions)}
        given = {name: value for name, value in vars(self.options).items() if name not in own}
        simulated = _simulated(self.options.of)
        self._simulated = simulated(simulated.Options(**given))
        if self._simulated.noise is None:
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
    def weight_bits(self) -> WeightBits | None:
        """That of the simulated backend."""
        return self._simulated.weight_bits

    @property
    def noise(self) -> NoiseModel:
        """That of the simulated backend."""
        noise = self._simulated.noise
        assert noise is not None
        return noise

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``: what the simulation itself sends, float32 both ways and a scale a token."""
        return tokens * (4 * linear_map.in_features + 8), 4 * tokens * linear_map.out_features

    def client(self, device: torch.device) -> SimulationClient:
        """See ``Backend.client``."""
        return SimulationClient(self.noise, self.options.seed)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> SimulationWorker:
        """See ``Backend.worker``."""
        return SimulationWorker(fields, device)
