"""Links: framed ones, which speak protocol 1 and carry one connection after another, and raw ones, which carry one.

Between connections one thread uses a link (on the server, the one that has taken it out of the pool).  While it is
spliced one thread sends, one receives, and others may only break the connection off.  The last of them closes it.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

from .protocol import (
    ABORT, BYE, CLIENT, CLOSED, DATA, DATA_HEAD, END, FAIL, HEAD, HEADER, IDLE, MAX_CONTROL, MAX_DATA, PING, REFUSED,
    START, Frame, LinkFault, LinkMachine, decode_fields, encode_frame, encode_header,
)  # fmt: skip
from .streams import BULK, FLUSH_TIMEOUT, Sink, Source, Stream
from .system import ignore_oserror
from .tcp import is_held_back, is_swollen, round_trip
from .text import shown
from .waiting import Deadline, Stop, wait_for

HEAR_OUT_TIME = 1.0
"""Seconds for which the other side's end is waited for where its bytes can no longer be passed on; two round trips of
the link where that is more."""
LINK_BUFFER = 512
"""Bytes of a link's buffer, to begin with: most control frames are shorter."""
MOST_DISCARDED = 1 << 20
"""Bytes that are received only to be dropped, behind this side's own end; for more, a link is closed."""


class Link:
    """A link that speaks protocol 1: control frames, and one connection at a time, whose source and sink it is."""

    head = HEADER
    speaks = True
    """Frames pass between connections: whether it is alive can be asked, and it can be given up in peace."""
    END_EVENTS = getattr(select, "POLLRDHUP", 0)
    """Poll events that say that it is lost, even after the other side has ended its direction of a connection."""

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
        self.spent = ""
        """Why it is not to be used again, as a new link would be better; "" where it would not."""
        self._buffer = bytearray()  # what has been received beyond the last frame: [_start:_end]
        self._start = self._end = 0
        self.left = 0
        """Bytes of the present DATA frame that are still to come out of here."""

    def __repr__(self) -> str:
        return f"<Link {self.name} {self.machine.state}>"

    @property
    def is_idle(self) -> bool:
        """It carries no connection, and may carry another one."""
        return self.machine.state == IDLE

    @property
    def is_between(self) -> bool:
        """It carries no connection: it is idle, or has been ended in peace."""
        return self.machine.state in (IDLE, CLOSED)

    @property
    def leaving(self) -> bool:
        """The relay client has said that it takes no further connection."""
        return self.machine.leaving

    @property
    def has_ended(self) -> bool:
        """This side has ended its direction of the connection."""
        return self.machine.has_ended(self.machine.role)

    @property
    def peer_has_ended(self) -> bool:
        """The other side has ended its own."""
        return self.machine.has_ended(self.machine.peer)

    @property
    def source(self) -> Source:
        """Where what comes out of the link is taken from, of the connection that it carries."""
        return self

    @property
    def sink(self) -> Sink:
        """Where the rest of that connection goes into it."""
        return self

    # Control frames

    def pack_control(self, kind: int, fields: dict[str, Any] | None = None) -> bytes:
        """A control frame, which has to be sent now."""
        self.machine.send(kind)
        if kind == START:
            self.passed = 0
        return encode_frame(kind, fields)

    def pack_ping(self, nonces: Sequence[str] = ()) -> bytes:
        """What asks whether the other side is there, and has done with what came before; with `nonces` for its next
        links."""
        return self.pack_control(PING, {"nonces": nonces} if nonces else None)

    def pack_bye(self, again: bool) -> bytes:
        """What ends an idle link in peace; the relay client may open one `again` at once."""
        return self.pack_control(BYE, {"again": True} if again else None)

    def send(self, kind: int, fields: dict[str, Any] | None = None) -> None:
        """Send a control frame.  Raises `OSError`."""
        self.stream.send(self.pack_control(kind, fields))

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
        does not even read that much is as good as dead, and must not hold up the keeper, which has many links."""
        if not self.stream.send_now(bytearray(self.pack_control(kind, fields))):
            raise TimeoutError("the other side does not read")

    def refuse(self, code: str, reason: str) -> None:
        """Tell the peer why, as far as it listens.  The caller owns the link, and closes it."""
        ignore_oserror(self.stream.send_now, bytearray(encode_frame(REFUSED, {"code": code, "reason": reason})))

    def unread(self) -> bytes:
        """The bytes that have come in and are no frame yet."""
        return bytes(self._buffer[self._start : self._end])

    # The source of one direction of a connection

    def recv_into(self, view: memoryview) -> int:
        count = self._recv(view, self.stream.recv_into)
        assert count is not None
        return count

    def recv_now(self, view: memoryview) -> int | None:
        return self._recv(view, self.stream.recv_now)

    def holds_bytes(self) -> bool:
        return self._start < self._end or self.stream.holds_bytes()

    def may_have_more(self) -> bool:
        return self.holds_bytes()  # END, sent with the last bytes, has come with them

    def _recv(self, view: memoryview, receive: Callable[[memoryview], int | None]) -> int | None:
        """Bytes out of DATA frames; ``None`` where `receive` gives that."""
        while self.left == 0:
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
            count = min(ahead, self.left, len(view))
            view[:count] = memoryview(self._buffer)[self._start : self._start + count]
            self._start += count
            rest = min(self.left, len(view)) - count
            if rest:  # it came with the header, most likely: so one message stays one
                try:
                    count += self.stream.recv_now(view[count : count + rest]) or 0
                except OSError:
                    pass  # the next call meets it again, or the end of the link
        else:
            count = receive(view[: self.left])
            if count is None:
                return None
            if count == 0:
                raise ConnectionResetError("the link was lost")
        self.left -= count
        return count

    def holds_frames(self) -> bool:
        """Whether there are bytes in its own buffer: what the stream has comes behind them."""
        return self._start < self._end

    def rest(self) -> None:
        """Give the buffer back where there is nothing in it."""
        if not self.holds_frames():
            self._buffer, self._start, self._end = bytearray(), 0, 0

    def take_frames(self, view: memoryview) -> memoryview:
        """What is in the DATA frames with which these bytes begin; they were taken from its stream while it had none.

        What comes behind them, another frame or a part of a header, is kept here for the decoder.
        """
        pieces, at = list[memoryview](), 0
        while len(view) - at >= HEADER and 0 <= (length := HEAD.unpack_from(view, at)[0] - DATA_HEAD) <= MAX_DATA:
            pieces.append(view[at + HEADER : at + HEADER + length])
            at += HEADER + length
        self.left = max(0, at - len(view))
        rest = view[at:]
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        return memoryview(b"".join(pieces))

    def bulk_ahead(self) -> int:
        # Read exactly a header, nothing behind it: those bytes are to go from socket to socket.
        while self.left == 0 and self._end - self._start < HEADER:
            self._space()
            view = memoryview(self._buffer)[self._end : self._start + HEADER]
            count = self.stream.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the link was lost")
            self._end += count
        if self.left == 0 and self._buffer[self._start] == DATA:
            self._decode()
        return self.left if self._start == self._end else 0

    def took_bulk(self, count: int) -> None:
        if count == 0:
            raise ConnectionResetError("the link was lost")
        self.left -= count

    # The sink of the other direction

    def pack_header(self, count: int) -> bytes:
        self.machine.send(DATA)
        return encode_header(DATA, count)

    def pack_end(self, passed: int = 0) -> bytes:
        if self.has_ended:
            return b""
        return self.pack_control(END, {"passed": passed} if passed and self.machine.role == CLIENT else None)

    def end(self, wait: bool = True) -> bool:
        return True

    # The end of a connection

    def abort(self, reason: str) -> None:
        """Tell the other side that the connection is broken off, if it still waits for its end.  Raises `OSError`."""
        if not self.has_ended:
            self.send(ABORT, {"reason": shown(reason)})

    def fail(self, reason: str, stop: Stop) -> None:
        """Answer START: the service cannot be reached; and drop what still comes.  Raises `OSError`."""
        self.send(FAIL, {"reason": shown(reason, 400)})
        try:
            self.discard(Deadline(FLUSH_TIMEOUT), stop)
        except ConnectionAbortedError:
            pass  # the service client has gone; the link is idle
        except TimeoutError:
            raise ConnectionResetError("the relay server did not end the connection after FAIL") from None

    def lose(self) -> None:
        """Sending has failed, maybe in the midst of a frame, which nothing can follow: the link is of no more use.

        What it holds can still be received.
        """
        self.wake()

    def break_off(self, hurry: bool, close: bool) -> None:
        """From outside: end the connection, unless `abort` is to say so and the link to live on."""
        if close:
            self.wake()

    def hurry(self) -> None:
        """The connection is over: it has nothing that could be hurried, and may be carrying another one."""

    def hear_out_time(self) -> float:
        """Seconds within which the end of the other side comes, where that has ended by itself; 0 if none can come."""
        return max(HEAR_OUT_TIME, 2 * round_trip(self.sock))

    def discard(self, deadline: Deadline, stop: Stop | None = None) -> int:
        """Receive and drop until the other side has ended its direction by END; returns how many bytes it were.

        Raises `ConnectionAbortedError` where it did so by ABORT, and `OSError`, also when more than `MOST_DISCARDED`
        bytes come after this side has ended its own direction: then a new link costs less than the rest.
        """
        scrap, dropped, after = memoryview(bytearray(4 * BULK)), 0, 0
        while not self.peer_has_ended:
            count = self.recv_now(scrap)
            if count is None:
                wait_for(self.fd, select.POLLIN, deadline, stop)
                continue
            dropped += count
            after += count if self.has_ended else 0
            if after > MOST_DISCARDED:
                raise ConnectionResetError("the other side did not stop sending")
        return dropped

    def conclude(self, whole: bool, sent: int, was_ahead: bool) -> None:
        """The connection is over, and so many bytes of it were sent on this link; what came on it may have been ahead
        of a slow reader, and have had the system offer a window that nothing but this needed."""
        self.stream.rest()
        self.rest()
        if is_held_back(self.sock, sent):
            self.spent = "it has lost packets, and a new one will be faster"
        elif was_ahead and is_swollen(self.sock):
            self.spent = "a slow reader had much wait on it, and on a new one less will"

    def wake(self) -> None:
        """Make blocked calls of other threads return.  A FIN here is no false end: only END is an end."""
        ignore_oserror(self.sock.shutdown, socket.SHUT_RDWR)

    def close(self) -> None:
        self.stream.close()

    # Decoding

    def _decode(self) -> Frame | None:
        """The next frame out of the buffer, if it is there; of DATA, its head."""
        buffer, start = self._buffer, self._start
        if self._end - start < HEADER:
            return None
        head = HEAD.unpack_from(buffer, start)[0]
        kind, length = head >> 24, head & MAX_DATA
        self.machine.check(kind, length)
        if kind == DATA:
            self._start += HEADER
            self.left = length
            return Frame(DATA, length)
        if self._end - start < HEADER + length:
            return None
        self._start += HEADER + length
        fields = decode_fields(kind, bytes(buffer[start + HEADER : start + HEADER + length]))
        self.machine.receive(kind)
        return Frame(kind, length, fields)

    def _space(self) -> memoryview:
        """Where the next bytes go; the buffer grows from nothing to `LINK_BUFFER`, then to one control frame and no
        further."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._end -= self._start
            self._start = 0
        if self._end == len(self._buffer):
            size = HEADER + MAX_CONTROL if self._buffer else LINK_BUFFER
            self._buffer.extend(bytes(size - len(self._buffer)))
        return memoryview(self._buffer)[self._end :]


