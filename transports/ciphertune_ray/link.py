"""A client's link to one worker of a cluster."""

from __future__ import annotations

from concurrent.futures import Future

from ciphertune.errors import ProtocolError, ReplyError
from ciphertune.protocol import Limits, Message, pack, unpack
from ciphertune.transport import Link, PendingReplies
from ciphertune_ray.relay_client import Answer, RelayClient


class RayLink(Link):
    """Requests to one actor, many at a time, answered in any order.

    Args:
        name: for messages, and to tell which workers have joined since.
        actor: its name in the cluster.
        peer: what this client is known as there.
        relay: to the cluster; the link is one of its users, and releases it when it is closed.
    """

    def __init__(self, name: str, actor: str, peer: str, relay: RelayClient) -> None:
        self.name = name
        self._actor, self._peer, self.relay = actor, peer, relay
        self._pending: PendingReplies[Message] = PendingReplies(name)

    def submit(self, request: Message) -> Future[Message]:
        """See ``Link.submit``. Buffers are read until the request has left, so they must not be changed."""
        frames = pack(request)
        number, reply = self._pending.add()
        if not reply.done():
            limits = request.reply_limits
            head = {"op": "call", "actor": self._actor, "peer": self._peer}
            asked = self.relay.request(head, frames, limits.header_bytes + limits.total_bytes)
            asked.add_done_callback(lambda answer: self._answered(number, limits, answer))
            # A request that is given up does not keep the answer's memory.
            reply.add_done_callback(lambda _: asked.cancel())
        return reply

    def close(self) -> None:
        """See ``Link.close``."""
        if self._pending.close():
            self.relay.release()

    def _answered(self, number: int, limits: Limits, answer: Future[Answer]) -> None:
        if answer.cancelled():
            return
        if (error := answer.exception()) is not None:
            self._pending.fail(number, error if isinstance(error, ReplyError) else str(error))
            return
        try:
            self._pending.answer(number, unpack(answer.result()[1], limits))
        except ProtocolError as problem:
            self._pending.fail(number, problem)
