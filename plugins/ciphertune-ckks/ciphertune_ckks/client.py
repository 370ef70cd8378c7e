"""The client half: Microsoft SEAL encodes, encrypts, decrypts and decodes. Never imports the worker half."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import seal
import torch
from numpy.typing import NDArray
from torch import Tensor

from ciphertune.backend import Buffers, ClientHalf, Encrypted, LinearMap, NoiseModel
from ciphertune.errors import ReplyError, SecurityError
from ciphertune_ckks.residues import DEGREE, SLOTS, TOKENS, Ring


@dataclasses.dataclass(frozen=True)
class EncryptionState:
    """What decryption needs: the number of ciphertexts per feature, and the scale per token, (tokens,) float64."""

    blocks: int
    scale: Tensor = dataclasses.field(repr=False)


class CKKSClient(ClientHalf[EncryptionState]):
    """Encrypts under a key of its own, which never leaves it: there is no public and no evaluation key.

    Values are scaled per token, so CKKS's own scale is 1 and an integer combination of ciphertexts leaves it there.

    Args:
        ring: the ciphertexts' ring.
        noise: the backend's error model.
        device: where inputs come from and results go.

    Raises:
        SecurityError: SEAL does not grant these parameters the security that is claimed, or stores them otherwise.
    """

    def __init__(self, ring: Ring, noise: NoiseModel, device: torch.device) -> None:
        self._ring, self._noise, self._device = ring, noise, device
        parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus([seal.Modulus(ring.modulus)])
        level = getattr(seal.sec_level_type, f"tc{ring.security_bits}")
        self._context = seal.SEALContext(parameters, True, level)
        if not self._context.parameters_set():
            raise SecurityError(f"SEAL refuses the parameters: {self._context.parameter_error_message()}")
        secret = seal.KeyGenerator(self._context).secret_key()
        self._encryptor = seal.Encryptor(self._context, secret)
        self._decryptor = seal.Decryptor(self._context, secret)
        self._encoder = seal.CKKSEncoder(self._context)
        # SEAL stores a ciphertext as a header, the same for all of ours, and its residues; only these travel.
        stored = self._encrypt(np.zeros(SLOTS, dtype=np.complex128))
        self._header = stored[: -2 * DEGREE * 8]
        residues = self._residues(stored)
        if int(residues.min()) < 0 or int(residues.max()) >= ring.modulus:
            raise SecurityError("this version of SEAL stores ciphertexts in another form than ciphertune-ckks knows")

    def open_fields(self) -> Mapping[str, Any]:
        """The modulus."""
        return {"modulus_bits": self._ring.bits}

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[EncryptionState]:
        """See ``ClientHalf.encrypt``. Buffer ``c`` as ``Ring.pack`` makes it, a block for every 2048 tokens."""
        scale = self._noise.token_scale(x, linear_map).cpu()
        tokens, features = x.shape
        blocks = -(-tokens // TOKENS)
        padded = torch.zeros(blocks * TOKENS, features, dtype=torch.float64)
        torch.mul(x.detach().cpu().double(), scale[:, None], out=padded[:tokens])
        parts = padded.view(blocks, 2, SLOTS, features).permute(3, 0, 1, 2)
        slots = torch.complex(parts[:, :, 0], parts[:, :, 1]).contiguous().numpy()
        residues = torch.empty(features, blocks, 2, DEGREE, dtype=torch.int64)
        for index in np.ndindex(features, blocks):
            residues[index] = self._residues(self._encrypt(slots[index]))
        return Encrypted(self._ring.pack(residues), EncryptionState(blocks, scale))

    def decrypt(self, reply: Buffers, state: EncryptionState, linear_map: LinearMap) -> Tensor:
        """See ``ClientHalf.decrypt``."""
        outputs, blocks = linear_map.out_features, state.blocks
        residues = self._ring.unpack(reply, outputs, blocks, ReplyError, linear_map.label)
        slots = np.empty((outputs, blocks, SLOTS), dtype=np.complex128)
        for index in np.ndindex(outputs, blocks):
            ciphertext = seal.Ciphertext()
            ciphertext.load_bytes(self._context, self._header + residues[index].numpy().tobytes())
            slots[index] = self._encoder.decode_complex(self._decryptor.decrypt(ciphertext))
        parts = torch.view_as_real(torch.from_numpy(slots)).permute(1, 3, 2, 0)
        y = parts.reshape(-1, outputs)[: len(state.scale)] / state.scale[:, None]
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

    @staticmethod
    def _residues(stored: bytes) -> Tensor:
        values = np.frombuffer(stored, dtype=np.int64, offset=len(stored) - 2 * DEGREE * 8)
        return torch.from_numpy(values.reshape(2, DEGREE).copy())
