"""Helpers that know nothing of encryption, models or workers."""
