"""Parameter sets of the scheme and their security figures."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from ciphertune.backend import LinearMap, NoiseModel

MODULUS_BITS = 32
"""log2 of the ciphertext modulus q: arithmetic mod q is int32 wrap-around."""

PLANES = 4
"""Bytes of one value mod q."""

HINT_PLANES = 3
"""Bytes kept of one value of a hint, the top ones."""

BINOMIAL_VARIANCE = 10.5
"""Variance of the centred binomial error over 42 bits, a little above the estimates' 3.2²."""

_WORST_RATIO = 1.25
"""Error of encryption over that of the weight's own rounding, above which a product takes the wider set."""


@dataclasses.dataclass(frozen=True)
class ParameterSet:
    """A set of Module-LWE parameters over Z_q[X]/(X^degree + 1), q = 2^32, secrets uniform ternary.

    Attributes:
        name: as in fields and pages.
        rank: number of ring elements in a secret.
        degree: of the ring; tokens of one secret.
        width: bits that travel of every value, up and down.
        error: "byte" for a uniform byte, below what is cut off; "binomial" for the centred binomial of 42 bits.
        estimates: cost of the cheapest known attack in bits, by cost model, from lattice-estimator (full estimate).
    """

    name: str
    rank: int
    degree: int
    width: Literal[24, 32]
    error: Literal["byte", "binomial"]
    estimates: dict[str, float]

    @property
    def dimension(self) -> int:
        """n, the dimension of the underlying lattice problem."""
        return self.rank * self.degree

    @property
    def security_bits(self) -> float:
        """Cost of the cheapest attack under the cost model that counts classical operations most cautiously."""
        return self.estimates["core-SVP classical"]

    @property
    def planes(self) -> int:
        """Bytes of a value that travel."""
        return self.width // 8

    def error_row_bytes(self, tokens: int) -> int:
        """Random bytes for one row of errors, padded to whole blocks of 16."""
        return -(-(tokens if self.error == "byte" else 6 * tokens) // 16) * 16

    def noise(self, digits: int) -> NoiseModel:
        """Errors of a product, in units of ciphertext values mod 2^32.

        With the uniform byte u, b = ⌊(A·s + m + u) / 2^8⌋ stands for A·s + m + u less its own lowest byte, which is
        uniform as A·s is: the difference of two uniform bytes. Rounding a hint to 24 bits leaves an error that is
        uniform over 256 values, through n ternary values of variance 2/3.
        """
        byte = (4.0**8 - 1) / 12
        sent = 2 * byte if self.error == "byte" else BINOMIAL_VARIANCE
        return NoiseModel(2.0 ** (MODULUS_BITS - 1), sent + 1 / 12, byte * self.dimension * 2 / 3, digits)


NARROW = ParameterSet(
    "mlwe-1280", 5, 256, 24, "byte", {"MATZOV": 156.0, "core-SVP classical": 130.2, "core-SVP quantum": 118.8}
)
WIDE = ParameterSet(
    "mlwe-1536", 6, 256, 32, "binomial", {"MATZOV": 161.1, "core-SVP classical": 135.2, "core-SVP quantum": 123.2}
)
PARAMETER_SETS = (NARROW, WIDE)


@functools.lru_cache(maxsize=1 << 14)
def parameters_of(linear_map: LinearMap, weight_bits: int, width: int | None) -> ParameterSet:
    """The parameter set of a group's product in one direction, from what everybody may know of it.

    The narrow set where its error stays about below that of rounding weights to int8, the wide one elsewhere and for
    16-bit weights. What is sent has no part in it: a length that followed activations would tell of them.

    Args:
        linear_map: of the whole group.
        weight_bits: 8 or 16.
        width: 24 or 32 to have that; None for the choice.
    """
    if width is not None:
        return NARROW if width == NARROW.width else WIDE
    if weight_bits != 8:
        return WIDE
    # A code's rounding has variance 1/12; of the signal both count as shares of its root mean square.
    own = (linear_map.in_features / 12) ** 0.5 / max(linear_map.max_norm, 1.0)
    return NARROW if NARROW.noise(1).relative_error(linear_map) <= _WORST_RATIO * own else WIDE
