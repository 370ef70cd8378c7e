"""A thread that owns a ZeroMQ socket, which link and listener derive from."""

from __future__ import annotations

import abc
import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from ciphertune._support.turns import SHORT, take_turns
from ciphertune_zmq.context import IO_THREADS, LOOP_DESCRIPTORS, need_descriptors

log = logging.getLogger(__name__)

CONNECTION_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
# A plain number: operations on enumerations take longer than the question.
_POLLIN = int(zmq.POLLIN)
_SLICE_SECONDS = 0.005
"""Of a thread that receives for itself between two looks at whether somebody else received for it."""
_ATTENDED_SECONDS = 0.05
"""How long after a thread that received for itself another one is expected to."""
_LOOK_SECONDS = 0.02
"""Of the socket's own thread between two looks meanwhile."""
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)


class SocketLoop(abc.ABC):
    """A thread that owns a ZeroMQ socket and its monitor. Other threads ``wake`` it, or send in its place.

    The socket is used by one thread at a time, under a lock. While the thread sleeps it watches the socket's descriptor
    and not the socket, so that another one can send: two changes of threads less for a message. One that waits for a
    message receives it itself, by ``receive_until``, and meanwhile the thread does not watch: two changes less again.

    Args:
        kind: type of the socket.
        name: of the thread.
        context: to make the socket in; one of its own, which ends with it, if None.

    Raises:
        TransportError: this process may not open files enough.
    """

    def __init__(self, kind: int, name: str, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        need_descriptors(LOOP_DESCRIPTORS if context is not None else 2 * LOOP_DESCRIPTORS + 2 * IO_THREADS)
        self._shares = context is not None
        self.context = context if context is not None else zmq.Context(IO_THREADS)
        self.socket: zmq.Socket[bytes] = self.context.socket(kind)
        self.socket.linger = 0
        self._monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(CONNECTION_EVENTS)
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self.stopping = False
        self._using = threading.RLock()
        self._working = False  # whether somebody is in ``work`` or ``connection_event``
        self._receiving = threading.Lock()  # held by who receives for itself
        self._attended = -_ATTENDED_SECONDS  # when somebody last did
        self._arrivals: Any = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, once the socket is set up."""
        self._thread.start()

    def wake(self) -> None:
        """Have the thread call ``work`` soon."""
        # If the buffer is full it is awake already.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_out.send(b"x")

    def send(self) -> None:
        """Have what waits sent: here if the socket is free, or this thread's, else by the thread soon. Never blocks."""
        if not self._using.acquire(blocking=False):
            self.wake()
            return
        try:
            left = self.stopping or self.send_now()
            # What came meanwhile shows in the events of the socket, and no longer at its descriptor. In the course of
            # ``work`` the thread will look by itself.
            left = not self._working and (left or self.readable())
        finally:
            self._using.release()
        if left:
            self.wake()

    def receive_until(self, done: Callable[[], bool], end: float | None) -> None:
        """Receive on the calling thread until what it waits for is there, or others wait too: then the thread does.

        Args:
            done: whether it is there.
            end: of the wait, as ``time.monotonic``; None for none.
        """
        if not hasattr(select, "poll") or not self._receiving.acquire(blocking=False):
            return
        try:
            while not done():
                with self._using:
                    if self.stopping:
                        return
                    if self._arrivals is None:
                        self._arrivals = select.poll()
                        self._arrivals.register(self.socket.getsockopt(zmq.FD), select.POLLIN)
                    # First, for the descriptor tells of what is new alone.
                    self._work()
                self.deliver()
                now = self._attended = time.monotonic()
                if done() or (end is not None and now >= end):
                    return
                if not self.awaited_alone():
                    self.attend_again()
                    return
                self._arrivals.poll(1000 * (_SLICE_SECONDS if end is None else min(_SLICE_SECONDS, end - now)))
        except Exception:
            log.exception("%s failed on a thread that waits", self._thread.name)
            self.stopping = True
            self.wake()
        finally:
            self._receiving.release()

    def attend_again(self) -> None:
        """Have the thread watch for messages, where others received for themselves lately."""
        if time.monotonic() - self._attended < _ATTENDED_SECONDS:
            self._attended = -_ATTENDED_SECONDS
            self.wake()

    def stop(self) -> None:
        """End the thread and release its resources. Idempotent; not to be called on the thread itself."""
        self.stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        elif self._thread.ident is None:
            self._release()

    @abc.abstractmethod
    def poll_seconds(self) -> float:
        """Seconds that the thread may sleep if nothing happens."""

    @abc.abstractmethod
    def send_now(self) -> bool:
        """Send what can be sent at once; whether that leaves something for ``work``. Called on any thread."""

    def awaited_alone(self) -> bool:
        """Whether one message at most is to come, so that who waits for it may receive it."""
        return False

    @abc.abstractmethod
    def work(self, readable: bool) -> None:
        """Send what waits, after receiving if the socket is ``readable``."""

    @abc.abstractmethod
    def deliver(self) -> None:
        """Hand on what ``work`` received; called while the socket is free, so that whoever is waked by it can send."""

    @abc.abstractmethod
    def connection_event(self, event: int, value: int) -> None:
        """Handle a connection that was made, lost or refused; ``value`` as in ``zmq_socket_monitor``."""

    @abc.abstractmethod
    def ended(self) -> None:
        """Settle what still waits; called when the thread ends."""

    def _run(self) -> None:
        # Whoever computes, or encrypts megabytes for the socket, gives way at once.
        take_turns(SHORT)
        try:
            self._loop()
        except Exception:
            log.exception("the thread %s failed", self._thread.name)
        finally:
            self.stopping = True
            try:
                self.ended()
            finally:
                with self._using:
                    self._release()

    def _loop(self) -> None:
        wake = self._wake_in.fileno()
        poller, attended_poller = zmq.Poller(), zmq.Poller()
        for each in (self._monitor, wake):
            poller.register(each, zmq.POLLIN)
            attended_poller.register(each, zmq.POLLIN)
        poller.register(self.socket.getsockopt(zmq.FD), zmq.POLLIN)
        sleep = 0.0
        while not self.stopping:
            # Whoever receives for itself is waked by the socket alone, and comes again soon.
            attended = self._receiving.locked() or time.monotonic() - self._attended < _ATTENDED_SECONDS
            seconds = min(sleep, _LOOK_SECONDS) if attended else sleep
            events: dict[Any, int] = dict((attended_poller if attended else poller).poll(int(1000 * seconds)))
            if wake in events:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif not events and self._receiving.locked():
                sleep = _LOOK_SECONDS
                continue
            with self._using:
                # Before the monitor: replies that came before the connection was lost count.
                self._work()
                if self._monitor in events:
                    self._working = True
                    self._read_monitor()
                    self._working = False
                # The descriptor tells of what is new alone.
                sleep = 0.0 if self.readable() else self.poll_seconds()
            self.deliver()

    def _work(self) -> None:
        self._working = True
        try:
            self.work(self.readable())
        finally:
            self._working = False

    def readable(self) -> bool:
        """Whether a message waits; asked by whoever uses the socket."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _read_monitor(self) -> None:
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            self.connection_event(int(event["event"]), int(event["value"]))

    def _release(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)
        if not self._shares:
            self.context.term()
        self._wake_in.close()
        self._wake_out.close()
