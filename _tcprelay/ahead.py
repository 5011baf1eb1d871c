"""How much of a bulk stream a relay takes ahead of a slow sink.

A relay would be a long queue otherwise: the system lets each of its sockets hold some megabytes, and the more, the more
is taken from it at once (measured at 10 Mbit/s and 50 ms: 7.2 MB still came after a service client had said stop, 0.6
directly).  Whatever else that service client says waits behind them, and so does its end.

    source's window     a far source's is the system's affair; a near one's is little, until it proves to be the slower
    what is read        what passes in `Queue.HELD_TIME`
    sink's socket       as much, beyond what is on the way
"""

from __future__ import annotations

import socket
import time

from .streams import PIPE_SIZE
from .tcp import UNSENT, hold_much, limit_unsent, unread_bytes


class Queue:
    """Bounds what waits for a sink: to about as much as passes in `HELD_TIME`.

    What the system holds of a far source stays its affair, since such a path needs a large window.  To offer less of it
    while the sink is the slower side helps, and costs more where that changes (measured over 40 ms and 100 Mbit/s:
    behind a second of slow reading the next 25 MB took 3.2 to 4.5 s instead of 2.1 to 2.6; directly 2.9).  A link whose
    window has grown over that is given up behind its connection: see `Link.conclude`.

    A near source needs no large window for what it can give, and is held to a small one from the beginning, until it
    turns out to be the slower side, or much passes: see `hold_little`.
    """

    HELD_TIME = 0.1
    """Seconds; how often the rate is looked at, too."""
    LEAST, MOST = UNSENT, PIPE_SIZE
    """Bytes: how little it bounds, since less would cost processor time, and where it bounds no longer."""
    AHEAD = 2
    """So many times more has waited of the source than is taken at once, where it is ahead.  What waits in the sink's
    own socket does not tell: its peer may take large pieces."""

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
        self._ahead = 0
        """How many times more has waited of it than is taken at once."""

    def sent(self, count: int) -> None:
        """So many bytes have been taken by the sink."""
        self._count += count
        now = time.monotonic()
        if (past := now - self._since) < self.HELD_TIME and self._count < self.MOST:
            return
        rate = self._count / max(past, 1e-6)
        bound = int(min(max(self.LEAST, self.HELD_TIME * rate), self.MOST))
        self._count, self._since = 0, now
        if bound == self.MOST != self.bound or not self.bound / 2 <= bound <= 2 * self.bound:
            self.bound = bound
            limit_unsent(self._sink, bound if bound < self.MOST else 0)
        there = unread_bytes(self._source)
        self._ahead += self.MOST > bound <= there
        if self._held and (bound == self.MOST or not there):
            self._held = False
            hold_much(self._source)

    @property
    def is_ahead(self) -> bool:
        """Whether the source has been ahead of the sink."""
        return self._ahead >= self.AHEAD

    def release(self) -> None:
        """Have the sink take as little as before."""
        if self.bound != self.LEAST:
            limit_unsent(self._sink)
