"""Fine-tune a model on private data while machines you do not trust do the heavy work, on ciphertext."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ciphertune.backend import (
        Backend as Backend,
        Buffers as Buffers,
        ClientHalf as ClientHalf,
        Direction as Direction,
        Encrypted as Encrypted,
        LinearMap as LinearMap,
        NoiseModel as NoiseModel,
        SecurityStatement as SecurityStatement,
        WeightBits as WeightBits,
        WorkerHalf as WorkerHalf,
    )
    from ciphertune.bundle import (
        load_client as load_client,
        split as split,
    )
    from ciphertune.convert import (
        Share as Share,
        outsource as outsource,
        outsourced_layers as outsourced_layers,
        restore as restore,
        session_of as session_of,
        share as share,
        validate as validate,
    )
    from ciphertune.errors import (
        CheckpointError as CheckpointError,
        CipherTuneError as CipherTuneError,
        ConfigError as ConfigError,
        InputError as InputError,
        KeyFileError as KeyFileError,
        LayerError as LayerError,
        NoAdapterError as NoAdapterError,
        NonFiniteLossError as NonFiniteLossError,
        NothingOutsourcedError as NothingOutsourcedError,
        OutsourcedWeightError as OutsourcedWeightError,
        PluginError as PluginError,
        PrecisionError as PrecisionError,
        ProtocolError as ProtocolError,
        ReplyError as ReplyError,
        SecurityError as SecurityError,
        SelectionError as SelectionError,
        TrainingError as TrainingError,
        TransportError as TransportError,
        TransportTimeoutError as TransportTimeoutError,
        UnknownLayerError as UnknownLayerError,
        UnsupportedLayerError as UnsupportedLayerError,
        VersionError as VersionError,
        VetoError as VetoError,
        WorkerError as WorkerError,
    )
    from ciphertune.linear import (
        OutsourcedLinear as OutsourcedLinear,
    )
    from ciphertune.plugins import (
        PluginManager as PluginManager,
        hookimpl as hookimpl,
        plugin_manager as plugin_manager,
    )
    from ciphertune.protocol import (
        DEFAULT_LIMITS as DEFAULT_LIMITS,
        Frame as Frame,
        Limits as Limits,
        Message as Message,
        error_message as error_message,
        pack as pack,
        unpack as unpack,
    )
    from ciphertune.session import (
        Exchange as Exchange,
        Session as Session,
        Traffic as Traffic,
    )
    from ciphertune.tracking import (
        Tracker as Tracker,
    )
    from ciphertune.trainer import (
        History as History,
        LoraTrainer as LoraTrainer,
    )
    from ciphertune.transport import (
        Desk as Desk,
        Handler as Handler,
        Link as Link,
        Listener as Listener,
        Loopback as Loopback,
        Reply as Reply,
        Transport as Transport,
    )
    from ciphertune.turns import (
        interleave as interleave,
    )

__version__ = "0.1.0"

# Where each public name lives: importing the package must stay cheap, so nothing is imported before it is asked for.
_PUBLIC = {
    "backend": (
        "Backend",
        "Buffers",
        "ClientHalf",
        "Direction",
        "Encrypted",
        "LinearMap",
        "NoiseModel",
        "SecurityStatement",
        "WeightBits",
        "WorkerHalf",
    ),
    "bundle": ("load_client", "split"),
    "convert": ("Share", "outsource", "outsourced_layers", "restore", "session_of", "share", "validate"),
    "errors": (
        "CheckpointError",
        "CipherTuneError",
        "ConfigError",
        "InputError",
        "KeyFileError",
        "LayerError",
        "NoAdapterError",
        "NonFiniteLossError",
        "NothingOutsourcedError",
        "OutsourcedWeightError",
        "PluginError",
        "PrecisionError",
        "ProtocolError",
        "ReplyError",
        "SecurityError",
        "SelectionError",
        "TrainingError",
        "TransportError",
        "TransportTimeoutError",
        "UnknownLayerError",
        "UnsupportedLayerError",
        "VersionError",
        "VetoError",
        "WorkerError",
    ),
    "linear": ("OutsourcedLinear",),
    "plugins": ("PluginManager", "hookimpl", "plugin_manager"),
    "protocol": ("DEFAULT_LIMITS", "Frame", "Limits", "Message", "error_message", "pack", "unpack"),
    "session": ("Exchange", "Session", "Traffic"),
    "tracking": ("Tracker",),
    "trainer": ("History", "LoraTrainer"),
    "transport": ("Desk", "Handler", "Link", "Listener", "Loopback", "Reply", "Transport"),
    "turns": ("interleave",),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ciphertune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ciphertune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
