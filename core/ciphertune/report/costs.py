"""The costs of a run by phase and by layer, for its report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ciphertune._support import environment
from ciphertune.hookspecs import hookimpl
from ciphertune.report.operations import StepOperations
from ciphertune.traffic import SetUp, TrafficByLayer

if TYPE_CHECKING:
    from ciphertune.client.session import Session
    from ciphertune.outsourcing.convert import Share
    from ciphertune.traffic import Exchange


@dataclasses.dataclass
class RunCosts:
    """Costs of a run in this process; of a resumed run, in its last process.

    Attributes:
        started: date and time, UTC.
        seconds: of training and evaluations.
        phases: those seconds by phase: ``encrypt``, ``decrypt``, ``worker``, ``network`` and ``rest``. They add up.
            Where several workers evaluate at the same time, ``worker`` is at most the time spent waiting for them.
        groups: a row for every group and direction, as ``ciphertune.traffic.TrafficByLayer`` has them.
        first_step: of this process; above 1 where the run was resumed.
        set_up: costs of preparations from the weights' codes, before the training and no part of ``seconds``.
        outsourced_weights, client_weights: numbers of them, adapters at the client included.
        outsourced_operations, client_operations: multiply-adds of the first step; both 0 where they are not known.
        remote: whether products were computed in other processes.
        routing_sent: whether workers saw how many tokens each expert of a mixture got (``experts=routed``).
        encrypted, assumption: of the backend's security statement.
        versions, machine: as ``ciphertune._support.environment`` finds them.
    """

    started: str
    seconds: float
    phases: dict[str, float]
    groups: list[dict[str, Any]]
    first_step: int
    set_up: SetUp
    outsourced_weights: int
    client_weights: int
    outsourced_operations: int
    client_operations: int
    remote: bool
    routing_sent: bool
    encrypted: bool
    assumption: str
    versions: dict[str, str | None]
    machine: dict[str, str | int | float]


class CostMeter:
    """A hook plugin that measures the costs of one session within ``measuring``."""

    def __init__(self, session: Session, share: Share) -> None:
        self._session = session
        self._share = share
        self._by_layer = TrafficByLayer()
        self._operations = StepOperations(session)
        self._seconds = 0.0
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._first_step = 1

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure within a ``with`` block."""
        plugins = self._session.plugins
        with contextlib.ExitStack() as stack:
            for plugin, name in ((self, "report"), (self._operations, "report-operations")):
                plugins.register(plugin, name)
                stack.callback(plugins.unregister, plugin)
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - begin

    @hookimpl
    def ciphertune_training_start(self, start_step: int) -> None:
        """Store the first step of this process."""
        self._first_step = start_step + 1

    @hookimpl
    def ciphertune_after_reply(self, session: Session, exchange: Exchange) -> None:
        """Add a product to the costs of its layers."""
        if session is self._session:
            self._by_layer.add(exchange)

    def costs(self) -> RunCosts:
        """The costs measured so far."""
        traffic, security = self._session.traffic, self._session.security
        worker = min(traffic.evaluate_seconds, traffic.wait_seconds)
        phases = {
            "encrypt": traffic.encrypt_seconds,
            "decrypt": traffic.decrypt_seconds,
            "worker": worker,
            "network": traffic.wait_seconds - worker,
        }
        phases["rest"] = max(0.0, self._seconds - sum(phases.values()))
        return RunCosts(
            started=self._started.isoformat(timespec="seconds"),
            seconds=self._seconds,
            phases=phases,
            groups=self._by_layer.rows(),
            first_step=self._first_step,
            set_up=dataclasses.replace(self._session.set_up),
            outsourced_weights=self._share.outsourced,
            client_weights=self._share.at_client,
            outsourced_operations=self._operations.at_workers,
            client_operations=self._operations.at_client,
            remote=self._session.choice.transport.remote,
            routing_sent=self._session.choice.options.experts == "routed",
            encrypted=security.encrypted,
            assumption=security.assumption,
            versions=environment.versions(),
            machine=environment.machine(),
        )
