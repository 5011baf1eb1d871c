"""Splicing."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time

from .link import Link, carrier
from .protocol import HEADER
from .streams import BULK, FLUSH_TIMEOUT, PIPE_SIZE, Leg, Stream
from .system import fcntl, ignore_oserror
from .tcp import UNSENT, hold_much, is_held_back, limit_unsent, path_is_dead, round_trip, unsent_bytes, waiting_bytes
from .text import say_error
from .threads import Threads
from .tls import LARGE_TLS_BUFFER, SMALL_READS, TLSStream
from .tuning import go_home, roam
from .waiting import Deadline

OPENING_TIME = 0.25
"""Seconds for which one thread carries both directions of a connection: a round trip or two, also through the
internet and under load (measured: 64 connections at a time, 1,680 a second, and with 20 ms 1,180)."""


GREETING_DELAY = 0.002
"""Seconds for which a relay client's READY waits for the service's first bytes, to go with them in one message.
Where the service speaks TLS it does not wait: whether there are bytes is known only after the first look."""


OPENING_BYTES = 16384
"""Bytes that it carries each way at most: what is larger is worth a second thread, and the pumps' buffers."""


OPENING_BUFFER = 4096
"""Bytes that it takes at once; four times as many cost each of 2,000 held connections 3 KiB afterwards (measured)."""


SMALL_BUFFER = 256
"""A pump's first buffer: what an idle connection costs is mostly its two buffers and two stacks."""


LARGE_BUFFER = 8**3 * SMALL_BUFFER
"""A pump's buffer when reads fill the smaller ones: each has eight times as much."""


PIPE_AGAIN = 256
"""So many large reads without one, since none was to be had, until it is asked for again."""


SPARSE_READS = 16
"""So many reads in a row that the buffer before would have held have a pump begin with its first one again."""


HEAR_OUT_TIME = 1.0
"""Seconds for which the other side's end is waited for where its bytes can no longer be passed on; two round trips of
the link where that is more."""


class LegError(ConnectionError):
    """A leg broke; the message names it."""

    def __init__(self, leg: Leg, error: OSError, held: int = 0) -> None:
        super().__init__(f"{leg.name}: {say_error(error)}")
        self.leg = leg
        self.cause = error
        self.held = held
        """Bytes of the other leg that this one did not take."""


class Flow:
    """One direction of a connection in its opening exchange, and what that leaves for the pump."""

    __slots__ = ("count", "ended", "error", "out", "sink", "source")

    def __init__(self, source: Leg, sink: Leg) -> None:
        self.source = source
        self.sink = sink
        self.out = bytearray()
        """For the sink, and not taken by its socket yet; so far `count` bytes of the connection."""
        self.count = 0
        self.ended = False
        """The source has come to its end."""
        self.error: OSError | None = None
        """What is to be raised when `out` has been sent."""


