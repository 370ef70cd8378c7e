"""The relay process between a client or worker and a Ray cluster: ``python -m ciphertune_ray.relay DESCRIPTOR``.

Ray's messages are pickles, so every process of a cluster can run code in every other one. A process with keys, data or
weights must not be part of one. The relay is, holds none of them, and passes frames on, which are checked where they
arrive, as those of any other transport.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ciphertune.errors import CipherTuneError, TransportError
from ciphertune.protocol import Frame
from ciphertune_ray.channel import Channel

_REQUESTS_AHEAD = 4
"""Requests that are fetched at a time from the proxy of a worker outside the cluster."""
_REACH_SECONDS = 10.0
_JOIN_TRIES = 4
_JOIN_AGAIN_SECONDS = 60.0
"""After this long, joining is not tried again."""
_SHUTDOWN_SECONDS = 5.0


class Relay:
    """Carries out the requests of the process that started it.

    Args:
        channel: to that process.
        max_inflight: bytes of requests under way; more wait.
    """

    def __init__(self, channel: Channel, max_inflight: int) -> None:
        self._channel = channel
        self._max_inflight = max_inflight
        self._nbytes = 0
        self._room = threading.Condition()
        self._actors: dict[str, Any] = {}
        self._proxies: dict[str, Any] = {}
        self._own_workers: list[Any] = []
        self._pool = ThreadPoolExecutor(8, "ciphertune-relay")
        # Ray's callbacks run on a thread of Ray, which must not wait for the other end to read.
        self._sender = ThreadPoolExecutor(1, "ciphertune-send")
        self._operations: dict[str, Callable[[dict[str, Any], list[Frame]], None]] = {
            "call": self._call,
            "members": self._members,
            "deploy": self._deploy,
            "register": self._register,
            "reply": self._reply,
            "unregister": self._unregister,
        }

    def run(self) -> None:
        """Serve until the other end is closed."""
        while (message := self._channel.receive()) is not None:
            head, frames = message
            try:
                self._operations[head["op"]](head, frames)
            except Exception as error:
                self._fail(head, error)

    def _call(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """Send a request to a worker, and pass its reply on."""
        from ciphertune_ray.actors import from_ray, to_ray

        nbytes = sum(len(frame) for frame in frames)
        with self._room:
            self._room.wait_for(lambda: self._nbytes == 0 or self._nbytes + nbytes <= self._max_inflight)
            self._nbytes += nbytes

        def send(future: Future[Any]) -> None:
            with self._room:
                self._nbytes -= nbytes
                self._room.notify()
            try:
                self._send({"id": head["id"]}, from_ray(future.result()))
            except Exception as error:
                # The name may be another actor's by now.
                self._actors.pop(head["actor"], None)
                self._fail(head, error)

        try:
            future = self._actor(head["actor"]).answer.remote(head["peer"], *to_ray(frames)).future()
        except BaseException:
            with self._room:
                self._nbytes -= nbytes
            self._actors.pop(head["actor"], None)
            raise
        future.add_done_callback(lambda done: self._sender.submit(send, done))

    def _actor(self, name: str) -> Any:
        import ray

        from ciphertune_ray.deployment import NAMESPACE

        if name not in self._actors:
            try:
                self._actors[name] = ray.get_actor(name, NAMESPACE)
            except ValueError:
                raise LookupError(f"no worker {name} is in the cluster") from None
        return self._actors[name]

    def _members(self, head: dict[str, Any], frames: list[Frame]) -> None:
        from ciphertune_ray.deployment import members

        self._in_pool(head, lambda: {"members": members(head["name"])})

    def _deploy(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """Start workers of a bundle, or more workers of a deployment."""

        def deploy() -> dict[str, Any]:
            from ciphertune_ray.deployment import Wanted, grow, members, plan, spec_of

            name, count, shared = head["name"], head["workers"], head["shared"]
            if not shared:
                spec = plan(Wanted(workers=count, **head["wanted"]))
                self._own_workers += grow(name, spec, count, shared=False, seconds=head["seconds"])
            elif members(name):
                known = spec_of(name)
                if known is None:
                    raise LookupError(f"no worker of the deployment {name!r} answers, so it cannot grow now")
                grow(name, known, count, shared=True, seconds=head["seconds"])
            return {"members": members(name)}

        self._in_pool(head, deploy)

    def _register(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """Start a proxy that takes requests for a worker of the other end."""
        import ray

        from ciphertune_ray.deployment import NAMESPACE
        from ciphertune_ray.proxy_actor import worker_proxy_class

        def start() -> dict[str, Any]:
            name = head["actor"]
            kind = ray.remote(worker_proxy_class())
            proxy = kind.options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=0).remote()
            ray.get(proxy.describe.remote(), timeout=60)
            self._proxies[name] = proxy
            for _ in range(_REQUESTS_AHEAD):
                self._forward_next(name, proxy, head["max_bytes"])
            return {}

        self._in_pool(head, start)

    def _forward_next(self, name: str, proxy: Any, max_bytes: int) -> None:
        """Pass on the proxy's next request, and so on; one larger than ``max_bytes`` goes without its frames."""
        from ciphertune_ray.actors import from_ray

        def taken(future: Future[Any]) -> None:
            if self._proxies.get(name) is not proxy:
                return
            try:
                number, peer, *frames = future.result()
            except Exception:
                self._proxies.pop(name, None)
                self._send({"op": "lost", "actor": name, "why": "its actor is gone"}, [])
                return
            self._forward_next(name, proxy, max_bytes)
            head = {"op": "request", "actor": name, "number": number, "peer": peer}
            kept = from_ray(frames)
            self._sender.submit(self._send, head, kept if sum(map(len, kept)) <= max_bytes else [])

        proxy.next_request.remote().future().add_done_callback(taken)

    def _reply(self, head: dict[str, Any], frames: list[Frame]) -> None:
        from ciphertune_ray.actors import to_ray

        if (proxy := self._proxies.get(head["actor"])) is not None:
            proxy.reply.remote(head["number"], *to_ray(frames))

    def _unregister(self, head: dict[str, Any], frames: list[Frame]) -> None:
        import ray

        if (proxy := self._proxies.pop(head["actor"], None)) is not None:
            ray.kill(proxy)
        self._send({"id": head["id"]}, [])

    def _in_pool(self, head: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        def run() -> None:
            try:
                self._send({"id": head["id"], **work()}, [])
            except Exception as error:
                self._fail(head, error)

        self._pool.submit(run)

    def _fail(self, head: dict[str, Any], error: Exception) -> None:
        self._send({"id": head.get("id"), "error": one_line(error), "kind": type(error).__name__}, [])

    def _send(self, head: dict[str, Any], frames: list[Frame]) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, which ends this process
            self._channel.send(head, frames)


def one_line(error: Exception) -> str:
    """Put an error in one line. The first line of Ray's own errors says what happened; a trace follows."""
    if isinstance(error, (CipherTuneError, LookupError)) and error.args:
        return str(error.args[0])
    first = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def join(cluster: str | None) -> None:
    """Make this process part of a cluster, or start a cluster on this machine.

    A Ray Client server starts a process for each client. On a busy machine that process may come up late, or die at its
    start, when gRPC is at work in the server while it forks; so this is tried again.

    Raises:
        OSError: nothing listens at the address, which Ray would take long to report.
        TransportError: the Ray Client server did not start its process in several tries.
        Exception: whatever Ray raises.
    """
    import logging

    import ray

    from ciphertune_ray.deployment import NAMESPACE

    address = os.environ.get("RAY_ADDRESS") if cluster == "auto" else cluster
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    where = {"address": cluster} if cluster is not None else {"address": "local", "include_dashboard": False}
    begun = time.monotonic()
    for tries in range(1, _JOIN_TRIES + 1):
        try:
            ray.init(**where, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            return
        except ConnectionAbortedError as error:
            if tries == _JOIN_TRIES or time.monotonic() - begun > _JOIN_AGAIN_SECONDS:
                # The end of a trace of the server says what happened.
                problem = str(error).strip().rpartition("\n")[2][:300]
                raise TransportError(
                    f"the Ray Client server at {address} started no process for this client (tried {tries}×), see "
                    f"ray_client_server*.err in the logs of the head: {problem}"
                ) from error
            time.sleep(2.0 ** (tries - 1))


def main() -> None:
    """Join the cluster and serve the process at the other end of the descriptor."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    message = channel.receive()
    if message is None:
        return
    head = message[0]
    try:
        join(head["cluster"])
    except BaseException as error:
        why = one_line(error) if isinstance(error, Exception) else type(error).__name__
        channel.send({"op": "failed", "error": why})
        return
    channel.send({"op": "joined"})
    Relay(channel, head["max_inflight"]).run()

    def shut_down() -> None:
        import ray

        ray.shutdown()

    shutdown = threading.Thread(target=shut_down, daemon=True)
    shutdown.start()
    shutdown.join(_SHUTDOWN_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
