"""The client half: quantizes and encrypts inputs, decrypts and dequantizes outputs. Holds keys and no weight."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap
from ciphertune.errors import ReplyError
from ciphertune_concrete.ml.library import ForeignError, Quantization, bits_only, executor, guarded, require
from ciphertune_concrete.ml.wire import is_reply


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized input: ``x ≈ scale · (codes - zero_point)``.

    Attributes:
        codes: (tokens, features) int16.
        scale, zero_point: (tokens, 1) float64.
    """

    codes: Tensor = dataclasses.field(repr=False)
    scale: Tensor = dataclasses.field(repr=False)
    zero_point: Tensor = dataclasses.field(repr=False)


class ConcreteMLClient(ClientHalf[Codes]):
    """Concrete ML's input quantizers and, in mode execute, its encryption.

    Args:
        quantization: how to quantize.
        device: where inputs come from and outputs go; Concrete ML itself works on the CPU.

    Raises:
        PluginError: Concrete ML is not installed.
    """

    def __init__(self, quantization: Quantization, device: torch.device) -> None:
        self._quantization = quantization
        self._device = device
        self._executor = executor(quantization)
        self._bits = bits_only(quantization)
        self._fixed: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()
        if quantization.mode == "execute":
            self._executor.keygen()

    def open_fields(self) -> Mapping[str, Any]:
        """The options that the worker half must share."""
        return dataclasses.asdict(self._quantization)

    def evaluation_key(self) -> Buffers:
        """The compression key, 128 MiB: the worker packs outputs with it and can decrypt nothing."""
        if self._quantization.mode != "execute":
            return {}
        return {"compression_key": _bytes(self._executor.compression_key.serialize())}

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Codes]:
        """See ``ClientHalf.encrypt``; in modes other than execute the codes are sent as they are."""
        x = x.to("cpu")
        state = self._per_token(x) if self._quantization.dynamic else self._in_one_range(x, linear_map)
        if self._quantization.mode != "execute":
            return Encrypted({"codes": state.codes}, state)
        library = self._executor.fhext
        # The library takes negative numbers as uint64, modulo 2^64.
        plain = np.ascontiguousarray(state.codes.numpy().astype(np.int64).astype(np.uint64))
        encrypted = library.encrypt_matrix(self._key(), self._executor.glwe_crypto_params, plain)
        return Encrypted({"ciphertext": _bytes(encrypted.serialize())}, state)

    def decrypt(self, reply: Buffers, state: Codes, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        outputs = linear_map.out_features
        rows: dict[str, Tensor] = {}
        for name in ("scale", "zero_point", "sum"):
            row = reply.get(name)
            if row is None or row.dtype != torch.float32 or row.shape != (outputs,) or not bool(row.isfinite().all()):
                raise ReplyError(f"{linear_map.label}: expected finite float32 values {name!r} of shape ({outputs},)")
            rows[name] = row.to("cpu")
        raw = self._accumulators(reply, len(state.codes), linear_map)
        # In double precision: with the executor's float32, sums beyond 2^24 would lose their last bits.
        y: Tensor = self._executor._apply_correction_and_dequantize(
            raw,
            state.codes.double(),
            state.zero_point,
            rows["zero_point"].double(),
            rows["sum"].double(),
            linear_map.in_features,
            state.scale.float(),
            rows["scale"],
        )
        return y.to(self._device)

    def close(self) -> None:
        """Forget the key."""
        self._executor.private_key = None
        self._executor.compression_key = None
        self._fixed.clear()

    def _key(self) -> Any:
        if self._executor.private_key is None:
            raise ReplyError("the keys of this session are gone: it is closed")
        return self._executor.private_key

    def _per_token(self, x: Tensor) -> Codes:
        codes, scale, zero_point, _ = self._executor._dynamic_input_quantization(x, self._bits)
        # The executor gives a token of equal values the scale 1, which rounds it to a whole number.
        flat = x.amin(1, keepdim=True) == x.amax(1, keepdim=True)
        top = (1 << self._quantization.n_bits) - 1
        codes = torch.where(flat, float(top), codes)
        scale = torch.where(flat, x[:, :1].double() / top, scale.double())
        zero_point = torch.where(flat, 0.0, zero_point.double())
        lowest = self._quantization.lowest_code
        return Codes((codes + lowest).to(torch.int16), scale, zero_point + lowest)

    def _in_one_range(self, x: Tensor, linear_map: LinearMap) -> Codes:
        place = (linear_map.label, linear_map.in_features)
        with self._lock:
            if place not in self._fixed:
                array = require("concrete.ml.quantization.quantizers").QuantizedArray
                self._fixed[place] = array(self._quantization.n_bits, x.numpy(), is_signed=True).quantizer
            quantizer = self._fixed[place]
        codes = torch.from_numpy(quantizer.quant(x.numpy(), np.int64)).to(torch.int16)
        # Outputs of a token of zeros are zeros, also where encryption adds noise.
        scale = torch.where((x == 0).all(1, keepdim=True), 0.0, float(quantizer.scale)).double()
        return Codes(codes, scale, torch.full((len(x), 1), float(quantizer.zero_point), dtype=torch.float64))

    def _accumulators(self, reply: Buffers, tokens: int, linear_map: LinearMap) -> Tensor:
        """Sums of products of codes, (tokens, outputs) int64."""
        shape = (tokens, linear_map.out_features)
        if self._quantization.mode != "execute":
            sums = reply.get("sums")
            if sums is None or sums.dtype != torch.int64 or sums.shape != shape:
                raise ReplyError(f"{linear_map.label}: expected int64 'sums' of shape {shape}")
            return sums.to("cpu")
        ciphertext = reply.get("ciphertext")
        if ciphertext is None or ciphertext.dtype != torch.uint8 or ciphertext.dim() != 1:
            raise ReplyError(f"{linear_map.label}: expected bytes 'ciphertext'")
        if not is_reply(ciphertext, *shape):
            raise ReplyError(f"{linear_map.label}: the reply is no ciphertext of shape {shape}")
        library, size = self._executor.fhext, self._executor.poly_size
        try:
            result = guarded(library.CompressedResultEncryptedMatrix.deserialize, ciphertext.cpu().numpy().tobytes())
            values = guarded(
                library.decrypt_matrix,
                result,
                self._key(),
                self._executor.glwe_crypto_params,
                linear_map.out_features % size or size,
            )
        except ForeignError as error:
            raise ReplyError(f"{linear_map.label}: the reply cannot be decrypted ({error})") from None
        if values.shape != shape:
            raise ReplyError(f"{linear_map.label}: expected a ciphertext of shape {shape}, got {values.shape}")
        return torch.from_numpy(values.astype(np.int64))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
