"""Two network namespaces with one slow line between them, for as long as a ``with`` block; needs root on Linux.

Packets of the line pass a process that delays them and keeps to the rate (two ``tun`` devices): so connections see
the line's latency, and answer losses as they do on a real one. Losses are made by netfilter's ``statistic`` match.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLIENT, WORKER = "10.213.0.1", "10.213.0.2"
"""Addresses of the two ends."""
MTU = 1500
MOST_WAITING = 4 << 20
"""Bytes that wait for their turn at most: what comes then is dropped, as by a router."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Ends:
    """Names of the two namespaces."""

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self.client, self.worker = f"ct-{mark}-client", f"ct-{mark}-worker"

    def within(self, namespace: str) -> list[str]:
        """What a command begins with that runs in a namespace."""
        return ["ip", "netns", "exec", namespace]


def missing() -> str:
    """What this machine lacks for it; empty for nothing."""
    if os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    absent = [name for name in ("ip", "iptables", "sysctl") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: install iproute2, iptables and procps"
    return "" if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


@contextlib.contextmanager
def line(latency: float, bandwidth: float, loss: float = 0.0, settings: dict[str, str] | None = None) -> Iterator[Ends]:
    """Two namespaces and the line between them; both are removed in the end, whatever happens.

    Args:
        latency: seconds one way.
        bandwidth: bytes a second each way.
        loss: share of packets that are lost, each way.
        settings: sysctls of both ends, such as ``net.ipv4.tcp_congestion_control``.
    """
    ends, process = Ends(), None
    both = (ends.client, ends.worker)
    try:
        for name in both:
            _do("ip", "netns", "add", name)
            _do(*ends.within(name), "ip", "link", "set", "lo", "up")
        command = [sys.executable, str(Path(__file__)), ends.client, ends.worker, repr(latency), repr(bandwidth)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the line did not start")
        for name, own, peer in ((ends.client, CLIENT, WORKER), (ends.worker, WORKER, CLIENT)):
            _do(*ends.within(name), "ip", "addr", "add", own, "peer", peer, "dev", "line")
            _do(*ends.within(name), "ip", "link", "set", "line", "up", "mtu", str(MTU), "txqueuelen", "4000")
            for key, value in (settings or {}).items():
                _do(*ends.within(name), "sysctl", "-q", "-w", f"{key}={value}")
            if loss:
                match = ["-m", "statistic", "--mode", "random", "--probability", f"{loss:.6f}"]
                _do(*ends.within(name), "iptables", "-A", "INPUT", "-i", "line", *match, "-j", "DROP")
        yield ends
    finally:
        if process is not None:
            process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in both:
            with contextlib.suppress(subprocess.CalledProcessError):
                _do("ip", "netns", "delete", name)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _device(namespace: str) -> int:
    """A tun device named ``line`` in a namespace, as an open file."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(there)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"line", _IFF_TUN | _IFF_NO_PI))
    finally:
        _enter(here)
        os.close(here)
        os.close(there)
    return device


def _enter(namespace: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def carry(devices: tuple[int, int], latency: float, bandwidth: float) -> None:
    """Pass packets on, for ever."""
    waiting: list[collections.deque[tuple[float, bytes]]] = [collections.deque(), collections.deque()]
    free = [0.0, 0.0]
    while True:
        now = time.monotonic()
        for way, queue in enumerate(waiting):
            while queue and queue[0][0] <= now:
                packet = queue.popleft()[1]
                with contextlib.suppress(OSError):
                    os.write(devices[1 - way], packet)
        due = min((queue[0][0] for queue in waiting if queue), default=now + 1.0)
        readable, _, _ = select.select(devices, [], [], max(0.0, due - time.monotonic()))
        for way, device in enumerate(devices):
            if device not in readable:
                continue
            for _ in range(64):
                try:
                    packet = os.read(device, 1 << 16)
                except BlockingIOError:
                    break
                # What waits for its turn, not what is under way.
                now = time.monotonic()
                if (free[way] - now) * bandwidth > MOST_WAITING:
                    continue
                free[way] = max(free[way], now) + len(packet) / bandwidth
                waiting[way].append((free[way] + latency, packet))


def main() -> None:
    parser = argparse.ArgumentParser(description="One slow line; started by ``line``.")
    for name in ("client", "worker"):
        parser.add_argument(name)
    parser.add_argument("latency", type=float)
    parser.add_argument("bandwidth", type=float)
    arguments = parser.parse_args()
    devices = _device(arguments.client), _device(arguments.worker)
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        carry(devices, arguments.latency, arguments.bandwidth)


if __name__ == "__main__":
    main()
