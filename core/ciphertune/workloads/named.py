"""Built-in workloads by name."""

from __future__ import annotations

from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.workloads.workload import Workload


def load_workload(name: str, *, batches: int, tokens: int, held_out: int, seed: int = 0, rank: int = 8) -> Workload:
    """Load a built-in workload.

    Args:
        name: ``smollm2`` or ``mlp``.
        batches: training batches.
        tokens: tokens (or samples) in a batch; of a language model a multiple of 256 is 256 a row.
        held_out: evaluation batches.
        seed: of the adapters' initial values and of the order of samples.
        rank: of the LoRA adapters.

    Raises:
        ConfigError: unknown, or a package it needs is missing; the message says what to install.
    """
    if name == "smollm2":
        from ciphertune.workloads.language import smollm2

        return smollm2(batches=batches, tokens=tokens, held_out=held_out, seed=seed, rank=rank)
    if name == "mlp":
        from ciphertune.workloads.digits import digits_mlp

        return digits_mlp(batches=batches, samples=tokens, held_out=held_out, seed=seed, rank=rank)
    raise ConfigError(f"unknown built-in model {name!r}; {closest(name, ['smollm2', 'mlp'])}")
