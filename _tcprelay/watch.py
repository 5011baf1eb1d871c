"""The watch over living connections: sweeps, draining, admission."""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .link import Link
from .carried import MOST_PARTIES, Carried, History, Party
from .splice import Splice
from .tally import OTHERS
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


class Pulse:
    """Whether the threads live that a role cannot do without: each says so again and again."""

    EVERY = 2.0
    """Seconds after which each looks at the time, whatever it waits for."""
    LATE = 10.0
    """Seconds of silence after which one counts as hanging."""

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}
        self._sign: Callable[[], object] = lambda: None
        self._sign_every = math.inf
        self._next_sign = math.inf

    def have_signed(self, sign: Callable[[], object], every: float) -> None:
        """Have the keeper call `sign` every so many seconds, while all threads live: to tell a service manager, or the
        parent of workers."""
        self._sign, self._sign_every, self._next_sign = sign, every, 0.0

    def beat(self, name: str) -> None:
        """A thread lives; called by itself, and before it starts."""
        self._beats[name] = time.monotonic()

    def keep(self, name: str) -> None:
        """The same for the thread that tells others, unless one of the threads hangs."""
        self.beat(name)
        if self._beats[name] >= self._next_sign and not self.complaints():
            self._next_sign = self._beats[name] + self._sign_every
            self._sign()

    def stop(self, name: str) -> None:
        """A thread has come to its end, as it should."""
        self._beats.pop(name, None)

    def complaints(self) -> list[str]:
        """Which threads hang: a sentence each."""
        now = time.monotonic()
        silent = [(name, now - at) for name, at in list(self._beats.items())]
        return [f"the {name} has not moved for {quiet:.0f} s" for name, quiet in silent if quiet > self.LATE]


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
    """The watch over the connections of one role, and the count of what they have carried."""

    def __init__(
        self, idle_timeout: float, half_close_timeout: float, dead_path: float = 0.0, probing: Probing | None = None
    ) -> None:
        """Times in seconds; 0 is never.  What a sweep finds is probed from then on: a short connection need not pay
        for that."""
        self._idle_timeout = idle_timeout
        self._half_close_timeout = half_close_timeout
        self._dead_path = dead_path
        self._probing = probing or Probing()
        self._condition = threading.Condition()  # over the next three
        self._all: set[Splice] = set()
        self._parties: set[Party] = set()
        self._over: dict[Party, Carried] = {}
        """What those have carried that are over."""
        self.history = History()
        """What was carried in the last minutes."""

    def set_timeouts(self, idle_timeout: float, half_close_timeout: float) -> None:
        """Have these count from the next sweep on."""
        self._idle_timeout, self._half_close_timeout = idle_timeout, half_close_timeout

    def __len__(self) -> int:
        return len(self._all)

    def add(self, splice: Splice) -> None:
        """Watch a connection from now on, and count it for its service and relay client as long as there are not too
        many of these; the pair is chosen once, so that no count becomes less."""
        with self._condition:
            party = splice.service, splice.name
            if party not in self._parties and len(self._parties) >= MOST_PARTIES:
                full = (splice.service, OTHERS) not in self._parties and len(self._parties) >= 2 * MOST_PARTIES
                party = (OTHERS if full else splice.service), OTHERS
            self._parties.add(party)
            splice.party = party
            self._all.add(splice)

    def remove(self, splice: Splice) -> None:
        """A connection is over; from here on it counts among those that were."""
        with self._condition:
            self._all.discard(splice)
            over = self._over.setdefault(splice.party, Carried())
            over.add(splice)
            over.broken += bool(splice.reason)
            self._condition.notify_all()

    def carried(self) -> dict[Party, Carried]:
        """What all have carried so far, those that are open included; it never becomes less.

        Each is counted once: under the lock it is open or over, and what an open one carries only grows.
        """
        with self._condition:
            carried = {
                party: Carried(over.opened, over.broken, over.to_link, over.from_link)
                for party, over in self._over.items()
            }
            living = list(self._all)
        for batch in in_batches(living):
            for splice in batch:
                found = carried.get(splice.party)
                if found is None:
                    found = carried[splice.party] = Carried()
                found.add(splice)
                found.open += 1
        return carried

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
        self.history.look(self.carried)

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
