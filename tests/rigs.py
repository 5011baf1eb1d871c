"""Connections to test with: pairs of sockets, and a splice with the far ends of both its sides."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import ExitStack

from _tcprelay.link import Link
from _tcprelay.protocol import CLIENT, HELLO, IDLE, READY, SERVER, START, WELCOME
from _tcprelay.sockets import listen
from _tcprelay.splice import Splice
from _tcprelay.streams import Stream
from _tcprelay.tcp import RESET_ON_CLOSE
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline
from _tcprelay.watch import Splices

from .conftest import PATIENCE, wait_until


def tcp_pair(room: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection; a deadline on the second one, which the test uses.  With `room` that receives not
    much more than so many bytes before it reads, and the first one holds as many."""
    [listener] = listen("127.0.0.1", 0)
    far = socket.socket()
    far.settimeout(PATIENCE)
    with listener:
        listener.setblocking(True)
        if room:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        far.connect(listener.getsockname())
        near, _ = listener.accept()
    return near, far


def receive_by(stream: Stream, receive: Callable[[memoryview], int]) -> None:
    """Have a stream receive by this function, in whichever way it is asked."""
    stream.recv_into = receive  # type: ignore[method-assign, assignment]
    send = stream.calls()[1]
    stream.calls = lambda: (receive, send)  # type: ignore[method-assign]


class Rig:
    """A splice between a stream and a link, and the far ends of both."""

    def __init__(self, stack: ExitStack, start: bool = True, room: int = 0) -> None:
        stream, self.far_stream = tcp_pair(room)
        link, far_link = tcp_pair()
        far_link.settimeout(None)
        for sock in (self.far_stream, far_link):
            stack.callback(sock.close)
        self.threads = Threads()
        stack.callback(lambda: self.threads.end(Deadline(PATIENCE)))
        self.link, self.far = Link(Stream(link, "link"), CLIENT), Link(Stream(far_link, "far link"), SERVER)
        for sender, kind in ((CLIENT, HELLO), (SERVER, WELCOME), (SERVER, START), (CLIENT, READY)):
            for one in (self.link, self.far):
                (one.machine.send if one.machine.role == sender else one.machine.receive)(kind)
        self.stream = Stream(stream, "stream")
        self.splice = Splice("1", "test", self.stream, self.link)
        self.done = threading.Event()
        if start:
            self.start()

    def start(self) -> None:
        self.threads.start(self._run)

    def _run(self) -> None:
        try:
            self.splice.run(self.threads)
        finally:
            self.stream.close()
            if self.link.machine.state != IDLE:
                self.link.close()
            self.done.set()

    def close(self) -> None:
        self.splice.break_off("the test is over", hurry=True, close_link=True)
        assert self.done.wait(PATIENCE)
        self.link.close()


def receive(link: Link) -> bytes:
    """What comes in on a link, to the end of its connection."""
    data = bytearray()
    view = memoryview(bytearray(100_000))
    while count := link.recv_into(view):
        data += view[:count]
    return bytes(data)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def bytes_waiting(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))[0])


def sweep_until_broken(splices: Splices) -> None:
    """Sweep until every connection is broken off."""

    def broken() -> bool:
        splices.sweep()
        return all(splice.reason for splice in splices.snapshot())

    wait_until(broken)
