"""The client half: encryption and decryption. Holds the secret key; never imports the worker half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, NoiseModel
from ciphertune.errors import InputError, ReplyError
from ciphertune.protocol import DEFAULT_LIMITS
from ciphertune_concrete.circuit.library import fhe, version
from ciphertune_concrete.circuit.params import ANCHOR, REQUEST_WORDS, STRIP, Mode, Words, reference, words_of


class CircuitClient(ClientHalf[Tensor]):
    """Quantizes each token to the accumulator's range and encrypts it, a ciphertext a value.

    Args:
        bits: width of the accumulator.
        mode: ``simulate`` encrypts nothing.
        noise: the error model of the chosen options.
        device: where products are returned.

    Raises:
        PluginError: concrete-python is not installed here.
    """

    def __init__(self, bits: int, mode: Mode, noise: NoiseModel, device: torch.device) -> None:
        self._mode = mode
        self._noise = noise
        self._device = device
        self._reference = reference(bits)
        self._keys: Any = None
        if mode == "execute":
            self._keys = fhe().Client(self._reference.specs)
            self._keys.keygen()

    def open_fields(self) -> Mapping[str, Any]:
        """The version of concrete-python and the parameters: the client chooses them, for they are its protection."""
        p = self._reference.parameters
        return {
            "library": version(),
            "mode": self._mode,
            "bits": p.bits,
            "dimension": p.dimension,
            "variance": p.variance,
        }

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Tensor]:
        """See ``ClientHalf.encrypt``. Buffer: ``x`` (tokens, features, 3) int64, the seed and body of each value."""
        tokens, features = x.shape
        largest = max(features * REQUEST_WORDS, linear_map.out_features * self._reference.parameters.reply_words)
        most = DEFAULT_LIMITS.buffer_bytes // (8 * largest)
        if tokens > most and self._mode == "execute":
            raise InputError(
                f"{linear_map.label}: {tokens} tokens are more than the {most} whose ciphertexts fit one message; "
                "use smaller batches"
            )
        x = x.detach().to("cpu", torch.float64)
        scale = self._noise.token_scale(x, linear_map)
        codes = (x * scale[:, None]).round().to(torch.int64)
        if self._mode == "simulate":
            return Encrypted({"x": codes}, scale)
        strips = _strips(codes.reshape(-1).numpy())
        words = np.concatenate([self._encrypt(strip) for strip in strips])[: tokens * features * REQUEST_WORDS]
        sent = torch.from_numpy(words.view(np.int64).reshape(tokens, features, REQUEST_WORDS))
        return Encrypted({"x": sent}, scale)

    def decrypt(self, reply: Buffers, state: Tensor, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        shape: tuple[int, ...] = (len(state), linear_map.out_features)
        if self._mode == "execute":
            shape = (*shape, self._reference.parameters.reply_words)
        y = reply.get("y")
        if y is None or y.dtype != torch.int64 or tuple(y.shape) != shape:
            got = "nothing" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ReplyError(f"{linear_map.label}: expected buffer 'y' int64 {shape} in the reply, got {got}")
        words = y.cpu().contiguous().numpy()
        if self._mode == "execute":
            values = words.view(np.uint64).reshape(-1, shape[-1])
            try:
                decrypted = np.concatenate([self._decrypt(strip) for strip in _strips(values)])
            except RuntimeError as error:
                raise ReplyError(f"{linear_map.label}: the reply cannot be decrypted") from error
            words = decrypted[: len(values)].reshape(shape[:2])
        scaled = torch.from_numpy(words.astype(np.float64)) / state[:, None]
        return scaled.to(self._device, torch.float32)

    def close(self) -> None:
        """Forget the key."""
        self._keys = None

    def _encrypt(self, strip: NDArray[np.int64]) -> Words:
        value = self._keys.encrypt(strip, function_name=ANCHOR)
        return words_of(value, STRIP * REQUEST_WORDS, self._reference.request)

    def _decrypt(self, strip: Words) -> NDArray[np.int64]:
        values: NDArray[np.int64] = self._keys.decrypt(self._reference.reply.fill(strip), function_name=ANCHOR)
        return values


def _strips(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Values in strips of ``STRIP``, the last one filled up with zeros."""
    missing = -len(values) % STRIP
    padded = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)]) if missing else values
    return list(padded.reshape(-1, STRIP, *values.shape[1:]))
