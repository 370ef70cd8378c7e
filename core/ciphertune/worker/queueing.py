"""Products of many clients in one queue: quotas, and turns by evaluation time. Knows no threads and no clock."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence

from ciphertune.backend import Joint
from ciphertune.protocol import Message
from ciphertune.transport import Reply
from ciphertune.worker.counters import Counters


@dataclasses.dataclass(frozen=True)
class Quota:
    """Bounds on what one client may have under way at a time, replies that it has not taken included.

    Attributes:
        requests: number of them.
        nbytes: bytes of requests and replies together. A single request is always taken, within ``Limits``, but for one
            whose reply alone would be more.
    """

    requests: int = 64
    nbytes: int = 2 << 30


@dataclasses.dataclass
class Job:
    """A request under way.

    Attributes:
        request: what was asked.
        nbytes: its bytes.
        reply: where its reply goes.
        arrived: when it did.
        reserved: bytes counted against the quota, the reply's included, until there is a reply.
        connection: that it came over; None where that is not known.
        seconds: of evaluation.
        joint: how it can be evaluated together with others; None for alone.
    """

    request: Message
    nbytes: int
    reply: Reply
    arrived: float
    reserved: int = 0
    connection: Hashable = None
    seconds: float = 0.0
    joint: Joint | None = None


@dataclasses.dataclass
class Client:
    """A client's queue, what it has under way, and its sums.

    Attributes:
        peer: who it is, as the transport authenticated it.
        jobs: products that wait.
        requests, nbytes: under way.
        virtual_time: its share of the evaluators' time so far.
        pace: seconds of evaluation by bytes of a product, request and reply, as its last one took.
        last_seen: when its last request arrived.
        counters: its own sums.
    """

    peer: str
    jobs: collections.deque[Job] = dataclasses.field(default_factory=collections.deque)
    requests: int = 0
    nbytes: int = 0
    virtual_time: float = 0.0
    pace: float = 0.0
    last_seen: float = 0.0
    counters: Counters = dataclasses.field(default_factory=Counters)

    def ends(self, job: Job) -> float:
        """What its share will be when a product that waits or is evaluated is done, as far as that can be told."""
        return self.virtual_time + max(0.0, self.pace * job.reserved - job.seconds)


_SMALLER = 4
"""How many times as large as a product is another one that it is let into."""


class FairQueue:
    """A queue of products whose next one is that of the client that will have used least evaluation time after it.

    Fair queueing by finish times, with the virtual time of start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996,
    section 2): a client with many requests, or large ones, delays others by one product at most, and small products of
    others by a part of one. Shares of clients whose products wait differ by a product or two at any time, and by no
    more in the end. Calls are not synchronized: the caller holds a lock.

    Args:
        quota: of every client.

    Attributes:
        clients: by peer.
        under_way: requests of all clients that are admitted and not yet released.
    """

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.clients: dict[str, Client] = {}
        self.under_way = 0
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(len(client.jobs) for client in self.clients.values())

    def __bool__(self) -> bool:
        return any(client.jobs for client in self.clients.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all clients that are under way."""
        return sum(client.nbytes for client in self.clients.values())

    def client(self, peer: str, now: float) -> Client:
        """The client of that name, known from now on."""
        client = self.clients.get(peer)
        if client is None:
            client = self.clients[peer] = Client(peer)
        client.last_seen = now
        return client

    def refusal(self, client: Client, nbytes: int) -> str:
        """Why a client's quota has no room for a request of so many bytes; empty where it has."""
        if client.requests >= self.quota.requests:
            return f"{client.requests} requests of this client are under way, and no more may be"
        if client.requests and client.nbytes + nbytes > self.quota.nbytes:
            return f"requests of this client hold {client.nbytes} bytes, of {self.quota.nbytes} it may have"
        return ""

    def admit(self, client: Client, nbytes: int) -> None:
        """Count a request against its client's quota, until ``release``."""
        client.requests += 1
        client.nbytes += nbytes
        self.under_way += 1

    def release(self, client: Client, nbytes: int) -> None:
        """Count a request, of which so many bytes are left, no more."""
        client.requests -= 1
        client.nbytes -= nbytes
        self.under_way -= 1

    def push(self, client: Client, job: Job) -> None:
        """Queue a product of an admitted request."""
        if not client.jobs:
            # Who was away saves up no time to use at once.
            client.virtual_time = max(client.virtual_time, self._virtual_time)
        client.jobs.append(job)

    def pop(self) -> tuple[Client, Job]:
        """The next product, of the client whose turn it is. Raises ``ValueError`` where none waits."""
        waiting = [client for client in self.clients.values() if client.jobs]
        self._virtual_time = max(self._virtual_time, min(client.virtual_time for client in waiting))
        client = min(waiting, key=lambda c: c.ends(c.jobs[0]))
        return client, client.jobs.popleft()

    def pop_joint(self, job: Job) -> list[tuple[Client, Job]]:
        """Products that wait and can be evaluated together with one that was popped; whose turn it is comes first."""
        if job.joint is None:
            return []
        taken, room = [], job.joint.most - job.joint.size
        for client in sorted((c for c in self.clients.values() if c.jobs), key=lambda c: c.virtual_time):
            while client.jobs and (joint := client.jobs[0].joint) and joint.key == job.joint.key and joint.size <= room:
                room -= joint.size
                taken.append((client, client.jobs.popleft()))
        return taken

    def pop_within(self, client: Client, job: Job) -> tuple[Client, Job] | None:
        """A product that is to be evaluated in a pause of another one, ``job``; None where none is."""
        small = [
            other for other in self.clients.values() if other.jobs and self._let_in(other, other.jobs[0], client, job)
        ]
        if not small:
            return None
        chosen = min(small, key=lambda c: c.ends(c.jobs[0]))
        return chosen, chosen.jobs.popleft()

    def pop_beside(self, client: Client, evaluated: Sequence[tuple[Client, Job]]) -> tuple[Client, Job] | None:
        """A client's only product that waits, if it is let into all of those that are evaluated; None otherwise.

        Where none is evaluated, as between one and the next, those that come next count.
        """
        others = evaluated or [(other, other.jobs[0]) for other in self.clients.values() if other.jobs]
        others = [(other, job) for other, job in others if job is not client.jobs[0]]
        if len(client.jobs) != 1 or not all(self._let_in(client, client.jobs[0], *each) for each in others):
            return None
        return client, client.jobs.popleft()

    @staticmethod
    def _let_in(small: Client, its: Job, client: Client, job: Job) -> bool:
        """Whether a client's product may be evaluated in the course of another one.

        It is a quarter as large at most, and of another client, who will have used no more evaluation time.
        """
        return small is not client and small.ends(its) <= client.ends(job) and _SMALLER * its.reserved <= job.reserved

    def charge(self, client: Client, job: Job, seconds: float) -> None:
        """Add evaluation time of a product to its client's share."""
        job.seconds += seconds
        client.virtual_time += seconds

    def ended(self, client: Client, job: Job) -> None:
        """Note that a product was evaluated."""
        client.pace = job.seconds / max(1, job.reserved)

    def forget(self, before: float) -> None:
        """Forget clients that have nothing under way and were not seen since."""
        for peer in [c.peer for c in self.clients.values() if not c.requests and c.last_seen < before]:
            del self.clients[peer]
