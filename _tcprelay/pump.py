"""One direction of a connection: the first bytes without waiting, what goes on longer by a pump.

    source ─▶ Flow.take ─▶ out ─▶ Flow.give ─▶ sink        while the connection is young: see `Splice`
    source ──────────▶ Flow.pump ───────────▶ sink         after that, in a thread of its own

A pump blocks in a plain ``recv``, ``send`` or ``splice`` and in nothing else; others end it by waking the socket it is
blocked on, after they have set `Flow.halted`.  It begins with a small buffer, takes a larger one where reads fill it,
and passes bulk traffic through a pipe inside the kernel, where both ends allow that:

    _pump ─▶ _pass_bytes           small messages of a stream
             _pass_frames          small messages of a link, most of which come as one whole frame
             _pass_paced           both, where the connection has a rate: no byte is taken before it may pass
             _pump_bulk ─▶ _pump_in_kernel, _pump_large

Small messages are where Python costs most: their two loops have the socket's own calls, and no method in between.
"""

from __future__ import annotations

import itertools
import os
import socket

from .ahead import Queue
from .link import Link
from .pace import Pace
from .protocol import DATA_HEAD, HEAD, HEADER
from .streams import BULK, PIPE_SIZE, Sink, Source
from .system import fcntl, go_home, roam
from .text import say_error
from .tls import LARGE_TLS_BUFFER, SMALL_READS

OPENING_BYTES = 16384
"""Bytes that pass each way before there are pumps, at most: what is larger is worth a second thread, and buffers."""
SMALL_BUFFER = 256
"""A pump's first buffer: what an idle connection costs is mostly its two buffers and two stacks."""
LARGE_BUFFER = 8**3 * SMALL_BUFFER
"""A pump's buffer when reads fill the smaller ones: each has eight times as much."""
PIPE_AGAIN = 256
"""So many large reads without one, since none was to be had, until it is asked for again."""
SPARSE_READS = 16
"""So many reads in a row that the buffer before would have held have a pump begin with its first one again."""


class SourceError(ConnectionError):
    """A source broke; the message names it."""

    def __init__(self, source: Source, cause: OSError) -> None:
        super().__init__(f"{source.name}: {say_error(cause)}")
        self.cause = cause


class SinkError(ConnectionError):
    """A sink broke; the message names it."""

    def __init__(self, sink: Sink, cause: OSError, held: int = 0) -> None:
        super().__init__(f"{sink.name}: {say_error(cause)}")
        self.held = held
        """Bytes of the source that it did not take."""


