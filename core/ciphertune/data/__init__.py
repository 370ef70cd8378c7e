"""Data to train on, as its owner has it."""
