"""Settings of the server."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

from ciphertune.errors import ConfigError, SecurityError

_SHORTEST_KEY = 16


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, who may use it, and how much.

    Attributes:
        host, port: address; port 0 for any that is free.
        api_keys: of the callers, each a trust domain of its own; none for one who needs no key, on loopback alone.
        certificate, certificate_key: PEM files, for TLS.
        max_new_tokens: of one answer at most.
        max_batch: answers generated together at most.
        max_waiting: answers of one caller that may wait.
        max_body: bytes of a request's body.
        max_connections: at a time.
        pad_tokens: prompts are sent as a multiple of this number of tokens.
        fixed_length: whether all of ``max_new_tokens`` are computed for each answer, wherever it ends.

    Raises:
        ConfigError: a value is out of range, or a key cannot be used.
        SecurityError: others than this machine can reach it, and no key is asked for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    certificate: Path | None = None
    certificate_key: Path | None = None
    max_new_tokens: int = 1024
    max_batch: int = 8
    max_waiting: int = 64
    max_body: int = 1 << 20
    max_connections: int = 256
    pad_tokens: int = 1
    fixed_length: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_batch", "max_waiting", "max_body", "max_connections", "pad_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"{self.port} is no port")
        if len(set(self.api_keys)) < len(self.api_keys):
            raise ConfigError("an API key is given twice: each caller has one of its own")
        for key in self.api_keys:
            if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key has fewer than {_SHORTEST_KEY} characters, or other characters than letters, digits "
                    "and signs; 'openssl rand -hex 16' makes one"
                )
        if (self.certificate is None) != (self.certificate_key is None):
            raise ConfigError("TLS needs both a certificate and its key")
        if not self.loopback and not self.api_keys:
            raise SecurityError(
                f"others than this machine can reach {self.host!r}: give each caller an API key, or listen at 127.0.0.1"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
