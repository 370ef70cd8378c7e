"""ZeroMQ workers on other machines: CURVE-encrypted and authenticated TCP, or Unix sockets on one machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciphertune.errors import PluginError, SelectionError
from ciphertune.key_files import make_keys_folder
from ciphertune.transport import Link, Listener, LocalWorker, Loopback, RequestHandler, Transport, opening_links

if TYPE_CHECKING:
    from ciphertune_zmq.address import Address
    from ciphertune_zmq.security import ClientCurve


@dataclasses.dataclass(frozen=True)
class ZmqOptions:
    """Options of the zmq transport.

    Attributes:
        curve: folder with this client's key and the workers' public keys; see ``ciphertune keys``.
            ``CIPHERTUNE_KEYS`` or ``~/.ciphertune/keys`` if not given.
        client: name of the client's key in that folder.
        insecure: plain TCP, to workers on this machine only.
        no_authentication: plain TCP to any machine: anyone on the network between can read what the backend does not
            encrypt, alter messages unnoticed, and pose as the worker.
        heartbeat: seconds between heartbeats; after three without one the connection counts as lost.
    """

    curve: str | None = None
    client: str = "client"
    insecure: bool = False
    no_authentication: bool = False
    heartbeat: float = 5.0

    def __post_init__(self) -> None:
        _check_heartbeat(self.heartbeat)


@dataclasses.dataclass(frozen=True)
class ZmqServeOptions:
    """Options of a worker's side.

    Attributes:
        curve: folder with the worker's key and the authorised clients' public keys in ``clients/``.
        insecure: plain TCP, on a loopback address only.
        no_authentication: plain TCP on any address: anyone who can reach it can use this worker.
        heartbeat: as for clients.
        max_incomplete_bytes: bytes of incomplete messages, of all connections together.
        connections: open at the same time. At most 64 may be of peers that have sent no message for two seconds, and
            half of these from one address; the oldest are closed for newer ones.
    """

    curve: str | None = None
    insecure: bool = False
    no_authentication: bool = False
    heartbeat: float = 5.0
    max_incomplete_bytes: int = 4 << 30
    connections: int = 512

    def __post_init__(self) -> None:
        _check_heartbeat(self.heartbeat)


class ZmqTransport(Transport):
    """A DEALER socket for each worker; workers listen on a ROUTER socket."""

    name = "zmq"
    interface = 1
    Options = ZmqOptions
    ServeOptions = ZmqServeOptions

    def connect(self, endpoints: tuple[str, ...], worker: LocalWorker | None) -> list[Link]:
        """See ``Transport.connect``. Endpoints are as ``ciphertune_zmq.address.parse`` reads them."""
        _need_zmq()
        from ciphertune_zmq.link import ZmqLink

        with opening_links() as links:
            for address, curve in self._places(endpoints):
                links.append(ZmqLink(address, curve, self.options.heartbeat))
        return links

    def check(self, endpoints: tuple[str, ...]) -> None:
        """See ``Transport.check``: reads the addresses and the keys."""
        _need_zmq()
        self._places(endpoints)

    def _places(self, endpoints: tuple[str, ...]) -> list[tuple[Address, ClientCurve | None]]:
        """Addresses and keys for connections."""
        from ciphertune_zmq.address import parse
        from ciphertune_zmq.security import client_curve

        if not endpoints:
            raise SelectionError("the zmq transport needs the workers' addresses: backend+zmq://HOST:PORT[,HOST:PORT…]")
        addresses = [parse(endpoint) for endpoint in endpoints]
        return [(address, client_curve(address, self.options)) for address in addresses]

    @staticmethod
    def make_keys(folder: Path, clients: Sequence[str], *, worker: bool) -> dict[str, str]:
        """Make CURVE keys.

        Args:
            folder: where; made if missing.
            clients: names of clients to make a key for.
            worker: whether to make a worker's key too.

        Returns:
            The files made, and what each is.

        Raises:
            KeyFileError: a file exists, or cannot be written; none was made.
        """
        _need_zmq()
        from ciphertune_zmq.keys import make_pair

        make_keys_folder(folder)
        make_keys_folder(folder / "clients")
        made: dict[str, str] = {}
        try:
            if worker:
                make_pair(folder / "worker.key", folder / "worker.pub")
                made |= {"worker.key": "secret, never leaves the worker", "worker.pub": "public, for clients"}
            for name in clients:
                public = f"clients/{name}.pub"
                make_pair(folder / f"{name}.key", folder / public)
                made |= {f"{name}.key": "secret, never leaves the client", public: "public, for the worker"}
        except BaseException:
            for file in made:  # all or none: the next attempt would find them in its way
                (folder / file).unlink()
            raise
        return made

    @staticmethod
    def client_names(folder: Path) -> dict[str, str]:
        """Names of the clients whose keys are in a worker's folder, by the names that a listener gives them.

        Args:
            folder: with ``clients/``.

        Raises:
            KeyFileError: a key is damaged.
        """
        _need_zmq()
        from ciphertune_zmq.keys import read_public
        from ciphertune_zmq.security import CURVE_PEER

        files = sorted((folder / "clients").glob("*.pub"))
        return {f"{CURVE_PEER}:{read_public(file).decode('ascii')}": file.stem for file in files}

    @classmethod
    def loopback(cls, folder: Path, options: Mapping[str, str]) -> Loopback:
        """See ``Transport.loopback``: with CURVE keys unless the selection says ``insecure``."""
        if "insecure" in options or "no_authentication" in options:
            return Loopback("127.0.0.1:*", serve={"insecure": "1"})
        keys = folder / "keys"
        if not keys.exists():
            cls.make_keys(keys, (options.get("client", "client"),), worker=True)
        return Loopback("127.0.0.1:*", serve={"curve": str(keys)}, connect={"curve": str(keys)})

    @classmethod
    def serve(cls, handler: RequestHandler, address: str, options: Any) -> Listener:
        """See ``Transport.serve``."""
        _need_zmq()
        from ciphertune_zmq.address import parse
        from ciphertune_zmq.listener import ZmqListener
        from ciphertune_zmq.security import server_curve

        where = parse(address)
        if where.moves:
            raise SelectionError(f"a worker listens at HOST:PORT or ipc://PATH, and {where} is where clients find that")
        return ZmqListener(handler, where, server_curve(where, options), options)


def _check_heartbeat(seconds: float) -> None:
    if not 0.05 <= seconds <= 3600:
        raise SelectionError(f"option heartbeat={seconds} must be between 0.05 and 3600 seconds")


def _need_zmq() -> None:
    try:
        import zmq  # noqa: F401
    except ImportError as error:
        raise PluginError('the zmq transport needs pyzmq: pip install "ciphertune[zmq]"') from error
