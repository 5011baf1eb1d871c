"""The relay as a whole, over loopback: bytes both ways."""

from __future__ import annotations

import socket

from .conftest import Bench, read_all


def test_bytes_pass_both_ways(bench: Bench) -> None:
    """What the service client sends comes back from the echo service, and then the end."""
    sock = bench.connect(bench.relay())
    sock.sendall(b"hello")
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"hello"
