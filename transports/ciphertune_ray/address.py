"""Addresses of clusters, deployments and workers, as users write them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ciphertune.errors import SelectionError

DEFAULT_NAME = "ciphertune"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})\Z")


@dataclasses.dataclass(frozen=True)
class Address:
    """A cluster, a deployment in it, and perhaps one worker of that.

    Attributes:
        cluster: ``auto``, the one this machine belongs to (or that ``RAY_ADDRESS`` names); ``local``, one on this
            machine for as long as it is used; ``HOST:PORT`` of a head's Ray Client server; ``gcs://HOST:PORT`` of a
            head, for machines in its network.
        name: of the deployment; None if none is named.
        index: of the worker; None for all of them.
    """

    cluster: str
    name: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        parts = [self.cluster, self.name, None if self.index is None else str(self.index)]
        return "/".join(part for part in parts if part is not None)

    @property
    def named(self) -> Address:
        """The address with the default name where none is given."""
        return dataclasses.replace(self, name=self.name or DEFAULT_NAME)

    def worker(self, index: int) -> Address:
        """The address of one worker of the deployment."""
        return dataclasses.replace(self, index=index)

    @property
    def actor(self) -> str:
        """The name of the worker's actor."""
        return actor_name(self.name or DEFAULT_NAME, self.index or 0)

    @property
    def ray(self) -> str | None:
        """The cluster's address in Ray's form; None to start one."""
        if self.cluster == "local":
            return None
        if self.cluster == "auto":
            return "auto"
        return self.cluster.removeprefix("gcs://") if self.cluster.startswith("gcs://") else f"ray://{self.cluster}"


def actor_name(deployment: str, index: int) -> str:
    """The name of a worker's actor."""
    return f"{deployment}/{index}"


def parse(text: str) -> Address:
    """Read ``CLUSTER[/NAME[/INDEX]]``.

    >>> parse("auto")
    Address(cluster='auto', name=None, index=None)
    >>> parse("head:10001/bank/2").actor, parse("gcs://10.0.0.1:6379").ray, parse("head:10001").ray
    ('bank/2', '10.0.0.1:6379', 'ray://head:10001')

    Raises:
        SelectionError: the text has another form.
    """
    prefix = "gcs://" if text.startswith("gcs://") else ""
    cluster, *rest = text.removeprefix(prefix).split("/")
    host = _HOST.match(cluster)
    if not (host and int(host[2]) < 65536) and not (cluster in ("auto", "local") and not prefix):
        raise SelectionError(
            f"cannot read the address {text!r}: expected auto, local, HOST:PORT (of a Ray Client server) or "
            "gcs://HOST:PORT, and perhaps /NAME of a deployment"
        )
    name = rest[0] if rest else None
    if name is not None and not _NAME.match(name):
        raise SelectionError(f"{name!r} in the address {text!r} is no name of a deployment: letters, digits, - and _")
    if len(rest) > 2 or (len(rest) == 2 and not (rest[1].isdecimal() and len(rest[1]) < 7)):
        raise SelectionError(f"cannot read the address {text!r}: after the deployment's name comes a worker's number")
    return Address(prefix + cluster, name, int(rest[1]) if len(rest) == 2 else None)


def absolute(bundle: str) -> str:
    """A bundle's address for other processes: an absolute path, or a URL as it is."""
    return bundle if "://" in bundle else str(Path(bundle).absolute())
