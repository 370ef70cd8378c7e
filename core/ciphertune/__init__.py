"""Fine-tune a model on private data while machines you do not trust do the heavy work, on ciphertext."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ciphertune._support.version import __version__ as __version__

if TYPE_CHECKING:
    from ciphertune.bundle.client import load_client as load_client
    from ciphertune.bundle.writer import split as split
    from ciphertune.client.session import Session as Session
    from ciphertune.errors import (
        CheckpointError as CheckpointError,
        CipherTuneError as CipherTuneError,
        ConfigError as ConfigError,
        InputError as InputError,
        KeyFileError as KeyFileError,
        LayerError as LayerError,
        PluginError as PluginError,
        PrecisionError as PrecisionError,
        SecurityError as SecurityError,
        SelectionError as SelectionError,
        TrainingError as TrainingError,
        TransportError as TransportError,
        WorkerError as WorkerError,
    )
    from ciphertune.interleaving.interleaver import interleave as interleave
    from ciphertune.linear import OutsourcedLinear as OutsourcedLinear
    from ciphertune.outsourcing.calibration import calibrate as calibrate, public_batches as public_batches
    from ciphertune.outsourcing.clear import in_the_clear as in_the_clear
    from ciphertune.outsourcing.convert import (
        outsource as outsource,
        outsourced_layers as outsourced_layers,
        restore as restore,
        session_of as session_of,
        share as share,
        validate as validate,
    )
    from ciphertune.plugins.registry import get_backend as get_backend, get_transport as get_transport
    from ciphertune.traffic import Traffic as Traffic
    from ciphertune.training.concrete_ml import load_concrete_ml as load_concrete_ml
    from ciphertune.training.trainer import LoraTrainer as LoraTrainer

# Where each public name lives: importing the package must stay cheap, so nothing is imported before it is asked for.
_PUBLIC = {
    "bundle.client": ("load_client",),
    "bundle.writer": ("split",),
    "client.session": ("Session",),
    "errors": (
        "CheckpointError",
        "CipherTuneError",
        "ConfigError",
        "InputError",
        "KeyFileError",
        "LayerError",
        "PluginError",
        "PrecisionError",
        "SecurityError",
        "SelectionError",
        "TrainingError",
        "TransportError",
        "WorkerError",
    ),
    "interleaving.interleaver": ("interleave",),
    "linear": ("OutsourcedLinear",),
    "outsourcing.calibration": ("calibrate", "public_batches"),
    "outsourcing.clear": ("in_the_clear",),
    "outsourcing.convert": ("outsource", "outsourced_layers", "restore", "session_of", "share", "validate"),
    "plugins.registry": ("get_backend", "get_transport"),
    "traffic": ("Traffic",),
    "training.concrete_ml": ("load_concrete_ml",),
    "training.trainer": ("LoraTrainer",),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ciphertune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ciphertune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
