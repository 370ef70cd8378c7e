"""The runs of ``ciphertune train`` and ``ciphertune demo``."""
