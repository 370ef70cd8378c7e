"""The ``concrete-glwe`` backend: options, security statement, error model, and the two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ciphertune.backend import (
    Backend,
    Buffers,
    ClientHalf,
    LinearMap,
    NoiseModel,
    SecurityStatement,
    Work,
    WorkerHalf,
)
from ciphertune.errors import PluginError
from ciphertune.key_files import keys_folder
from ciphertune_concrete.glwe.params import (
    DEVIATION,
    ESTIMATES,
    KEY_WORDS,
    MESSAGE_BITS,
    NAME,
    REQUEST_WORDS,
    SEED_WORDS,
    SIZE,
    errors,
    input_blocks,
    reply_words,
)
from ciphertune_concrete.licence import TERMS

_SECONDS_AN_OUTPUT = 0.05
"""Seconds of one output of one token on a slow machine: several times what two cores of a server took."""


@dataclasses.dataclass(frozen=True)
class GlweOptions:
    """Options of the concrete-glwe backend.

    Attributes:
        keys: folder that the key is kept in, made if there is none; ``CIPHERTUNE_KEYS`` or ``~/.ciphertune/keys`` if
            not given.
    """

    keys: str | None = None


class GlweBackend(Backend):
    """GLWE encryption of Zama's concrete-ml-extensions; a worker's time goes by tokens times outputs."""

    name = "concrete-glwe"
    interface = 1
    Options = GlweOptions
    licence: ClassVar[str] = TERMS
    measured_size: ClassVar[tuple[int, int, int]] = (4, 64, 64)

    @property
    def security(self) -> SecurityStatement:
        """IND-CPA under GLWE, with the library's parameters."""
        figures = ", ".join(f"{attack} {bits}" for attack, bits in ESTIMATES.items())
        return SecurityStatement(
            True,
            min(ESTIMATES.values()),
            "workers see only ciphertext, shapes, layer names, timing, and a key by which they know a client again",
            f"GLWE ({NAME}), n = {SIZE}, q = 2^64, binary secret, Gaussian error of standard deviation "
            f"{DEVIATION:.4g} q; lattice-estimator, classical bits: {figures}",
        )

    def noise(self, linear_map: LinearMap | None = None) -> NoiseModel:
        """Errors in units of an encoded value's last bit; see ``params.errors``."""
        e = errors()
        output = e.switched + e.stored
        return NoiseModel(2.0 ** (MESSAGE_BITS - 1), e.rounding + e.sent, output, 1, e.shared / output, SIZE)

    def traffic(self, linear_map: LinearMap, tokens: int) -> tuple[int, int]:
        """See ``Backend.traffic``."""
        up = input_blocks(linear_map.in_features) * (REQUEST_WORDS + SEED_WORDS)
        return 8 * tokens * up, 8 * tokens * sum(reply_words(linear_map.out_features))

    def work(self, linear_map: LinearMap, tokens: int) -> Work:
        """See ``Backend.work``: what each input costs an output is little beside what the output itself does."""
        blocks = tokens * input_blocks(linear_map.in_features), tokens * len(reply_words(linear_map.out_features))
        by = "tokens × outputs to evaluate, tokens × blocks of 2048 values to encrypt and decrypt"
        return Work(blocks[0], tokens * linear_map.out_features, blocks[1], by)

    def allowance(self, linear_map: LinearMap, tokens: int) -> float:
        """See ``Backend.allowance``."""
        return _SECONDS_AN_OUTPUT * tokens * linear_map.out_features

    def client(self, device: torch.device) -> ClientHalf[Any]:
        """A client half with the key of the keys folder. Raises ``KeyFileError`` and ``PluginError``."""
        from ciphertune_concrete.glwe.client import GlweClient
        from ciphertune_concrete.glwe.keys import key_pair

        return GlweClient(key_pair(keys_folder(self.options.keys)), self.noise(), device)

    def renewed_client(self, device: torch.device) -> ClientHalf[Any]:
        """See ``Backend.renewed_client``: the key of the keys folder is removed, and another one made."""
        from ciphertune_concrete.glwe.keys import discard

        discard(keys_folder(self.options.keys))
        return self.client(device)

    @classmethod
    def worker(cls, fields: Mapping[str, Any], evaluation_key: Buffers, device: torch.device) -> WorkerHalf:
        """See ``Backend.worker``; the library chooses the device."""
        from ciphertune_concrete.glwe.worker import GlweWorker

        return GlweWorker(fields, evaluation_key)

    @classmethod
    def problem(cls) -> str | None:
        """See ``Backend.problem``."""
        from ciphertune_concrete.glwe.library import problem

        return problem()

    def diagnose(self, device: torch.device) -> Mapping[str, Any]:
        """The library's version, what it evaluates on, and whether there is a key."""
        from ciphertune_concrete.glwe import library
        from ciphertune_concrete.glwe.keys import FILE

        try:
            found = library.load(notice=False)
        except PluginError as error:
            return {"not usable": str(error)}
        cuda = found.is_cuda_enabled() and found.is_cuda_available()
        file = keys_folder(self.options.keys) / FILE
        return {
            library.PACKAGE: library.version() or "unknown",
            "evaluates on": "CUDA" if cuda else "the processor",
            "key": f"{file}, {8 * KEY_WORDS / 1e6:.0f} MB" if file.exists() else f"none yet in {file.parent}",
        }
