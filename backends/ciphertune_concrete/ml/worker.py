"""The worker half: quantizes weights and multiplies codes or ciphertext by them. Holds weights and no private key."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_concrete.ml.library import (
    ForeignError,
    Quantization,
    bits_only,
    executor,
    guarded,
    key_bytes,
    largest_sum,
    require,
)
from ciphertune_concrete.ml.wire import request_tokens
from ciphertune_concrete.threads import prepare_thread


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized matrix M of a product ``x M``, M of shape (features, outputs).

    Attributes:
        codes: (features, outputs) int16, ``M ≈ scale · (codes - zero_point)``.
        scale, zero_point, sum: (outputs,) float32; the sum is of each column's codes.
        module: the quantized module that evaluates it, where one does.
    """

    codes: Tensor = dataclasses.field(repr=False)
    scale: Tensor = dataclasses.field(repr=False)
    zero_point: Tensor = dataclasses.field(repr=False)
    sum: Tensor = dataclasses.field(repr=False)
    module: Any = dataclasses.field(default=None, repr=False)


class Prepared:
    """A weight of shape (N, K) and what was made of it for either direction; made when first asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._made: dict[Direction, Quantized] = {}
        self._lock = threading.Lock()

    def matrix(self, direction: Direction, make: Any) -> Quantized:
        """The quantized matrix of a direction; ``make`` gets the float32 matrix, (features, outputs)."""
        with self._lock:
            if direction not in self._made:
                self._made[direction] = make(self.weight.t() if direction == "forward" else self.weight)
            return self._made[direction]


class ConcreteMLWorker(WorkerHalf):
    """Concrete ML's quantized modules, or its GLWE product without the private key.

    Args:
        fields: what the client's ``open_fields`` sent.
        evaluation_key: what its ``evaluation_key`` sent.

    Raises:
        PluginError: Concrete ML is not installed.
        ProtocolError: the fields or the key are not those of a client of this version.
    """

    def __init__(self, fields: Mapping[str, Any], evaluation_key: Buffers) -> None:
        self._quantization = Quantization.read(fields)
        self._executor = executor(self._quantization)
        self._bits = bits_only(self._quantization)
        self._parameters = json.loads(self._executor.fhext.default_params())
        if self._quantization.mode == "execute":
            self._executor.compression_key = self._read_key(evaluation_key.get("compression_key"))

    def prepare(self, weight: Tensor) -> Prepared:
        """See ``WorkerHalf.prepare``: float32 weights or integer codes, quantized when they are first used."""
        return Prepared(weight)

    @property
    def form(self) -> str:
        """See ``WorkerHalf.form``."""
        return repr(self._quantization)

    def reply_bytes(self, prepared: Prepared, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        outputs, features = prepared.weight.shape if direction == "forward" else prepared.weight.shape[::-1]
        if self._quantization.mode == "execute":
            data = request.get("ciphertext")
            tokens = None if data is None else wire.request_tokens(data, features)
            return 0 if tokens is None else 8 * wire.reply_words(tokens, outputs) + 12 * outputs
        codes = request.get("codes")
        return 0 if codes is None or codes.dim() != 2 else 8 * len(codes) * outputs + 12 * outputs

    def evaluate(self, prepared: Prepared, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``. The reply carries what dequantizing takes: three numbers an output."""
        matrix = prepared.matrix(direction, self._quantize)
        reply = {"scale": matrix.scale, "zero_point": matrix.zero_point, "sum": matrix.sum}
        if self._quantization.mode == "execute":
            return {"ciphertext": self._on_ciphertext(matrix, request.get("ciphertext")), **reply}
        codes = request.get("codes")
        features = len(matrix.codes)
        if codes is None or codes.dtype != torch.int16 or codes.dim() != 2 or codes.shape[1] != features:
            raise ProtocolError(f"expected an int16 buffer 'codes' of shape (tokens, {features})")
        lowest, highest = self._quantization.lowest_code, self._quantization.highest_code
        if codes.numel() and not lowest <= int(codes.min()) <= int(codes.max()) <= highest:
            raise ProtocolError(f"codes must be between {lowest} and {highest}")
        return {"sums": self._on_codes(matrix, codes.to("cpu")), **reply}

    def close(self) -> None:
        """Forget the session's key."""
        self._executor.compression_key = None

    def _read_key(self, key: Tensor | None) -> Any:
        expected = key_bytes(self._parameters)
        if key is None or key.dtype != torch.uint8 or key.dim() != 1:
            raise ProtocolError("expected the bytes 'compression_key'")
        if len(key) != expected:
            raise ProtocolError(
                f"the compression key has {len(key)} bytes and not {expected}: "
                "it was cut short, or is of other parameters"
            )
        try:
            return guarded(self._executor.fhext.deserialize_compression_key, key.cpu().numpy().tobytes())
        except ForeignError as error:
            raise ProtocolError(f"the compression key cannot be read ({error})") from None

    def _quantize(self, matrix: Tensor) -> Quantized:
        matrix = matrix.to("cpu", torch.float32).contiguous()
        if self._quantization.by_module:
            return _as_module(matrix, self._quantization)
        if self._quantization.per_channel:
            quantized = self._per_channel(matrix)
        else:
            array = require("concrete.ml.quantization.quantizers").QuantizedArray
            bits = self._quantization.n_bits
            quantized = _in_one_range(array(bits, matrix.numpy(), is_signed=True, is_symmetric=True))
        if self._quantization.mode == "execute":
            self._refuse_to_wrap(quantized.codes)
        return quantized

    def _refuse_to_wrap(self, codes: Tensor) -> None:
        lowest, highest = self._quantization.lowest_code, self._quantization.highest_code
        up, down = codes.clamp_min(0).sum(0), codes.clamp_max(0).sum(0)
        worst = int(torch.maximum(highest * up + lowest * down, -(highest * down + lowest * up)).max())
        limit = largest_sum(self._parameters)
        if worst >= limit:
            raise ProtocolError(
                f"with n_bits={self._quantization.n_bits}, sums over {len(codes)} features can reach {worst} and "
                f"wrap around at {limit}: use fewer bits, or leave this layer at the client"
            )

    def _per_channel(self, matrix: Tensor) -> Quantized:
        codes, scale, zero_point, _ = self._executor._per_channel_weight_quantization(
            matrix.numpy(), self._bits, torch.device("cpu")
        )
        # The executor gives a channel of equal weights the scale 1, which rounds it to a whole number.
        flat = matrix.amin(0) == matrix.amax(0)
        top = (1 << (self._quantization.n_bits - 1)) - 1
        codes = torch.where(flat, float(top), codes)
        scale = torch.where(flat, matrix[0] / top, scale.reshape(-1))
        zero_point = torch.where(flat, 0.0, zero_point.reshape(-1))
        return Quantized(codes.to(torch.int16), scale, zero_point, codes.sum(0))

    def _on_codes(self, matrix: Quantized, codes: Tensor) -> Tensor:
        if matrix.module is None:
            # In float32, as the executor does.
            return torch.matmul(codes.float(), matrix.codes.float()).long()
        sums = matrix.module.quantized_forward(codes.numpy().astype(np.int64), fhe=self._quantization.mode)
        return torch.from_numpy(np.ascontiguousarray(sums, dtype=np.int64))

    def _on_ciphertext(self, matrix: Quantized, data: Tensor | None) -> Tensor:
        if data is None or data.dtype != torch.uint8 or data.dim() != 1:
            raise ProtocolError("expected the bytes 'ciphertext'")
        if request_tokens(data, len(matrix.codes)) is None:
            raise ProtocolError(f"the request is no ciphertext for {len(matrix.codes)} features")
        library = self._executor.fhext
        if self._executor.compression_key is None:
            raise ProtocolError("the session is closed")
        # Negative numbers are uint64 to the library, modulo 2^64.
        weight = np.ascontiguousarray(matrix.codes.numpy().astype(np.int64).astype(np.uint64))
        try:
            encrypted = guarded(library.EncryptedMatrix.deserialize, data.cpu().numpy().tobytes())
            result = guarded(library.matrix_multiplication, encrypted, weight, self._executor.compression_key)
            return torch.frombuffer(bytearray(guarded(result.serialize)), dtype=torch.uint8)
        except ForeignError as error:
            raise ProtocolError(f"the request cannot be evaluated ({error})") from None


