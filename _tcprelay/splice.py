"""A stream and a link that carry one connection, from its first bytes to its end.

    Splice.run: _converse          one thread carries both directions, while the connection is young and small
                _carry_to_link     then two, if there is more to carry: a pump for each direction (see `Flow.pump`)
                _carry_from_link

Each direction ends by itself.  Where one breaks, the other is woken, what was read before is still sent, and neither
peer sees a clean end: the stream gets an RST, the link an ABORT or its own end.
"""

from __future__ import annotations

import select
import threading
import time

from .link import AnyLink
from .pace import Pace
from .pump import Flow, SinkError, SourceError
from .streams import FLUSH_TIMEOUT, Stream
from .system import ignore_oserror
from .tcp import path_is_dead, unsent_bytes
from .threads import Threads
from .waiting import Deadline

OPENING_TIME = 0.25
"""Seconds for which one thread carries both directions of a connection: a round trip or two, also through the
internet and under load (measured: 64 connections at a time, 1,680 a second, and with 20 ms 1,180)."""
OPENING_BUFFER = 4096
"""Bytes that it takes at once; four times as many cost each of 2,000 held connections 3 KiB afterwards (measured)."""
GREETING_DELAY = 0.002
"""Seconds for which a relay client's READY waits for the service's first bytes, to go with them in one message.
Where the service speaks TLS it does not wait: whether there are bytes is known only after the first look."""


