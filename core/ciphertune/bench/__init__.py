"""Measurements against plaintext in the same run."""
