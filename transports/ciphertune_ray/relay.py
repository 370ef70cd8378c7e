"""The process that speaks to a cluster in another one's place: ``python -m ciphertune_ray.relay DESCRIPTOR``.

Whoever is part of a Ray cluster can be made to run code by any other part of it: its messages are pickles. The process
with the keys and the data must not be. So this one is, holds neither, and passes on frames that are checked where they
arrive, as those of any other wire.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ciphertune.errors import CipherTuneError
from ciphertune.protocol import Frame
from ciphertune_ray.pipe import Pipe

_TAKES = 4
"""Requests asked for at a time on behalf of a worker that runs elsewhere."""
_REACH_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0


class Relay:
    """See the module.

    Args:
        pipe: to the process that it serves.
        most: bytes of requests under way; more wait.
    """

    def __init__(self, pipe: Pipe, most: int) -> None:
        self._pipe = pipe
        self._most = most
        self._nbytes = 0
        self._room = threading.Condition()
        self._actors: dict[str, Any] = {}
        self._hosted: dict[str, Any] = {}
        self._kept: list[Any] = []
        self._pool = ThreadPoolExecutor(8, "ciphertune-relay")
        # Ray calls back on a thread of its own, which must not wait for the other end to read.
        self._sender = ThreadPoolExecutor(1, "ciphertune-send")
        self._operations: dict[str, Callable[[dict[str, Any], list[Frame]], None]] = {
            "call": self._call,
            "members": self._members,
            "deploy": self._deploy,
            "host": self._host,
            "give": self._give,
            "unhost": self._unhost,
        }

    def run(self) -> None:
        """Serve until the other end hangs up."""
        while (message := self._pipe.receive()) is not None:
            head, frames = message
            try:
                self._operations[head["op"]](head, frames)
            except Exception as error:
                self._fail(head, error)

    def _call(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """A request to a worker. Its answer is sent on when it is there."""
        from ciphertune_ray.actors import carried, frames_of

        nbytes = sum(len(frame) for frame in frames)
        with self._room:
            self._room.wait_for(lambda: self._nbytes == 0 or self._nbytes + nbytes <= self._most)
            self._nbytes += nbytes

        def send(future: Future[Any]) -> None:
            with self._room:
                self._nbytes -= nbytes
                self._room.notify()
            try:
                self._tell({"id": head["id"]}, frames_of(future.result()))
            except Exception as error:
                # The name may be another actor's by now.
                self._actors.pop(head["actor"], None)
                self._fail(head, error)

        try:
            future = self._actor(head["actor"]).answer.remote(head["peer"], *carried(frames)).future()
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

        self._later(head, lambda: {"members": members(head["name"])})

    def _deploy(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """Start workers of a bundle, or more of those that are there."""

        def deploy() -> dict[str, Any]:
            from ciphertune_ray.deployment import Wanted, grow, members, plan, spec_of

            name, count, shared = head["name"], head["workers"], head["shared"]
            if not shared:
                spec = plan(Wanted(**head["wanted"]))
                self._kept += grow(name, spec, max(count, len(spec.parts)), shared=False, seconds=head["seconds"])
            elif members(name):
                known = spec_of(name)
                if known is None:
                    raise LookupError(f"no worker of the deployment {name!r} answers, so it cannot grow now")
                grow(name, known, count, shared=True, seconds=head["seconds"])
            return {"members": members(name)}

        self._later(head, deploy)

    def _host(self, head: dict[str, Any], frames: list[Frame]) -> None:
        """Take requests for a worker of the other end."""
        import ray

        from ciphertune_ray.deployment import NAMESPACE
        from ciphertune_ray.mailbox import mailbox_class

        def host() -> dict[str, Any]:
            name = head["actor"]
            kind = ray.remote(mailbox_class())
            mailbox = kind.options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=0).remote()
            ray.get(mailbox.describe.remote(), timeout=60)
            self._hosted[name] = mailbox
            for _ in range(_TAKES):
                self._take(name, mailbox, head["most"])
            return {}

        self._later(head, host)

    def _take(self, name: str, mailbox: Any, most: int) -> None:
        """Wait for a request, and for the next one. What is too large is passed on without its frames."""
        from ciphertune_ray.actors import frames_of

        def taken(future: Future[Any]) -> None:
            if self._hosted.get(name) is not mailbox:
                return
            try:
                number, peer, *frames = future.result()
            except Exception:
                self._hosted.pop(name, None)
                self._tell({"op": "lost", "actor": name, "why": "its actor is gone"}, [])
                return
            self._take(name, mailbox, most)
            head = {"op": "request", "actor": name, "number": number, "peer": peer}
            kept = frames_of(frames)
            self._sender.submit(self._tell, head, kept if sum(map(len, kept)) <= most else [])

        mailbox.take.remote().future().add_done_callback(taken)

    def _give(self, head: dict[str, Any], frames: list[Frame]) -> None:
        from ciphertune_ray.actors import carried

        if (mailbox := self._hosted.get(head["actor"])) is not None:
            mailbox.give.remote(head["number"], *carried(frames))

    def _unhost(self, head: dict[str, Any], frames: list[Frame]) -> None:
        import ray

        if (mailbox := self._hosted.pop(head["actor"], None)) is not None:
            ray.kill(mailbox)
        self._tell({"id": head["id"]}, [])

    def _later(self, head: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        def run() -> None:
            try:
                self._tell({"id": head["id"], **work()}, [])
            except Exception as error:
                self._fail(head, error)

        self._pool.submit(run)

    def _fail(self, head: dict[str, Any], error: Exception) -> None:
        self._tell({"id": head.get("id"), "error": told(error), "kind": type(error).__name__}, [])

    def _tell(self, head: dict[str, Any], frames: list[Frame]) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, which ends this process
            self._pipe.send(head, frames)


def told(error: Exception) -> str:
    """An error in one line. Ray's own begin with what happened; what follows is a trace."""
    if isinstance(error, (CipherTuneError, LookupError)) and error.args:
        return str(error.args[0])
    first = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def join(cluster: str | None) -> None:
    """Become part of a cluster, or start one of this machine alone.

    Raises:
        OSError: nobody listens there, which Ray would take long to say.
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
    ray.init(**where, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)


def main() -> None:
    """Serve the process at the other end of the descriptor."""
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    message = pipe.receive()
    if message is None:
        return
    head = message[0]
    try:
        join(head["cluster"])
    except BaseException as error:
        pipe.send({"op": "failed", "error": told(error) if isinstance(error, Exception) else type(error).__name__})
        return
    pipe.send({"op": "joined"})
    Relay(pipe, head["most"]).run()

    def leave() -> None:
        import ray

        ray.shutdown()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(_GOODBYE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
