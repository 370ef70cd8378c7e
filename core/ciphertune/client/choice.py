"""Choice of a selection string: its plugins found by name, and their options read."""

from __future__ import annotations

import dataclasses

from ciphertune._support.options import build_options, split_options
from ciphertune.backend import Backend, SecurityStatement
from ciphertune.errors import SecurityError
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed, wrong_result
from ciphertune.selection import Selection, SessionOptions
from ciphertune.transport import Transport


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
        PluginError: a named plugin is installed but cannot be used, or fails as it is set up.
        SecurityError: data would leave this process unencrypted and ``allow_insecure`` is not set.
    """
    selection = Selection.parse(to)
    backend_class = registry.get_backend(selection.backend)
    transport_class = registry.get_transport(selection.transport)
    with blamed(registry.BACKENDS, selection.backend, "reading its options", quote=True):
        backend_options = backend_class.options_class(selection.options)
    common, of_backend, of_transport = split_options(
        selection.options, SessionOptions, backend_options, transport_class.Options
    )
    options = build_options(SessionOptions, common)
    with blamed(registry.BACKENDS, selection.backend, "its set-up", quote=True):
        backend = backend_class.from_text(of_backend)
    with blamed(registry.TRANSPORTS, selection.transport, "its set-up", quote=True):
        transport = transport_class(build_options(transport_class.Options, of_transport))
    security = security_of(backend)
    if transport.remote and not security.encrypted and not options.allow_insecure:
        raise SecurityError(
            f"{selection.backend!r} does not encrypt, and {selection.transport!r} sends data to other processes; "
            "choose a backend that encrypts, or say allow_insecure=1 to send it in the clear"
        )
    return Choice(selection, backend, transport, options)


def security_of(backend: Backend) -> SecurityStatement:
    """What a backend with its options protects.

    Raises:
        PluginError: it states something else than that, or fails.
    """
    name = type(backend).name
    with blamed(registry.BACKENDS, name, "its security statement", quote=True):
        stated: object = backend.security
    if not isinstance(stated, SecurityStatement):
        why = f"is a {type(stated).__name__}, and must be a ciphertune.backend.SecurityStatement"
        raise wrong_result(registry.BACKENDS, name, "'security'", why)
    return stated
