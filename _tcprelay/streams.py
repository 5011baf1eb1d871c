"""A byte stream over one socket, and what a connection's two ends are for each other: a source and a sink.

One thread at a time receives from a stream and one sends on it; the thread that serves its connection owns it, and
closes it after the other has left.  Everybody else may only `Stream.wake` it or have it `Stream.hurry`: closing would
not wake a blocked ``recv``, and the number of a closed descriptor may already belong to another connection.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Any, Protocol

from .system import ignore_oserror
from .tcp import BYTES_RECEIVED, CLOSE_NORMALLY, RESET_ON_CLOSE, STATE, Probing, tcp_info, unsent_bytes
from .waiting import Deadline, Stop, wait_for

FLUSH_TIMEOUT = 5.0
"""Seconds that the bytes sent before an abort have to leave, before the RST that would discard them."""
BULK = 16384
"""Reads of this size on are bulk traffic, worth passing through a pipe inside the kernel."""
PIPE_SIZE = 1 << 20
"""Bytes that a pipe for bulk traffic takes: Linux's limit for ordinary users.  It holds a page for each of the
fragments that packets come in, so less would fill up early (measured: 256 KiB cost 30 % more processor time)."""


class Source(Protocol):
    """Where the bytes of one direction of a connection come from.  All its methods raise `OSError`."""

    name: str
    sock: socket.socket
    fd: int
    head: int
    """Bytes of the header before each piece of them on the stream (see `protocol.HEAD`); 0 where there is none."""
    spliceable: bool
    """Whether its bytes can pass inside the kernel, from `fd`."""

    @property
    def stream(self) -> Stream: ...

    def recv_into(self, view: memoryview) -> int:
        """Receive at least a byte; 0 is the end, and one that can be believed."""

    def recv_now(self, view: memoryview) -> int | None:
        """The same, but ``None`` where it would have to wait."""

    def holds_bytes(self) -> bool:
        """Whether there may be bytes, or the end, that the socket has given already, so that poll does not tell."""

    def may_have_more(self) -> bool:
        """Whether it is worth asking again at once, after some have come."""

    def bulk_ahead(self) -> int:
        """How many bytes may be taken from `fd` directly; 0: use `recv_into`."""

    def took_bulk(self, count: int) -> None:
        """So many of them were taken; 0 at the end of the descriptor."""


class Sink(Protocol):
    """Where the bytes of one direction go: over a stream, with what has to stand there before and behind them."""

    name: str
    head: int
    """As a source's."""
    spliceable: bool

    @property
    def stream(self) -> Stream: ...

    def pack_header(self, count: int) -> bytes:
        """What goes before `count` bytes; they have to follow it at once, and nothing else.  Raises `OSError`."""

    def pack_end(self, passed: int = 0) -> bytes:
        """What tells that nothing more will come, to be sent before `end`; nothing where that has been packed before.

        So many bytes of the other direction were `passed` on by now, which a relay client tells its server.
        """

    def end(self, wait: bool = True) -> bool:
        """End this direction: the other side has got everything.  False where it does not `wait`, and would have to;
        then it is to be called again.  Raises `OSError`."""


