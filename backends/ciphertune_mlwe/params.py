"""Parameter sets of the scheme and their security figures."""

from __future__ import annotations

import dataclasses

MODULUS_BITS = 32
"""log2 of the ciphertext modulus q: arithmetic mod q is int32 wrap-around."""

PLANES = 4
"""Balanced base-256 digits of one value mod q."""

ERROR_VARIANCE = 10.5
"""Variance of the centred binomial error over 42 bits, a little above the estimates' 3.2²."""


@dataclasses.dataclass(frozen=True)
class ParameterSet:
    """A set of Module-LWE parameters over Z_q[X]/(X^degree + 1), q = 2^32, secrets uniform ternary.

    Attributes:
        name: as in the ``params`` option and in key files.
        rank: number of ring elements in a secret.
        degree: of the ring; tokens of one ciphertext block.
        sigma: standard deviation of the error that the estimates are for; what is sampled has ERROR_VARIANCE.
        estimates: classical cost in bits by attack, from lattice-estimator (full estimate, default
            ADPS16/MATZOV cost models).
    """

    name: str
    rank: int
    degree: int
    sigma: float
    estimates: dict[str, float]

    @property
    def dimension(self) -> int:
        """n, the dimension of the underlying lattice problem."""
        return self.rank * self.degree

    @property
    def security_bits(self) -> float:
        """Cost of the cheapest known attack, in bits."""
        return min(self.estimates.values())


_SETS = (
    ParameterSet("mlwe-1280", 5, 256, 3.2, {"usvp": 135.6, "bdd": 134.0, "dual": 138.4, "dual-hybrid": 133.4}),
    ParameterSet("mlwe-1536", 6, 256, 3.2, {"usvp": 164.4, "bdd": 162.7, "dual": 168.0, "dual-hybrid": 161.1}),
)
PARAMETER_SETS = {parameters.name: parameters for parameters in _SETS}
