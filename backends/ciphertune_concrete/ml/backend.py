"""The backend's options, its security statement, and its two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from ciphertune.backend import Backend, Buffers, ClientHalf, LinearMap, SecurityStatement, WeightBits, Work, WorkerHalf
from ciphertune.errors import SelectionError
from ciphertune_concrete.licence import TERMS
from ciphertune_concrete.ml import library, wire
from ciphertune_concrete.ml.library import Quantization

_CIRCUITS_BELOW = 512
"""Features of a layer's smaller side from which on Concrete ML takes its GLWE executor."""


@dataclasses.dataclass(frozen=True)
class ConcreteMLOptions:
    """Options of the concrete-ml backend, named as Concrete ML names them.

    Attributes:
        mode: ``execute`` encrypts; ``disable`` and ``simulate`` send codes in the clear, and evaluate them in plain
            arithmetic or by simulating the compiled circuit.
        n_bits: of quantized inputs and weights, 2 to 8.
        use_dynamic_quantization: a range for every token and output channel; 0 for one range of each weight, and one
            of each layer's inputs that its first batch decides and later values are clipped to.
        weight_bits: of the weights that workers hold and Concrete ML quantizes: 32 for float32, 8 or 16 as in bundles.
    """

    mode: Literal["disable", "simulate", "execute"] = "execute"
    n_bits: int = 8
    use_dynamic_quantization: bool = True
    weight_bits: Literal[8, 16, 32] = 32

    def __post_init__(self) -> None:
        if self.n_bits not in library.N_BITS:
            raise SelectionError(
                f"option n_bits={self.n_bits} must be from {library.N_BITS[0]} to {library.N_BITS[-1]}"
            )


class ConcreteMLBackend(Backend):
    """Products by Concrete ML's own quantizers, quantized modules and GLWE executor."""

    name = "concrete-ml"
    interface = 1
    Options = ConcreteMLOptions
    licence: ClassVar[str] = TERMS
    # An output of a token takes the worker 15 ms.
    measured_size: ClassVar[tuple[int, int, int]] = (1, 512, 32)

    @property
    def quantization(self) -> Quantization:
        """The options as both halves use them."""
        options: ConcreteMLOptions = self.options
        return Quantization(options.mode, options.n_bits, options.use_dynamic_quantization)

    @property
    def security(self) -> SecurityStatement:
        """Encrypted in mode execute alone."""
        if self.options.mode != "execute":
            return SecurityStatement(
                False, None, f"no protection: mode={self.options.mode} sends quantized activations in the clear"
            )
        return SecurityStatement(
            True,
            133.1,
            "workers see only ciphertext, shapes, layer names and timing",
            "GLWE with Zama's default parameters, n = 2048, q = 2^64, binary secret, Gaussian error of standard "
            "deviation 2.845e-15 q; lattice-estimator, classical bits: dual-hybrid 133.1",
        )

    @property
    def weight_bits(self) -> WeightBits | None:
        """See ``Backend.weight_bits``: the option; Concrete ML quantizes for each direction what it finds."""
        bits: Literal[8, 16, 32] = self.options.weight_bits
        return None if bits == 32 else bits

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``; exact."""
        features, outputs = linear_map.in_features, linear_map.out_features
        per_output = 12 * outputs
        if self.options.mode != "execute":
            return 2 * tokens * features, 8 * tokens * outputs + per_output
        return 8 * wire.request_words(tokens, features), 8 * wire.reply_words(tokens, outputs) + per_output

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        """See ``Backend.work``: what an input costs an output is little beside what the output itself does."""
        if self.options.mode != "execute":
            return super().work(linear_map, tokens)
        sent, returned = (tokens * -(-size // wire.SIZE) for size in (linear_map.in_features, linear_map.out_features))
        by = "tokens × outputs to evaluate, tokens × blocks of 2048 values to encrypt and decrypt"
        return Work(sent, tokens * linear_map.out_features, returned, by)

    def allowance(self, linear_map: LinearMap, tokens: int) -> float:
        """See ``Backend.allowance``: 50 ms an output under encryption; 10 ms a token, and compiling, to simulate."""
        if self.options.mode == "execute":
            return 0.05 * tokens * linear_map.out_features
        return 0.01 * tokens + 60 if self.options.mode == "simulate" else 0.0

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """See ``Backend.client``. Raises ``PluginError`` where Concrete ML is not installed."""
        from ciphertune_concrete.ml.client import ConcreteMLClient

        return ConcreteMLClient(self.quantization, device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``. Raises ``PluginError`` where Concrete ML is not installed."""
        from ciphertune_concrete.ml.worker import ConcreteMLWorker

        return ConcreteMLWorker(fields, evaluation_key)

    @classmethod
    def problem(cls) -> str | None:
        """See ``Backend.problem``."""
        return library.problem()

    def advise(self, linear_map: LinearMap) -> str | None:
        """See ``Backend.advise``: Concrete ML itself evaluates small layers by circuits."""
        if self.options.mode != "execute" or min(linear_map.in_features, linear_map.out_features) >= _CIRCUITS_BELOW:
            return None
        return (
            f"below {_CIRCUITS_BELOW} features Concrete ML itself evaluates by circuits, which this backend does not "
            "have: concrete-circuit does, and is several times faster for such layers"
        )

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """See ``Backend.diagnose``."""
        return {library.PACKAGE: library.version() or "not installed"}
