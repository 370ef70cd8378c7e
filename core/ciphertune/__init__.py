"""Fine-tune a model on private data while machines you do not trust do the heavy work, on ciphertext."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ciphertune.bundle import load_client as load_client
    from ciphertune.bundle import split as split
    from ciphertune.convert import (
        Share as Share,
    )
    from ciphertune.convert import (
        outsource as outsource,
    )
    from ciphertune.convert import (
        outsourced_layers as outsourced_layers,
    )
    from ciphertune.convert import (
        restore as restore,
    )
    from ciphertune.convert import (
        session_of as session_of,
    )
    from ciphertune.convert import (
        share as share,
    )
    from ciphertune.convert import (
        validate as validate,
    )
    from ciphertune.errors import CipherTuneError as CipherTuneError
    from ciphertune.errors import VetoError as VetoError
    from ciphertune.linear import OutsourcedLinear as OutsourcedLinear
    from ciphertune.plugins import hookimpl as hookimpl
    from ciphertune.plugins import plugin_manager as plugin_manager
    from ciphertune.trainer import LoraTrainer as LoraTrainer

__version__ = "0.1.0"

# Where each public name lives: importing the package must stay cheap, so nothing is imported before it is asked for.
_HOMES = {
    "CipherTuneError": "errors",
    "LoraTrainer": "trainer",
    "OutsourcedLinear": "linear",
    "Share": "convert",
    "VetoError": "errors",
    "hookimpl": "plugins",
    "load_client": "bundle",
    "outsource": "convert",
    "outsourced_layers": "convert",
    "plugin_manager": "plugins",
    "restore": "convert",
    "session_of": "convert",
    "share": "convert",
    "split": "bundle",
    "validate": "convert",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ciphertune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ciphertune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
