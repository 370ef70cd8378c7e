"""The library's parameters, and what follows from them. Nothing here needs the library."""

from __future__ import annotations

import dataclasses
import json

PARAMETERS: dict[str, int | float] = {
    "bits_reserved_for_computation": 27,
    "glwe_encryption_noise_distribution_stdev": 2.84526747960191e-15,
    "encryption_glwe_dimension": 1,
    "polynomial_size": 2048,
    "ciphertext_modulus_bit_count": 64,
    "input_storage_ciphertext_modulus": 39,
    "packing_ks_level": 2,
    "packing_ks_base_log": 14,
    "packing_ks_polynomial_size": 2048,
    "packing_ks_glwe_dimension": 1,
    "output_storage_ciphertext_modulus": 26,
    "pks_noise_distrubution_stdev": 2.84526747960191e-15,
}
"""Parameters that concrete-ml-extensions 0.2.0 gives as ``default_params()``, in its own spelling."""

NAME = "glwe-2048"
"""This set's name, in key files and on the wire."""

SIZE = 2048
"""Coefficients of a polynomial: inputs of one ciphertext, and outputs of one."""
REQUEST_BITS = 39
"""Bits kept of every ciphertext value that is sent."""
MESSAGE_BITS = REQUEST_BITS
"""Bits of an encoded value, at which products wrap, sign included.

The library's own choice is 27, of which an output keeps 26. But it takes integers, and rounding inputs to them is by
far the largest error then. With all bits of a request for an input, what is left is the error of the reply. What
ciphertexts look like does not depend on it.
"""
PARAMETERS_JSON = json.dumps({**PARAMETERS, "bits_reserved_for_computation": MESSAGE_BITS})
"""JSON of the parameters as the client encodes; keys do not depend on how many bits a message has."""
REPLY_BITS = 26
"""Bits kept of every ciphertext value that comes back."""
LEVELS, BASE_BITS = 2, 14
"""Digits of the key switch that packs outputs into one ciphertext, and their bits."""
DEVIATION = 2.84526747960191e-15
"""Standard deviation of encryption's error, as a fraction of the modulus."""

ESTIMATES = {"usvp": 136.1, "bdd": 134.9, "dual": 138.0, "dual-hybrid": 133.1}
"""Classical cost in bits by attack, from lattice-estimator (commit 27a581b, full estimate, default MATZOV and ADPS16
models): n = 2048, q = 2^64, uniform binary secret, discrete Gaussian error of DEVIATION · q, any number of samples."""

KEY_WORDS = SIZE * LEVELS * 2 * SIZE
"""64-bit values of a compression key: 128 MiB."""
SECRET_BYTES = 8 * 2 * (SIZE + 2)
REQUEST_WORDS = REQUEST_BITS * SIZE // 64
SEED_WORDS = 2


def reply_words(outputs: int) -> list[int]:
    """64-bit words of each ciphertext that carries so many outputs of one token, 2048 a ciphertext."""
    sizes = [min(SIZE, outputs - start) for start in range(0, outputs, SIZE)]
    return [-(-REPLY_BITS * (SIZE + size) // 64) for size in sizes]


def input_blocks(features: int) -> int:
    """Ciphertexts that one token of so many features takes."""
    return -(-features // SIZE)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Variances in units of an encoded value's last bit, for a binary secret of which half the bits are set.

    Attributes:
        rounding: of an input to an integer.
        sent: of an input, by encryption and by keeping ``REQUEST_BITS`` of its ciphertext, times a squared weight.
        switched: of an output, by the key switch: the digits it does not use, and its key's error.
        stored: of an output, by keeping ``REPLY_BITS`` of its ciphertext.
        shared: the part of ``stored`` that neighbouring outputs have in common: the same roundings, times secret bits
            that are both set for a quarter of them.
    """

    rounding: float
    sent: float
    switched: float
    stored: float
    shared: float


def _squared_unit(bits: int) -> float:
    """The square of what one unit is worth where so many bits are kept of a value."""
    return 4.0 ** (MESSAGE_BITS - bits)


def errors() -> Errors:
    """Errors that the parameters lead to."""
    set_bits = SIZE / 2
    fresh = (DEVIATION * 2.0**MESSAGE_BITS) ** 2
    digits = SIZE * LEVELS * 4.0**BASE_BITS / 12
    return Errors(
        rounding=1 / 12,
        sent=fresh + _squared_unit(REQUEST_BITS) / 12 * (1 + set_bits),
        switched=_squared_unit(LEVELS * BASE_BITS) / 12 * set_bits + digits * fresh,
        stored=_squared_unit(REPLY_BITS) / 12 * (1 + set_bits),
        shared=_squared_unit(REPLY_BITS) / 12 * set_bits / 2,
    )
