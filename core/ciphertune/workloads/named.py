"""Workloads by name."""

from __future__ import annotations

from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.workloads.workload import Workload


def load_workload(name: str, *, batches: int, tokens: int, held_out: int, seed: int = 0, rank: int = 8) -> Workload:
    """Load a workload.

    Args:
        name: ``smollm2`` or ``mlp``; or a known shape of ``ciphertune.models.known``, which gets random weights, or a
            folder with a causal language model, both on random tokens.
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
    from ciphertune.models.known import BUILT_IN
    from ciphertune.workloads.shapes import is_shape, random_tokens

    if is_shape(name):
        return random_tokens(name, batches=batches, tokens=tokens, held_out=held_out, seed=seed, rank=rank)
    known = ["smollm2", "mlp", *(shape for shape in BUILT_IN if shape != "smollm2")]
    raise ConfigError(f"{name!r} is neither a folder nor a known model; {closest(name, known)}")
