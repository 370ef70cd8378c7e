"""The listener of a worker in a process that Ray did not start: a proxy actor in the cluster takes its requests."""

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
from ciphertune_ray.relay_client import shared_relay

log = logging.getLogger(__name__)

_JOIN_SECONDS = 180.0
_AGAIN_SECONDS = 2.0


class RayListener(Listener):
    """Serves a handler to the clients of a cluster, through a proxy actor.

    Args:
        handler: where requests go.
        where: the deployment and the worker's number in it.
        max_inflight: bytes of replies under way.

    Raises:
        TransportError: the cluster cannot be joined, or has such a worker already.
    """

    def __init__(self, handler: RequestHandler, where: Address, max_inflight: int) -> None:
        self.address = str(where)
        self._handler, self._actor = handler, where.actor
        self._closing = threading.Event()
        self._relay = shared_relay(where.ray, max_inflight)
        try:
            self._register()
        except BaseException:
            self.close()
            raise

    def close(self, linger: float = 0.0) -> None:
        """See ``Listener.close``. Replies that are ready are in the relay's queue already, so they leave first."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._relay.request({"op": "unregister", "actor": self._actor}).result(max(linger, 5.0))
        except (TransportError, FutureTimeoutError):
            log.info("the proxy actor of %s could not be removed", self.address)
        self._relay.served.pop(self._actor, None)
        self._relay.release()

    def _register(self) -> None:
        limits = self._handler.limits
        register = {"op": "register", "actor": self._actor, "max_bytes": limits.total_bytes + limits.header_bytes}
        try:
            self._relay.request(register).result(_JOIN_SECONDS)
        except FutureTimeoutError:
            raise TransportError(f"{self.address}: the cluster did not answer in {_JOIN_SECONDS:g} s") from None
        except TransportError as error:
            raise TransportError(f"{self.address} cannot be served: {error}") from error
        self._relay.served[self._actor] = self._notified

    def _notified(self, head: dict[str, Any], frames: list[Frame]) -> None:
        if head["op"] == "request":
            self._handler.submit(frames, f"ray:{head['peer']}", self._reply_to(head["number"]))
        elif not self._closing.is_set():
            log.warning("%s has lost its proxy actor: %s", self.address, head["why"])
            threading.Thread(target=self._register_again, name="ciphertune-ray-register", daemon=True).start()

    def _reply_to(self, number: int) -> Callable[[list[Frame], Callable[[], None]], None]:
        def reply(frames: list[Frame], release: Callable[[], None]) -> None:
            self._relay.send({"op": "reply", "actor": self._actor, "number": number}, frames, release)

        return reply

    def _register_again(self) -> None:
        while not self._closing.wait(_AGAIN_SECONDS):
            try:
                self._register()
            except TransportError as error:
                log.info("no proxy actor yet: %s", error)
            else:
                log.info("%s has a proxy actor again", self.address)
                return