class Splice:
    """A stream and a link that carry one connection: the opening exchange, two pumps, and the record they share.

    Each direction ends by itself.  Where one breaks, the other is woken, what was read before is still sent,
    and nobody sees a clean end: the stream gets an RST, the link an ABORT or its own end.
    """

    def __init__(self, id: str, service: str, stream: Stream, link: Link | Stream, greeting: bytes = b"") -> None:
        """The `greeting` goes to the link first, with the stream's first bytes or soon."""
        self.id = id
        self.service = service
        self.stream = stream
        self.link = link
        self.reason = ""
        """Why it was broken off; empty while all is well."""
        self.to_link = self.from_link = 0
        """Bytes carried from the stream to the link and back; each is written by one pump."""
        self.opened = time.monotonic()
        self.thread = threading.get_ident()
        self.to_link_ended = False
        """The pump to the link has left, or there was nothing left for it to do."""
        self.said_end = False
        """The link was told that the stream has ended, and is complete."""
        self.from_link_ended = False
        self._flow_to_link, self._flow_from_link = Flow(stream, link), Flow(link, stream)
        self._flow_to_link.out += greeting
        self._lock = threading.Lock()  # reason, said_end, _broken_at, _over, _halted
        self._broken_at = 0.0
        self._over = False
        self._halted = False  # the pumps stop, whatever there is to carry
        # For the sweep alone: what was carried when it last looked, since when; and when it saw the stream lost.
        self._lost_at = 0.0
        self._seen = 0
        self._quiet_since = self.opened

    def run(self, threads: Threads) -> None:
        """Carry the connection until both directions have ended; then no other thread uses the legs.

        The caller owns both legs.  Afterwards a `Link` whose machine is not idle is of no further use.
        """
        self._converse()
        left = threading.Lock()
        left.acquire()
        if self.to_link_ended:
            left.release()
        elif self.from_link_ended:
            self._carry_to_link(left)
        else:
            try:
                threads.start(self._carry_to_link, left)
            except RuntimeError as error:
                self.break_off(str(error), close_link=True)
                return
        try:
            if not self.from_link_ended:
                self._carry_from_link()
        finally:
            left.acquire()
            with self._lock:
                self._over = True
        for leg in (self.stream, self.link):
            if not isinstance(leg, Stream):
                continue
            if not self.reason:
                leg.complete()
            elif not leg.given_up:
                leg.flush()
        if isinstance(self.link, Link):
            self.link.stream.rest()
            self.link.spent = is_held_back(self.link.sock, self.to_link)

    def break_off(self, reason: str, force: bool = False, close_link: bool = False) -> None:
        """End both directions with an error; any thread, any number of times, the first reason counts.

        Bytes that were read before still go out, for `FLUSH_TIMEOUT` at most; with `force` they do not.
        The pumps tell the other side by ABORT, and the link lives on, unless it is to be closed.
        """
        self._note(reason)
        with self._lock:
            # The legs are woken under the lock (that never blocks): when the connection is over, its link
            # may be carrying another one.
            if self._over:
                self.stream.given_up = self.stream.given_up or force  # what was sent is still being waited for
                if isinstance(self.link, Stream):
                    self.link.given_up = self.link.given_up or force
                return
            self._halted = True
            self.stream.abort(force)
            if isinstance(self.link, Stream):
                self.link.abort(force)
            elif close_link:
                self.link.wake()

    def _note(self, reason: str) -> None:
        """Remember why it failed.  The direction that is not concerned goes on to its own end, which will come."""
        with self._lock:
            if not self.reason and not self._over:
                self._broken_at = time.monotonic()
                self.reason = reason

    def lose(self, leg: Leg, now: float) -> None:
        """A leg's connection was seen to be reset, at this moment and maybe before; for one thread.

        A stream's peer that had ended its direction may merely have closed: see `_hear_out`.
        """
        if leg is self.stream and self._stream_has_ended() and isinstance(self.link, Link):
            self._lost_at = self._lost_at or now
            if now - self._lost_at < max(HEAR_OUT_TIME, 2 * round_trip(self.link.sock)):
                return
        self.break_off(f"{leg.name}: connection lost", close_link=leg is self.link)

    def check_time(self, now: float, idle_timeout: float, half_close_timeout: float, dead_path: float) -> None:
        """Break off what has carried no byte for too long, or is broken and does not leave; for one thread."""
        if self.reason:
            if now - self._broken_at > FLUSH_TIMEOUT:
                self.break_off(self.reason, force=True, close_link=True)
            return
        half_closed = self.to_link_ended != self.from_link_ended
        # In one number: millions of lists would have the collector of garbage look at all there is (measured:
        # 5,000 connections stood still for 100 ms every six seconds).
        state = (self.to_link + self.from_link) << 2 | self.to_link_ended << 1 | self.from_link_ended
        if idle_timeout or half_closed:
            # A slow reader takes bytes from the kernel's buffers long before a pump can add some.
            state = (state << 32 | unsent_bytes(self.stream.sock)) << 32 | unsent_bytes(self.link.sock)
        if state != self._seen:
            self._seen, self._quiet_since = state, now
        quiet = now - self._quiet_since
        if idle_timeout and quiet >= idle_timeout:
            self.break_off(f"idle for {idle_timeout:g} s", force=True)
        elif half_closed and half_close_timeout and quiet >= half_close_timeout:
            self.break_off(f"half closed and idle for {half_close_timeout:g} s", force=True)
        elif 0 < dead_path <= quiet and any(path_is_dead(leg.sock, dead_path) for leg in (self.stream, self.link)):
            # By RST: otherwise this kernel would go on sending, and its answers would keep the other side in the dark.
            carrier(self.link).reset_on_close()
            self.break_off("sent bytes are no longer acknowledged", force=True, close_link=True)

    def _converse(self) -> None:
        """The opening exchange: carry both directions in this thread, while the connection is young and small.

        Nothing here waits, except for the one ``poll``.  It is over when one direction has come to its plain end.
        What it leaves of the others, an error or what a socket did not take, their pumps find in the `Flow`.
        """
        flows = {flow.source.fd: flow for flow in (self._flow_from_link, self._flow_to_link)}
        poller = select.poll()
        for fd in flows:
            poller.register(fd, select.POLLIN)
        view, greeting = memoryview(bytearray(OPENING_BUFFER)), self._flow_to_link.out
        soon, until = time.monotonic() + GREETING_DELAY, time.monotonic() + OPENING_TIME
        ready = [fd for fd, flow in flows.items() if flow.source.holds_bytes()]
        try:
            while not (self.to_link_ended or self.from_link_ended):
                for fd in ready:
                    if not self._pass_on(flows[fd], view):
                        return
                now = time.monotonic()
                if now >= until or self._halted:
                    return
                ready = [fd for fd, _ in poller.poll(1000 * max(0.0, (soon if greeting else until) - now))]
                if greeting and self.stream.fd not in ready and time.monotonic() >= soon:
                    ready.append(self.stream.fd)
        except BaseException:
            self.break_off("unexpected error", force=True, close_link=True)
            raise

    def _pass_on(self, flow: Flow, view: memoryview) -> bool:
        """Pass on what is here in one direction, and its end; False where the rest is for a pump."""
        try:
            while flow.count < OPENING_BYTES and (count := flow.source.recv_now(view)) is not None:
                if self._halted:
                    return False
                if count == 0:
                    flow.ended = True
                    break
                flow.out += flow.sink.pack(view[:count])
                flow.count += count
                # A service's end often is right behind its bytes; END, sent with them, has come with them.
                if isinstance(flow.source, Link) and not flow.source.holds_bytes():
                    break
        except OSError as error:
            flow.error = LegError(flow.source, error)
        if flow.ended:
            with self._lock:
                if self.reason:
                    return False
                self.said_end = self.said_end or flow is self._flow_to_link
            flow.out += flow.sink.pack_end(self._passed())
        stream = carrier(flow.sink)
        try:
            if not stream.send_now(flow.out, end_follows=flow.ended and stream is flow.sink):
                return False
        except OSError as error:
            flow.out.clear()
            flow.error = LegError(flow.sink, error)
        if flow.error is not None:
            return False
        little = self._count(flow, flow.count) < OPENING_BYTES
        flow.count = 0
        if not flow.ended:
            return little
        try:
            if not flow.sink.end_now():
                return False
        except OSError as error:
            flow.error = error
            return False
        if flow is self._flow_to_link:
            self.to_link_ended = True
        else:
            self.from_link_ended = True
        return True

    def _count(self, flow: Flow, count: int) -> int:
        """Count bytes that were carried; returns how many it has been in this direction."""
        if flow is self._flow_to_link:
            self.to_link += count
            return self.to_link
        self.from_link += count
        return self.from_link

    def _carry_to_link(self, left: threading.Lock) -> None:
        try:
            try:
                self._pump(self._flow_to_link)
                with self._lock:
                    self.said_end = self.said_end or not self.reason
                if self.said_end:
                    self.link.end(self._passed())
            except OSError as error:
                # Where the stream failed, ABORT tells the other side, or on the raw wire an RST.  Where the link did,
                # it may be in the midst of a frame, which nothing can follow; the other pump still reads what it holds.
                stream_failed = isinstance(error, LegError) and error.leg is self.stream
                if stream_failed and isinstance(self.link, Stream):
                    self.break_off(say_error(error))
                else:
                    self._note(say_error(error))
                if not stream_failed and isinstance(self.link, Link):
                    self.link.wake()
            except BaseException:
                self.break_off("unexpected error", force=True, close_link=True)
                raise
            if self.reason and isinstance(self.link, Link):
                ignore_oserror(self.link.abort, self.reason)
        finally:
            self.to_link_ended = True
            left.release()

    def _carry_from_link(self) -> None:
        try:
            self._pump(self._flow_from_link)
            if not self.reason:
                self.stream.end()
        except LegError as error:
            if error.leg is self.link:
                # What ends the link's side ends the connection; an ABORT leaves the link itself whole.
                lost = not isinstance(error.cause, ConnectionAbortedError)
                self.break_off(say_error(error), close_link=lost)
            elif not self._hear_out(error.held):
                # The stream was reset: the other pump still reads what had come before the RST, then its error.
                self._note(say_error(error))
        except OSError as error:
            if not self._stream_has_ended():
                self._note(f"{self.stream.name}: {say_error(error)}")
        except BaseException:
            self.break_off("unexpected error", force=True, close_link=True)
            raise
        self.from_link_ended = True
        if self.reason and isinstance(self.link, Link):
            self._give_link_up(self.link)

    def _passed(self) -> int:
        """How many bytes for the stream will not hold up what comes next on the link: see `Leg.end`.

        With TLS none of them, before the end of that direction: ending it takes a message, which may have to wait.
        """
        return 0 if isinstance(self.stream, TLSStream) and not self.from_link_ended else self.from_link

    def _stream_has_ended(self) -> bool:
        """Whether the link was told that the stream has ended: what then takes no more has been closed by its peer."""
        with self._lock:
            return self.said_end

    def _hear_out(self, held: int) -> bool:
        """Whether the link's direction ends soon, where the stream's peer has closed and takes no more of it.

        Both peers have ended by themselves then, and both relays call the connection complete; `held` and what is
        dropped here count as carried, as they do at the other relay.
        """
        if not (self._stream_has_ended() and isinstance(self.link, Link)):
            return False
        try:
            patience = Deadline(max(HEAR_OUT_TIME, 2 * round_trip(self.link.sock)))
            self._count(self._flow_from_link, held + self.link.discard(patience))
        except OSError:
            return False
        return not self.reason

    def _give_link_up(self, link: Link) -> None:
        """After a broken connection: drop what still comes on the link, up to its end, or else have it closed."""
        if link.machine.has_ended(link.machine.peer):
            return  # whoever is behind the link has said all: it is whole, and maybe idle already
        try:
            if self._stream_has_ended():
                raise ConnectionResetError("after END only the link's own end says that something went wrong")
            link.discard(Deadline(FLUSH_TIMEOUT))
        except ConnectionAbortedError:
            pass  # the end that was waited for
        except OSError:
            link.wake()

    def _pump(self, flow: Flow) -> None:
        """Pass bytes on until the source ends or the connection is broken off.  Raises `LegError`."""
        self._finish_opening(flow)
        if not flow.ended:
            self._pump_all(flow)

    def _pump_all(self, flow: Flow) -> None:
        source, sink = flow.source, flow.sink
        size, small = SMALL_BUFFER, 0
        view = memoryview(bytearray(HEADER + size))
        data = view[HEADER:]
        while True:
            try:
                count = source.recv_into(data)
            except OSError as error:
                raise LegError(source, error) from error
            if count == 0 or self._halted:
                return
            try:
                sink.send_buffer(view, count)
            except OSError as error:
                raise LegError(sink, error, count) from error
            self._count(flow, count)
            small = small + 1 if count <= size // 8 else 0
            if count == size < LARGE_BUFFER:
                size *= 8
            elif size == LARGE_BUFFER and count >= BULK:
                if self._pump_bulk(flow):
                    return
                size, small = SMALL_BUFFER, 0
            elif size > SMALL_BUFFER and small >= SPARSE_READS:
                size, small = SMALL_BUFFER, 0
            else:
                continue
            view = memoryview(bytearray(HEADER + size))
            data = view[HEADER:]

    def _finish_opening(self, flow: Flow) -> None:
        """Send what the opening exchange could not, and raise the error that ended it."""
        try:
            try:
                carrier(flow.sink).send(flow.out)
            except OSError as error:
                raise LegError(flow.sink, error, flow.count) from error
            self._count(flow, flow.count)
            flow.out.clear()
            if flow.error is not None:
                raise flow.error
        finally:
            flow.error = None  # kept, its traceback would make a ring

    def _pump_bulk(self, flow: Flow) -> bool:
        """Pass bytes on while reads are large, on any processor; True at the source's end."""
        source, sink = flow.source, flow.sink
        queue = Queue(carrier(source).sock, carrier(sink).sock)
        roam()
        try:
            if source.spliceable and sink.spliceable and (pipe := _open_pipe()):
                return self._pump_in_kernel(flow, *pipe, queue)
            return self._pump_large(flow, queue)
        finally:
            queue.release()
            go_home()

    def _pump_large(self, flow: Flow, queue: Queue) -> bool:
        """The same through a large buffer; now and then False where a pipe would do, since there may be one again."""
        source, sink = flow.source, flow.sink
        view, small = memoryview(bytearray(HEADER + LARGE_TLS_BUFFER)), 0
        for _ in range(PIPE_AGAIN) if source.spliceable and sink.spliceable else itertools.count():
            if small == SPARSE_READS:
                return False
            try:
                count = source.recv_into(view[HEADER : HEADER + queue.bound])
            except OSError as error:
                raise LegError(source, error) from error
            if count == 0 or self._halted:
                return True
            try:
                sink.send_buffer(view, count)
            except OSError as error:
                raise LegError(sink, error, count) from error
            queue.sent(count)
            self._count(flow, count)
            small = small + 1 if count < BULK else 0
        return False

    def _pump_in_kernel(self, flow: Flow, reader: int, writer: int, queue: Queue) -> bool:
        """The same through a pipe, so that no byte comes into this process."""
        source, sink = flow.source, flow.sink
        small = 0
        try:
            while small < SMALL_READS:
                try:
                    ahead = source.bulk_ahead()
                    if not ahead:
                        return False
                    count = os.splice(source.fd, writer, min(ahead, queue.bound))
                    source.took_bulk(count)
                except OSError as error:
                    raise LegError(source, error) from error
                if self._halted:
                    return True
                if count == 0:
                    return False  # the end, or urgent data (splice stops there): `recv_into` can tell
                try:
                    sink.announce_bulk(count)
                    rest = count
                    while rest:
                        try:
                            rest -= os.splice(reader, sink.fd, rest)
                        except BlockingIOError:
                            sink.keep_trying()
                except OSError as error:
                    raise LegError(sink, error, count) from error
                queue.sent(count)
                self._count(flow, count)
                small = small + 1 if count < BULK else 0
            return False
        finally:
            os.close(reader)
            os.close(writer)


