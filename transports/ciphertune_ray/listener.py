"""The door of a worker in a process that Ray did not start: an actor in the cluster takes its requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from ciphertune.errors import TransportError
from ciphertune.protocol import Frame
from ciphertune.transport import Listener, RequestHandler
from ciphertune_ray.address import Address
from ciphertune_ray.bridge import shared_bridge

log = logging.getLogger(__name__)

_JOIN_SECONDS = 90.0
_AGAIN_SECONDS = 2.0


class RayListener(Listener):
    """See the module.

    Args:
        handler: where requests go.
        where: with the worker's number.
        most: bytes of replies under way.

    Raises:
        TransportError: the cluster cannot be joined, or has such a worker already.
    """

    def __init__(self, handler: RequestHandler, where: Address, most: int) -> None:
        self.address = str(where)
        self._handler, self._actor = handler, where.actor
        self._closing = threading.Event()
        self._bridge = shared_bridge(where.ray, most)
        try:
            self._host()
        except BaseException:
            self.close()
            raise

    def close(self, linger: float = 0.0) -> None:
        """See ``Listener.close``. Replies were handed over when they were ready, and leave first."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._bridge.ask({"op": "unhost", "actor": self._actor}).result(max(linger, 5.0))
        except (TransportError, FutureTimeoutError):
            log.info("the cluster was not told that %s is gone", self.address)
        self._bridge.hosted.pop(self._actor, None)
        self._bridge.release()

    def _host(self) -> None:
        limits = self._handler.limits
        most = limits.total_bytes + limits.header_bytes
        try:
            self._bridge.ask({"op": "host", "actor": self._actor, "most": most}).result(_JOIN_SECONDS)
        except FutureTimeoutError:
            raise TransportError(f"{self.address}: the cluster did not answer in {_JOIN_SECONDS:g} s") from None
        except TransportError as error:
            raise TransportError(f"{self.address} cannot be served: {error}") from error
        self._bridge.hosted[self._actor] = self._pushed

    def _pushed(self, head: dict[str, Any], frames: list[Frame]) -> None:
        if head["op"] == "request":
            self._handler.submit(frames, f"ray:{head['peer']}", self._reply_to(head["number"]))
        elif not self._closing.is_set():
            log.warning("%s is not reached any more: %s", self.address, head["why"])
            threading.Thread(target=self._host_again, name="ciphertune-ray-again", daemon=True).start()

    def _reply_to(self, number: int) -> Callable[[list[Frame], Callable[[], None]], None]:
        def reply(frames: list[Frame], release: Callable[[], None]) -> None:
            self._bridge.tell({"op": "give", "actor": self._actor, "number": number}, frames, release)

        return reply

    def _host_again(self) -> None:
        while not self._closing.wait(_AGAIN_SECONDS):
            try:
                self._host()
            except TransportError as error:
                log.info("not yet: %s", error)
            else:
                log.info("%s is reached again", self.address)
                return
