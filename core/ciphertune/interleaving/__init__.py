"""Interleaved tasks: one computes while the others wait for workers."""