class Stream:
    """A byte stream over one TCP or Unix socket; a source and a sink.

    While it carries a connection it is to be reset when it is closed, or when the process dies, until
    `conclude` says that both directions are whole: a part must not be taken for the whole.  What a relay
    accepts is like that from the start (see `listen`), what it dials from `reset_on_close` on.
    """

    head = 0
    spliceable = hasattr(os, "splice")
    secure = False
    """It speaks TLS: there is a handshake, bytes may have left although a send has failed, and its end is a message."""
    protocol = ""
    """What both sides have agreed to speak over TLS (ALPN), once they have shaken hands; "" for nothing."""
    room = PIPE_SIZE
    """Bytes that are taken from the socket at once at most, where TLS takes more than it is asked for."""
    beginning = b""
    """Of what was received for a TLS handshake the first bytes, up to 16: they may say what else the peer speaks."""

    def __init__(self, sock: socket.socket, name: str, peer: Any = None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.name = name
        """What it is in a log line: "service client 192.0.2.7:50312"."""
        self.peer = peer
        self.hurried = False
        """Blocked sends are to return with an error, and what was sent need not be delivered any more."""
        self._tcp = sock.family != socket.AF_UNIX
        self._fin_sent = False
        self.received = 0
        """Bytes that were taken from the socket, in whichever process, for `believe_end`."""

    def probe(self, probing: Probing) -> None:
        """Have the system ask whether the peer is still there, now that its connection has turned out to last."""
        if self._tcp:
            ignore_oserror(probing.apply, self.sock)

    def handshake(self, deadline: Deadline, stop: Stop | None = None) -> None:
        """What comes before the first byte.  Raises `OSError`, `TimeoutError`, `EOFError` and `Stopping`."""

    def calls(self) -> tuple[Callable[[memoryview], int], Callable[[memoryview], int]]:
        """What receives and what sends small messages, with nothing in between: the socket's own calls.

        `received` is to be told of what was received so, and `believe_end` asked after a 0.
        """
        return self.sock.recv_into, self.sock.send

    # The source

    def recv_into(self, view: memoryview) -> int:
        count = self.sock.recv_into(view)
        self.received += count
        return count or self.believe_end()

    def recv_now(self, view: memoryview) -> int | None:
        try:
            count = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        self.received += count
        return count or self.believe_end()

    def holds_bytes(self) -> bool:
        return False

    def may_have_more(self) -> bool:
        return True  # the end often is right behind the bytes

    def bulk_ahead(self) -> int:
        return PIPE_SIZE

    def took_bulk(self, count: int) -> None:
        self.received += count

    def believe_end(self) -> int:
        """0, where a receive that gave 0 means the end.  Raises `ConnectionResetError` where it does not.

        The error of an RST is told once.  Where another thread's send takes it, a receive gives 0, as at a FIN;
        but only after an RST is the connection closed (TCP_CLOSE) while this side has not sent its own FIN.  Then a
        FIN may have come before the RST, as from a peer that has closed and is sent more: it counts as one more
        byte in tcpi_bytes_received, which Linux has from 4.1 on.
        """
        if self._tcp and not self._fin_sent and tcp_info(self.sock, STATE) == [7]:
            [arrived] = tcp_info(self.sock, BYTES_RECEIVED) or [0]
            if arrived <= self.received:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return 0

    # The sink

    @property
    def stream(self) -> Stream:
        return self

    def pack_header(self, count: int) -> bytes:
        return b""

    def pack_end(self, passed: int = 0) -> bytes:
        return b""

    def end(self, wait: bool = True) -> bool:
        self._fin_sent = True
        self.sock.shutdown(socket.SHUT_WR)
        return True

    # Sending

    def send(self, data: bytes | bytearray | memoryview, flags: int = 0) -> int:
        """Send all of it, however long the peer takes; returns how many bytes that is.  Raises `OSError`."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view, flags) :]
            except BlockingIOError:
                self.keep_trying()
        return len(data)

    def keep_trying(self) -> None:
        """Called when a send has been blocked for a while.  Raises `ConnectionAbortedError` to give up."""
        if self.hurried:
            raise ConnectionAbortedError("given up")

    def send_now(self, data: bytearray, end_follows: bool = False) -> bool:
        """Send what can go without waiting, and remove it from `data`; True when all has gone.  Raises `OSError`.

        Where the end follows at once (not otherwise: a part is held back), both leave in one segment.
        """
        if data:
            try:
                del data[: self.sock.send(data, _NOW_WITH_END if end_follows else socket.MSG_DONTWAIT)]
            except BlockingIOError:
                pass
        return not data

    # Its end

    def reset_on_close(self) -> None:
        """Have `close`, or the death of this process, reset the connection."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def close_normally(self) -> None:
        """Have `close` let the kernel deliver what it still has."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_NORMALLY)

    def abort(self, hurry: bool = False) -> None:
        """Have `close` reset the connection, and wake the threads that use it; with `hurry`, blocked senders too."""
        self.reset_on_close()
        if hurry:
            self.hurry()
        self.wake()

    def wake(self) -> None:
        """Make another thread's blocked receive return with an end.

        Only the receiving side is shut down, which sends nothing.  Shutting down the sending side would wake a
        blocked sender, too; but it sends a FIN, and that says "complete".
        """
        ignore_oserror(self.sock.shutdown, socket.SHUT_RD)

    def hurry(self) -> None:
        """Have blocked sends give up soon, and `conclude` not wait for what was sent."""
        self.hurried = True

    def conclude(self, whole: bool) -> None:
        """The connection is over.  Where it is `whole`, `close` lets the kernel deliver what it still has; else the
        peer gets what was sent before the RST, as far as it takes it in time."""
        if whole:
            self.close_normally()
        elif not self.hurried:
            self.flush()

    def close(self) -> None:
        """Close the socket; only its owner does, when no other thread uses it."""
        self.sock.close()

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Wait until the peer has acknowledged what was sent: an RST would discard the rest.

        No descriptor turns readable at that moment, so this looks again and again, at growing intervals; only
        connections that end in an error come here.  It ends at once where the peer has reset the connection.
        """
        deadline, pause = Deadline(timeout), 1.0
        poller = select.poll()
        try:
            poller.register(self.sock, 0)
            while not self.hurried and unsent_bytes(self.sock) and deadline.remaining() and not poller.poll(pause):
                pause = min(2 * pause, 50.0)
        except (OSError, ValueError):
            pass  # gone already

    def rest(self) -> None:
        """Give back what a connection took and an idle link does not need."""

    def linger(self) -> None:
        """End, and wait a little for the peer's end: with its bytes unread, `close` would reset the connection,
        and the peer might lose what was sent to it last."""
        try:
            self.close_normally()
            self.sock.shutdown(socket.SHUT_WR)
            deadline, scrap = Deadline(1.0), memoryview(bytearray(4096))
            for _ in range(64):
                wait_for(self.fd, select.POLLIN, deadline)
                if self.sock.recv_into(scrap, 0, socket.MSG_DONTWAIT) == 0:
                    break
        except OSError:
            pass


_NOW_WITH_END = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_MORE", 0)
