"""The ``mlwe`` backend: options, security statement, parameters by group, and the two halves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ciphertune.backend import (
    Backend,
    Buffers,
    ClientHalf,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    WeightBits,
    Work,
    WorkerHalf,
)
from ciphertune.errors import ProtocolError, SelectionError
from ciphertune_mlwe.params import (
    BINOMIAL_VARIANCE,
    HINT_PLANES,
    MODULUS_BITS,
    PARAMETER_SETS,
    ParameterSet,
    parameters_of,
)

_HINT_MEMORY = 4096
"""Megabytes of hints in memory where the system does not tell how much there is."""


@dataclasses.dataclass(frozen=True)
class MLWEOptions:
    """Options of the mlwe backend.

    Attributes:
        request_bits: bits of every value that travels, up and down. If not given, 24 for groups where the error of
            encryption stays below about that of an int8 weight's own rounding, and 32 for others.
        weight_bits: how workers hold weights, per output channel; 16 doubles evaluation and what comes back.
        pad_tokens: round the number of tokens up to a multiple of this, to hide the exact one.
        banks: let requests of few tokens share secrets, as token-by-token generation needs to be fast.
        ahead: make masks before the data, while the client waits for workers elsewhere.
        mask_memory: megabytes for banks and for masks that are made ahead.
        check: hold every answer against secret vectors before it is decrypted.
        hint_memory: megabytes of hints that are held in memory; others are read from disk for each product. If not
            given, a quarter of the machine's memory.
        hint_disk: megabytes of hints that are kept on disk for later sessions, of all models; 0 to keep none.
    """

    request_bits: Literal[24, 32] | None = None
    weight_bits: Literal[8, 16] = 8
    pad_tokens: int = 1
    banks: bool = True
    ahead: bool = True
    mask_memory: int = 512
    check: bool = True
    hint_memory: int | None = None
    hint_disk: int = 20480

    def __post_init__(self) -> None:
        if not 1 <= self.pad_tokens <= 1 << 16:
            raise SelectionError(f"option pad_tokens={self.pad_tokens} must be between 1 and 65536")
        if not 1 <= self.mask_memory <= 1 << 20:
            raise SelectionError(f"option mask_memory={self.mask_memory} must be between 1 and 1048576 megabytes")
        if self.hint_memory is not None and not 0 <= self.hint_memory <= 1 << 24:
            raise SelectionError(f"option hint_memory={self.hint_memory} must be between 0 and 16777216 megabytes")
        if not 0 <= self.hint_disk <= 1 << 24:
            raise SelectionError(f"option hint_disk={self.hint_disk} must be between 0 and 16777216 megabytes")


class MLWEBackend(Backend):
    """Module-LWE encryption; workers evaluate int8 matrix products on ciphertext."""

    name = "mlwe"
    interface = 1
    Options = MLWEOptions

    prepares = True
    whole_products = True
    separates_callers = True

    def parameters(self, linear_map: LinearMap) -> ParameterSet:
        """The parameter set of a group's product in one direction."""
        return parameters_of(linear_map, self.options.weight_bits, self.options.request_bits)

    @property
    def _digits(self) -> int:
        return int(self.options.weight_bits) // 8

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under Module-LWE."""
        sets = [each for each in PARAMETER_SETS if self.options.request_bits in (None, each.width)]
        told = "; ".join(
            f"n = {each.dimension} ({each.width} bits travel, error: "
            + ("a uniform byte" if each.error == "byte" else f"centred binomial of variance {BINOMIAL_VARIANCE}")
            + "): "
            + ", ".join(f"{model} {bits:g}" for model, bits in each.estimates.items())
            for each in sets
        )
        return SecurityStatement(
            True,
            min(each.security_bits for each in sets),
            "workers see only ciphertext, shapes, layer names and timing",
            f"Module-LWE with fresh ternary secrets for every product, q = 2^{MODULUS_BITS}; lattice-estimator, bits "
            f"by cost model: {told}",
            {model: min(each.estimates[model] for each in sets) for model in sets[0].estimates},
        )

    @property
    def weight_bits(self) -> WeightBits:
        """See ``Backend.weight_bits``: the option of that name."""
        bits: WeightBits = self.options.weight_bits
        return bits

    @property
    def _hint_memory(self) -> int:
        """Megabytes of hints in memory."""
        if self.options.hint_memory is not None:
            return int(self.options.hint_memory)
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 22
        except (AttributeError, OSError, ValueError):
            return _HINT_MEMORY

    @property
    def checks_answers(self) -> bool:
        """See ``Backend.checks_answers``: unless the option says otherwise."""
        return bool(self.options.check)

    def rounding(self, linear_map: LinearMap) -> None:
        """See ``Backend.rounding``: answers are checked before they are decrypted, or not at all."""
        return

    def noise(self, linear_map: LinearMap) -> NoiseModel:
        """See ``Backend.noise``."""
        return self.parameters(linear_map).noise(self._digits)

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``."""
        return self.piece_traffic(linear_map, linear_map, tokens)

    def piece_traffic(self, whole: LinearMap, piece: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.piece_traffic``: pieces are cuts of one ciphertext, as wide as the whole product's."""
        sent = -(-tokens // self.options.pad_tokens) * self.options.pad_tokens
        value = self.parameters(whole).planes * sent
        return piece.in_features * value, piece.out_features * self._digits * value

    def kept_bytes(self, forward: LinearMap | None, backward: LinearMap) -> int:
        """See ``Backend.kept_bytes``: the hints of both directions."""
        maps = [each for each in (forward, backward) if each is not None]
        rows = ((each.out_features, self.parameters(each).dimension) for each in maps)
        return sum(self._digits * count * dimension * HINT_PLANES for count, dimension in rows)

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        """See ``Backend.work``: requests carry their own tokens and nothing else."""
        k, n = linear_map.in_features, linear_map.out_features * self._digits
        by = "tokens × inputs to encrypt, tokens × inputs × outputs to evaluate, tokens × outputs to decrypt"
        # Masks are made while encrypting where they were not made ahead.
        return Work(tokens * (k + n), tokens * k * n, tokens * n, by, ahead=tokens * (k + n))

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half; its public matrix is its own, or with hints on disk that of the client and the model."""
        from ciphertune_mlwe.client import MLWEClient
        from ciphertune_mlwe.hint_store import HintStore

        o = self.options
        store = HintStore(self._hint_memory << 20, o.hint_disk << 20, device)
        mask_bytes = o.mask_memory << 20
        return MLWEClient(
            self.parameters, self._digits, o.pad_tokens, o.banks, mask_bytes, o.ahead, device, store, o.check
        )

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; this scheme has no evaluation key."""
        from ciphertune_mlwe.worker import MLWEWorker

        if evaluation_key:
            raise ProtocolError("the mlwe backend has no evaluation key")
        return MLWEWorker(fields, device)

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """Which product kernel this machine uses, its speed, and where hints are."""
        from ciphertune.cache import entries
        from ciphertune_mlwe.hint_cache import PART
        from ciphertune_mlwe.kernels import choose_kernel
        from ciphertune_mlwe.native import library

        chosen, speed = choose_kernel(device)
        loops = "compiled" if library() is not None else "portable (no C compiler was found at installation)"
        return {
            "kernel": chosen,
            f"{chosen} product (GMAC/s)": round(speed, 1),
            "encryption loops": loops,
            "hints in memory at most (GB)": round(self._hint_memory / 1024, 1),
            "hints on disk (GB)": round(sum(each.nbytes for each in entries(PART)) / 1e9, 2),
        }
