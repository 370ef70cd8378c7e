"""The thread that talks to MLflow, so that training never waits for it."""

from __future__ import annotations

import collections
import queue
import threading
from typing import Any

from ciphertune import PluginError

Value = tuple[str, float, int, int]
"""Name, value, time in milliseconds, step."""

_BATCH = 1000  # what MLflow takes at once
_LIMIT = 500_000  # values kept for a server that is away; older ones are given up


class Sender:
    """Makes a run and sends values to it.

    Attributes:
        run_id: None until the server has made the run.
    """

    def __init__(self, client: Any, experiment: str, name: str, params: dict[str, str], tags: dict[str, str]) -> None:
        self.run_id: str | None = None
        self._client = client
        self._experiment, self._name, self._params, self._tags = experiment, name, params, tags
        self._queue: queue.SimpleQueue[list[Value] | str] = queue.SimpleQueue()
        self._waiting: collections.deque[Value] = collections.deque(maxlen=_LIMIT)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._sending = threading.Lock()  # a thread that was given up may still be at it
        self.put([])

    @property
    def running(self) -> bool:
        """Return whether ``finish`` is still to come."""
        return self._thread is not None

    def put(self, values: list[Value]) -> None:
        """Send these soon; never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ciphertune-mlflow", daemon=True)
            self._thread.start()
        self._queue.put(values)

    def finish(self, status: str, seconds: float) -> None:
        """Send what is left, end the run and the thread; gives up after ``seconds``."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(status)
            thread.join(seconds)
            if thread.is_alive() and self._error is None:
                self._error = TimeoutError(f"no answer within {seconds:g} s")

    def check(self) -> None:
        """Raise PluginError if the last attempt to send failed; values are kept for the next one."""
        error = self._error
        if error is not None:
            kept = f"{len(self._waiting)} values wait" if self.running else "the run is not complete there"
            raise PluginError(f"MLflow could not be told, {kept}: {type(error).__name__}: {error}") from error

    def _work(self) -> None:
        status: str | None = None
        while status is None:
            items = [self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get())
            with self._sending:
                for item in items:
                    if isinstance(item, str):
                        status = item
                    else:
                        self._waiting.extend(item)
                try:
                    self._send()
                    if status is not None:
                        self._client.set_terminated(self.run_id, status)
                    self._error = None
                except Exception as error:
                    self._error = error

    def _send(self) -> None:
        from mlflow.entities import Metric, Param

        if self.run_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            identity = found.experiment_id if found else self._client.create_experiment(self._experiment)
            self.run_id = self._client.create_run(identity, tags=self._tags, run_name=self._name).info.run_id
        if self._params:
            # 500 characters are what every MLflow store takes.
            params = [Param(name, value[:500]) for name, value in self._params.items()]
            self._client.log_batch(self.run_id, params=params)
            self._params = {}
        while self._waiting:
            batch = [self._waiting[n] for n in range(min(_BATCH, len(self._waiting)))]
            self._client.log_batch(self.run_id, metrics=[Metric(*value) for value in batch])
            for _ in batch:
                self._waiting.popleft()
