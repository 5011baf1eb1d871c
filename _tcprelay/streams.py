"""A byte stream over one socket."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import Any, Protocol

from .protocol import HEADER
from .system import ignore_oserror
from .tcp import CLOSE_NORMALLY, RESET_ON_CLOSE, unsent_bytes
from .waiting import Deadline, wait_for


class Leg(Protocol):
    """One side of a spliced connection, as a pump sees it.

    A pump's buffer has `HEADER` free bytes before the data: a leg that sends frames puts its header there, so
    that header and bytes leave in one system call and are never copied together.
    """

    name: str
    fd: int
    spliceable: bool
    """Whether its bytes can pass inside the kernel, from and to `fd`."""

    def recv_into(self, view: memoryview) -> int:
        """Receive at least a byte; 0 is the end, and one that can be believed.  Raises `OSError`."""

    def recv_now(self, view: memoryview) -> int | None:
        """Like `recv_into`, but ``None`` where it would have to wait."""

    def holds_bytes(self) -> bool:
        """Whether there may be bytes, or the end, that the socket has given already, so that poll does not tell."""

    def send_buffer(self, view: memoryview, count: int) -> None:
        """Send the `count` bytes behind the header space of `view`, all of them.  Raises `OSError`."""

    def bulk_ahead(self) -> int:
        """How many bytes may be taken from `fd` directly; 0: use `recv_into`.  Raises `OSError`."""

    def took_bulk(self, count: int) -> None:
        """So many of them were taken; 0 at the end of the descriptor.  Raises `OSError` if that is no end."""

    def announce_bulk(self, count: int) -> None:
        """`count` bytes are about to be written to `fd` directly.  Raises `OSError`."""

    def keep_trying(self) -> None:
        """A send has been blocked for a while.  Raises `OSError` to give up."""

    def end(self, passed: int = 0) -> None:
        """End the sending direction: the other side has got everything.  So many bytes of the other direction
        were `passed` on by now, which a relay client tells its server.  Raises `OSError`."""

    def pack(self, data: memoryview) -> bytes | memoryview:
        """These bytes as they cross the leg's socket, to be sent by `carrier`.  They have to be sent now."""

    def pack_end(self, passed: int = 0) -> bytes:
        """What says there that nothing more will come (see `end`); maybe nothing."""

    def end_now(self) -> bool:
        """When that has been sent: `end`, as far as it goes without waiting; False where `end` has to be called."""


FLUSH_TIMEOUT = 5.0
"""Seconds that the bytes sent before an abort have to leave, before the RST that would discard them."""


BULK = 16384
"""Reads of this size on are bulk traffic, worth passing through a pipe inside the kernel."""


PIPE_SIZE = 1 << 20
"""Bytes that a pipe for bulk traffic takes: Linux's limit for ordinary users.  It holds a page for each of the
fragments that packets come in, so less would fill up early (measured: 256 KiB cost 30 % more processor time)."""


