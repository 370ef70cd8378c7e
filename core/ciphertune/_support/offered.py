"""Backends that workers offer unless their operator says otherwise."""

OFFERED = ("mlwe", "simulation", "clear")
"""Those that need no further package."""
