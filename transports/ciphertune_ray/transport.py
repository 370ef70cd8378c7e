"""The ray transport: its options, and links to the workers of a cluster."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciphertune.errors import PluginError, SelectionError, TransportError
from ciphertune.transport import Link, Listener, LocalWorker, Loopback, RequestHandler, Transport, opening_links

if TYPE_CHECKING:
    from ciphertune_ray.address import Address
    from ciphertune_ray.relay_client import RelayClient

_ANSWER_SECONDS = 180.0
"""Joining the cluster comes first, if nobody did before."""


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """Options of the ray transport.

    Attributes:
        workers: with ``bundle``, workers to start for this client alone (1 if not given); without, the least number of
            the deployment's: more are started where there are fewer.
        bundle: a path that all machines of the cluster share, or a URL that fsspec reads; its workers go when the
            client does. Without it the deployment that the address names is used; see ``ciphertune ray up``.
        placement: of the bundle on the workers, as of ``ciphertune split``; if not given, as few parts of whole layers
            as fit the nodes' memory, and replicas of them.
        cpus, gpus: of each worker that is started.
        memory_gb: of each worker that is started; what its weights need if not given.
        threads: CPU threads of a product; as many as ``cpus`` if not given.
        start_timeout: seconds to wait for room in the cluster, and again for workers that start.
        max_inflight_mb: megabytes of requests under way at most; more wait in this process.
    """

    workers: int | None = None
    bundle: str | None = None
    placement: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float | None = None
    threads: int | None = None
    start_timeout: float = 300.0
    max_inflight_mb: int = 512

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("threads", 1), ("memory_gb", 0.001)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SelectionError(f"option {name}={value} must be {least} or more")
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < 4096:
                raise SelectionError(f"option {name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.start_timeout < 86400 or self.max_inflight_mb < 1:
            raise SelectionError("options start_timeout and max_inflight_mb must be above 0")
        if self.bundle is None and (self.placement or self.memory_gb or self.threads):
            raise SelectionError("options placement, memory_gb and threads are for workers of a bundle: name it too")


@dataclasses.dataclass(frozen=True)
class RayServeOptions:
    """Options of a worker that is started by hand.

    Attributes:
        max_inflight_mb: megabytes of replies that are under way at most.
    """

    max_inflight_mb: int = 512

    def __post_init__(self) -> None:
        if self.max_inflight_mb < 1:
            raise SelectionError("option max_inflight_mb must be above 0")


class RayTransport(Transport):
    """A link for each actor. Ray runs in a relay process, so that nothing it unpickles can reach keys and data."""

    name = "ray"
    Options = RayOptions
    ServeOptions = RayServeOptions
    elastic = True

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
        """See ``Transport.connect``. Endpoints are ``CLUSTER[/NAME[/NUMBER]]``; see ``ciphertune_ray.address``.

        The cluster is asked for the workers of a deployment; workers of a bundle are started, and waited for.

        Raises:
            TransportError: the cluster cannot be joined, or has no such deployment, or no room.
        """
        _need_ray()
        from ciphertune_ray.address import parse

        if not endpoints:
            raise SelectionError(
                "the ray transport needs a cluster: backend+ray://auto, ray://HOST:10001 or ray://local, "
                "and perhaps /NAME of a deployment"
            )
        addresses = [parse(endpoint) for endpoint in endpoints]
        if self.options.bundle is not None and (len(addresses) > 1 or addresses[0].name is not None):
            raise SelectionError("workers of a bundle are this client's own: name one cluster, and no deployment")
        with opening_links() as links:
            for address in addresses:
                if address.index is not None:
                    links.append(self._link(address))
                elif self.options.bundle is not None:
                    links += self._own(address)
                else:
                    links += self._shared(address)
        return links

    def joining_workers(self, endpoints: tuple[str, ...], links: Sequence[Link]) -> list[Link]:
        """See ``Transport.joining_workers``."""
        from ciphertune_ray.address import parse

        if self.options.bundle is not None:
            return []
        known = {link.name for link in links}
        addresses = [address.named for address in map(parse, endpoints) if address.index is None]
        workers = [address.worker(index) for address in addresses for index in self._present(address)]
        return [self._link(each) for each in workers if str(each) not in known]

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """See ``Transport.loopback``: in the cluster that ``RAY_ADDRESS`` names.

        A cluster started here for the moment would take no client: only its starter has the token that Ray asks for.
        """
        if not os.environ.get("RAY_ADDRESS"):
            raise SelectionError(
                "name a cluster in RAY_ADDRESS (after 'ray start --head': RAY_ADDRESS=127.0.0.1:6379), or have workers "
                "of a bundle started: mlwe+ray://local?bundle=…"
            )
        return Loopback(f"auto/loopback-{secrets.token_hex(4)}/0")

    @classmethod
    def _listen(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        _need_ray()
        from ciphertune_ray.address import parse
        from ciphertune_ray.listener import RayListener

        where = parse(address)
        if where.cluster == "local":
            raise SelectionError(
                "a Ray that is started for one process lets no client in: serve in a cluster that runs"
            )
        return RayListener(handler, where.named.worker(where.index or 0), options.max_inflight_mb << 20)

    def _shared(self, address: Address) -> list[Link]:
        """Links to the workers of a deployment; it is made larger if it has fewer than asked for."""
        address = address.named
        name, found = address.name, self._present(address)
        if found and self.options.workers is not None and len(found) < self.options.workers:
            more = {"op": "deploy", "name": name, "shared": True, "workers": self.options.workers}
            found = self._ask(address, {**more, "seconds": self.options.start_timeout}, self._deploy_seconds)
        if not found:
            raise TransportError(
                f"the cluster {address.cluster} has no deployment named {name!r}: start one with "
                f"'ciphertune ray up BUNDLE --name {name}', or say bundle=… to have workers for this client alone"
            )
        return [self._link(address.worker(index)) for index in found]

    def _own(self, address: Address) -> list[Link]:
        """Links to workers that are started for this client and end with it."""
        from ciphertune_ray.address import absolute
        from ciphertune_ray.link import RayLink
        from ciphertune_ray.relay_client import RelayClient

        options = self.options
        name = f"own-{secrets.token_hex(8)}"
        wanted = {"bundle": absolute(options.bundle), "cpus": options.cpus, "gpus": options.gpus}
        wanted |= {"placement": options.placement or "", "threads": options.threads or 0}
        wanted |= {"memory": int((options.memory_gb or 0) * 1e9)}
        head = {"op": "deploy", "name": name, "shared": False, "workers": options.workers or 1, "wanted": wanted}
        relay = RelayClient(address.ray, options.max_inflight_mb << 20).acquire()
        try:
            found = _members(relay, {**head, "seconds": options.start_timeout}, self._deploy_seconds)
            workers = [dataclasses.replace(address, name=name).worker(index) for index in found]
            return [RayLink(str(each), each.actor, secrets.token_hex(16), relay.acquire()) for each in workers]
        finally:
            relay.release()

    def _link(self, address: Address) -> Link:
        from ciphertune_ray.link import RayLink

        return RayLink(str(address), address.actor, secrets.token_hex(16), self._relay(address))

    def _present(self, address: Address) -> list[int]:
        """The numbers of a deployment's workers."""
        return self._ask(address, {"op": "members", "name": address.name}, _ANSWER_SECONDS)

    def _ask(self, address: Address, head: dict[str, Any], seconds: float) -> list[int]:
        relay = self._relay(address)
        try:
            return _members(relay, head, seconds)
        finally:
            relay.release()

    def _relay(self, address: Address) -> RelayClient:
        from ciphertune_ray.relay_client import shared_relay

        return shared_relay(address.ray, self.options.max_inflight_mb << 20)

    @property
    def _deploy_seconds(self) -> float:
        return 2 * float(self.options.start_timeout) + _ANSWER_SECONDS


def _members(relay: RelayClient, head: dict[str, Any], seconds: float) -> list[int]:
    try:
        answer, _ = relay.request(head).result(seconds)
    except FutureTimeoutError:
        raise TransportError(f"the cluster did not answer within {seconds:g} s") from None
    found = answer.get("members")
    if not isinstance(found, list) or not all(type(index) is int and 0 <= index < 1 << 20 for index in found):
        raise TransportError("the relay did not say which workers there are")
    return found


def _need_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise PluginError('the ray transport needs Ray: pip install "ciphertune[ray]"')