class Stream:
    """A byte stream over one TCP or Unix socket.

    While it carries a connection it is to be reset when it is closed, or when the process dies, until
    `complete` says that both directions are whole: nobody must take a part for the whole.  What a relay
    accepts is like that from the start (see `listen`), what it dials from `reset_on_close` on.
    """

    spliceable = hasattr(os, "splice")

    def __init__(self, sock: socket.socket, name: str, peer: Any = None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.name = name
        """What it is in a log line: "service client 192.0.2.7:50312"."""
        self.peer = peer
        self.given_up = False
        """Blocked sends are to return with an error, and what was sent need not be delivered any more."""
        self._tcp = sock.family != socket.AF_UNIX
        self._fin_sent = False
        self.received = 0
        """Bytes that were taken from the socket, in whichever process, for `_believe_end`."""

    def recv_into(self, view: memoryview) -> int:
        count = self.sock.recv_into(view)
        self.received += count
        return count or self._believe_end()

    def recv_now(self, view: memoryview) -> int | None:
        """Like `recv_into`, but ``None`` where it would have to wait."""
        try:
            count = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        self.received += count
        return count or self._believe_end()

    def holds_bytes(self) -> bool:
        return False

    def _believe_end(self) -> int:
        """0, where a receive that gave 0 means the end.  Raises `ConnectionResetError` where it does not.

        The error of an RST is told once.  Where another thread's send takes it, a receive gives 0, as at a FIN;
        but only after an RST is the connection closed (TCP_CLOSE, byte 0 of Linux's tcp_info) while this side
        has not sent its own FIN.  Then a FIN may have come before the RST, as from a peer that has closed and is
        sent more: it counts as one more byte in tcpi_bytes_received, at byte 128.
        """
        if self._tcp and not self._fin_sent:
            try:
                info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                closed = info[0] == 7 and struct.unpack_from("Q", info, 128)[0] <= self.received
            except (OSError, AttributeError):
                closed = False
            except struct.error:  # Linux before 4.1
                closed = info[0] == 7
            if closed:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return 0

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, however long the peer takes.  Raises `OSError`."""
        self._send_all(memoryview(data))

    def _send_all(self, view: memoryview, flags: int = 0) -> None:
        while view:
            try:
                view = view[self.sock.send(view, flags) :]
            except BlockingIOError:
                self.keep_trying()

    def keep_trying(self) -> None:
        """Called when a send has been blocked for a while.  Raises `ConnectionAbortedError` to give up."""
        if self.given_up:
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

    def send_buffer(self, view: memoryview, count: int) -> None:
        self._send_all(view[HEADER : HEADER + count])

    def bulk_ahead(self) -> int:
        return PIPE_SIZE

    def took_bulk(self, count: int) -> None:
        self.received += count

    def announce_bulk(self, count: int) -> None:
        pass

    def end(self, passed: int = 0) -> None:
        self._fin_sent = True
        self.sock.shutdown(socket.SHUT_WR)

    def pack(self, data: memoryview) -> bytes | memoryview:
        return data

    def pack_end(self, passed: int = 0) -> bytes:
        return b""

    def end_now(self) -> bool:
        self.end()
        return True

    def reset_on_close(self) -> None:
        """Have `close`, or the death of this process, reset the connection."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def abort(self, force: bool = False) -> None:
        """Have `close` reset the connection, and wake whoever uses it."""
        self.reset_on_close()
        self.wake(force)

    def complete(self) -> None:
        """Both directions are whole: close normally, and let the kernel deliver what it still has."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_NORMALLY)

    def wake(self, force: bool = False) -> None:
        """Make other threads' blocked receives return with an end; with `force` blocked sends soon give up.

        Only the receiving side is shut down, which sends nothing.  Shutting down the sending side would wake a
        blocked sender, too; but it sends a FIN, and that says "complete".
        """
        self.given_up = self.given_up or force
        ignore_oserror(self.sock.shutdown, socket.SHUT_RD)

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
            while not self.given_up and unsent_bytes(self.sock) and deadline.remaining() and not poller.poll(pause):
                pause = min(2 * pause, 50.0)
        except (OSError, ValueError):
            pass  # gone already

    def rest(self) -> None:
        """Give back what a connection took and an idle link does not need."""

    def linger(self) -> None:
        """End, and wait a little for the peer's end: with its bytes unread, `close` would reset the connection,
        and the peer might lose what was sent to it last."""
        try:
            self.complete()
            self.sock.shutdown(socket.SHUT_WR)
            deadline, scrap = Deadline(1.0), memoryview(bytearray(4096))
            for _ in range(64):
                wait_for(self.fd, select.POLLIN, deadline)
                if self.sock.recv_into(scrap, 0, socket.MSG_DONTWAIT) == 0:
                    break
        except OSError:
            pass


_NOW_WITH_END = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_MORE", 0)
