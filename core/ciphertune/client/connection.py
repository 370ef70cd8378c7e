"""One worker as a client knows it: link, protocol version, session, health, and checks of what it answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError as FutureTimeoutError
from typing import Any

from ciphertune._support.printable import LONGEST_TEXT, printable
from ciphertune.errors import (
    CipherTuneError,
    PluginError,
    ProtocolError,
    ReplyError,
    TransportError,
    TransportTimeoutError,
    VersionError,
    WorkerError,
)
from ciphertune.plugins.blame import place_of
from ciphertune.protocol import HELLO_VERSION, Message, agree, buffers_fault, spoken_versions
from ciphertune.transport import Link
from ciphertune.weights import Shard, read_manifest

log = logging.getLogger(__name__)

BACKOFF_SECONDS = 0.05
"""Pause after a first failure at most; it doubles with each one that follows."""
LONGEST_BACKOFF_SECONDS = 2.0
_LONGEST_CODE = 40
_MOST_BUNDLES = 64
_SLOWEST_LINK = 1 << 18
"""Bytes a second that a link is expected to carry at least: a large key gets the time that it then takes."""
_LARGE_KEY = 1 << 20

KeyWatch = Callable[[str, int, bool], None]
"""Called with a worker's name, a large key's bytes, and False as it sets out, True once it has arrived or failed."""


def backoff(failures: int, longest: float = LONGEST_BACKOFF_SECONDS) -> float:
    """Seconds to wait after so many failures in a row: up to half of them by chance, so that clients spread.

    "Equal jitter" in Marc Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015.
    """
    pause: float = min(BACKOFF_SECONDS * 2 ** min(failures - 1, 16), longest)
    return pause * random.uniform(0.5, 1.0)


class Retry(Exception):  # noqa: N818 - not an error: the reason to try again
    """Failure of one attempt that another one, later or elsewhere, may not meet."""


class UnknownSession(Retry):
    """A session that the worker does not know: it was restarted, or closed what was idle."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """The request that opens a session at a worker, without the groups that it is opened for.

    Attributes:
        fields: of the request.
        key: buffers of the evaluation key.
        watch: told of a large key on its way.
    """

    fields: Mapping[str, Any]
    key: Mapping[str, Any]
    watch: KeyWatch | None = None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the key."""
        return sum(buffer.nbytes for buffer in self.key.values())

    @property
    def upload_seconds(self) -> float:
        """Seconds that the key may take on its way."""
        return self.nbytes / _SLOWEST_LINK

    @contextlib.contextmanager
    def sending(self, worker: str) -> Iterator[None]:
        """Tell of a large key that is on its way to a worker within this context."""
        if self.nbytes < _LARGE_KEY:
            yield
            return
        watch = self.watch or (lambda *_: None)
        log.info("sending a key of %.1f MB to %s", self.nbytes / 1e6, worker)
        begun = time.monotonic()
        watch(worker, self.nbytes, False)
        try:
            yield
            log.info("%s has the key of %.1f MB after %.1f s", worker, self.nbytes / 1e6, time.monotonic() - begun)
        finally:
            watch(worker, self.nbytes, True)


