"""The client half: Microsoft SEAL encodes, encrypts, decrypts and decodes. Never imports the worker half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import seal
import torch
from numpy.typing import NDArray
from torch import Tensor

from ciphertune import SecurityError
from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, NoiseModel
from ciphertune.errors import ReplyError
from ciphertune_ckks.ring import DEGREE, FIELDS, MODULUS, SLOTS, TOKENS, pack, unpack

_BODY = 2 * DEGREE * 8
"""Bytes of a ciphertext's residues as SEAL stores them."""


class CKKSClient(ClientHalf[Tensor]):
    """Encrypts under a key of its own, which never leaves it: there is no public and no evaluation key.

    Tokens are scaled one by one, so CKKS's own scale is 1, and integer combinations of ciphertexts leave it there.
    A request's state is the scale per token, (tokens,) float64.

    Args:
        noise: the backend's error model.
        device: where results go.

    Raises:
        SecurityError: SEAL does not grant these parameters 192 bits of security, or stores ciphertexts otherwise.
    """

    def __init__(self, noise: NoiseModel, device: torch.device) -> None:
        self._noise, self._device = noise, device
        parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus([seal.Modulus(MODULUS)])
        self._context = seal.SEALContext(parameters, True, seal.sec_level_type.tc192)
        if not self._context.parameters_set():
            raise SecurityError(f"SEAL refuses the parameters: {self._context.parameter_error_message()}")
        secret = seal.KeyGenerator(self._context).secret_key()
        self._encryptor = seal.Encryptor(self._context, secret)
        self._decryptor = seal.Decryptor(self._context, secret)
        self._encoder = seal.CKKSEncoder(self._context)
        # SEAL stores a ciphertext as a header, the same for all of ours, and its residues; only these travel.
        stored = self._encrypt(np.zeros(SLOTS, dtype=np.complex128))
        self._header = stored[:-_BODY]
        if np.frombuffer(stored[-_BODY:], dtype=np.uint64).max() >= MODULUS:
            raise SecurityError("this version of SEAL stores ciphertexts in a form that ciphertune-ckks does not know")

    def open_fields(self) -> Mapping[str, Any]:
        """The parameters' name."""
        return FIELDS

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Tensor]:
        """See ``ClientHalf.encrypt``. Buffer ``c`` as ``ring.pack`` makes it, with a block for every 2048 tokens."""
        x = x.detach().cpu()
        tokens, features = x.shape
        scale = self._noise.token_scale(x, linear_map)
        padded = torch.zeros(-(-tokens // TOKENS) * TOKENS, features, dtype=torch.float64)
        padded[:tokens] = x.double() * scale[:, None]
        parts = padded.view(-1, 2, SLOTS, features).permute(3, 0, 1, 2)
        slots = torch.complex(parts[:, :, 0], parts[:, :, 1]).contiguous().numpy()
        residues = np.empty((*slots.shape[:2], 2, DEGREE), dtype=np.int64)
        for index in np.ndindex(slots.shape[:2]):
            stored = self._encrypt(slots[index])
            residues[index] = np.frombuffer(stored[-_BODY:], dtype=np.int64).reshape(2, DEGREE)
        return Encrypted(pack(torch.from_numpy(residues)), scale)

    def decrypt(self, reply: Buffers, state: Tensor, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        outputs, blocks = linear_map.out_features, -(-len(state) // TOKENS)
        residues = unpack(reply, outputs, ReplyError, linear_map.label).contiguous().numpy()
        if residues.shape[1] != blocks:
            raise ReplyError(f"{linear_map.label}: {residues.shape[1]} blocks of tokens came back instead of {blocks}")
        slots = np.empty((outputs, blocks, SLOTS), dtype=np.complex128)
        for index in np.ndindex(outputs, blocks):
            ciphertext = seal.Ciphertext()
            ciphertext.load_bytes(self._context, self._header + residues[index].tobytes())
            slots[index] = self._encoder.decode_complex(self._decryptor.decrypt(ciphertext))
        parts = torch.view_as_real(torch.from_numpy(slots)).permute(1, 3, 2, 0)
        y = parts.reshape(-1, outputs)[: len(state)] / state[:, None]
        return y.to(torch.float32).to(self._device)

    def close(self) -> None:
        """Forget the key; SEAL overwrites its memory."""
        for name in ("_encryptor", "_decryptor"):
            vars(self).pop(name, None)

    def _encrypt(self, slots: NDArray[np.complex128]) -> bytes:
        """A ciphertext of (SLOTS,) values as SEAL stores it, not compressed."""
        ciphertext = self._encryptor.encrypt_symmetric(self._encoder.encode_complex(slots, 1.0))
        stored: bytes = ciphertext.to_string(seal.compr_mode_type.none)
        return stored