def _in_one_range(array: Any) -> Quantized:
    """A matrix that was quantized with one symmetric range."""
    codes = torch.from_numpy(array.qvalues.astype(np.int16))
    outputs = codes.shape[1]
    scale = torch.full((outputs,), float(array.quantizer.scale), dtype=torch.float32)
    return Quantized(codes, scale, torch.zeros(outputs, dtype=torch.float32), codes.sum(0, dtype=torch.float32))


def _as_module(matrix: Tensor, quantization: Quantization) -> Quantized:
    """Concrete ML's quantized module of ``x M``, compiled for mode simulate.

    Its inputs are codes that the client quantized, so of the data it is calibrated with only the range matters:
    that of the codes, and for a circuit those inputs that give the largest and the smallest sum there can be.
    """
    compiler = require("concrete.ml.torch.compile")
    prepare_thread()
    linear = require("concrete.ml.torch.hybrid_backprop_linear").BackwardModuleLinear(matrix)
    extremes = matrix.clamp_min(0).sum(0).argmax(), matrix.clamp_max(0).sum(0).argmin()
    signs = torch.stack([torch.where(matrix[:, column] > 0, 1.0, -1.0) for column in extremes]).to(torch.float32)
    ones = torch.ones(1, len(matrix), dtype=torch.float32)
    calibration = torch.cat([signs, -signs, ones, -ones])
    build = compiler.compile_torch_model if quantization.mode == "simulate" else compiler.build_quantized_module
    module = build(linear, calibration, n_bits=quantization.n_bits)
    (_, operation) = next(iter(module.quant_layers_dict.values()))
    return dataclasses.replace(_in_one_range(next(iter(operation.constant_inputs.values()))), module=module)
