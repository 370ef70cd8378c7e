"""The selection string: one string names the encryption, the wire, the endpoints and the options.

``backend[+transport]://[endpoint,endpoint…][?option=value&…]``, or just ``backend[?option=value&…]``. A transport may
stand before another that it wraps, as in ``mlwe+flaky::zmq://…``. Some options are those of every selection string; no
backend and no transport may have one of their names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from ciphertune.errors import SelectionError

DEFAULT_TRANSPORT = "local"
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*\Z")


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Times to wait for workers.

    Attributes:
        timeout: seconds without an answer after which a request is sent again, to a replica where there is one.
        deadline: seconds that one product may take in all, restarts of workers included.
        hedge: seconds after which an unanswered request is also sent to a replica; 0 for never.
        connect_timeout: seconds to wait for the workers when a session opens. A transport that takes longer to open its
            links is named in the log, and waited for.

    Raises:
        SelectionError: one of them is no number of seconds above 0.
    """

    timeout: float = 60.0
    deadline: float = 300.0
    hedge: float = 0.0
    connect_timeout: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (("timeout", 0.001), ("deadline", 0.001), ("hedge", 0.0), ("connect_timeout", 0.001)):
            if not least <= getattr(self, name) < math.inf:
                raise SelectionError(f"option {name}={getattr(self, name)} must be a number of seconds above 0")

    def extended(self, seconds: float) -> Timeouts:
        """Timeouts for a product that may take so much longer."""
        return Timeouts(
            self.timeout + seconds,
            self.deadline + seconds,
            self.hedge + seconds if self.hedge else 0.0,
            self.connect_timeout,
        )


@dataclasses.dataclass(frozen=True)
class SessionOptions(Timeouts):
    """Options that every selection string takes, those of ``Timeouts`` among them.

    Attributes:
        allow_insecure: let a backend that does not encrypt send data out of this process.
        check_answers: hold answers of workers elsewhere against what was asked for once they are decrypted, within the
            backend's declared error, where the backend does not check them before. Reads the weights' codes.
        share_inputs: evaluate layers that read the same input (q/k/v, gate/up) as one product.
        experts: what is sent to the experts of a mixture. With ``all`` every token goes to every expert, and nothing of
            the routing shows. With ``routed`` only what routing chose is sent: workers see how many tokens each expert
            gets, which follows from what the tokens say.
    """

    allow_insecure: bool = False
    check_answers: bool = True
    share_inputs: bool = True
    experts: Literal["all", "routed"] = "all"


@dataclasses.dataclass(frozen=True)
class Selection:
    """A parsed selection string.

    Attributes:
        backend: name of the backend entry point.
        transport: name of the transport entry point; of one that wraps another, both, as ``flaky::zmq``.
        endpoints: the transport's addresses, verbatim, without a scheme.
        options: option names and their text.
    """

    backend: str
    transport: str = DEFAULT_TRANSPORT
    endpoints: tuple[str, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Parse a selection string.

        >>> Selection.parse("mlwe").transport
        'local'
        >>> s = Selection.parse("mlwe+zmq://10.0.0.5:5555,10.0.0.6:5555?request_bits=24")
        >>> s.backend, s.transport, s.endpoints, dict(s.options)
        ('mlwe', 'zmq', ('10.0.0.5:5555', '10.0.0.6:5555'), {'request_bits': '24'})
        >>> Selection.parse("simulation?seed=7").options["seed"]
        '7'
        >>> Selection.parse("mlwe+flaky::zmq://10.0.0.5:5555?loss=0.01").transport
        'flaky::zmq'

        Raises:
            SelectionError: the text does not have the documented form.
        """
        if not isinstance(text, str) or not text.strip():
            raise SelectionError("the selection is empty: give a backend, for example 'mlwe' or 'simulation?seed=1'")
        head, query_mark, query = text.strip().partition("?")
        scheme, separator, rest = head.partition("://")
        backend, plus, transport = scheme.partition("+")
        if not _NAME.match(backend) or (plus and not all(map(_NAME.match, transport.split("::")))):
            raise SelectionError(
                f"cannot read the selection {text!r}: expected backend[+transport]://[endpoint,…][?option=value&…]"
            )
        endpoints = tuple(part.strip() for part in rest.split(",")) if rest else ()
        if any(not part for part in endpoints):
            raise SelectionError(f"an endpoint is empty in {text!r}")
        if plus and not separator:
            raise SelectionError(
                f"a transport needs '://' after it: write {backend}+{transport}://… instead of {text!r}"
            )
        options = _parse_query(query, text) if query_mark else {}
        return cls(backend, transport if plus else DEFAULT_TRANSPORT, endpoints, options)

    def __str__(self) -> str:
        """The canonical text.

        >>> str(Selection.parse("mlwe+local://?request_bits=32"))
        'mlwe?request_bits=32'
        """
        query = "?" + urlencode(self.options) if self.options else ""
        if self.transport == DEFAULT_TRANSPORT and not self.endpoints:
            return self.backend + query
        return f"{self.backend}+{self.transport}://{','.join(self.endpoints)}{query}"


def parse_use(text: str) -> tuple[str, dict[str, str]]:
    """Parse how a plugin is named with its options: ``name[?option=value&…]``.

    >>> parse_use("history?path=runs/one.csv")
    ('history', {'path': 'runs/one.csv'})
    >>> parse_use("traffic")
    ('traffic', {})

    Raises:
        SelectionError: the text does not have this form.
    """
    name, query_mark, query = text.strip().partition("?")
    if not _NAME.match(name):
        raise SelectionError(
            f"cannot read the plugin {text!r}: expected name[?option=value&…], as in 'history?path=run.csv'"
        )
    return name, _parse_query(query, text) if query_mark else {}


def _parse_query(query: str, text: str) -> dict[str, str]:
    """Parse ``option=value&…``, which stands in ``text``.

    Raises:
        SelectionError: it has another form, or an option is given twice.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise SelectionError(f"cannot read the options of {text!r}: expected name=value joined by '&'") from error
    options: dict[str, str] = {}
    for name, value in pairs:
        if name in options:
            raise SelectionError(f"option {name!r} is given twice in {text!r}")
        options[name] = value
    return options
