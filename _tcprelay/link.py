"""A link that speaks protocol 1."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from .protocol import (
    ABORT,
    CLIENT,
    DATA,
    END,
    HEADER,
    MAX_CONTROL,
    REFUSED,
    START,
    Frame,
    LinkMachine,
    decode_fields,
    encode_frame,
    encode_header,
)
from .streams import BULK, Leg, Stream
from .system import ignore_oserror
from .text import shown
from .waiting import Deadline, Stop, wait_for

MOST_DISCARDED = 1 << 20
"""Bytes that are received only to be dropped, behind this side's own end; for more, a link is closed."""


class Link:
    """A link that speaks protocol 1: control frames, and one connection at a time as a `Leg`.

    Between connections one thread uses it (on the server, whoever has taken it out of the pool); while
    it is spliced, one thread sends and one receives.  `close` is for the last of them.
    """

    def __init__(self, stream: Stream, role: str) -> None:
        self.stream = stream
        self.sock = stream.sock
        self.fd = stream.fd
        self.name = stream.name
        self.spliceable = stream.spliceable
        self.machine = LinkMachine(role)
        self.heartbeat = 0.0
        """Seconds between the server's PINGs, as it said in WELCOME."""
        self.passed = 0
        """Bytes of the present connection, or the last, that the relay client had passed on when it sent END."""
        self.spent = False
        """Not to be used again, since a new link would be faster: see `is_held_back`."""
        self._buffer = bytearray(512)  # what has been received beyond the last frame: [_start:_end]
        self._start = self._end = 0
        self._left = 0  # bytes of the present DATA frame that are still to come out of here

    def __repr__(self) -> str:
        return f"<Link {self.name} {self.machine.state}>"

    # Control frames

    def pack_control(self, kind: int, fields: dict[str, Any] | None = None) -> bytes:
        """A control frame, which has to be sent now."""
        self.machine.send(kind)
        if kind == START:
            self.passed = 0
        return encode_frame(kind, fields)

    def send(self, kind: int, fields: dict[str, Any] | None = None, also: bytes = b"") -> None:
        """Send a control frame, with further encoded frames behind it in the same call.  Raises `OSError`."""
        self.stream.send(self.pack_control(kind, fields) + also)

    def receive(self, deadline: Deadline, stop: Stop | None = None) -> Frame:
        """The next frame, waited for.  Raises `EOFError` at the end of the link, `LinkFault`, `OSError`."""
        frame = self.receive_held()
        while frame is None:
            wait_for(self.fd, select.POLLIN, deadline, stop)
            frame = self.receive_now()
        return frame

    def receive_held(self) -> Frame | None:
        """The next frame if the socket need not be asked for it; what is in the socket, poll tells."""
        return self.receive_now() if self.stream.holds_bytes() else self._decode()

    def receive_now(self) -> Frame | None:
        """The next frame if it is here, as a whole.  Raises as `receive` does."""
        while (frame := self._decode()) is None:
            count = self.stream.recv_now(self._space())
            if count is None:
                return None
            if count == 0:
                raise EOFError("the link was closed")
            self._end += count
        return frame

    def send_now(self, kind: int, fields: dict[str, Any] | None = None) -> None:
        """Send a control frame on an idle link.  Raises `OSError`, also where it would have to wait: a peer that
        does not even read that much is as good as dead, and must not hold up who looks after many links."""
        if not self.stream.send_now(bytearray(self.pack_control(kind, fields))):
            raise TimeoutError("the other side does not read")

    def refuse(self, code: str, reason: str) -> None:
        """Tell the peer why, as far as it listens.  The caller owns the link, and closes it."""
        ignore_oserror(self.stream.send_now, bytearray(encode_frame(REFUSED, {"code": code, "reason": reason})))

    def unread(self) -> bytes:
        """The bytes that have come in and are no frame yet."""
        return bytes(self._buffer[self._start : self._end])

    # The leg

    def recv_into(self, view: memoryview) -> int:
        count = self._recv(view, self.stream.recv_into)
        assert count is not None
        return count

    def recv_now(self, view: memoryview) -> int | None:
        return self._recv(view, self.stream.recv_now)

    def holds_bytes(self) -> bool:
        return self._start < self._end or self.stream.holds_bytes()

    def _recv(self, view: memoryview, receive: Callable[[memoryview], int | None]) -> int | None:
        """Bytes out of DATA frames; ``None`` where `receive` gives that."""
        while self._left == 0:
            if (frame := self._decode()) is None:
                count = receive(self._space())
                if count is None:
                    return None
                if count == 0:
                    raise ConnectionResetError("the link was lost")
                self._end += count
            elif frame.kind == END:
                self.passed = int(frame.number("passed", 0, 1 << 62))
                return 0
            elif frame.kind == ABORT:
                raise ConnectionAbortedError(shown(frame.text("reason") or "broken off by the other relay"))
        ahead = self._end - self._start
        if ahead:
            count = min(ahead, self._left, len(view))
            view[:count] = memoryview(self._buffer)[self._start : self._start + count]
            self._start += count
            rest = min(self._left, len(view)) - count
            if rest:  # it came with the header, most likely: so one message stays one
                try:
                    count += self.stream.recv_now(view[count : count + rest]) or 0
                except OSError:
                    pass  # the next call meets it again, or the end of the link
        else:
            count = receive(view[: self._left])
            if count is None:
                return None
            if count == 0:
                raise ConnectionResetError("the link was lost")
        self._left -= count
        return count

    def send_buffer(self, view: memoryview, count: int) -> None:
        self.machine.send(DATA)
        view[:HEADER] = encode_header(DATA, count)
        self.stream.send(view[: HEADER + count])

    def bulk_ahead(self) -> int:
        # Read exactly a header, nothing behind it: those bytes are to go from socket to socket.
        while self._left == 0 and self._end - self._start < HEADER:
            self._space()
            view = memoryview(self._buffer)[self._end : self._start + HEADER]
            count = self.stream.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the link was lost")
            self._end += count
        if self._left == 0 and self._buffer[self._start] == DATA:
            self._decode()
        return self._left if self._start == self._end else 0

    def took_bulk(self, count: int) -> None:
        if count == 0:
            raise ConnectionResetError("the link was lost")
        self._left -= count

    def announce_bulk(self, count: int) -> None:
        self.machine.send(DATA)
        self.stream._send_all(memoryview(encode_header(DATA, count)), socket.MSG_MORE)

    def keep_trying(self) -> None:
        self.stream.keep_trying()

    def end(self, passed: int = 0) -> None:
        if not self.machine.has_ended(self.machine.role):  # otherwise `pack_end` was before this
            self.stream.send(self.pack_end(passed))

    def pack(self, data: memoryview) -> bytes | memoryview:
        self.machine.send(DATA)
        return encode_header(DATA, len(data)) + data

    def pack_end(self, passed: int = 0) -> bytes:
        return self.pack_control(END, {"passed": passed} if passed and self.machine.role == CLIENT else None)

    def end_now(self) -> bool:
        return True

    def abort(self, reason: str) -> None:
        if not self.machine.has_ended(self.machine.role):
            self.send(ABORT, {"reason": shown(reason)})

    def discard(self, deadline: Deadline, stop: Stop | None = None) -> int:
        """Receive and drop until the other side has ended its direction by END; returns how many bytes it were.

        Raises `ConnectionAbortedError` where it did so by ABORT, and `OSError`, also when more than `MOST_DISCARDED`
        bytes come after this side has ended its own direction: then a new link costs less than the rest.
        """
        scrap, dropped, after = memoryview(bytearray(4 * BULK)), 0, 0
        while not self.machine.has_ended(self.machine.peer):
            count = self.recv_now(scrap)
            if count is None:
                wait_for(self.fd, select.POLLIN, deadline, stop)
                continue
            dropped += count
            after += count if self.machine.has_ended(self.machine.role) else 0
            if after > MOST_DISCARDED:
                raise ConnectionResetError("the other side did not stop sending")
        return dropped

    def wake(self) -> None:
        """Make blocked calls of other threads return.  A FIN here deceives nobody: only END is an end."""
        ignore_oserror(self.sock.shutdown, socket.SHUT_RDWR)

    def close(self) -> None:
        self.stream.close()

    # Decoding

    def _decode(self) -> Frame | None:
        """The next frame out of the buffer, if it is there; of DATA, its head."""
        buffer, start = self._buffer, self._start
        if self._end - start < HEADER:
            return None
        kind, length = buffer[start], int.from_bytes(buffer[start + 1 : start + HEADER], "big")
        self.machine.check(kind, length)
        if kind == DATA:
            self._start += HEADER
            self._left = length
            return Frame(DATA, length)
        if self._end - start < HEADER + length:
            return None
        self._start += HEADER + length
        fields = decode_fields(kind, bytes(buffer[start + HEADER : start + HEADER + length]))
        self.machine.receive(kind)
        return Frame(kind, length, fields)

    def _space(self) -> memoryview:
        """Where the next bytes go; the buffer grows to one control frame and no further."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._end -= self._start
            self._start = 0
        if self._end == len(self._buffer):
            self._buffer.extend(bytes(HEADER + MAX_CONTROL - len(self._buffer)))
        return memoryview(self._buffer)[self._end :]


def carrier(leg: Leg) -> Stream:
    """The stream whose socket a leg's bytes go through."""
    if isinstance(leg, Link):
        return leg.stream
    assert isinstance(leg, Stream)
    return leg