class WorkerConnection:
    """Connection to one worker, with the session that is open there and the worker's health.

    Args:
        link: the connection.
        longest_backoff: seconds that a failing worker is left alone at most.
        clock: seconds, as ``time.monotonic``; by it ``not_before`` is set.

    Attributes:
        link: the connection.
        version: of the protocol, once both ends agreed on one.
        holdings: digest of what it holds, of the bundle that fits where it has several.
        blocks: its manifest, None until it was read.
        groups: the groups that sessions there are opened for, each with its place among them.
        session: id of the open session, None where there is none.
        in_flight: requests under way; the pool counts them.
        last_used: when the last of them was sent.
        failures: in a row.
        not_before: when it may be asked again.
        last_problem: what went wrong last.
        excluded: whether it gave a wrong answer, and is asked no more.
    """

    def __init__(
        self,
        link: Link,
        longest_backoff: float = LONGEST_BACKOFF_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.link = link
        self.version: int | None = None
        self.holdings = ""
        self.blocks: Sequence[Sequence[Shard]] | None = None
        self.groups: dict[tuple[str, ...], int] = {}
        self.session: str | None = None
        self.in_flight = 0
        self.last_used = 0.0
        self.failures = 0
        self.not_before = 0.0
        self.last_problem = "no worker answers"
        self.excluded = False
        self._longest_backoff = longest_backoff
        self._clock = clock
        self._opened = 0  # groups that the open session knows
        self._opened_by: Opening | None = None
        self._forgotten_before = False
        # Bundles that were not asked for yet, the one that is asked for, and the best so far.
        self._offered: list[str] = []
        self._asked = ""
        self._best = -1
        self._chosen: Sequence[Sequence[Shard]] = ()
        self._opening = threading.Lock()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Address of the worker, for messages."""
        return self.link.name

    # Requests and replies.

    def submit(self, request: Message, reply_bytes: int | None = 0) -> Future[Message]:
        """Send a request; the future of its reply has failed where the link does not take it.

        Args:
            request: what is asked.
            reply_bytes: of the reply's buffers at most, see ``Message.reply_bytes``.
        """
        request.reply_bytes = reply_bytes
        request.version = HELLO_VERSION if request.kind == "hello" or self.version is None else self.version
        future: Future[Message] = Future()
        try:
            given: object = self.link.submit(request)
        except Exception as error:
            future.set_exception(error)
            return future
        if not isinstance(given, Future):
            future.set_exception(self._fault(f"'submit' returned a {type(given).__name__} and no Future"))
            return future
        return given

    def hello(self) -> Future[Message]:
        """Ask which versions of the protocol the worker speaks; ``greeted`` reads the reply."""
        return self.submit(Message("hello", {"versions": spoken_versions()}))

    def greeted(self, reply: Message) -> None:
        """Take the reply to ``hello``. Raises ``VersionError`` where no version is common, or ``ReplyError``."""
        try:
            self.version = agree(reply.fields.get("versions"))
        except VersionError as error:
            raise VersionError(f"{self.name}: {error}") from error
        except ProtocolError as error:
            raise ReplyError(f"{self.name}: {error}") from error
        self.holdings = self.text(reply, "holdings")
        offered = reply.fields.get("bundles", [self.holdings])
        if not (isinstance(offered, list) and offered and all(isinstance(each, str) for each in offered)):
            raise ReplyError(f"{self.name} does not say which bundles it holds")
        self._offered, self._best = offered[:_MOST_BUNDLES], -1

    def ask_manifest(self) -> Future[Message] | None:
        """Ask for the manifest of the next bundle that the worker holds; None where all were asked for."""
        if not self._offered:
            return None
        self._asked = self._offered.pop(0)
        return self.submit(Message("manifest", {"holdings": self._asked}))

    def read_manifest(self, reply: Message, fit: Callable[[Sequence[Sequence[Shard]]], int]) -> None:
        """Take the reply to ``ask_manifest``; the bundle that fits best is the one that is used.

        Args:
            reply: with a bundle's manifest.
            fit: number of its shards that this client can use.

        Raises:
            ReplyError: the manifest makes no sense.
        """
        try:
            blocks = read_manifest(reply.fields.get("blocks"))
        except ProtocolError as error:
            raise ReplyError(f"{self.name}: {error}") from error
        if (found := fit(blocks)) > self._best:
            self._best, self._chosen, self.holdings = found, blocks, self._asked
        if not self._offered:
            self.blocks = self._chosen

    def reply(self, future: Future[Message], seconds: float, kind: str) -> Message:
        """Wait for the good reply to a request of a kind.

        Raises:
            TransportError, TransportTimeoutError: there is none.
            PluginError: the transport raised what no network does, or gave something that is no message.
            UnknownSession, Retry: the worker refused it for a reason that may pass.
            WorkerError, ReplyError: it refused it for good, or answered nonsense.
        """
        try:
            reply = future.result(seconds)
        except TransportError:
            raise  # which may be a timeout of the link's own
        except FutureTimeoutError:
            future.cancel()
            raise TransportTimeoutError(f"no answer within {seconds:.3g} s") from None
        except CancelledError:
            raise TransportError("the request was given up") from None
        except CipherTuneError:
            raise
        except OSError as error:
            raise TransportError(f"{type(error).__name__}: {error.strerror or 'the connection failed'}") from error
        except Exception as error:
            # Its text may quote what was sent.
            raise self._fault(f"{type(error).__name__}{place_of(error, __file__)}") from error
        if not isinstance(reply, Message):
            raise self._fault(f"a {type(reply).__name__} came in place of a Message")
        if why := buffers_fault(reply.buffers):
            raise self._fault(f"the buffers of a reply: it {why}")
        if reply.kind == "error":
            code = printable(str(reply.fields.get("code")), _LONGEST_CODE)
            text = printable(str(reply.fields.get("message")), LONGEST_TEXT)
            if code == "unknown-session":
                raise UnknownSession("it does not know the session that it opened")
            if code in ("busy", "holdings"):
                raise Retry(text)
            raise WorkerError(f"{self.name} refused a request of kind {kind!r}: {text}", code)
        if reply.kind != "ok":
            raise ReplyError(f"{self.name} answered a {kind!r} request with {reply.kind!r}")
        return reply

    def _fault(self, what: str) -> PluginError:
        """The error for a link that does what none may: no other attempt would meet anything else."""
        link = type(self.link)
        return PluginError(
            f"{self.name}: the transport failed ({link.__module__}.{link.__qualname__}): {what}. This is a fault of "
            "the plugin, not of the network"
        )

    def text(self, reply: Message, field: str) -> str:
        """Read a text field of a reply. Raises ``ReplyError`` where it is no text."""
        value = reply.fields.get(field)
        if not isinstance(value, str):
            raise ReplyError(f"{self.name} sent a reply without the field {field!r}")
        return value

    # The session.

    def open(self, opening: Opening, seconds: float, group: int, closed: threading.Event) -> str:
        """Return the worker's session that knows a group, and open one where there is none.

        Args:
            opening: the request.
            seconds: to wait; a large key may take longer.
            group: place of the group in ``groups``.
            closed: set once this client closes its sessions.

        Raises:
            Retry, TransportError: there is none now.
            WorkerError, ReplyError: the worker refuses for good.
        """
        seconds += opening.upload_seconds
        if (session := self._session_of(opening, group)) is not None:
            return session
        begun = self._clock()
        if not self._opening.acquire(timeout=seconds):
            raise Retry(f"no session within {seconds:.3g} s")
        try:
            outdated = self.session
            if (session := self._session_of(opening, group)) is not None:
                return session
            # Another thread found just now that none can be had: not one more wait for each of them.
            if self.not_before > begun:
                raise Retry(self.last_problem)
            groups = [list(names) for names in list(self.groups)]
            fields = {**opening.fields, "groups": groups, "holdings": self.holdings}
            left = max(0.0, begun + seconds - self._clock())
            with opening.sending(self.name):
                future = self.submit(Message("open", fields, dict(opening.key)))
                session = self.text(self.reply(future, left, "open"), "session")
            self._opened, self._opened_by, self.session = len(groups), opening, session
            # What still runs in it is refused as unknown there, and sent again.
            self.close_session(outdated)
        finally:
            self._opening.release()
        if closed.is_set():
            # Nobody else tells the worker of a session that was opened while this end closed.
            self.close_session(session)
            raise TransportError("the session was closed")
        return session

    def _session_of(self, opening: Opening, group: int) -> str | None:
        """The open session, where it has this opening's keys and knows the group."""
        session = self.session
        return session if self._opened_by is opening and group < self._opened else None

    def close_session(self, session: str | None) -> Future[Message] | None:
        """Ask the worker to close a session; None where there is none to close."""
        return None if session is None else self.submit(Message("close", {"session": session}))

    # Health.

    def mark_failed(self, problem: str) -> None:
        """Record a failure and back off."""
        with self._lock:
            self.last_problem = problem
            now = self._clock()
            # Requests that fail together tell of one failure.
            if now >= self.not_before:
                self.failures += 1
                self.not_before = now + backoff(self.failures, self._longest_backoff)

    def mark_answered(self) -> None:
        """Record a good answer."""
        with self._lock:
            self.failures = 0
            self._forgotten_before = False

    def mark_forgotten(self, session: str, problem: str) -> None:
        """Record that the worker does not know a session."""
        with self._lock:
            if self.session != session:
                return  # Another thread has noticed already.
            self.session = None
            again, self._forgotten_before = self._forgotten_before, True
        # One that was restarted, or closed what was idle, is asked for another session at once. One that forgets
        # session after session is not, or this would never end.
        if again:
            self.mark_failed(problem)
