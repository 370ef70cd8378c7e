"""States of a service as systemd is told of them, see sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(*states: str) -> bool:
    """Send states such as ``READY=1`` to the socket that ``NOTIFY_SOCKET`` names; whether they were sent."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        # A name that begins with @ is of the abstract namespace.
        out.connect("\0" + address[1:] if address[0] == "@" else address)
        out.sendall("\n".join(states).encode())
        return True
    return False


def notify_reloading() -> bool:
    """Tell that the service reads its configuration again; ``READY=1`` ends it."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """How often systemd expects ``WATCHDOG=1``, halved as its manual advises; None where it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isdigit() and int(text) > 0 else None
