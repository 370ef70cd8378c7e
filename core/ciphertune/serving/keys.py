"""Who a request is of: the API key that it carries, and the machine that it comes from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from ciphertune.serving.request_error import RequestError

_OWN_NAMES = ("localhost", "127.0.0.1", "::1")
OWNER = "owner"
"""The caller where no key is asked for."""


class Callers:
    """Names callers by their keys. Keys are compared by their hashes, in constant time, and are in no name.

    Args:
        keys: none where no key is asked for.
        host: the name that the server listens at.
    """

    def __init__(self, keys: Sequence[str], host: str) -> None:
        self._digests = [(_digest(key), f"key {number}") for number, key in enumerate(keys, 1)]
        self._names = {*_OWN_NAMES, host}

    @property
    def count(self) -> int:
        """Number of callers."""
        return max(len(self._digests), 1)

    def of(self, headers: Mapping[str, str]) -> str:
        """The caller.

        Without keys, pages of other sites that the user's browser shows are kept out: by the name that they think to
        talk to, and by where they come from.

        Raises:
            RequestError: it is none of them.
        """
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise RequestError("requests of other sites' pages are refused", 403, "forbidden_origin")
        if not self._digests:
            if _host_name(headers.get("host", "")) not in self._names:
                raise RequestError("the server is asked by a name that is not its own", 403, "forbidden_host")
            return OWNER
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        found = [name for digest, name in self._digests if hmac.compare_digest(digest, given)]
        if not found:
            raise RequestError("the API key is missing or wrong", 401, "invalid_api_key")
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
