"""The ``concrete-glwe`` backend: products with GLWE ciphertexts, evaluated by Zama's concrete-ml-extensions."""

from ciphertune_concrete.glwe.backend import GlweBackend as GlweBackend
