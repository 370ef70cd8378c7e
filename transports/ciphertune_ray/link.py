"""A client's link to one worker of a cluster."""

from __future__ import annotations

from concurrent.futures import Future

from ciphertune.errors import ProtocolError, ReplyError, TransportError
from ciphertune.protocol import Message, pack, unpack
from ciphertune.transport import Link, settle
from ciphertune_ray.bridge import Answer, Bridge


class RayLink(Link):
    """Requests to one actor, many at a time, answered in any order.

    Args:
        name: for messages, and to tell joining workers by.
        actor: its name in the cluster.
        peer: what this client is known as there.
        bridge: to the cluster, held for this link, which releases it when it is closed.
    """

    def __init__(self, name: str, actor: str, peer: str, bridge: Bridge) -> None:
        self.name = name
        self._actor, self._peer, self._bridge = actor, peer, bridge
        self._pending: set[Future[Message]] = set()
        self._closed = False

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. Buffers are read until the request has left, so they must not be changed."""
        future: Future[Message] = Future()
        if self._closed:
            future.set_exception(TransportError(f"{self.name}: the link is closed"))
            return future
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        asked = self._bridge.ask({"op": "call", "actor": self._actor, "peer": self._peer}, pack(request))
        asked.add_done_callback(lambda answer: self._answered(future, answer))
        # Whoever gives up does not keep the answer's memory.
        future.add_done_callback(lambda _: asked.cancel())
        return future

    def close(self) -> None:
        """See ``Link.close``."""
        if self._closed:
            return
        self._closed = True
        for future in list(self._pending):
            settle(future, TransportError(f"{self.name}: the link is closed"))
        self._bridge.release()

    def _answered(self, future: Future[Message], answer: Future[Answer]) -> None:
        if answer.cancelled():
            return
        error = answer.exception()
        if error is not None:
            settle(future, TransportError(f"{self.name}: {error}"))
            return
        try:
            settle(future, unpack(answer.result()[1]))
        except ProtocolError as problem:
            settle(future, ReplyError(f"{self.name} sent a malformed reply: {problem}"))
