"""Hook specifications: every place where a plugin may look in, or have a say.

A plugin is a module or object registered in the ``ciphertune.plugins`` entry-point group whose functions are
marked with ``ciphertune.hookimpl`` and named as below. A hook that raises is reported by the plugin's name and
stops nothing, except the gates: ``ciphertune_before_request`` and ``ciphertune_select_layers`` let errors through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from ciphertune.session import Exchange, Session

hookspec = pluggy.HookspecMarker("ciphertune")


@hookspec(firstresult=True)
def ciphertune_select_layers(model: Any, candidates: Sequence[str]) -> Sequence[str] | None:
    """Gate: choose which layers to outsource when the caller named none.

    Args:
        model: the ``torch.nn.Module`` being converted.
        candidates: dotted names of the layers that can be outsourced, in module order.

    Returns:
        The names to outsource, or None to leave the choice to others. The first plugin that answers decides.
    """


@hookspec
def ciphertune_session_opened(session: Session) -> None:
    """A client session is open; ``session.layers`` and ``session.security`` say what it carries."""


@hookspec
def ciphertune_sending_key(worker: str, nbytes: int, done: bool) -> None:
    """A large evaluation key sets out to a worker; then, ``done``, it is there or has failed to be. On any thread."""


@hookspec
def ciphertune_session_closed(session: Session) -> None:
    """A client session was closed; ``session.traffic`` holds its totals."""


@hookspec
def ciphertune_before_request(exchange: Exchange) -> None:
    """Gate: a product is about to be sent. Raise ``ciphertune.VetoError`` to refuse it."""


@hookspec
def ciphertune_after_reply(exchange: Exchange) -> None:
    """A reply was decrypted; ``exchange`` holds its byte counts and seconds by phase."""


@hookspec
def ciphertune_training_start(trainer: Any, total_steps: int, start_step: int) -> None:
    """Training begins, or resumes at ``start_step`` optimizer steps of ``total_steps``."""


@hookspec
def ciphertune_training_step(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
    """An optimizer step is done; ``metrics`` has at least loss, learning_rate, grad_norm and seconds."""


@hookspec
def ciphertune_evaluation(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
    """An evaluation is done."""


@hookspec
def ciphertune_training_end(trainer: Any, step: int, reason: str) -> None:
    """Training ended: ``reason`` is ``finished``, ``interrupted`` or ``failed``."""


@hookspec
def ciphertune_register_commands(cli: click.Group) -> None:
    """Add commands to the ``ciphertune`` command line."""
