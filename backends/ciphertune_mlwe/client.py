"""The client half: encryption and decryption. Holds the secret; never imports the worker half."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, NoiseModel
from ciphertune.errors import InputError, ReplyError, SecurityError
from ciphertune_mlwe.engine import make_engine
from ciphertune_mlwe.keys import MAX_BLOCKS, MasterKey
from ciphertune_mlwe.prg import SEED_BYTES


@dataclasses.dataclass(frozen=True)
class EncryptionState:
    """State that decryption needs: tokens asked for, tokens sent, and the scale per sent token, (sent,) float64."""

    tokens: int
    sent: int
    scale: Tensor = dataclasses.field(repr=False)


def fresh_seed() -> bytes:
    """32 bytes from the operating system. Raises ``SecurityError`` where it cannot give any: a seed is never reused."""
    try:
        return os.urandom(SEED_BYTES)
    except NotImplementedError as error:
        raise SecurityError("the operating system gives no randomness; nothing can be encrypted safely") from error


class MLWEClient(ClientHalf[EncryptionState]):
    """Encrypts (tokens, features) as ``b_{k,j} = ⟨a_k, s_j⟩ + e_{k,j} + m_{k,j}`` for feature k and token block j.

    The public a_k of one call are the keystream of a fresh seed, shared by all its token blocks.

    Args:
        key: the secret key.
        noise: the error model of the chosen options.
        request_bits: bits kept of every value that travels up.
        reply_bits, body_bits: bits kept of every value of the mask and of the body that come back.
        pad_tokens: the number of tokens sent is rounded up to a multiple of this, to hide the exact one.
        device: where encryption and decryption run.
    """

    def __init__(
        self,
        key: MasterKey,
        noise: NoiseModel,
        request_bits: int,
        reply_bits: int,
        body_bits: int,
        pad_tokens: int,
        device: torch.device,
    ) -> None:
        self._parameters = key.parameters
        self._noise = noise
        self._request_bits = request_bits
        self._reply_bits = reply_bits
        self._body_bits = body_bits
        self._pad = pad_tokens
        self._device = device
        self._engine = make_engine(key, device)

    def open_fields(self) -> Mapping[str, Any]:
        """The parameter set's name and the precision of both ways."""
        return {
            "parameters": self._parameters.name,
            "request_bits": self._request_bits,
            "reply_bits": self._reply_bits,
            "body_bits": self._body_bits,
        }

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[EncryptionState]:
        """See ``ClientHalf.encrypt``. Buffers: ``seed`` (32,) uint8 and ``b`` (features, planes, tokens) int8."""
        tokens = len(x)
        sent = -(-tokens // self._pad) * self._pad
        most = MAX_BLOCKS * self._parameters.degree
        if sent > most:
            raise InputError(f"{linear_map.label}: {sent} tokens are more than the {most} of one product")
        x = x.detach().to(self._device, torch.float32)
        if sent > tokens:
            x = torch.cat([x, x.new_zeros(sent - tokens, x.shape[1])])
        scale = self._noise.token_scale(x, linear_map)
        seed = fresh_seed()
        b = self._engine.encrypt(x, scale, seed, fresh_seed(), self._request_bits // 8)
        public_seed = torch.frombuffer(bytearray(seed), dtype=torch.uint8)
        return Encrypted({"seed": public_seed, "b": b}, EncryptionState(tokens, sent, scale))

    def decrypt(self, reply: Buffers, state: EncryptionState, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        digits = self._noise.digits
        rows = digits * linear_map.out_features
        a = self._expect(reply, "a", (rows, self._reply_bits // 8, self._parameters.dimension), linear_map)
        b = self._expect(reply, "b", (rows, self._body_bits // 8, state.sent), linear_map)
        y = self._engine.decrypt(a, b, 1.0 / state.scale)[: state.tokens]
        return y if digits == 1 else torch.add(*y.tensor_split(2, dim=1), alpha=256)

    def close(self) -> None:
        """Forget the secrets and free scratch memory."""
        self._engine.close()

    def _expect(self, reply: Buffers, name: str, shape: tuple[int, ...], linear_map: LinearMap) -> Tensor:
        buffer = reply.get(name)
        if buffer is None or buffer.dtype != torch.int8 or tuple(buffer.shape) != shape:
            got = "nothing" if buffer is None else f"{buffer.dtype} {tuple(buffer.shape)}"
            raise ReplyError(f"{linear_map.label}: expected buffer {name!r} int8 {shape} in the reply, got {got}")
        return buffer.to(self._device)