class RawLink:
    """A link as node-tcp-relay knows it, with the face of `Link`: a stream that carries one connection, and no more.

    All bytes on it are the connection's, from the first one on, which starts it.  Its end is a FIN, and what breaks it
    off an RST; after either it is of no further use.
    """

    speaks = False
    END_EVENTS = 0
    heartbeat = 0.0
    passed = 0
    spent = ""
    leaving = is_idle = is_between = has_ended = False
    peer_has_ended = True
    """There is nothing that would have to be heard to its end."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.sock = stream.sock
        self.fd = stream.fd
        self.name = stream.name
        self.source: Source = stream
        self.sink: Sink = stream

    def receive_now(self) -> Frame | None:
        """While it is idle the other side has nothing to say.  Raises `EOFError`, `LinkFault` and `OSError`."""
        count = self.stream.recv_now(memoryview(bytearray(1)))
        if count == 0:
            raise EOFError("the link was closed")
        if count is not None:
            raise LinkFault("bytes on an idle link; does the other side speak --wire v1?")
        return None

    receive_held = receive_now

    def refuse(self, code: str, reason: str) -> None:
        """There are no words for that."""

    def fail(self, reason: str, stop: Stop) -> None:
        """Nor for this."""

    def pack_ping(self, nonces: Sequence[str] = ()) -> bytes:
        return b""

    def pack_bye(self, again: bool) -> bytes:
        return b""

    def abort(self, reason: str) -> None:
        """Its close says that: `break_off` has armed it."""

    def lose(self) -> None:
        """What it holds can still be received."""

    def break_off(self, hurry: bool, close: bool) -> None:
        self.stream.abort(hurry)

    def hurry(self) -> None:
        self.stream.hurry()

    def hear_out_time(self) -> float:
        return 0.0

    def discard(self, deadline: Deadline, stop: Stop | None = None) -> int:
        raise ConnectionResetError("a raw link has no end but its own")

    def conclude(self, whole: bool, sent: int, was_ahead: bool) -> None:
        self.stream.conclude(whole)

    def wake(self) -> None:
        self.stream.wake()

    def close(self) -> None:
        self.stream.close()


AnyLink = Link | RawLink
