"""Checkpoints in files: their tensors by name, unpacked where they are stored in fewer bits."""
