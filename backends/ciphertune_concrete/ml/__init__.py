"""Concrete ML's quantizers, quantized modules and GLWE executor as a backend, split between client and worker."""

from __future__ import annotations

from ciphertune_concrete.ml.backend import ConcreteMLBackend, ConcreteMLOptions

__all__ = ["ConcreteMLBackend", "ConcreteMLOptions"]