class Queue:
    """Bounds what waits for a sink: to about as much as passes in `HELD_TIME`.

    A relay would be a long queue otherwise: the system lets each of its sockets hold some megabytes, and the more,
    the more is taken from it at once (measured at 10 Mbit/s and 50 ms: 7.2 MB still came after a service client had
    said stop, 0.6 directly).  Whatever else that service client says waits behind them, and so does its end.

    What the system holds of a far source stays its affair, since such a path needs a large window.  So it is with a
    near one from when that turns out to be the slower side, or much passes: see `hold_little`.
    """

    HELD_TIME = 0.1
    """Seconds; how often the rate is looked at, too."""
    LEAST, MOST = UNSENT, PIPE_SIZE
    """Bytes: how little it bounds, since less would cost processor time, and where it bounds no longer."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self._source = source
        self._sink = sink
        self.bound = self.LEAST
        """Bytes: so many are taken from the source at once (and by TLS some more), and by the sink's socket before it
        has sent some.  It is one figure for both: a piece that is larger than what the socket takes would wait for
        0.2 s behind its own header, which is held back for it."""
        self._count, self._since = 0, time.monotonic()
        self._held = True
        """Nothing has told yet that the source needs a large window."""

    def sent(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if (past := now - self._since) < self.HELD_TIME and self._count < self.MOST:
            return
        bound = int(min(max(self.LEAST, self.HELD_TIME * self._count / max(past, 1e-6)), self.MOST))
        self._count, self._since = 0, now
        if bound == self.MOST != self.bound or not self.bound / 2 <= bound <= 2 * self.bound:
            self.bound = bound
            limit_unsent(self._sink, bound if bound < self.MOST else 0)
        if self._held and (bound == self.MOST or not waiting_bytes(self._sink)):
            self._held = False
            hold_much(self._source)

    def release(self) -> None:
        """Have the sink take as little as before."""
        if self.bound != self.LEAST:
            limit_unsent(self._sink)


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
