"""A TCP proxy that makes a link of this machine's as slow as one between machines.

    python benchmarks/shaped.py --to 127.0.0.1:5555 --latency 5ms --bandwidth 1Gbit/s

It prints ``ready HOST:PORT`` and forwards what connects there. Every byte arrives ``latency`` later, in each direction,
and no faster than ``bandwidth``; apart from that, as fast as this machine carries it, whatever the bytes are.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 18
MOST_CHUNKS = 1 << 12
START_SECONDS = 60


@contextlib.contextmanager
def shaped(to: str, latency: float, bandwidth: float | None = None) -> Iterator[str]:
    """A proxy in a process of its own.

    Args:
        to: HOST:PORT.
        latency: seconds each way.
        bandwidth: bytes a second each way, over all connections; None for no limit.

    Yields:
        HOST:PORT to connect to.
    """
    command = [sys.executable, str(Path(__file__)), "--to", to, "--latency", f"{latency:.9f}"]
    if bandwidth is not None:
        command += ["--bandwidth", f"{bandwidth:.0f}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if readable else ""
        if not line.startswith("ready "):
            raise RuntimeError(f"the proxy to {to} did not start: {line or 'no output'}")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Way:
    """One direction: when bytes that come now are to be passed on."""

    def __init__(self, latency: float, bandwidth: float | None) -> None:
        self._latency = latency
        self._bandwidth = bandwidth
        self._free = 0.0
        self._lock = threading.Lock()

    def due(self, nbytes: int) -> float:
        now = time.monotonic()
        if self._bandwidth is None:
            return now + self._latency
        with self._lock:
            self._free = max(self._free, now) + nbytes / self._bandwidth
            return self._free + self._latency


def carry(source: socket.socket, target: socket.socket, way: Way) -> None:
    """Pass bytes on until the source ends or either breaks, reading on while earlier ones wait."""
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(MOST_CHUNKS)

    def deliver() -> None:
        while True:
            due, chunk = waiting.get()
            left = due - time.monotonic()
            if left > 0:
                time.sleep(left)
            # Once the target is gone, what still comes is dropped, so that the other end is not held up.
            with contextlib.suppress(OSError):
                if not chunk:
                    target.shutdown(socket.SHUT_WR)
                else:
                    target.sendall(chunk)
            if not chunk:
                return

    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    chunk = b"\0"
    while chunk:
        try:
            chunk = source.recv(CHUNK)
        except OSError:
            chunk = b""
        waiting.put((way.due(len(chunk)), chunk))
    thread.join()


def serve(listener: socket.socket, to: tuple[str, int], latency: float, bandwidth: float | None) -> None:
    """Forward every connection, for ever."""
    up, down = Way(latency, bandwidth), Way(latency, bandwidth)
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(to)
        except OSError:
            client.close()
            continue
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_both, args=(client, server, up, down), daemon=True).start()


def _both(client: socket.socket, server: socket.socket, up: Way, down: Way) -> None:
    with client, server:
        back = threading.Thread(target=carry, args=(server, client, down), daemon=True)
        back.start()
        carry(client, server, up)
        back.join()


def _seconds(text: str) -> float:
    """A number of seconds, or a time with its unit."""
    with contextlib.suppress(ValueError):
        return float(text)
    from ciphertune.planning.plan import seconds  # loads torch, which takes longer than all else here

    return seconds(text)


def _bytes_per_second(text: str) -> float:
    """A number of bytes a second, or a bandwidth with its unit."""
    with contextlib.suppress(ValueError):
        return float(text)
    from ciphertune.planning.plan import bytes_per_second

    return bytes_per_second(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--latency", type=_seconds, default=0.0, help="each way, as 5ms")
    parser.add_argument("--bandwidth", type=_bytes_per_second, help="each way, as 1Gbit/s; no limit if not given")
    parser.add_argument("--port", type=int, default=0, help="to listen on; any free one if not given")
    arguments = parser.parse_args()
    host, _, port = arguments.to.rpartition(":")
    with socket.create_server(("127.0.0.1", arguments.port)) as listener:
        print(f"ready 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            serve(listener, (host, int(port)), arguments.latency, arguments.bandwidth)


if __name__ == "__main__":
    main()
