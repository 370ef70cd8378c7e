"""What a session used of a worker, for the operator's records."""

from __future__ import annotations

import dataclasses
import secrets


@dataclasses.dataclass
class SessionRecord:
    """One session: who, when and how much, and nothing of its content.

    Attributes:
        client: as the transport knows it: its public key, or its address where there are no keys.
        bundle: name of the weights that it uses; empty where a worker's have none.
        backend: of the encryption.
        opened, last_used: seconds since the epoch.
        ended: likewise, None while it is open.
        why: how it ended.
        products, errors: answers to requests for products, and those of them that were errors.
        bytes_in, bytes_out: of these requests and answers, headers included.
        evaluate_seconds: of evaluation.
        id: names the record. It is not the session's id, with which its client uses it.
    """

    client: str
    bundle: str
    backend: str
    opened: float
    last_used: float
    ended: float | None = None
    why: str = ""
    products: int = 0
    errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    evaluate_seconds: float = 0.0
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
