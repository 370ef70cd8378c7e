"""The proxy that measurements over slow links use."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from shaped import shaped


@pytest.fixture
def echo() -> Iterator[str]:
    """Sends back what it gets, over any number of connections."""

    def answer(connection: socket.socket) -> None:
        with connection:
            while chunk := connection.recv(1 << 16):
                connection.sendall(chunk)

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def back_and_forth(address: str, content: bytes) -> tuple[bytes, float]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        begin = time.monotonic()
        writer = threading.Thread(target=lambda: (connection.sendall(content), connection.shutdown(socket.SHUT_WR)))
        writer.start()
        got = b""
        while chunk := connection.recv(1 << 16):
            got += chunk
        writer.join()
        return got, time.monotonic() - begin


@pytest.mark.slow
def test_bytes_arrive_unchanged_late_and_no_faster_than_allowed(echo: str) -> None:
    content = bytes(range(256)) * 4000
    with shaped(echo, latency=0.05) as address:
        for _ in range(2):
            got, seconds = back_and_forth(address, content)
            assert got == content
            assert seconds >= 0.1
    with shaped(echo, latency=0.0, bandwidth=4e6) as address:
        got, seconds = back_and_forth(address, content)
        assert got == content
        assert seconds >= len(content) / 4e6


@pytest.mark.slow
def test_a_connection_to_nowhere_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
    with shaped(nowhere, latency=0.0) as address:
        assert back_and_forth_or_nothing(address) == b""


def back_and_forth_or_nothing(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        return connection.recv(1)
