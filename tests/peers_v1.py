"""The two ends of a link, played by a test frame by frame."""

from __future__ import annotations

import socket
from typing import Any

from _tcprelay.link import Link
from _tcprelay.protocol import (
    AUTH, CHALLENGE, CLIENT, HELLO, PING, PONG, PROTOCOL_VERSION, READY, SERVER, START, WELCOME, Frame, new_nonce,
    prove,
)  # fmt: skip
from _tcprelay.streams import Stream
from _tcprelay.waiting import Deadline
from tcprelay import RelayServer

from .conftest import PATIENCE, connect
from .ends import send_data, send_end


class FakeClient(Link):
    """A relay client's end of one link."""

    def __init__(self, server: RelayServer, source: str = "") -> None:
        self.server = server
        sock = connect(server.relay_address, source=source)
        sock.settimeout(None)
        super().__init__(Stream(sock, "the server"), CLIENT)

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> Frame:
        """The next frame, within the tests' patience."""
        return self.receive(Deadline(PATIENCE))

    def hello(self, *, token: bytes = b"", service: str = "default", client: str = "fake", **more: Any) -> Frame:
        """Go through the handshake; the last frame of it."""
        nonce = new_nonce()
        fields = {"version": PROTOCOL_VERSION, "service": service, "client": client, "name": "fake", "nonce": nonce}
        self.send(HELLO, {**fields, **more})
        frame = self.next()
        if frame.kind == CHALLENGE:
            frame = self.answer(frame, token, nonce, service, client)
        if frame.kind == WELCOME:
            assert self.next().kind == PING
            self.send(PONG)
        return frame

    def answer(self, challenge: Frame, token: bytes, nonce: str, service: str, client: str) -> Frame:
        """AUTH; returns what comes then."""
        self.send(AUTH, {"proof": prove(token, CLIENT, nonce, challenge.text("nonce"), service, client)})
        return self.next()

    def read(self, count: int) -> bytes:
        """So many bytes of the connection."""
        self.sock.settimeout(PATIENCE)
        view = memoryview(bytearray(count))
        have = 0
        while have < count:
            got = self.recv_into(view[have:])
            assert got, f"the end after {have} of {count} bytes"
            have += got
        self.sock.settimeout(None)
        return bytes(view)

    def read_end(self) -> None:
        """The end of the connection's direction, and nothing before it."""
        self.sock.settimeout(PATIENCE)
        assert self.recv_into(memoryview(bytearray(1))) == 0
        self.sock.settimeout(None)

    def send_connection(self, sock: socket.socket) -> None:
        """Carry a service client's connection of a few bytes each way, which ends there first; START comes next."""
        start = self.next()
        assert start.kind == START
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert self.read(8) == b"question"
        self.read_end()
        self.send(READY)
        self.write(b"answer")
        send_end(self, passed=8)
        assert sock.recv(100) + sock.recv(100) == b"answer"

    def write(self, data: bytes) -> None:
        send_data(self, data)


class FakeServer:
    """A relay server that accepts links for a test to play their other end."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port: int = self._listener.getsockname()[1]
        self._links: list[Link] = []

    def accept(self) -> Link:
        """The next link, before its HELLO."""
        sock, _ = self._listener.accept()
        sock.settimeout(None)
        link = Link(Stream(sock, "the client"), SERVER)
        self._links.append(link)
        return link

    def welcome(self, link: Link, **fields: Any) -> Frame:
        """Take HELLO and answer WELCOME; returns HELLO."""
        hello = link.receive(Deadline(PATIENCE))
        assert hello.kind == HELLO
        link.send(WELCOME, {"heartbeat": 15, "address": "[::]:1", "waiting": 0, **fields})
        return hello

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for link in self._links:
            link.close()
