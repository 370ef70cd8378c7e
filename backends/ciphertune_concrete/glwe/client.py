"""The client half: encryption and decryption. Holds the private key; never imports the worker half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, NoiseModel
from ciphertune.errors import ReplyError, SecurityError
from ciphertune_concrete.glwe import wire
from ciphertune_concrete.glwe.keys import KeyPair
from ciphertune_concrete.glwe.library import load, panics_are
from ciphertune_concrete.glwe.params import MESSAGE_BITS, NAME, SIZE, reply_words


class GlweClient(ClientHalf[Tensor]):
    """Encrypts tokens as integers, each token scaled so that its outputs use the whole range that does not wrap.

    Args:
        pair: the keys.
        noise: the error model.
        device: where results go; the library works on the processor.
    """

    def __init__(self, pair: KeyPair, noise: NoiseModel, device: torch.device) -> None:
        self._pair: KeyPair | None = pair
        self._noise = noise
        self._device = device
        self._library = load()

    def open_fields(self) -> Mapping[str, Any]:
        """The parameter set's name."""
        return {"parameters": NAME}

    def evaluation_key(self) -> Buffers:
        """The compression key: 134 MB."""
        return {"key": self._keys.compression}

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Tensor]:
        """See ``ClientHalf.encrypt``. Buffers: ``values`` (tokens, ciphertexts, 1248) and ``seeds`` (…, 2) int64."""
        x = x.detach().to("cpu", torch.float64)
        scale = self._noise.token_scale(x, linear_map)
        codes = (x * scale[:, None]).round_().to(torch.int64).contiguous().numpy().view(np.uint64)
        pair = self._keys
        with panics_are(SecurityError, f"{linear_map.label}: concrete-ml-extensions could not encrypt"):
            blob = self._library.encrypt_matrix(pair.library_key, pair.parameters, codes).serialize()
        return Encrypted(wire.request_buffers(blob, *x.shape), scale)

    def decrypt(self, reply: Buffers, state: Tensor, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        outputs = linear_map.out_features
        shape = (len(state), sum(reply_words(outputs)))
        values = reply.get("values")
        if values is None or values.dtype != torch.int64 or tuple(values.shape) != shape:
            got = "nothing" if values is None else f"{values.dtype} {tuple(values.shape)}"
            raise ReplyError(f"{linear_map.label}: expected a buffer 'values' int64 {shape} in the reply, got {got}")
        pair = self._keys
        with panics_are(ReplyError, f"{linear_map.label}: concrete-ml-extensions cannot read the reply"):
            result = self._library.CompressedResultEncryptedMatrix.deserialize(wire.reply_bytes(values, outputs))
            found = self._library.decrypt_matrix(result, pair.library_key, pair.parameters, (outputs - 1) % SIZE + 1)
        if found.shape != (len(state), outputs):
            raise ReplyError(f"{linear_map.label}: the reply decrypts to the wrong shape {found.shape}")
        half = 1 << MESSAGE_BITS - 1
        signed = torch.from_numpy(found.view(np.int64)).add_(half).bitwise_and_(2 * half - 1).sub_(half)
        return (signed.to(torch.float64) / state[:, None]).to(self._device, torch.float32)

    def close(self) -> None:
        """Let go of the keys."""
        self._pair = None

    @property
    def _keys(self) -> KeyPair:
        if self._pair is None:
            raise SecurityError("this client is closed and has let go of its keys")
        return self._pair
