"""A training loop for people who have none: accumulation, clipping, evaluation, checkpoints and exact resume."""

from __future__ import annotations

from ciphertune.trainer.history import History
from ciphertune.trainer.loop import LoraTrainer

__all__ = ["History", "LoraTrainer"]
