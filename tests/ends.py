"""A test's own end of a TLS connection."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from _tcprelay.link import Link
from _tcprelay.tls import TLSStream
from _tcprelay.waiting import Deadline

from .conftest import PATIENCE


def send_data(link: Link, data: bytes) -> None:
    """Send bytes of a connection on a link."""
    link.stream.send(link.pack_header(len(data)) + data)


def send_end(link: Link, passed: int = 0) -> None:
    """End this side's direction of the connection on a link."""
    link.stream.send(link.pack_end(passed))


class TLSEnd:
    """A test's own end of a TLS connection, which can end its direction and go on reading.

    `ssl.SSLSocket` cannot do that; here records are made and read by an `ssl.SSLObject`.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool) -> None:
        self.sock = sock
        self.sock.settimeout(None)
        self.stream = TLSStream(sock, "test", context, server_side=server_side)
        self.stream.handshake(Deadline(PATIENCE))
        self.sock.settimeout(PATIENCE)

    def sendall(self, data: bytes) -> None:
        self.stream.send(data)

    def recv(self, size: int) -> bytes:
        view = memoryview(bytearray(size))
        return bytes(view[: self.stream.recv_into(view)])

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        self.stream.end()

    def setsockopt(self, *words: Any) -> None:
        self.sock.setsockopt(*words)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> TLSEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
