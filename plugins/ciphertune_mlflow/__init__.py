"""Training runs in MLflow: settings, metrics of every step, and how the run ended."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ciphertune import PluginError, SelectionError
from ciphertune.errors import NothingOutsourcedError
from ciphertune.tracker import Tracker
from ciphertune_mlflow.sender import Sender

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which may be JSON
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",  # drawn from Python's generator, which training may depend on
}
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


@dataclasses.dataclass(frozen=True)
class MLflowOptions:
    """Options of the mlflow plugin.

    Attributes:
        uri: of the tracking server; MLflow's own default (``MLFLOW_TRACKING_URI``) if not given. Credentials belong
            into MLflow's environment variables.
        experiment: name of the experiment, made if there is none.
        run: name of the run; made from the time if not given.
        wait: seconds that the end of training waits for what the server has not taken yet.
    """

    uri: str | None = None
    experiment: str = "ciphertune"
    run: str | None = None
    wait: float = 30.0

    def __post_init__(self) -> None:
        if self.uri is not None and "@" in urlsplit(self.uri).netloc:
            raise SelectionError(
                "option uri holds a password or a token: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if not 0 <= self.wait < math.inf:
            raise SelectionError(f"option wait={self.wait} must be a number of seconds from 0")


class MLflow(Tracker):
    """A run of MLflow for every training run; one that resumes is a new one, tagged with the step it resumes at.

    Neither training data nor anything of a key is logged: settings that are numbers, the names of backend and
    transport, and metrics. Endpoints and options that are text (paths, tokens) are left out. A server that is slow or
    away delays no step: a thread sends. MLflow's own telemetry is switched off unless the environment says otherwise.

    Raises:
        PluginError: mlflow-skinny is missing, or MLflow cannot use this ``uri``.
    """

    interface = 1
    Options = MLflowOptions

    def __init__(self, options: MLflowOptions) -> None:
        super().__init__()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise PluginError('needs mlflow-skinny: pip install "ciphertune[mlflow]"') from error
        _give_mlflow_a_generator()
        self.options = options
        try:
            self._client = MlflowClient(options.uri)
        except Exception as error:
            raise PluginError(f"MLflow cannot use {options.uri or 'its default store'}: {error}") from error
        self._sender: Sender | None = None
        self._status = "RUNNING"

    @property
    def run_id(self) -> str | None:
        """Identifier of the current or last run, once the server has given one."""
        return None if self._sender is None else self._sender.run_id

    def begin(self, trainer: Any, total_steps: int, start_step: int) -> None:
        """Start a run."""
        self.close()
        tags = {"ciphertune.resumed_at_step": str(start_step)} if start_step else {}
        params = {"total_steps": str(total_steps), **_params(trainer)}
        # A name that MLflow makes up is drawn from Python's random generator.
        name = self.options.run or time.strftime("ciphertune %Y-%m-%d %H:%M:%S")
        self._sender = Sender(self._client, self.options.experiment, name, params, tags)
        self._status = "KILLED"  # should the end never come

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to the thread; raise what it met earlier."""
        if self._sender is None:
            return
        now = int(time.time() * 1000)
        left_out = ("step", "epoch") if kind == "step" else ("step", "requests", "retries", "bytes_up", "bytes_down")
        values = {name: float(value) for name, value in metrics.items() if name not in left_out}
        late = not self._sender.running
        self._sender.put([(name, value, now, step) for name, value in values.items() if math.isfinite(value)])
        if late:  # an evaluation after the run
            self._sender.finish(self._status, self.options.wait)
        self._sender.check()

    def end(self, step: int, reason: str) -> None:
        """End the run with a status: FINISHED, KILLED where it was interrupted, or FAILED."""
        if self._sender is not None:
            self._status = _STATUS.get(reason, "FAILED")
            self._sender.finish(self._status, self.options.wait)
            self._sender.check()

    def close(self) -> None:
        """End a run that goes on."""
        if self._sender is not None and self._sender.running:
            self._sender.finish(self._status, self.options.wait)


def _give_mlflow_a_generator() -> None:
    """Let MLflow draw names from a generator of its own, not from Python's, which training may depend on.

    Its file store draws for the identifier of one experiment in ten.
    """
    from mlflow.utils import name_utils

    name_utils.random = random.Random()


def _params(trainer: Any) -> dict[str, str]:
    from ciphertune import session_of, share

    optimizer = trainer.optimizer
    params: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "weight_decay": optimizer.param_groups[0].get("weight_decay"),
        "scheduler": None if trainer.scheduler is None else type(trainer.scheduler).__name__,
        "accumulation": trainer.settings.accumulation,
        "max_grad_norm": trainer.settings.max_grad_norm,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    try:
        session, part = session_of(trainer.model), share(trainer.model)
    except NothingOutsourcedError:
        return {name: str(value) for name, value in params.items()}
    choice = session.choice
    params |= {
        "backend": choice.selection.backend,
        "transport": choice.selection.transport,
        "security": session.security.summary,
        "security_bits": session.security.bits,
        "outsourced_layers": part.layers,
        "outsourced_fraction": round(part.fraction, 4),
    }
    for field in dataclasses.fields(choice.backend.options):
        value = getattr(choice.backend.options, field.name)
        if isinstance(value, (bool, int, float)):
            params[f"backend.{field.name}"] = value
    return {name: str(value) for name, value in params.items()}
