"""The watch over living connections: sweeps, draining, admission."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .link import Link
from .splice import Splice
from .waiting import Deadline

BATCH = 256
"""Connections or links that are looked at without a pause, for about a millisecond."""


def in_batches(items: list[ItemT]) -> Iterator[list[ItemT]]:
    """Cut a long list into pieces, with a pause between them: threads that have bytes to carry wait for the
    interpreter lock."""
    for first in range(0, len(items), BATCH):
        if first:
            time.sleep(0.0001)
        yield items[first : first + BATCH]


ItemT = TypeVar("ItemT")


class Splices:
    """The connections of one role: how many there may be, and the watch over them."""

    def __init__(self, most: int, idle_timeout: float, half_close_timeout: float, dead_path: float = 0.0) -> None:
        """Times in seconds; 0 is never."""
        self.most = most
        self._idle_timeout = idle_timeout
        self._half_close_timeout = half_close_timeout
        self._dead_path = dead_path
        self._condition = threading.Condition()  # over the two below
        self._admitted = 0
        self._all: set[Splice] = set()
        self.show: Callable[[int], object] = lambda count: None
        """Called with the number of those that are admitted, whenever it changes, under the lock."""

    def __len__(self) -> int:
        return len(self._all)

    def admit(self) -> bool:
        """Count in what has or may get a connection: on the server a service client, on the client a link.

        False where there are as many as there may be.  Each one counted in calls `leave`.
        """
        with self._condition:
            if self._admitted >= self.most:
                return False
            self._admitted += 1
            self.show(self._admitted)
            return True

    def leave(self) -> None:
        with self._condition:
            self._admitted -= 1
            self.show(self._admitted)
            self._condition.notify_all()

    def add(self, splice: Splice) -> None:
        """Watch a connection from now on."""
        with self._condition:
            self._all.add(splice)

    def remove(self, splice: Splice) -> None:
        with self._condition:
            self._all.discard(splice)
            self._condition.notify_all()

    def snapshot(self) -> list[Splice]:
        with self._condition:
            return list(self._all)

    def drain(self, deadline: Deadline) -> None:
        """Wait until all that was admitted has left, or for the deadline; `hurry` makes it look again."""
        with self._condition:
            while self._admitted and deadline.remaining() != 0:
                self._condition.wait(deadline.remaining())

    def hurry(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def break_off_all(self, reason: str, deadline: Deadline) -> None:
        """Break off all connections and wait for their end, waking them again until it has come."""
        me = threading.get_ident()
        while (splices := self.snapshot()) and deadline.remaining() != 0:
            for splice in splices:
                splice.break_off(reason, force=True, close_link=True)
            with self._condition:
                if all(splice.thread == me for splice in self._all):
                    return
                self._condition.wait(0.05)

    @property
    def interval(self) -> float:
        """Seconds between two sweeps, short enough for the shortest time-out."""
        timeouts = [t for t in (self._idle_timeout, self._half_close_timeout) if t > 0]
        return min([1.0] + [t / 4 for t in timeouts])

    def sweep(self) -> None:
        """Break off what has been idle or half closed for too long, and what is dead without a pump noticing.

        A pump that is blocked in a send does not see that the connection it reads from was reset, and one
        that has done its direction no longer sees that the link is lost: so look at all of them in one poll.
        """
        for batch in in_batches(self.snapshot()):
            self._sweep(batch)

    def _sweep(self, splices: list[Splice]) -> None:
        now = time.monotonic()
        poller = select.poll()
        by_fd: dict[int, Splice] = {}
        for splice in splices:
            splice.check_time(now, self._idle_timeout, self._half_close_timeout, self._dead_path)
            # A link that has ended after END is lost; on the raw wire that is what its end looks like.
            watched = _RDHUP if splice.from_link_ended and isinstance(splice.link, Link) else 0
            poller.register(splice.stream.fd, 0)
            poller.register(splice.link.fd, watched)
            by_fd[splice.stream.fd] = by_fd[splice.link.fd] = splice
        for fd, events in poller.poll(0):
            if events & (select.POLLERR | _RDHUP):
                splice = by_fd[fd]
                splice.lose(splice.link if fd == splice.link.fd else splice.stream, now)


_RDHUP: int = getattr(select, "POLLRDHUP", 0)
