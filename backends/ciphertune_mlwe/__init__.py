"""The ``mlwe`` backend: linear homomorphic encryption whose evaluation is int8 matrix products.

Variant of the shared-a Module-LWE formats of Bae, Cheon, Hanrot, Park and Stehlé, "Fast Homomorphic Linear Algebra
with BLAS" (arXiv 2503.16080), with multi-secret encryption as in FrodoKEM and SimplePIR.
"""

from ciphertune_mlwe.backend import MLWEBackend as MLWEBackend
