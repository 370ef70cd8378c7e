"""Every exception that CipherTune raises on purpose.

CipherTuneError
├── SelectionError            the selection string, an option, or a name in it is wrong
├── PluginError               an installed plugin cannot be used, or failed by a fault of its own
├── LayerError                a layer cannot be outsourced, or is unknown
│   ├── UnknownLayerError
│   ├── UnsupportedLayerError
│   ├── NothingOutsourcedError
│   └── OutsourcedWeightError something asked for a weight that is at the workers
├── InputError                activations or gradients that must not be sent
├── PrecisionError            a product whose exactness or precision cannot be guaranteed
├── KeyFileError              a key file is missing, damaged, unsafe, or of other parameters
├── SecurityError             the requested run would give up a protection silently
│   └── VetoError             a before-request hook refused the request
├── ProtocolError             a message that breaks the protocol
│   ├── VersionError          the other end speaks no version of the protocol that this one does
│   └── ReplyError            a reply that cannot belong to its request
│       └── WrongReplyError   a reply of the right form that is not the product that was asked for
├── TransportError            the link to a worker failed
│   ├── TransportTimeoutError no answer within the deadline
│   └── RefusedError          the worker's end does not let this client in
├── WeightsError              codes that a client prepares itself from cannot be had, or are others
├── NotPreparedError          (client half) what was prepared for a product is used up, and its codes are needed again
├── CacheError                what is kept on disk between sessions cannot be written, or was altered
├── WorkerError               the worker answered with an error of its own
├── UnknownSessionError       (worker) the session that a request names is not open
├── HoldingsError             (worker) it does not hold what the client expects
├── QuotaError                (worker) a client asks for more than it may have
├── WithheldError             (worker) it does not let its weights be read
├── ConfigError               a configuration file or a command's argument is wrong
└── TrainingError             training cannot start or go on
    ├── NoAdapterError        no trainable parameter
    ├── NonFiniteLossError    the loss is NaN or infinite; no weight was touched
    └── CheckpointError       a checkpoint cannot be written, read, or matched to this run
"""

from __future__ import annotations


class CipherTuneError(Exception):
    """Base of all CipherTune errors."""


class SelectionError(CipherTuneError, ValueError):
    """The selection string, one of its options, or a name in it is wrong."""


class PluginError(CipherTuneError):
    """An installed plugin cannot be imported, checked or set up, or failed by a fault of its own.

    Not what a network, a worker or a user did: another attempt would meet the same.
    """


class LayerError(CipherTuneError, ValueError):
    """A layer cannot be outsourced, or is unknown."""


class UnknownLayerError(LayerError):
    """A layer name or pattern matches no layer of the model."""


class UnsupportedLayerError(LayerError):
    """A layer was named that cannot be outsourced."""


class NothingOutsourcedError(LayerError):
    """The selection leaves no layer to outsource, or the model holds none."""


class OutsourcedWeightError(LayerError):
    """Something asked for a weight that is at the workers and not on this machine."""


class InputError(CipherTuneError, ValueError):
    """What must not be sent: of a wrong shape, empty, or beyond float32; gradients with NaN or infinity."""


class PrecisionError(CipherTuneError, ValueError):
    """A product whose exactness or precision cannot be guaranteed."""


class KeyFileError(CipherTuneError):
    """A key file is missing, damaged, readable by others, or of another parameter set."""


class SecurityError(CipherTuneError):
    """The requested run would silently give up a protection."""


class VetoError(SecurityError):
    """A ``ciphertune_before_request`` hook refused the request; nothing was sent."""


class ProtocolError(CipherTuneError):
    """A message that breaks the protocol: malformed, oversized, or of another version."""


class VersionError(ProtocolError):
    """The other end speaks no version of the protocol that this one does."""


class ReplyError(ProtocolError):
    """A reply that cannot belong to its request: tampered with, truncated, or of another shape."""


class WrongReplyError(ReplyError):
    """A reply of the right form is not the product that was asked for: the worker is broken, or lies."""


class TransportError(CipherTuneError):
    """The link to a worker failed. Retrying may help."""


class TransportTimeoutError(TransportError, TimeoutError):
    """No answer within the deadline."""


class RefusedError(TransportError):
    """The worker's end does not let this client in: its key or token is not authorised there.

    A session that opens does not wait for it to change its mind. One that is open does, until its deadline.
    """


class WeightsError(CipherTuneError):
    """Codes that a client prepares itself from are not to be had, or are not those of its model."""


class NotPreparedError(CipherTuneError):
    """What a client half prepared for a product does not suffice for its tokens. It is asked for a preparation again.

    Raised by what encrypts, before anything of the request is used up; a session reads the codes once more and encrypts
    again.
    """


class CacheError(CipherTuneError):
    """What is kept on disk between sessions cannot be written or read, or was altered."""


class WorkerError(CipherTuneError):
    """The worker answered with an error of its own.

    Attributes:
        code: machine-readable kind, one of ``ciphertune.protocol.ERROR_CODES``.
    """

    def __init__(self, message: str, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code


class ConfigError(CipherTuneError, ValueError):
    """A configuration file or a command's argument is wrong."""


class TrainingError(CipherTuneError):
    """Training cannot start or cannot go on."""


class NoAdapterError(TrainingError):
    """The model has no trainable parameter."""


class NonFiniteLossError(TrainingError):
    """The loss is NaN or infinite; no weight was touched."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, read, or matched to this run."""


class UnknownSessionError(CipherTuneError):
    """A request names a session that is not open at this worker for this client."""


class HoldingsError(CipherTuneError):
    """A worker does not hold what the client expects of it."""


class WithheldError(CipherTuneError):
    """A worker does not let its weights be read."""


class QuotaError(CipherTuneError):
    """A client asks for more than it may have."""
