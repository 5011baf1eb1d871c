"""The watch over living connections: sweeps, draining, admission."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from .link import Link
from .splice import Splice
from .tcp import Probing
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


class Places:
    """A bounded number of places for what a role serves, each of which has a thread: on a relay server service clients,
    on a relay client links.  The end waits until all have left."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._condition = threading.Condition()  # over the next
        self._taken = 0

    def enter(self) -> bool:
        """Take a place, up to `leave`; False where all are taken."""
        with self._condition:
            if self._taken >= self.most:
                return False
            self._taken += 1
            return True

    def leave(self) -> None:
        with self._condition:
            self._taken -= 1
            self._condition.notify_all()

    def wait_until_empty(self, deadline: Deadline) -> None:
        """Wait until all have left, or for the deadline; `hurry` makes it look again."""
        with self._condition:
            while self._taken and deadline.remaining() != 0:
                self._condition.wait(deadline.remaining())

    def hurry(self) -> None:
        with self._condition:
            self._condition.notify_all()


class Splices:
    """The watch over the connections of one role."""

    def __init__(
        self, idle_timeout: float, half_close_timeout: float, dead_path: float = 0.0, probing: Probing | None = None
    ) -> None:
        """Times in seconds; 0 is never.  What a sweep finds is probed from then on: a short connection need not pay
        for that."""
        self._idle_timeout = idle_timeout
        self._half_close_timeout = half_close_timeout
        self._dead_path = dead_path
        self._probing = probing or Probing()
        self._condition = threading.Condition()  # over the next
        self._all: set[Splice] = set()

    def set_timeouts(self, idle_timeout: float, half_close_timeout: float) -> None:
        """Have these count from the next sweep on."""
        self._idle_timeout, self._half_close_timeout = idle_timeout, half_close_timeout

    def __len__(self) -> int:
        return len(self._all)

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

    def break_off_all(self, reason: str, deadline: Deadline) -> None:
        """Break off all connections and wait for their end, waking them again until it has come."""
        me = threading.get_ident()
        while (splices := self.snapshot()) and deadline.remaining() != 0:
            for splice in splices:
                splice.break_off(reason, hurry=True, close_link=True)
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
            if not splice.probed:
                splice.probed = True
                splice.stream.probe(self._probing)
            splice.check_time(now, self._idle_timeout, self._half_close_timeout, self._dead_path)
            poller.register(splice.stream.fd, 0)
            # A link that has ended after END is lost; on the raw wire that is what its end looks like.
            poller.register(splice.link.fd, splice.link.END_EVENTS if splice.from_link.done else 0)
            by_fd[splice.stream.fd] = by_fd[splice.link.fd] = splice
        for fd, events in poller.poll(0):
            if events & (select.POLLERR | Link.END_EVENTS):
                splice = by_fd[fd]
                if fd == splice.link.fd:
                    splice.lose_link()
                else:
                    splice.lose_stream(now)
