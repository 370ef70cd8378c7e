"""LoRA training: settings, the loop, gradient accumulation, evaluation, checkpoints and exact resume."""
