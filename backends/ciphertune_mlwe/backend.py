"""The ``mlwe`` backend: options, security statement, noise model, and the two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ciphertune.backend import (
    Backend,
    Buffers,
    ClientHalf,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    WeightBits,
    Work,
    WorkerHalf,
)
from ciphertune.errors import ProtocolError, SelectionError
from ciphertune_mlwe.params import ERROR_VARIANCE, MODULUS_BITS, PARAMETER_SETS, ParameterSet


@dataclasses.dataclass(frozen=True)
class MLWEOptions:
    """Options of the mlwe backend.

    Attributes:
        params: parameter set.
        request_bits: bits kept of every ciphertext value sent; 24 saves a quarter of the upload and rounds
            activations to about 9 bits at 768 features.
        reply_bits: bits kept of every value of the mask that comes back, whose rounding the secret multiplies.
        body_bits: bits kept of every value of the body that comes back, one a token and output, at most
            ``reply_bits``. If not given: 16 with 8-bit weights, whose own rounding is far larger, and
            ``reply_bits`` with 16-bit weights.
        weight_bits: how workers hold weights, per output channel; 16 doubles evaluation and more than doubles what
            comes back.
        pad_tokens: round the number of tokens up to a multiple of this, to hide the exact one.
        key: key file to use, made if it does not exist; a key of this process alone if not given.
    """

    params: Literal["mlwe-1280", "mlwe-1536"] = "mlwe-1280"
    request_bits: Literal[24, 32] = 32
    reply_bits: Literal[16, 24, 32] = 24
    body_bits: Literal[16, 24, 32] | None = None
    weight_bits: Literal[8, 16] = 8
    pad_tokens: int = 1
    key: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.pad_tokens <= 1 << 16:
            raise SelectionError(f"option pad_tokens={self.pad_tokens} must be between 1 and 65536")
        if self.body_bits is not None and self.body_bits > self.reply_bits:
            raise SelectionError(
                f"option body_bits={self.body_bits} must not be more than reply_bits={self.reply_bits}: "
                "the mask's rounding is the larger error, so raise reply_bits first"
            )

    @property
    def kept_body_bits(self) -> int:
        """Bits kept of the body: ``body_bits``, or what stands for it."""
        if self.body_bits is not None:
            return self.body_bits
        return 16 if self.weight_bits == 8 else self.reply_bits


def _squared_unit(bits: int) -> float:
    """The square of what one unit is worth where so many bits of the modulus are kept."""
    return 4.0 ** (MODULUS_BITS - bits)


class MLWEBackend(Backend):
    """Module-LWE encryption; workers evaluate int8 matrix products on ciphertext."""

    name = "mlwe"
    Options = MLWEOptions

    @property
    def parameters(self) -> ParameterSet:
        """The chosen parameter set."""
        return PARAMETER_SETS[self.options.params]

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under Module-LWE."""
        p = self.parameters
        figures = ", ".join(f"{attack} {bits}" for attack, bits in p.estimates.items())
        return SecurityStatement(
            True,
            p.security_bits,
            "workers see only ciphertext, shapes, layer names and timing",
            f"Module-LWE, n = {p.dimension}, q = 2^{MODULUS_BITS}, ternary secret, centred binomial error of "
            f"variance {ERROR_VARIANCE}; lattice-estimator at sigma {p.sigma}, classical bits: {figures}",
        )

    @property
    def weight_bits(self) -> WeightBits:
        """See ``Backend.weight_bits``: the option of that name."""
        bits: WeightBits = self.options.weight_bits
        return bits

    @property
    def noise(self) -> NoiseModel:
        """Errors of encryption and of rounding both ways, in units of ciphertext values mod 2^32.

        A fresh value carries the error and its rounding, with the message's, to ``request_bits``. Rounding a reply adds
        1/12 of the squared unit of ``body_bits`` for b', less what is a multiple of the request's unit already, and,
        through a ternary secret of variance 2/3, n/18 of that of ``reply_bits`` for a'.
        """
        o = self.options
        sent = _squared_unit(o.request_bits)
        received = ERROR_VARIANCE + sent / 12
        body = max(_squared_unit(o.kept_body_bits) - sent, 0.0) / 12
        mask = (_squared_unit(o.reply_bits) - 1) * self.parameters.dimension / 18
        return NoiseModel(2.0 ** (MODULUS_BITS - 1), received, mask + body, o.weight_bits // 8)

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``."""
        from ciphertune_mlwe.prg import SEED_BYTES

        o = self.options
        sent = -(-tokens // o.pad_tokens) * o.pad_tokens
        row = o.reply_bits // 8 * self.parameters.dimension + o.kept_body_bits // 8 * sent
        up = SEED_BYTES + linear_map.in_features * (o.request_bits // 8) * sent
        return up, linear_map.out_features * (o.weight_bits // 8) * row

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        """See ``Backend.work``.

        All of it has a part that does not grow with tokens, so halves of a product cost more than half of it: the
        public matrix of n columns is made and transformed at the client, made again and multiplied by the weight at
        the worker, and transformed once more where it comes back. How much of each there is was fitted to products of
        32 to 2,048 tokens and 64 to 4,096 features on one processor; on another the proportions differ a little.
        """
        k, n, dimension, o = linear_map.in_features, linear_map.out_features, self.parameters.dimension, self.options
        # Multiplying, putting each output's digits together, and expanding the seed, in multiply-adds.
        columns = o.request_bits / 32 * tokens + dimension
        evaluate = o.weight_bits // 8 * n * columns * (k + 120) + 180 * k * dimension
        by = f"inputs × outputs × (tokens + {dimension}) to evaluate, and less to encrypt and decrypt"
        return Work(k * (tokens + 0.6 * dimension), evaluate, n * (tokens + 0.75 * dimension), by)

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with the key file's key, or a fresh one. Raises ``KeyFileError``."""
        from ciphertune_mlwe.client import MLWEClient
        from ciphertune_mlwe.keys import MasterKey

        o = self.options
        if o.key is None:
            key = MasterKey.generate(self.parameters)
        elif (file := Path(o.key).expanduser()).exists():
            key = MasterKey.load(file, self.parameters)
        else:
            key = MasterKey.generate(self.parameters)
            key.save(file)
        return MLWEClient(key, self.noise, o.request_bits, o.reply_bits, o.kept_body_bits, o.pad_tokens, device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; this scheme has no evaluation key."""
        from ciphertune_mlwe.worker import MLWEWorker

        if evaluation_key:
            raise ProtocolError("the mlwe backend has no evaluation key")
        return MLWEWorker(fields, device)

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """Which product kernel this machine uses, and the speed of each that is exact."""
        from ciphertune_mlwe.kernels import choose_kernel
        from ciphertune_mlwe.native import library

        chosen, speeds = choose_kernel(device)
        loops = "compiled" if library() is not None else "portable (no C compiler was found at installation)"
        return {
            "kernel": chosen,
            "encryption loops": loops,
            **{f"{name} product (GMAC/s)": round(speed, 1) for name, speed in speeds.items()},
        }
