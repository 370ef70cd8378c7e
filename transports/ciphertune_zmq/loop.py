"""A thread that owns a ZeroMQ socket, which link and listener derive from."""

from __future__ import annotations

import abc
import contextlib
import logging
import socket
import threading
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
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)


class SocketLoop(abc.ABC):
    """A thread that owns a ZeroMQ socket and its monitor. Other threads ``wake`` it, or send in its place.

    The socket is used by one thread at a time, under a lock. While the thread sleeps it watches the socket's descriptor
    and not the socket, so that another one can send: two changes of threads less for a message.

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
        self._working = False  # whether the thread is in ``work`` or ``connection_event``
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
        poller = zmq.Poller()
        wake = self._wake_in.fileno()
        for each in (self.socket.getsockopt(zmq.FD), self._monitor, wake):
            poller.register(each, zmq.POLLIN)
        sleep = 0.0
        while not self.stopping:
            events: dict[Any, int] = dict(poller.poll(int(1000 * sleep)))
            if wake in events:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            with self._using:
                self._working = True
                # Before the monitor: replies that came before the connection was lost count.
                self.work(self.readable())
                if self._monitor in events:
                    self._read_monitor()
                self._working = False
                # The descriptor tells of what is new alone.
                sleep = 0.0 if self.readable() else self.poll_seconds()
            self.deliver()

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