class Splice:
    """A stream and a link that carry one connection, and the record that its threads share."""

    def __init__(
        self, id: str, service: str, stream: Stream, link: AnyLink, first: bytes = b"", peer: str = "", name: str = ""
    ) -> None:
        """Between this service client and, on a relay server, the relay client of that name.  What is `first`, a relay
        client's READY, goes to the link before all else, with the stream's first bytes or soon."""
        self.id = id
        self.service = service
        self.peer = peer
        self.name = name
        self.party = service, name
        """Under what it is counted: see `Splices`."""
        self.stream = stream
        self.link = link
        self.to_link = Flow(stream, link.sink, first)
        self.from_link = Flow(link.source, stream)
        self.opened = time.monotonic()
        self.thread = threading.get_ident()
        self._lock = threading.Lock()  # over the four that follow
        self.reason = ""
        """Why it was broken off; empty while all is well."""
        self.said_end = False
        """The link was told that the stream has ended, and is complete."""
        self._broken_at = 0.0
        self._over = False
        """No other thread uses the two any more."""
        self.probed = False
        """The system asks whether the stream's peer is still there: see `Splices`."""
        # For the sweep alone: what was carried when it last looked, since when; and when it saw the stream lost.
        self._lost_at = 0.0
        self._seen = 0
        self._quiet_since = self.opened

    def limit_rate(self, rate: int) -> None:
        """Let each direction carry no more than so many bytes a second; before `run`."""
        self.to_link.pace, self.from_link.pace = Pace(rate), Pace(rate)

    def run(self, threads: Threads) -> None:
        """Carry the connection until both directions have ended; then no other thread uses stream and link.

        The caller owns both.  Afterwards a link that is not idle is of no further use.
        """
        self._converse()
        left = threading.Lock()
        left.acquire()
        if self.to_link.done:
            left.release()
        elif self.from_link.done:
            self._carry_to_link(left)
        else:
            try:
                threads.start(self._carry_to_link, left)
            except RuntimeError as error:
                self.break_off(str(error), close_link=True)
                return
        try:
            if not self.from_link.done:
                self._carry_from_link()
        finally:
            left.acquire()
            with self._lock:
                self._over = True
        self.stream.conclude(whole=not self.reason)
        self.link.conclude(not self.reason, self.to_link.carried, self.from_link.was_ahead)

    # From any thread

    def break_off(self, reason: str, hurry: bool = False, close_link: bool = False) -> None:
        """End both directions with an error; any thread, any number of times, the first reason counts.

        Bytes that were read before still go out, for `FLUSH_TIMEOUT` at most; with `hurry` they do not.
        The pumps tell the other side by ABORT, and the link lives on, unless it is to be closed.
        """
        self._note(reason)
        with self._lock:
            # They are woken under the lock (that never blocks): when the connection is over, the link may be carrying
            # another one.
            if not self._over:
                self.to_link.halted = self.from_link.halted = True
                self.stream.abort(hurry)
                self.link.break_off(hurry, close_link)
            elif hurry:  # what was sent is still being waited for
                self.stream.hurry()
                self.link.hurry()

    def lose_stream(self, now: float) -> None:
        """The stream was seen to be reset, at this moment and maybe before; for one thread.

        A peer that had ended its direction may merely have closed: see `_hear_out`.
        """
        if self._stream_has_ended():
            self._lost_at = self._lost_at or now
            if now - self._lost_at < self.link.hear_out_time():
                return
        self.break_off(f"{self.stream.name}: connection lost")

    def lose_link(self) -> None:
        """The link was seen to be lost."""
        self.break_off(f"{self.link.name}: connection lost", close_link=True)

    def check_time(self, now: float, idle_timeout: float, half_close_timeout: float, dead_path: float) -> None:
        """Break off what has carried no byte for too long, or is broken and does not leave; for one thread."""
        if self.reason:
            if now - self._broken_at > FLUSH_TIMEOUT:
                self.break_off(self.reason, hurry=True, close_link=True)
            return
        there, back = self.to_link, self.from_link
        half_closed = there.done != back.done
        # In one number: millions of lists would have the collector of garbage look at all there is (measured:
        # 5,000 connections stood still for 100 ms every six seconds).
        state = (there.carried + back.carried) << 2 | there.done << 1 | back.done
        if idle_timeout or half_closed:
            # A slow reader takes bytes from the kernel's buffers long before a pump can add some.
            state = (state << 32 | unsent_bytes(self.stream.sock)) << 32 | unsent_bytes(self.link.sock)
        if state != self._seen or any(flow.pace is not None and flow.pace.resting for flow in (there, back)):
            self._seen, self._quiet_since = state, now
        quiet = now - self._quiet_since
        if idle_timeout and quiet >= idle_timeout:
            self.break_off(f"idle for {idle_timeout:g} s", hurry=True)
        elif half_closed and half_close_timeout and quiet >= half_close_timeout:
            self.break_off(f"half closed and idle for {half_close_timeout:g} s", hurry=True)
        elif 0 < dead_path <= quiet and any(path_is_dead(end.sock, dead_path) for end in (self.stream, self.link)):
            # By RST: otherwise this kernel would go on sending, and its answers would keep the other side in the dark.
            self.link.stream.reset_on_close()
            self.break_off("sent bytes are no longer acknowledged", hurry=True, close_link=True)

    def _note(self, reason: str) -> None:
        """Remember why it failed.  The direction that is not concerned goes on to its own end, which will come."""
        with self._lock:
            if not self.reason and not self._over:
                self._broken_at = time.monotonic()
                self.reason = reason

    # The opening exchange

    def _converse(self) -> None:
        """Carry both directions in this thread, while the connection is young and small.

        Nothing here waits, except for the one ``poll``.  It is over when one direction has come to its plain end.
        What it leaves of the others, an error or what a socket did not take, their pumps find in the `Flow`.
        """
        flows = {flow.source.fd: flow for flow in (self.from_link, self.to_link)}
        poller = select.poll()
        for fd in flows:
            poller.register(fd, select.POLLIN)
        view, first = memoryview(bytearray(OPENING_BUFFER)), self.to_link.out
        soon, until = time.monotonic() + GREETING_DELAY, time.monotonic() + OPENING_TIME
        ready = [fd for fd, flow in flows.items() if flow.source.holds_bytes()]
        try:
            while not (self.to_link.done or self.from_link.done):
                for fd in ready:
                    if not self._pass_on(flows[fd], view):
                        return
                now = time.monotonic()
                if now >= until or self.to_link.halted:
                    return
                ready = [fd for fd, _ in poller.poll(1000 * max(0.0, (soon if first else until) - now))]
                if first and self.stream.fd not in ready and time.monotonic() >= soon:
                    ready.append(self.stream.fd)
        except BaseException:
            self.break_off("unexpected error", hurry=True, close_link=True)
            raise

    def _pass_on(self, flow: Flow, view: memoryview) -> bool:
        """Pass on what is here in one direction, and its end; False where the rest is for a pump."""
        flow.take(view)
        if flow.halted:
            return False
        if flow.ended:
            with self._lock:
                if self.reason:
                    return False
                self.said_end = self.said_end or flow is self.to_link
            flow.out += flow.sink.pack_end(self._passed())
        return flow.give()

    # The pumps

    def _carry_to_link(self, left: threading.Lock) -> None:
        """The direction to the link, up to its end; releases `left` when this thread uses nothing any more."""
        try:
            if self._fill_link() and self.reason:
                ignore_oserror(self.link.abort, self.reason)
        except BaseException:
            self.break_off("unexpected error", hurry=True, close_link=True)
            raise
        finally:
            self.to_link.done = True
            left.release()

    def _fill_link(self) -> bool:
        """Carry what comes from the stream; False where the link takes nothing more."""
        try:
            self.to_link.pump()
            with self._lock:
                self.said_end = self.said_end or not self.reason
            if self.said_end:
                self.to_link.end(self._passed())
        except SourceError as error:
            if self.link.speaks:
                self._note(str(error))
            else:  # nothing tells the other side but an RST of the link
                self.break_off(str(error))
        except SinkError as error:
            self._note(str(error))
            self.link.lose()  # the other pump still reads what it holds
            return False
        return True

    def _carry_from_link(self) -> None:
        """The direction from the link, up to its end."""
        flow, ending = self.from_link, False
        try:
            flow.pump()
            ending = True
            if not self.reason:
                flow.end(0)
        except SourceError as error:
            # What ends the link's side ends the connection; an ABORT leaves the link itself whole.
            self.break_off(str(error), close_link=not isinstance(error.cause, ConnectionAbortedError))
        except SinkError as error:
            # The stream was reset.  If it has not ended by itself, the other pump still reads what came before the RST.
            if not (self._stream_has_ended() if ending else self._hear_out(error.held)):
                self._note(str(error))
        except BaseException:
            self.break_off("unexpected error", hurry=True, close_link=True)
            raise
        flow.done = True
        if self.reason:
            self._clear_link()

    def _passed(self) -> int:
        """How many bytes for the stream will not hold up what comes next on the link: see `Sink.pack_end`.

        With TLS none of them, before the end of that direction: ending it takes a message, which may have to wait.
        """
        return self.from_link.carried if self.from_link.done or not self.stream.secure else 0

    def _stream_has_ended(self) -> bool:
        """Whether the link was told that the stream has ended: what then takes no more has been closed by its peer."""
        with self._lock:
            return self.said_end

    def _hear_out(self, held: int) -> bool:
        """Whether the link's direction ends soon, where the stream's peer has closed and takes no more of it.

        Both peers have ended by themselves then, and both relays call the connection complete; `held` and what is
        dropped here count as carried, as they do at the other relay.
        """
        if not self._stream_has_ended():
            return False
        try:
            self.from_link.carried += held + self.link.discard(Deadline(self.link.hear_out_time()))
        except OSError:
            return False
        return not self.reason

    def _clear_link(self) -> None:
        """After a broken connection: drop what still comes on the link, up to its end, or else have it closed."""
        if self.link.peer_has_ended:
            return  # the other relay has said all: it is whole, and maybe idle already
        try:
            if not self._stream_has_ended():  # after that only the link's own end says that something went wrong
                self.link.discard(Deadline(FLUSH_TIMEOUT))
                return
        except ConnectionAbortedError:
            return  # the end that was waited for
        except OSError:
            pass
        self.link.wake()
