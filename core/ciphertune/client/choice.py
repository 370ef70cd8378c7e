"""Choice of a selection string: its plugins found by name, and their options read."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ciphertune._support.options import build_options, split_options
from ciphertune.backend import Backend
from ciphertune.client.timeouts import Timeouts
from ciphertune.errors import SecurityError
from ciphertune.plugins import registry
from ciphertune.selection import Selection
from ciphertune.transport import Transport


@dataclasses.dataclass(frozen=True)
class SessionOptions(Timeouts):
    """Options that every selection string takes, those of ``Timeouts`` among them.

    Attributes:
        allow_insecure: let a backend that does not encrypt send data out of this process.
        check_answers: hold answers of workers elsewhere against what was asked for once they are decrypted, within the
            backend's declared error, where the backend does not check them before. Reads the weights' codes.
        share_inputs: evaluate layers that read the same input (q/k/v, gate/up) as one product.
        experts: what is sent to the experts of a mixture. With ``all`` every token goes to every expert, and nothing of
            the routing shows. With ``routed`` only what routing chose is sent: workers see how many tokens each expert
            gets, which follows from what the tokens say.
    """

    allow_insecure: bool = False
    check_answers: bool = True
    share_inputs: bool = True
    experts: Literal["all", "routed"] = "all"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection string with its plugins found and its options read."""

    selection: Selection
    backend: Backend
    transport: Transport
    options: SessionOptions


def choose(to: str) -> Choice:
    """Find the plugins a selection string names and read its options.

    Raises:
        SelectionError: a malformed string, an unknown name or option, or an endpoint where none is taken.
        PluginError: a named plugin is installed but cannot be imported.
        SecurityError: data would leave this process unencrypted and ``allow_insecure`` is not set.
    """
    selection = Selection.parse(to)
    backend_class = registry.load(registry.BACKENDS, selection.backend)
    transport_class = registry.load(registry.TRANSPORTS, selection.transport)
    common, of_backend, of_transport = split_options(
        selection.options, SessionOptions, backend_class.options_class(selection.options), transport_class.Options
    )
    options = build_options(SessionOptions, common)
    backend = backend_class.from_text(of_backend)
    transport = transport_class(build_options(transport_class.Options, of_transport))
    if transport.remote and not backend.security.encrypted and not options.allow_insecure:
        raise SecurityError(
            f"{selection.backend!r} does not encrypt, and {selection.transport!r} sends data to other processes; "
            "choose a backend that encrypts, or say allow_insecure=1 to send it in the clear"
        )
    return Choice(selection, backend, transport, options)
