"""Security of mlwe's parameter sets by lattice-estimator, under three cost models.

Needs SageMath and the package ``estimator`` (github.com/malb/lattice-estimator) on the path:

    sage -python benchmarks/estimate.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ciphertune_mlwe.params import MODULUS_BITS, PARAMETER_SETS, ParameterSet

SAMPLES = 1 << 18
"""Ring samples that an attacker may have of one secret."""


def bits(parameters: ParameterSet) -> dict[str, float]:
    """Cost of the cheapest attack on a set, in bits, by cost model. Raises ``ImportError`` without the estimator."""
    from estimator import LWE, ND, RC  # type: ignore[import-not-found]
    from estimator.reduction import ADPS16  # type: ignore[import-not-found]

    error: Any = ND.Uniform(0, 255) if parameters.error == "byte" else ND.CenteredBinomial(21)
    problem = LWE.Parameters(
        n=parameters.dimension, q=1 << MODULUS_BITS, Xs=ND.Uniform(-1, 1), Xe=error, m=SAMPLES * parameters.degree
    )
    models = {
        "MATZOV": RC.MATZOV,
        "core-SVP classical": ADPS16(mode="classical"),
        "core-SVP quantum": ADPS16(mode="quantum"),
    }
    found = {}
    for name, model in models.items():
        costs = LWE.estimate(problem, red_cost_model=model, quiet=True)
        found[name] = min(float(cost["rop"].log(2)) for cost in costs.values())
    return found


def main() -> int:
    """Print the table, beside the figures that are quoted."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{'set':12}{'cost model':22}{'estimated':>10}{'quoted':>8}")
    for parameters in PARAMETER_SETS:
        try:
            found = bits(parameters)
        except ImportError as error:
            print(f"{error}: this needs SageMath and lattice-estimator; see the top of this file", file=sys.stderr)
            return 1
        for model, quoted in parameters.estimates.items():
            print(f"{parameters.name:12}{model:22}{found[model]:10.1f}{quoted:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
