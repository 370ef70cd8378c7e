"""What a worker serves, described by a TOML file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from ciphertune._support.offered import OFFERED
from ciphertune._support.options import build_section
from ciphertune._support.ranges import AT_LEAST_ONE, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, Range, check_fields
from ciphertune.errors import ConfigError
from ciphertune.runs.config import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PORT = Range(lambda value: 0 <= value < 65536, "from 0 to 65535")
_EVALUATORS = Range(lambda value: 1 <= value <= 64, "from 1 to 64")


@dataclasses.dataclass(frozen=True)
class BindSection:
    """``[[bind]]``: an address to serve at, with its keys.

    Attributes:
        address: in the transport's form.
        transport: name of the transport.
        curve: folder with ``worker.key`` and ``clients/``, made by ``ciphertune keys``.
        insecure: plain TCP, on a loopback address only.
        no_authentication: plain TCP on any address: anyone who can reach it can use this worker.
        options: any options of the transport.
    """

    address: str = "tcp://127.0.0.1:5555"
    transport: str = "zmq"
    curve: str | None = None
    insecure: bool = False
    no_authentication: bool = False
    options: dict[str, str | float] = dataclasses.field(default_factory=dict)

    @property
    def listen_options(self) -> dict[str, Any]:
        """Options of the transport's ``listen``."""
        named = {"curve": self.curve, "insecure": self.insecure, "no_authentication": self.no_authentication}
        return {**self.options, **{name: value for name, value in named.items() if value}}


@dataclasses.dataclass(frozen=True)
class QuotaSection:
    """``[quotas]``: of each client, but for what says ``all``. Megabytes are of 2²⁰ bytes.

    Attributes:
        requests: under way at a time.
        client_mb: of requests and replies under way.
        message_mb: of one message.
        sessions: open at a time.
        all_sessions: of all clients.
        key_mb: of evaluation keys.
        all_key_mb: of all clients' evaluation keys; eight times ``key_mb`` if not given.
        idle: seconds after which a session that is not used is closed.
        readings: how often all weights may be read within an hour; 0 to withhold them.
    """

    requests: int = 64
    client_mb: int = 2048
    message_mb: int = 1024
    sessions: int = 4
    all_sessions: int = 256
    key_mb: int = 1024
    all_key_mb: int | None = None
    idle: float = 600.0
    readings: int = 32

    def __post_init__(self) -> None:
        counts = ("requests", "client_mb", "message_mb", "sessions", "all_sessions", "key_mb", "all_key_mb")
        ranges = dict.fromkeys(counts, AT_LEAST_ONE)
        check_fields(self, ConfigError, **ranges, idle=POSITIVE, readings=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class MetricsSection:
    """``[metrics]``: figures for Prometheus, ``/live`` and ``/ready``.

    Attributes:
        port: 0 for any free one; nothing is served if not given.
        host: address to serve at. Whoever reaches it reads all figures.
    """

    port: int | None = None
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        check_fields(self, ConfigError, port=_PORT)


@dataclasses.dataclass(frozen=True)
class LogSection:
    """``[log]``.

    Attributes:
        format: ``text``, or ``json`` for an object a line.
        level: least level that is written.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """A worker's configuration file; what is no section stands before the sections.

    Attributes:
        bundles: worker folders that ``ciphertune split`` wrote. Each client uses the one that its model fits.
        layers: names or patterns of the layers to serve; all if not given.
        verify: whether weights are checked against their hashes before they are served.
        backends: those that clients may ask for; ``["all"]`` for every one that is installed.
        device: that evaluates products.
        threads: CPU threads of a product; all cores if not given.
        evaluators: products evaluated at a time.
        drain: seconds to finish in after SIGTERM.
        audit: SQLite file for a record of each session.
        bind: addresses to serve at.
    """

    bundles: tuple[str, ...]
    layers: tuple[str, ...] | None = None
    verify: bool = True
    backends: tuple[str, ...] = OFFERED
    device: str = "cpu"
    threads: int | None = None
    evaluators: int = 1
    drain: float = 30.0
    audit: str | None = None
    bind: tuple[BindSection, ...] = (BindSection(),)
    quotas: QuotaSection = QuotaSection()
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()

    def __post_init__(self) -> None:
        check_fields(
            self,
            ConfigError,
            bundles=NOT_EMPTY,
            layers=NOT_EMPTY,
            backends=NOT_EMPTY,
            threads=AT_LEAST_ONE,
            evaluators=_EVALUATORS,
            drain=NOT_NEGATIVE,
            bind=NOT_EMPTY,
        )

    @property
    def offered(self) -> tuple[str, ...] | None:
        """Names of the backends that clients may ask for; None for all that are installed."""
        return None if self.backends == ("all",) else self.backends


def load_worker_config(path: Path) -> WorkerConfig:
    """Read a file; paths in it are relative to the file.

    Raises:
        ConfigError: it cannot be read, or a section or key is unknown, missing, of the wrong type or out of its range.
    """
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from error
    config = build_section(WorkerConfig, content)

    def below(name: str) -> str:
        return str(path.parent / Path(name).expanduser())

    return dataclasses.replace(
        config,
        bundles=tuple(below(bundle) for bundle in config.bundles),
        audit=None if config.audit is None else below(config.audit),
        bind=tuple(
            each if each.curve is None else dataclasses.replace(each, curve=below(each.curve)) for each in config.bind
        ),
    )
