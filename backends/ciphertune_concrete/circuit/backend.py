"""The ``concrete-circuit`` backend: options, security statement, noise model, and the two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from ciphertune.backend import Backend, Buffers, ClientHalf, LinearMap, NoiseModel, SecurityStatement, WorkerHalf
from ciphertune.errors import ProtocolError, SelectionError
from ciphertune_concrete.licence import TERMS


@dataclasses.dataclass(frozen=True)
class CircuitOptions:
    """Options of the concrete-circuit backend.

    Attributes:
        bits: width of the accumulator, 16 to 32: tokens are quantized to the largest range for which no output can
            exceed it. Wider ones cost little: 24 to 28 bits add 9% to the time and to what comes back.
        mode: ``simulate`` has the library compute the circuits without encryption, to try things; it protects nothing.
    """

    bits: int = 24
    mode: Literal["execute", "simulate"] = "execute"

    def __post_init__(self) -> None:
        if not 16 <= self.bits <= 32:
            raise SelectionError(f"option bits={self.bits} must be between 16 and 32")


class CircuitBackend(Backend):
    """Circuits of Zama's Concrete: an LWE ciphertext a value, exact integer products."""

    name = "concrete-circuit"
    interface = 1
    Options = CircuitOptions
    licence: ClassVar[str] = TERMS
    measured_size: ClassVar[tuple[int, int, int]] = (2, 256, 256)

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under LWE, by Zama's estimate."""
        from ciphertune_concrete.circuit.params import SECURITY_BITS

        if self.options.mode == "simulate":
            return SecurityStatement(False, None, "no protection: circuits are computed without encryption")
        return SecurityStatement(
            True,
            float(SECURITY_BITS),
            "workers see only ciphertext, shapes, layer names and timing",
            "LWE with a binary secret, q = 2^64, dimension and error from the curve of concrete-python 2.11 for "
            f"{SECURITY_BITS} bits",
        )

    def noise(self, linear_map: LinearMap | None = None) -> NoiseModel:
        """Rounding tokens to integers; the products of these are exact."""
        return NoiseModel(2.0 ** (self.options.bits - 1), 1 / 12, 0.0)

    def refuse(self, linear_map: LinearMap) -> str | None:
        """See ``Backend.refuse``: what compiles here, and how long that takes, was measured."""
        from ciphertune_concrete.circuit.params import MAX_FEATURES

        if max(linear_map.in_features, linear_map.out_features) <= MAX_FEATURES:
            return None
        return (
            f"a circuit of {linear_map.in_features} inputs and {linear_map.out_features} outputs is too large to "
            f"compile; the largest that does has {MAX_FEATURES} of each. share_inputs=0 keeps layers of the same input "
            "apart; otherwise leave this one at the client with layers=…"
        )

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``. Raises ``PluginError`` where concrete-python, which knows, is not installed."""
        from ciphertune_concrete.circuit.params import REQUEST_WORDS, reference

        up, down = 1, 1
        if self.options.mode == "execute":
            up, down = REQUEST_WORDS, reference(self.options.bits).parameters.reply_words
        return 8 * tokens * linear_map.in_features * up, 8 * tokens * linear_map.out_features * down

    def allowance(self, linear_map: LinearMap, tokens: int) -> float:
        """Seconds that a map may take a worker to compile and evaluate, four times as long as was measured.

        Compiling takes a microsecond a weight; a token, 0.13 ms an input to expand its seeds and 2.2 µs a weight.
        """
        weights = linear_map.in_features * linear_map.out_features
        return 4 * (1e-6 * weights + tokens * (1.3e-4 * linear_map.in_features + 2.2e-6 * weights))

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with a fresh key. Raises ``PluginError`` where concrete-python is not installed."""
        from ciphertune_concrete.circuit.client import CircuitClient

        return CircuitClient(self.options.bits, self.options.mode, self.noise(), device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; linear circuits need no evaluation key."""
        from ciphertune_concrete.circuit.worker import CircuitWorker

        if evaluation_key:
            raise ProtocolError("the concrete-circuit backend has no evaluation key")
        return CircuitWorker(fields)

    @classmethod
    def problem(cls) -> str | None:
        """See ``Backend.problem``."""
        from ciphertune_concrete.circuit.library import problem

        return problem()

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """Versions, parameters and the size of the secret key."""
        from ciphertune_concrete.circuit.library import version
        from ciphertune_concrete.circuit.params import reference

        p = reference(self.options.bits).parameters
        return {"concrete-python": version(), "LWE dimension": p.dimension, "accumulator (bits)": p.bits}
