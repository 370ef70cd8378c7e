"""Settings of a run for display: without values that could be secret, and as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "(not shown)"
_SECRET = re.compile(r"key|token|secret|pass|auth|cred|curve|cert|cookie|signature", re.I)
_HARMLESS = re.compile(r"(?:0|1|true|false|yes|no|on|off|none)?\Z", re.I)


def redacted(text: str) -> str:
    """Remove the values that could be secret from a selection string or from a plugin's name with its options.

    Removed are the values of options whose names suggest keys, tokens or passwords, whether the value is the secret or
    a file that holds it, and the part of an address before an @.

    >>> redacted("mlwe+zmq://10.0.0.5:5555?curve=keys&request_bits=24")
    'mlwe+zmq://10.0.0.5:5555?curve=(not shown)&request_bits=24'
    >>> redacted("mlwe+http://me:word@10.0.0.5:5555?no_authentication=1")
    'mlwe+http://(not shown)@10.0.0.5:5555?no_authentication=1'
    """
    head, mark, query = text.partition("?")
    options = []
    for option in query.split("&") if mark else []:
        name, equals, value = option.partition("=")
        if _SECRET.search(name) and not _HARMLESS.match(value):
            value = HIDDEN
        options.append(name + equals + _without_login(value))
    return _without_login(head) + mark + "&".join(options)


def _without_login(text: str) -> str:
    return re.sub(rf"[^/,]*(?:@|{quote('@')})", HIDDEN + "@", text, flags=re.I)


def toml(content: Mapping[str, Any]) -> str:
    """The TOML file of a training configuration, which is ``dataclasses.asdict`` of a ``TrainConfig``.

    Keys that are None are left out, as in a file; ``max_grad_norm`` without a limit is infinity.
    """
    lines = [f"{name} = {_value(value)}" for name, value in content.items() if _plain(value)]
    for section, values in content.items():
        if isinstance(values, Mapping):
            lines += ["", f"[{section}]"]
            if "max_grad_norm" in values and values["max_grad_norm"] is None:
                values = {**values, "max_grad_norm": float("inf")}
            lines += [f"{name} = {_value(value)}" for name, value in values.items() if _plain(value)]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # JSON's strings are TOML's, but for one character that TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
