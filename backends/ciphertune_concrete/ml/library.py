"""Concrete ML, imported when it is first used."""

from __future__ import annotations

import dataclasses
import importlib
import os
import types
import warnings
from collections.abc import Mapping
from typing import Any

from ciphertune.errors import PluginError, ProtocolError
from ciphertune_concrete import versions
from ciphertune_concrete.ending import keep_status
from ciphertune_concrete.licence import notice

PACKAGE = "concrete-ml"
SERIES = "1.9"
INSTALL = 'pip install "ciphertune[concrete-ml]", in an environment of its own with Python 3.10 to 3.12'

MODES = ("disable", "simulate", "execute")
N_BITS = range(2, 9)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Public parameters of how both halves quantize.

    Attributes:
        mode: Concrete ML's own word for how a product is evaluated.
        n_bits: of inputs and weights.
        dynamic: inputs are quantized per token and weights per output channel, each with a range of its own; else
            both with one range, as Concrete ML's quantized modules do.
    """

    mode: str
    n_bits: int
    dynamic: bool

    @property
    def by_module(self) -> bool:
        """Return whether a quantized module evaluates, and not the GLWE executor."""
        return self.mode == "simulate" or (self.mode == "disable" and not self.dynamic)

    @property
    def per_channel(self) -> bool:
        """Return whether weights have a range for every output channel. Those of quantized modules have one for all."""
        return self.dynamic and not self.by_module

    @property
    def lowest_code(self) -> int:
        """Smallest code of an input; quantized modules take signed ones, the dynamic executor unsigned ones."""
        return 0 if self.per_channel else -(1 << (self.n_bits - 1))

    @property
    def highest_code(self) -> int:
        """Largest code of an input."""
        return self.lowest_code + (1 << self.n_bits) - 1

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Quantization:
        """Read the quantization that a client sent. Raises ``ProtocolError``."""
        mode, n_bits, dynamic = fields.get("mode"), fields.get("n_bits"), fields.get("dynamic")
        if mode not in MODES:
            raise ProtocolError(f"the mode must be one of {', '.join(MODES)}")
        if not isinstance(n_bits, int) or isinstance(n_bits, bool) or n_bits not in N_BITS:
            raise ProtocolError(f"n_bits must be a whole number from {N_BITS[0]} to {N_BITS[-1]}")
        if not isinstance(dynamic, bool):
            raise ProtocolError("dynamic must be true or false")
        return cls(mode, n_bits, dynamic)


def load() -> types.ModuleType:
    """The module of Concrete ML's GLWE executor; says once what its licence asks for.

    Raises:
        PluginError: Concrete ML is not installed, is none that this backend was made for, or cannot be imported.
    """
    if version() is not None and (wrong := problem()) is not None:
        raise PluginError(wrong)
    notice(PACKAGE)
    # The crate prints a stack trace of its own for every malformed input, before the error that we handle.
    os.environ.setdefault("RUST_BACKTRACE", "0")
    return require("concrete.ml.quantization.linear_op_glwe_backend")


def require(module: str) -> types.ModuleType:
    """Import a module of Concrete ML. Raises ``PluginError``."""
    try:
        with warnings.catch_warnings():
            # What its dependencies of 2024 deprecate is no news to whoever runs them.
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
        keep_status()
        return found
    except ImportError as error:
        raise PluginError(
            f"the backend concrete-ml needs the package {PACKAGE}, which cannot be imported here ({error}): {INSTALL}"
        ) from error


def version() -> str | None:
    """The installed version of Concrete ML, or None; nothing is imported."""
    return versions.installed(PACKAGE)


def problem() -> str | None:
    """Why the backend cannot run here by what is installed; None where it can."""
    return versions.problem("concrete-ml", PACKAGE, SERIES, INSTALL)


def executor(quantization: Quantization) -> Any:
    """A GLWE executor without keys. Raises ``PluginError``."""
    return load().GLWELinearLayerExecutor(use_dynamic_quantization=quantization.dynamic)


def bits_only(quantization: Quantization) -> Any:
    """Stand-in for a quantized module of which the executor reads the bits of the input quantizer alone."""
    options = require("concrete.ml.quantization.quantizers").QuantizationOptions(quantization.n_bits)
    return types.SimpleNamespace(input_quantizers=[types.SimpleNamespace(quant_options=options)])


def largest_sum(parameters: Mapping[str, Any]) -> int:
    """Bound of sums of products of codes, either way: beyond it the library wraps around."""
    return 1 << (int(parameters["bits_reserved_for_computation"]) - 1)


def key_bytes(parameters: Mapping[str, Any]) -> int:
    """Size of a serialized compression key: a key-switching key from the input key to one GLWE key, and a header."""
    levels, size = parameters["packing_ks_level"], parameters["packing_ks_polynomial_size"]
    dimension = parameters["encryption_glwe_dimension"] * parameters["polynomial_size"]
    return 80 + int(dimension * levels * (parameters["packing_ks_glwe_dimension"] + 1) * size * 8)


class ForeignError(Exception):
    """The library refused bytes; its own message may quote them."""


def guarded(function: Any, *args: Any) -> Any:
    """Call into the crate with bytes from outside; its panics are no ``Exception``. Raises ``ForeignError``."""
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ForeignError(type(error).__name__) from None
