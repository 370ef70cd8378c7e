"""The ``concrete-circuit`` backend: each layer is a circuit that Zama's compiler makes for its weight."""

from ciphertune_concrete.circuit.backend import CircuitBackend as CircuitBackend
