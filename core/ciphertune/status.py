"""Status of a worker as one client may know it: the reply to a ``stats`` request, written and read here alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ciphertune._support.printable import printable

_TEXT = 40


@dataclasses.dataclass(frozen=True)
class ClientUsage:
    """One client's own use of a worker; sums begin when it comes, or comes again after a long absence.

    Attributes:
        sessions, under_way: open sessions and unanswered requests now.
        products, errors, bytes_in, bytes_out, evaluate_seconds: sums.
    """

    sessions: int | None = None
    under_way: int | None = None
    products: int | None = None
    errors: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    evaluate_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class WorkerStatus:
    """A worker's status. At a client, what the worker did not say, or said in a form that makes no sense, is None.

    A client must learn no more of another one than the load of all together. Whatever is added here must first have
    its place in docs/threat-model.md.

    Attributes:
        version, device, layers, weight_bytes, evaluators, uptime_seconds: of the worker.
        draining: whether it refuses new requests because it is about to stop.
        busy: share of the last seconds in which it evaluated, 0 to 1.
        sessions, clients, queued, under_way: of all clients.
        bytes_in_per_second, bytes_out_per_second: of all clients, in whole megabytes.
        own: of the client that asked.
    """

    version: str | None = None
    device: str | None = None
    layers: int | None = None
    weight_bytes: int | None = None
    evaluators: int | None = None
    draining: bool | None = None
    uptime_seconds: float | None = None
    busy: float | None = None
    sessions: int | None = None
    clients: int | None = None
    queued: int | None = None
    under_way: int | None = None
    bytes_in_per_second: float | None = None
    bytes_out_per_second: float | None = None
    own: ClientUsage = dataclasses.field(default_factory=ClientUsage)

    def fields(self) -> dict[str, Any]:
        """Fields of the reply that says so."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> WorkerStatus:
        """Read a worker's status from a reply, of which nothing is taken for granted."""
        told = fields.get("own")
        own = ClientUsage(**_numbers(ClientUsage, told if isinstance(told, dict) else {}))
        known = _numbers(cls, fields)
        if "busy" in known:
            known["busy"] = min(1.0, known["busy"])
        for name in ("version", "device"):
            text = fields.get(name)
            known[name] = printable(text, _TEXT) if isinstance(text, str) else None
        draining = fields.get("draining")
        return cls(draining=draining if isinstance(draining, bool) else None, own=own, **known)


def _numbers(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are finite, not below 0, and whole where the dataclass says so, by field name."""
    known = {}
    for field in dataclasses.fields(cls):
        kinds = {"int": (int,), "float": (int, float)}.get(str(field.type).partition(" ")[0])
        value = fields.get(field.name)
        if kinds and isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < 2**63:
            known[field.name] = value
    return known
