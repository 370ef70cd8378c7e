"""The contract of a transport, which carries requests to workers and replies back, and helpers for writing one."""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_type_hints

from ciphertune._support.options import build_options
from ciphertune._support.printable import LONGEST_TEXT, printable
from ciphertune.errors import CipherTuneError, PluginError, ProtocolError, ReplyError, SelectionError, TransportError
from ciphertune.protocol import Frame, Limits, Message

INTERFACE_VERSION = 1
"""The version of this interface. It grows with every change that a transport which is written for the one before would
not stand; ``Transport.interface`` says which one a transport is written for."""

_Answer = TypeVar("_Answer")
_Connection = TypeVar("_Connection", bound=Hashable)

MOST_STRANGERS = 64
"""Connections of a listener over which no key was shown for a while: in all, and half as many from one address."""
GRACE_SECONDS = 2.0
"""Age of a connection from which that counts."""


class Transport(abc.ABC):
    """A way to carry messages, registered in the entry-point group ``ciphertune.transports``.

    It knows nothing of encryption or layers. Subclasses set ``name``, ``Options`` (a frozen dataclass), ``remote`` and,
    if workers can be served over it, ``ServeOptions`` and ``serve``.

    Args:
        options: an instance of ``Options``; one with all defaults if not given. A subclass needs no ``__init__``. One
            that has its own takes ``options=None`` and hands it to ``super().__init__``.

    Attributes:
        options: as above, defaults filled in.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    ServeOptions: ClassVar[type | None] = None
    """Options of ``listen``, a frozen dataclass; None if workers cannot be served over this transport."""
    interface: ClassVar[int | None] = None
    """The ``INTERFACE_VERSION`` that this transport is written for, as a number; None where it does not say. One that
    is written for another is refused when it is loaded."""
    remote: bool = True
    """Whether requests leave this process; a backend that does not encrypt then needs ``allow_insecure=1``. What the
    class says holds for every instance that says nothing else."""
    elastic: bool = False
    """Whether workers may join while a session is open: ``joining_workers`` is then asked repeatedly."""
    joining_seconds: float = 2.0
    """Seconds between two calls of ``joining_workers``."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @abc.abstractmethod
    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> Sequence[Link]:
        """Open a link to every worker, without waiting for any of them.

        Nothing bounds how long it takes: the session opens once it returns. One that takes longer than the option
        ``connect_timeout`` is named in a warning.

        Args:
            endpoints: addresses from the selection string.
            worker: the embedded worker for a transport that is not remote, else None.

        Raises:
            SelectionError: the endpoints are wrong for this transport.
            KeyFileError, SecurityError: the connection cannot be protected as asked for.
        """

    def check(self, endpoints: tuple[str, ...]) -> None:  # noqa: B027 - nothing to check is the rule
        """Raise what ``connect`` would raise about addresses and keys, before a model is loaded. Opens no link.

        Args:
            endpoints: as for ``connect``.

        Raises:
            SelectionError, KeyFileError, SecurityError: as ``connect``.
        """

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> Sequence[Link]:
        """Open links to the workers that have joined since, as ``connect`` does. May block.

        Args:
            endpoints: as for ``connect``.
            links: the open ones; a worker whose name one of them has is not new.

        Raises:
            TransportError: it cannot be found out now; the call is repeated later.
        """
        return ()

    @classmethod
    def listen(cls, handler: RequestHandler, address: str, options: Mapping[str, Any]) -> Listener:
        """Read the options and ``serve``. This is what the framework calls, and what no transport overrides.

        Args:
            handler: takes the requests.
            address: in this transport's form.
            options: text or values for ``ServeOptions``.

        Raises:
            SelectionError: this transport cannot serve, or the address or an option is wrong.
            KeyFileError, SecurityError: connections cannot be protected as asked for.
            TransportError: the address cannot be used.
        """
        if cls.ServeOptions is None:
            raise SelectionError(f"the {cls.name} transport cannot serve workers")
        return cls.serve(handler, address, build_options(cls.ServeOptions, options))

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """Address and options to serve a worker on this machine, for benchmarks, the demo and the conformance suite.

        Args:
            folder: where keys and certificates may be made.
            options: of the client's selection string; they take precedence over ``Loopback.connect``.

        Raises:
            SelectionError: this transport cannot serve.
        """
        if cls.ServeOptions is None:
            raise SelectionError(f"the {cls.name} transport cannot serve workers, so it needs the address of one")
        return Loopback("127.0.0.1:0")

    @classmethod
    def serve(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        """Serve at an address, on threads of the transport's own. Every transport with ``ServeOptions`` overrides it.

        Args:
            handler: takes the requests.
            address: in this transport's form.
            options: an instance of ``ServeOptions``.

        Raises:
            SelectionError: the address is wrong.
            KeyFileError, SecurityError: connections cannot be protected as asked for.
            TransportError: the address cannot be used.
        """
        raise NotImplementedError


CHAIN = "::"
"""Stands between a transport and the one that it wraps."""


class Link(abc.ABC):
    """An open connection to one worker. Safe to use from several threads.

    Attributes:
        name: of the worker in errors and logs, usually its address.
        identity: what the connection proves the worker to be, such as its public key; empty where it proves nothing.
            A worker that gave a wrong answer is known again by it, whatever its address.
    """

    name: str = ""
    identity: str = ""

    @abc.abstractmethod
    def submit(self, request: Message) -> Future[Message]:
        """Send a request; the future resolves to its reply.

        The future raises ``TransportError`` as soon as it is known that no reply will come over this connection: the
        worker is gone, or was never there. It has no deadline: the caller sets one, and cancels the future to give the
        request up. A reply of kind ``error`` is a result, not an exception. After a failure the link connects again by
        itself, and later requests may succeed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Drop the connection; pending futures fail with ``TransportError``. Idempotent."""


class Listener(abc.ABC):
    """A worker's side of a transport: takes requests at an address until it is closed.

    Attributes:
        address: that of the worker in a selection string, after ``://``.
    """

    address: str = ""

    @abc.abstractmethod
    def close(self, linger: float = 0.0) -> None:
        """Stop taking requests, send replies that are ready for up to ``linger`` seconds, and release the address.

        Idempotent.
        """


Reply = Callable[[list[Frame], Callable[[], None]], None]
"""Sends a reply: takes its frames, and a function to call once they have left this process, or never will."""


class WrappingTransport(Transport):
    """A transport around another, which is named after it: ``flaky::zmq``.

    It changes what the links of the other do, and nothing else: addresses, keys, joining workers and serving are the
    inner transport's. Subclasses set ``name`` and ``Options`` and override ``wrap``.

    Args:
        options: of this transport alone.
        inner: the transport that it wraps. A subclass with an ``__init__`` of its own takes ``options=None`` and
            ``inner=None``, and hands both to ``super().__init__`` first, which refuses to do without an inner one.

    Attributes:
        options: of this transport alone.
        inner: as above; ``remote``, ``elastic`` and ``joining_seconds`` are this one's.

    Raises:
        SelectionError: it was given none.
    """

    def __init__(self, options: Any = None, inner: Transport | None = None) -> None:
        super().__init__(options)
        if inner is None:
            raise SelectionError(
                f"{self.name!r} wraps another transport, which has to be named: {self.name}{CHAIN}zmq://… or "
                f"{self.name}{CHAIN}local://"
            )
        self.inner = inner
        self.remote, self.elastic, self.joining_seconds = inner.remote, inner.elastic, inner.joining_seconds

    @abc.abstractmethod
    def wrap(self, link: Link) -> Link:
        """A link around one of the inner transport, with its ``name`` and ``identity``. Closing it closes that one."""

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> Sequence[Link]:
        """See ``Transport.connect``: the inner transport's links, each wrapped."""
        return self._wrapped(self.inner.connect(endpoints, worker))

    def check(self, endpoints: tuple[str, ...]) -> None:
        """See ``Transport.check``: what the inner transport checks."""
        self.inner.check(endpoints)

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> Sequence[Link]:
        """See ``Transport.joining_workers``: the inner transport's, each wrapped."""
        return self._wrapped(self.inner.joining_workers(endpoints, links))

    @classmethod
    def around(cls, inner: type[Transport]) -> type[Transport]:
        """The transport that a selection string names by both, with the options of both.

        An option that both have is this transport's; the other's is called ``INNER_OPTION``, as ``zmq_curve``.

        Args:
            inner: a transport; also one that wraps another itself.

        Raises:
            SelectionError: that name is an option of this transport, too.
        """
        mine = [field.name for field in dataclasses.fields(cls.Options)]
        owners: Mapping[str, str] = getattr(inner, "_option_owners", {})
        names = {}
        for field in dataclasses.fields(inner.Options):
            owner = owners.get(field.name, inner.name)
            names[field.name] = f"{owner}_{field.name}" if field.name in mine else field.name
        if again := {*mine} & {*names.values()}:
            raise SelectionError(f"{cls.name!r} cannot wrap {inner.name!r}: both have options {', '.join(again)}")
        fields = [*_fields(cls.Options), *_fields(inner.Options, names)]
        options = dataclasses.make_dataclass(f"{cls.Options.__name__}Over", fields, frozen=True, kw_only=True)

        def __init__(self: WrappingTransport, chosen: Any = None) -> None:  # noqa: N807 - it becomes a method
            chosen = options() if chosen is None else chosen
            of_inner = inner.Options(**{name: getattr(chosen, known) for name, known in names.items()})
            own = cls.Options(**{name: getattr(chosen, name) for name in mine})
            cls.__init__(self, own, inner(of_inner))

        attributes = {
            "__init__": __init__,
            "__doc__": f"{cls.name} around {inner.name}.",
            "__module__": cls.__module__,
            "name": f"{cls.name}{CHAIN}{inner.name}",
            "Options": options,
            "ServeOptions": inner.ServeOptions,
            "_option_owners": {
                **dict.fromkeys(mine, cls.name),
                **{known: owners.get(name, inner.name) for name, known in names.items()},
            },
            "remote": inner.remote,
            "elastic": inner.elastic,
            "joining_seconds": inner.joining_seconds,
            "listen": inner.listen,
            "loopback": inner.loopback,
        }
        return type(f"{cls.__name__}Over{inner.__name__}", (cls,), attributes)

    def _wrapped(self, links: Sequence[Link]) -> list[Link]:
        found: list[Link] = []
        try:
            for link in links:
                found.append(self.wrap(link))
        except BaseException:
            for link in (*found, *links[len(found) :]):
                link.close()
            raise
        return found


def _fields(options: type, names: Mapping[str, str] | None = None) -> list[tuple[str, Any, Any]]:
    """The fields of a dataclass for ``make_dataclass``, perhaps under other names."""
    hints = get_type_hints(options)
    found = []
    for field in dataclasses.fields(options):
        default: Any = dataclasses.field(default=field.default, default_factory=field.default_factory)
        found.append((field.name if names is None else names[field.name], hints[field.name], default))
    return found


class RequestHandler(Protocol):
    """Answers the requests that a listener receives, as ``ciphertune.worker.service.Service`` does."""

    limits: Limits
    """Bounds on a request. A listener refuses larger ones before it has read them."""

    def reserve(self, peer: str, nbytes: int) -> Callable[[], None] | None:
        """Count a request of known size against its client's quota before it is received.

        Args:
            peer: as for ``submit``.
            nbytes: of the request.

        Returns:
            What gives the quota back, to be called before ``submit`` or where the request never comes; None where there
            is no room, and the client is to try again.
        """
        ...

    def submit(
        self, frames: Sequence[Frame], peer: str, reply: Reply, connection: Hashable = None, *, idle: bool = False
    ) -> None:
        """Take a request; ``reply`` is called once, from any thread. Never raises, and does not block for long.

        Args:
            frames: of the request; none if it was malformed, which is answered with an error.
            peer: the client's name, by which quotas, sessions and turns go.
            reply: sends the reply.
            connection: names the connection that it came over, once and for all; None where the transport cannot tell
                connections apart.
            idle: whether the calling thread has nothing else to do at the moment: then a small product, of a
                millisecond or so, may be evaluated and answered in the call, which is sooner than on another thread.
        """
        ...

    def left(self, peer: str, connection: Hashable) -> None:
        """Take notice that a connection over which requests of a client came has ended.

        Sessions that no other connection uses give way to new ones of their client from then on.
        """
        ...

    def dismiss(self, peer: str) -> None:
        """End the sessions of a client that may use this worker no more: its key was taken out."""
        ...

    def refused(self, peer: str, why: str) -> None:
        """Count a connection or a message that was refused, and log it, rarely.

        Args:
            peer: who came, as far as that is known: an address, or a public key.
            why: in a few words.
        """
        ...


class LocalWorker(Protocol):
    """A worker in this process, as ``ciphertune.worker.worker.Worker`` is."""

    def handle(self, request: Message, peer: str = ...) -> Message:
        """Answer one request of the client known as ``peer``; never raises."""
        ...


@dataclasses.dataclass(frozen=True)
class Loopback:
    """How to serve a worker to clients on this machine alone.

    Attributes:
        address: for ``listen``, on any free port.
        serve: options of ``listen``.
        connect: options of a client's selection string.
    """

    address: str
    serve: Mapping[str, str] = dataclasses.field(default_factory=dict)
    connect: Mapping[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def opening_links() -> Iterator[list[Link]]:
    """Give a list for links that are opened one by one; if that fails half-way, the links in it are closed."""
    links: list[Link] = []
    try:
        yield links
    except BaseException:
        for link in links:
            link.close()
        raise


class Connections(Generic[_Connection]):
    """The open connections of a listener, and which of them to close so that strangers keep nobody out.

    A stranger is a connection over which no key or token was shown yet. There are ``most`` connections at any moment,
    and few strangers, in all and of an address, that are older than ``GRACE_SECONDS``: clients open many connections at
    once, and take a moment to show their keys. The oldest stranger of the address that has the most of them goes first.
    Not synchronized, and opens and closes nothing.

    Args:
        most: connections in all.
        seconds: that a connection may stay a stranger's.
        clock: as ``time.monotonic``.
    """

    def __init__(self, most: int, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = max(4, most)
        self.strangers = min(MOST_STRANGERS, self.most // 2)
        self.strangers_per_address = max(1, self.strangers // 2)
        self._seconds = seconds
        self._clock = clock
        # In the order in which they became strangers.
        self._strangers: dict[_Connection, tuple[str, float]] = {}
        self._known: dict[_Connection, str] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    def all(self) -> list[_Connection]:
        """All connections."""
        return [*self._strangers, *self._known]

    def came(self, connection: _Connection, address: str) -> None:
        """Count a new connection from an address."""
        self.gone(connection)
        self._strangers[connection] = address, self._clock()

    def known(self, connection: _Connection) -> None:
        """Note that the peer has shown a key; nothing for a connection that is not counted."""
        if (found := self._strangers.pop(connection, None)) is not None:
            self._known[connection] = found[0]

    def stranger_again(self, connection: _Connection) -> None:
        """Note that the peer has to show its key once more."""
        if (address := self._known.get(connection)) is not None:
            self.came(connection, address)

    def gone(self, connection: _Connection) -> None:
        """Count a connection no more."""
        self._strangers.pop(connection, None)
        self._known.pop(connection, None)

    def excess(self) -> list[_Connection]:
        """Connections to close now. They are counted no more."""
        now = self._clock()
        found = [each for each, (_, since) in self._strangers.items() if since < now - self._seconds]
        for connection in found:
            self.gone(connection)
        old = {each: address for each, (address, since) in self._strangers.items() if since <= now - GRACE_SECONDS}
        found += self._displaced(old, lambda counts: self._too_many(counts))
        everyone = {each: address for each, (address, _) in self._strangers.items()}
        found += self._displaced(everyone, lambda _: len(self) > self.most)
        while len(self) > self.most:
            newest = next(reversed(self._known))
            self.gone(newest)
            found.append(newest)
        return found

    def _too_many(self, counts: collections.Counter[str]) -> bool:
        return max(counts.values()) > self.strangers_per_address or counts.total() > self.strangers

    def _displaced(
        self, strangers: dict[_Connection, str], too_many: Callable[[collections.Counter[str]], bool]
    ) -> list[_Connection]:
        """The oldest of the address with the most, again and again while there are too many."""
        counts = collections.Counter(strangers.values())
        found = []
        while strangers and too_many(counts):
            ((most, _),) = counts.most_common(1)
            victim = next(each for each, address in strangers.items() if address == most)
            del strangers[victim]
            counts[most] -= 1
            self.gone(victim)
            found.append(victim)
        return found


def connections_allowed(wanted: int) -> int:
    """As many connections as were asked for, but half of the files at most that this process may have open."""
    try:
        import resource
    except ImportError:  # not on Windows
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files // 2)


class PendingReplies(Generic[_Answer]):
    """The requests of a link that have no reply yet. Safe to use from several threads.

    Each request has a number and a future. The future is settled once: with the reply, with an error, or by a caller
    that cancels it. It is then forgotten, and what arrives for its number later is ignored. Callbacks of a future run
    on the thread that settles it, with no lock held.

    Args:
        name: of the worker, with which errors begin.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)
        self._futures: dict[int, Future[_Answer]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._futures)

    def __contains__(self, number: int) -> bool:
        return number in self._futures

    def add(self, future: Future[_Answer] | None = None) -> tuple[int, Future[_Answer]]:
        """Register a request; its number, from 1 up, and its future.

        After ``close`` the future has failed already, and the request need not be sent.

        Args:
            future: a new one of a class of the transport's own; a plain one if not given.
        """
        future = Future() if future is None else future
        with self._lock:
            number = next(self._numbers)
            closed = self._closed
            if not closed:
                self._futures[number] = future
        if closed:
            future.set_exception(self._error("the link is closed"))
        else:
            future.add_done_callback(lambda _: self._take(number))
        return number, future

    def answer(self, number: int, reply: _Answer) -> None:
        """Settle a request with its reply."""
        for future in self._take(number):
            _settle_once(lambda future: future.set_result(reply), future)

    def fail(self, number: int, why: BaseException | str) -> None:
        """Settle a request with an error.

        Args:
            number: of the request.
            why: a text or ``OSError`` becomes a ``TransportError`` that names the worker, a ``ProtocolError`` the
                ``ReplyError`` of a malformed reply; other errors of CipherTune stay as they are. Any other is a
                ``PluginError``, a fault of the transport, which no other attempt is made after.
        """
        error = self._error(why)
        for future in self._take(number):
            _settle_once(lambda future: future.set_exception(error), future)

    def fail_all(self, why: TransportError | str) -> None:
        """Settle all requests with a ``TransportError``. Later ones are taken as before.

        Args:
            why: as of ``fail``; a ``RefusedError`` has a session that opens give up at once.
        """
        self._fail_all(why, close=False)

    def close(self) -> bool:
        """Settle all requests with a ``TransportError``, and refuse later ones; False if it was closed before."""
        return self._fail_all("the link is closed", close=True)

    def _take(self, number: int) -> list[Future[_Answer]]:
        with self._lock:
            future = self._futures.pop(number, None)
        return [] if future is None else [future]

    def _fail_all(self, why: TransportError | str, *, close: bool) -> bool:
        with self._lock:
            first = not self._closed
            self._closed = self._closed or close
            taken = list(self._futures.values())
            self._futures.clear()
        self._settle(taken, lambda future: future.set_exception(self._error(why)))
        return first

    def _error(self, why: BaseException | str) -> BaseException:
        if isinstance(why, ProtocolError) and not isinstance(why, ReplyError):
            return ReplyError(f"{self._name} sent a malformed reply: {printable(str(why), LONGEST_TEXT)}")
        if isinstance(why, CipherTuneError):
            return why
        if isinstance(why, (str, OSError)):
            return TransportError(f"{self._name}: {printable(str(why), LONGEST_TEXT)}")
        return PluginError(f"{self._name}: the transport failed: unexpected {type(why).__name__}, a fault of it")

    @staticmethod
    def _settle(futures: Sequence[Future[_Answer]], settle: Callable[[Future[_Answer]], None]) -> None:
        # A callback that ends the thread (SystemExit, KeyboardInterrupt) leaves no other future unsettled.
        with contextlib.ExitStack() as stack:
            for future in reversed(futures):
                stack.callback(_settle_once, settle, future)


def _settle_once(settle: Callable[[Future[Any]], None], future: Future[Any]) -> None:
    # The caller may have cancelled it a moment ago.
    with contextlib.suppress(InvalidStateError):
        settle(future)
