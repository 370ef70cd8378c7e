"""A training loop for people who have none: accumulation, clipping, evaluation, checkpoints and exact resume."""
