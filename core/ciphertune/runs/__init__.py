"""What ``ciphertune train`` and ``ciphertune demo`` do."""
