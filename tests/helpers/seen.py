"""Requests that reach a worker in this process."""

from __future__ import annotations

from typing import Any

from ciphertune.protocol import Message


def seen_by(worker: Any) -> list[Message]:
    """The list of requests that reach a worker from now on; it grows."""
    requests: list[Message] = []
    answer = worker.handle

    def handle(request: Message, peer: str = "", *rest: Any) -> Message:
        requests.append(request)
        reply: Message = answer(request, peer, *rest)
        return reply

    worker.handle = handle
    return requests
