"""The backend's options, its security statement, and its two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ciphertune.backend import Backend, Buffers, ClientHalf, LinearMap, SecurityStatement, WorkerHalf
from ciphertune.errors import SelectionError
from ciphertune_concrete.ml import library, wire
from ciphertune_concrete.ml.library import Quantization


@dataclasses.dataclass(frozen=True)
class ConcreteMLOptions:
    """Options of the concrete-ml backend, named as Concrete ML names them.

    Attributes:
        mode: ``execute`` encrypts; ``disable`` and ``simulate`` send codes in the clear, and evaluate them in plain
            arithmetic or by simulating the compiled circuit.
        n_bits: of quantized inputs and weights, 2 to 8.
        use_dynamic_quantization: a range for every token and output channel; 0 for one range of each weight, and one
            of each layer's inputs that its first batch decides and later values are clipped to.
    """

    mode: Literal["disable", "simulate", "execute"] = "execute"
    n_bits: int = 8
    use_dynamic_quantization: bool = True

    def __post_init__(self) -> None:
        if self.n_bits not in library.N_BITS:
            raise SelectionError(
                f"option n_bits={self.n_bits} must be from {library.N_BITS[0]} to {library.N_BITS[-1]}"
            )


class ConcreteMLBackend(Backend):
    """Products by Concrete ML's own quantizers, quantized modules and GLWE executor."""

    name = "concrete-ml"
    Options = ConcreteMLOptions

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
            128,
            "a worker sees GLWE ciphertext of Concrete ML; commercial use needs a patent licence from Zama",
            "GLWE, dimension 2048, modulus 2^64, Gaussian error of 2.8e-15 of it: parameters and figure are Zama's",
        )

    @property
    def weight_bits(self) -> None:
        """Workers hold float32 weights, which Concrete ML quantizes for each direction."""
        return

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``; exact."""
        features, outputs = linear_map.in_features, linear_map.out_features
        per_output = 12 * outputs
        if self.options.mode != "execute":
            return 2 * tokens * features, 8 * tokens * outputs + per_output
        return 8 * wire.request_words(tokens, features), 8 * wire.reply_words(tokens, outputs) + per_output

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """See ``Backend.client``. Raises ``PluginError`` where Concrete ML is not installed."""
        from ciphertune_concrete.ml.client import ConcreteMLClient

        return ConcreteMLClient(self.quantization, device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``. Raises ``PluginError`` where Concrete ML is not installed."""
        from ciphertune_concrete.ml.worker import ConcreteMLWorker

        return ConcreteMLWorker(fields, evaluation_key)

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """See ``Backend.diagnose``."""
        version = library.version()
        return {"concrete-ml": version if version is not None else f"not installed: {library.INSTALL}"}