class Flow:
    """One direction of a connection, from a source to a sink.

    One thread at a time works on it.  Others may read `carried` and `done`, and set `halted`.
    """

    def __init__(self, source: Source, sink: Sink, first: bytes = b"") -> None:
        """What is `first` goes to the sink before all else, with the source's first bytes or soon."""
        self.source = source
        self.sink = sink
        self.carried = 0
        """Bytes of the connection that the sink has taken."""
        self.ended = False
        """The source has come to its end."""
        self.done = False
        """Nothing is left to do: the sink has ended too, or something broke."""
        self.halted = False
        """Stop, whatever there is to carry."""
        self.was_ahead = False
        """The sink was the slower side of bulk traffic, so that much came ahead of it."""
        self.pace: Pace | None = None
        """How fast it may be; set before the first byte."""
        self.out = bytearray(first)
        """For the sink, and not taken by its socket yet; so far `_taken` bytes of the connection."""
        self._taken = 0
        self._error: ConnectionError | None = None
        """What is to be raised when `out` has been sent."""

    # Without waiting

    def take(self, view: memoryview) -> None:
        """Take what is here from the source, as much as may pass without a pump."""
        source, most = self.source, OPENING_BYTES
        if self.pace is not None:
            most = min(most, self.pace.burst)
            view = view[:most]
        try:
            while self._taken < most and (count := source.recv_now(view)) is not None and not self.halted:
                if count == 0:
                    self.ended = True
                    return
                self.out += self.sink.pack_header(count)
                self.out += view[:count]
                self._taken += count
                if not source.may_have_more():
                    return
        except OSError as error:
            self._error = SourceError(source, error)

    def give(self) -> bool:
        """Send what was taken, and end the sink where the source has ended; False where the rest is for the pump."""
        sink, stream = self.sink, self.sink.stream
        try:
            if not stream.send_now(self.out, end_follows=self.ended and sink is stream):
                return False
        except OSError as error:
            self.out.clear()
            self._error = SinkError(sink, error)
        if self._error is not None:
            return False
        self.carried, self._taken = self.carried + self._taken, 0
        if not self.ended:
            return self.carried < (OPENING_BYTES if self.pace is None else min(OPENING_BYTES, self.pace.burst))
        try:
            self.done = sink.end(wait=False)
        except OSError as error:
            self._error = SinkError(sink, error)
        return self.done

    # With a thread of its own

    def pump(self) -> None:
        """Pass bytes on until the source ends or the flow is halted.  Raises `SourceError` and `SinkError`."""
        try:
            try:
                self.sink.stream.send(self.out)
            except OSError as error:
                raise SinkError(self.sink, error, self._taken) from error
            self.carried, self._taken = self.carried + self._taken, 0
            self.out.clear()
            if self._error is not None:
                raise self._error
        finally:
            self._error = None  # kept, its traceback would make a ring
        if not self.ended:
            self._pump()

    def end(self, passed: int) -> None:
        """Tell the sink that the source has ended; see `Sink.pack_end`.  Raises `SinkError`."""
        try:
            if words := self.sink.pack_end(passed):
                self.sink.stream.send(words)
            self.sink.end()
        except OSError as error:
            raise SinkError(self.sink, error) from error

    def _pump(self) -> None:
        size, pass_small = SMALL_BUFFER, self._pass_frames if self.source.head else self._pass_bytes
        if self.pace is not None:
            pass_small = self._pass_paced
        while count := pass_small(size, BULK if size == LARGE_BUFFER else size):
            if size == LARGE_BUFFER and count >= BULK and self._pump_bulk():
                return
            size = 8 * size if size <= count and size < LARGE_BUFFER else SMALL_BUFFER

    def _pass_bytes(self, size: int, enough: int) -> int:
        """Pass on what a stream gives, up to `size` bytes at once, until that is `enough`, or little again and again;
        returns how many it was, 0 at the end.

        They are received into a view behind the room for a header, so that they leave in one call with what goes before
        them and are never copied together.  DATA needs no leave of the link's state machine while its direction is
        open, and this thread is the one that ends it.
        """
        head, stream, out, pack = self.sink.head, self.source.stream, self.sink.stream, HEAD.pack_into
        receive, send = stream.calls()[0], out.calls()[1]
        view, little, sparse = memoryview(bytearray(head + size)), _little(size), 0
        data = view[head:]
        while True:
            try:
                count = receive(data)
                stream.received += count
                if count == 0:
                    self.ended = stream.believe_end() == 0
            except OSError as error:
                raise SourceError(stream, error) from error
            if count == 0 or self.halted:
                return 0
            try:
                if head:
                    pack(view, 0, DATA_HEAD | count)
                if (sent := send(view[: head + count])) < head + count:
                    out.send(view[sent : head + count])
            except OSError as error:
                self._send_late(error, view[: head + count], count)
            self.carried += count
            sparse = sparse + 1 if count <= little else 0
            if count >= enough or sparse == SPARSE_READS:
                return count

    def _pass_frames(self, size: int, enough: int) -> int:
        """The same for what a link gives.  A whole frame, by itself, needs no decoder; what is none is held by the
        link, and decoded there."""
        link = self.source
        assert isinstance(link, Link)
        stream, out, unpack = link.stream, self.sink.stream, HEAD.unpack_from
        receive, send = stream.calls()[0], out.calls()[1]
        view, little, sparse = memoryview(bytearray(HEADER + size)), _little(size), 0
        decode = link.left > 0 or link.holds_frames()
        link.rest()
        while True:
            if decode:
                count = self._pass_piece(view, view[HEADER:])
                decode = link.left > 0 or link.holds_frames()
                if count == 0:
                    return 0
            else:
                try:
                    count = receive(view)
                    stream.received += count
                    if count == 0:
                        stream.believe_end()
                        raise ConnectionResetError("the link was lost")
                    if count > HEADER and unpack(view)[0] == DATA_HEAD + count - HEADER:
                        piece = view[HEADER:count]
                    else:
                        piece = link.take_frames(view[:count])
                        decode = link.left > 0 or link.holds_frames()
                except OSError as error:
                    raise SourceError(link, error) from error
                if self.halted:
                    return 0
                if not (count := len(piece)):
                    continue
                try:
                    if (sent := send(piece)) < count:
                        out.send(piece[sent:])
                except OSError as error:
                    self._send_late(error, piece, count)
                self.carried += count
            sparse = sparse + 1 if count <= little else 0
            if count >= enough or sparse == SPARSE_READS:
                return count

    def _pass_paced(self, size: int, enough: int) -> int:
        """The same for either source, as fast as the pace allows."""
        view, little, sparse = memoryview(bytearray(HEADER + size)), _little(size), 0
        while room := self._room(size):
            count = self._pass_piece(view, view[HEADER : HEADER + room])
            sparse = sparse + 1 if count <= little else 0
            if count == 0 or count >= enough or sparse == SPARSE_READS:
                return count
        return 0

    def _room(self, most: int) -> int:
        """How many bytes may be taken at once, of so many at most; rests first where the pace asks for that, and is 0
        where the flow is halted meanwhile."""
        return most if self.pace is None else min(most, self.pace.wait(self))

    def _send_late(self, error: OSError, piece: memoryview, count: int) -> None:
        """Send what a sink has not taken for a while, with so many bytes of the source in it.  Raises `SinkError` where
        that is to end, and for every other error."""
        try:
            if not isinstance(error, BlockingIOError):
                raise error
            self.sink.stream.keep_trying()
            self.sink.stream.send(piece)
        except OSError as problem:
            raise SinkError(self.sink, problem, count) from problem

    def _pass_piece(self, view: memoryview, data: memoryview) -> int:
        """Pass on what one receive gives, into `data`: the view behind its first `HEADER` bytes; returns how many bytes
        it was, 0 at the end."""
        sink = self.sink
        try:
            count = self.source.recv_into(data)
        except OSError as error:
            raise SourceError(self.source, error) from error
        if count == 0:
            self.ended = True
        if count == 0 or self.halted:
            return 0
        try:
            if header := sink.pack_header(count):
                view[HEADER - len(header) : HEADER] = header
            sink.stream.send(view[HEADER - len(header) : HEADER + count])
        except OSError as error:
            raise SinkError(sink, error, count) from error
        self.carried += count
        return count

    def _pump_bulk(self) -> bool:
        """Pass bytes on while reads are large, on any processor; True at the source's end."""
        queue = Queue(self.source.sock, self.sink.stream.sock)
        roam()
        try:
            spliceable = self.source.spliceable and self.sink.spliceable
            if spliceable and (pipe := _open_pipe()):
                return self._pump_in_kernel(*pipe, queue)
            return self._pump_large(queue, PIPE_AGAIN if spliceable else None)
        finally:
            self.was_ahead |= queue.is_ahead
            self.source.stream.room = PIPE_SIZE
            queue.release()
            go_home()

    def _pump_large(self, queue: Queue, most: int | None) -> bool:
        """The same through a large buffer, with so many reads at `most`; then there may be a pipe again."""
        view, small, stream = memoryview(bytearray(HEADER + LARGE_TLS_BUFFER)), 0, self.source.stream
        for _ in itertools.count() if most is None else range(most):
            if small == SPARSE_READS:
                return False
            stream.room = queue.bound
            room = self._room(queue.bound)
            count = self._pass_piece(view, view[HEADER : HEADER + room]) if room else 0
            if count == 0:
                return True
            queue.sent(count)
            small = small + 1 if count < BULK else 0
        return False

    def _pump_in_kernel(self, reader: int, writer: int, queue: Queue) -> bool:
        """The same through a pipe, so that no byte comes into this process."""
        source, sink = self.source, self.sink
        stream, small = sink.stream, 0
        try:
            while small < SMALL_READS:
                if not (room := self._room(queue.bound)):
                    return True
                try:
                    ahead = source.bulk_ahead()
                    if not ahead:
                        return False
                    count = os.splice(source.fd, writer, min(ahead, room))
                    source.took_bulk(count)
                except OSError as error:
                    raise SourceError(source, error) from error
                if self.halted:
                    return True
                if count == 0:
                    return False  # the end, or urgent data (splice stops there): `recv_into` can tell
                try:
                    stream.send(sink.pack_header(count), socket.MSG_MORE)
                    rest = count
                    while rest:
                        try:
                            rest -= os.splice(reader, stream.fd, rest)
                        except BlockingIOError:
                            stream.keep_trying()
                except OSError as error:
                    raise SinkError(sink, error, count) from error
                queue.sent(count)
                self.carried += count
                small = small + 1 if count < BULK else 0
            return False
        finally:
            os.close(reader)
            os.close(writer)


def _little(size: int) -> int:
    """How much is so little for a buffer of that size that a small one would do; for the smallest, nothing is."""
    return size // 8 if size > SMALL_BUFFER else 0


def _open_pipe() -> tuple[int, int] | None:
    """A pipe for bulk traffic; ``None`` where there is none to be had, and copying is better."""
    try:
        reader, writer = os.pipe()
    except OSError:
        return None  # out of descriptors
    if _widen_pipe(writer) < BULK:
        os.close(reader)
        os.close(writer)
        return None  # the user has many pipes, and gets only small ones now
    return reader, writer


def _widen_pipe(pipe: int) -> int:
    """Give a pipe `PIPE_SIZE` bytes, if the system allows; returns how many it has."""
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
