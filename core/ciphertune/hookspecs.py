"""Hook specifications: the points of sessions and training at which plugins are called.

A plugin is a module, an object or a class registered in the ``ciphertune.plugins`` entry-point group whose functions
are marked with ``ciphertune.hookspecs.hookimpl`` and named as below; each may take fewer arguments than are listed. A
hook that raises is reported by the plugin's name and stops nothing. The gates ``ciphertune_before_request`` and
``ciphertune_select_layers`` let errors through. A hook is called on the thread of the event that it reports; hooks
about requests may be called on several threads at once.

The plugin that was registered last is called first. ``hookimpl(tryfirst=True)`` puts an implementation before all
others, and ``hookimpl(trylast=True)`` after them.

With ``CIPHERTUNE_TRACE_PLUGINS=1`` every call is printed to standard error, with the plugins that it goes to: of its
arguments whole numbers and texts as they are, of all else the type. No value of a tensor is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:  # at runtime they would import torch, for which `ciphertune --help` would wait
    import click

    from ciphertune.backend import SecurityStatement
    from ciphertune.selection import Selection
    from ciphertune.traffic import Exchange, SetUp, Traffic
    from ciphertune.weights import LayerInfo

INTERFACE_VERSION = 1
"""The version of the hooks. It grows with every change that a plugin which is written for the one before would not
stand. A plugin says which one it is written for by ``interface``, a number; one that is written for another is
refused when it is loaded."""

hookspec = pluggy.HookspecMarker("ciphertune")
hookimpl = pluggy.HookimplMarker("ciphertune")
"""Marks a function of a plugin as an implementation of the hook of its name."""


class SessionView(Protocol):
    """What a hook may rely on of a session, which is a ``ciphertune.Session``."""

    @property
    def layers(self) -> Sequence[LayerInfo]:
        """The outsourced layers."""
        ...

    @property
    def security(self) -> SecurityStatement:
        """What the backend protects."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Totals since the session opened."""
        ...

    @property
    def set_up(self) -> SetUp:
        """Costs of preparations from the weights' codes."""
        ...

    @property
    def selection(self) -> Selection:
        """The selection string that it was opened with."""
        ...


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
def ciphertune_session_opened(session: SessionView) -> None:
    """Called when a session is open; ``session.layers`` and ``session.security`` describe it."""


@hookspec
def ciphertune_preparing(session: SessionView, done: int, total: int) -> None:
    """Called as a session that opens reads the weights' codes to prepare its encryption.

    Args:
        session: the session; nothing can be evaluated yet.
        done: codes read so far.
        total: all that will be read, less what is cached.
    """


@hookspec
def ciphertune_worker_silent(session: SessionView, worker: str, problem: str, seconds: float) -> None:
    """Called once when a worker stops answering; a later call of ``ciphertune_worker_back`` ends it.

    On any thread. The request goes to a replica, or is sent again until the worker is back.

    Args:
        session: the session.
        worker: address of the worker.
        problem: what went wrong.
        seconds: until the product that waits is given up.
    """


@hookspec
def ciphertune_worker_back(session: SessionView, worker: str, seconds: float) -> None:
    """Called once a worker that was silent answers again. On any thread.

    Args:
        session: the session.
        worker: address of the worker.
        seconds: since it was called silent.
    """


@hookspec
def ciphertune_worker_excluded(session: SessionView, worker: str, layers: tuple[str, ...], direction: str) -> None:
    """Called once a worker gave an answer that is not the product that was asked for. It is asked no more.

    On any thread.

    Args:
        session: the session.
        worker: address of the worker.
        layers: names of the layers of the product.
        direction: forward or backward.
    """


@hookspec
def ciphertune_sending_key(worker: str, nbytes: int, done: bool) -> None:
    """Called before a large evaluation key is sent to a worker, and with ``done`` after it arrived or failed.

    On any thread.
    """


@hookspec
def ciphertune_session_closed(session: SessionView) -> None:
    """Called when a session was closed; ``session.traffic`` holds its totals."""


@hookspec
def ciphertune_before_request(session: SessionView, exchange: Exchange) -> None:
    """Gate: called before a product is sent. Raise ``ciphertune.errors.VetoError`` to refuse it: nothing is sent.

    In training, the step that asked for it fails and no weight is touched; the run can resume from its last checkpoint.

    Args:
        session: where it would go; ``session.selection`` and ``session.security`` say how.
        exchange: the layers, direction and number of tokens; nothing is counted yet.
    """


@hookspec
def ciphertune_after_reply(session: SessionView, exchange: Exchange) -> None:
    """Called when a product was decrypted.

    Args:
        session: the session that carried it, whose ``traffic`` already includes it.
        exchange: its byte counts, retries and seconds by phase. Failed products are not announced.
    """


@hookspec
def ciphertune_training_start(trainer: Any, total_steps: int, start_step: int) -> None:
    """Called when training begins, or resumes at ``start_step`` optimizer steps of ``total_steps``.

    Steps that an interrupted run did after ``start_step`` are done again: forget them.

    Args:
        trainer: a ``ciphertune.LoraTrainer``; ``ciphertune.session_of(trainer.model)`` is its session where layers are
            outsourced.
        total_steps: optimizer steps of the whole run.
        start_step: those done already; 0 unless it resumes.
    """


@hookspec
def ciphertune_training_step(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
    """Called after an optimizer step.

    Args:
        trainer: whose step.
        step: its number, from 1.
        metrics: as in ``trainer.history.steps``: step, epoch, loss, learning_rate, grad_norm, seconds, and tokens or
            samples; more in later versions.
    """


@hookspec
def ciphertune_evaluation(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
    """Called after an evaluation, within training or outside of it.

    Args:
        trainer: whose evaluation.
        step: optimizer steps done so far.
        metrics: eval_loss; for language models, perplexity, which may be infinite; for classifiers, eval_accuracy and
            eval_f1; more in later versions.
    """


@hookspec
def ciphertune_training_end(trainer: Any, step: int, reason: str) -> None:
    """Called when training ended; ``reason`` is ``finished``, ``interrupted`` or ``failed``."""


@hookspec
def ciphertune_register_commands(cli: click.Group) -> None:
    """Add commands to the ``ciphertune`` command line.

    A class with ``Options`` implements it as a static method or a class method: commands are there before any options
    are given. A command whose name is taken is refused, and one that raises ends with one line that names it.

    Args:
        cli: the group of all commands; ``cli.add_command(command)``.
    """
