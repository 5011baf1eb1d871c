"""What one address may take, and how many handshakes may be under way."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ..addresses import Network, address_group, is_among
from ..streams import Stream
from ..system import hashlib, random_fraction

LEAST_HANDSHAKES, MOST_HANDSHAKES = 256, 2048
"""Handshakes under way at once, on the relay port and (with TLS) on the service ports each: a quarter of the
connections that there may be, within these bounds.  A silent one costs a thread and 16 KiB, with TLS 60 (measured):
where the limit on open files is high, a flood must not take all the memory of a small machine."""
TOO_MANY_HANDSHAKES = "too many handshakes at once"


def most_handshakes(connections: int) -> int:
    """How many may be under way where there may be so many connections."""
    return min(MOST_HANDSHAKES, max(LEAST_HANDSHAKES, connections // 4))


def bounds_of_handshakes(connections: int, processes: int) -> tuple[int, int]:
    """How many one of so many processes may have: of links, and of service clients, for whom half of the connections
    are there when they have shaken hands."""
    links = max(16, most_handshakes(connections) // processes)
    return links, min(links, max(1, connections // 2 // processes))


class Shares:
    """How many connections each address has (see `addresses.address_group`), up to `most`; 0 is no limit, and nothing
    is counted.  Nor are proxies', in these networks: they have the connections of many.  Where the first limit is
    set while there are connections, those count for nothing, and each that leaves makes room for another one."""

    def __init__(self, most: int, proxies: Sequence[Network] = ()) -> None:
        self.most = most
        self.proxies = proxies
        self.counts = bool(most)
        """They are counted: from the first limit on, also where there is none any more."""
        self._lock = threading.Lock()  # over what follows
        self._counts: dict[str, int] = {}

    def set(self, most: int, proxies: Sequence[Network]) -> None:
        """Have these count from now on."""
        self.most, self.proxies = most, proxies
        self.counts = self.counts or bool(most)

    def enter(self, address: Any) -> bool:
        """Count one in; False where the address has as many as it may have.  Each one counted in calls `leave`."""
        if not self.counts or is_among(address, self.proxies):
            return True
        group = address_group(address)
        with self._lock:
            count = self._counts.get(group, 0)
            if 0 < self.most <= count:
                return False
            self._counts[group] = count + 1
            return True

    def leave(self, address: Any) -> None:
        if not self.counts:
            return
        group = address_group(address)
        with self._lock:
            count = self._counts.pop(group, 0) - 1
            if count > 0:
                self._counts[group] = count


Ball = TypeVar("Ball")


class Quotas:
    """How many of something each name has, in all worker processes together.

    Each process writes a table of its own in memory that they share, and adds up all of them: where two come to the
    last place at the same moment, both may be refused.

    Parameters: the processes.  Made before they are forked.
    """

    ROWS = 1 << 13
    """So many names each process can have counted, those that were taken out of a configuration included."""

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._table = memoryview(mmap.mmap(-1, 16 * processes * self.ROWS)).cast("q")  # untouched it takes no memory
        self._lock = threading.Lock()  # over this process's table
        self.process = 0
        """Which of the processes this is."""

    def enter(self, name: str, most: int) -> bool:
        """Count one in; False where there are `most` already (0 is no limit).  Each one counted in calls `leave`."""
        with self._lock:
            place = self._place(self.process, name)
            if self._table[place] == 0:
                self._table[place + 1], self._table[place] = 0, key_of(name)
            self._table[place + 1] += 1
            if not most or self.count(name) <= most:
                return True
            self._table[place + 1] -= 1
            return False

    def leave(self, name: str) -> None:
        with self._lock:
            self._table[self._place(self.process, name) + 1] -= 1

    def count(self, name: str) -> int:
        """How many it has."""
        return sum(self._table[self._place(process, name) + 1] for process in range(self._processes))

    def strike(self, process: int) -> None:
        """A process has died, and what it had with it."""
        for place in range(2 * process * self.ROWS, 2 * (process + 1) * self.ROWS):
            if self._table[place]:
                self._table[place] = 0

    def _place(self, process: int, name: str) -> int:
        """Where the row of a name is in a process's table, or would be: its key, and behind it the count."""
        key, base = key_of(name), process * self.ROWS
        for step in range(self.ROWS):
            place = 2 * (base + (key + step) % self.ROWS)
            if self._table[place] in (0, key):
                return place
        raise RuntimeError("more names were counted than there are rows for")


def key_of(name: str) -> int:
    """A number for a name that no other is likely to have; never 0."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8], "big", signed=True) or 1


class Handshakes:
    """Handshakes under way: a bounded number.

    Beyond it one gives way, and chance decides which, among those of the address that has the most, or of all that
    have as many.  So a flood hits itself; and of a storm of honest ones, each from an address of its own, some are lost
    and the others get through: the oldest is the one nearest to done.

    Parameters: how many; and what gives random numbers from 0 to 1.
    """

    def __init__(self, most: int, fraction: Callable[[], float] = random_fraction) -> None:
        self._most = most
        self._fraction = fraction
        self._lock = threading.Lock()  # over what follows
        self._count = 0
        self._streams: dict[str, Urn[Stream]] = {}  # by address
        self._addresses: dict[int, Urn[str]] = {}  # by how many they have
        self._evicted: set[Stream] = set()

    def enter(self, stream: Stream) -> None:
        """Count one in; another may have to give way: it is woken.  Each one calls `leave`, once at least."""
        with self._lock:
            self._add(stream)
            if self._count > self._most:
                greediest = self._addresses[max(self._addresses)].draw(self._fraction())
                unlucky = self._streams[greediest].draw(self._fraction())
                self._remove(unlucky)
                self._evicted.add(unlucky)
                unlucky.wake()  # under the lock, which never blocks: once it has left, it is closed

    def leave(self, stream: Stream) -> bool:
        """Count one out, if it has not left; False where it had given way: then it must not go on."""
        with self._lock:
            if stream in self._evicted:
                self._evicted.discard(stream)
                return False
            if stream in self._streams.get(address_group(stream.peer), ()):
                self._remove(stream)
            return True

    def was_evicted(self, stream: Stream) -> bool:
        with self._lock:
            return stream in self._evicted

    def _add(self, stream: Stream) -> None:
        address = address_group(stream.peer)
        streams = self._streams.setdefault(address, Urn())
        streams.add(stream)
        self._count += 1
        self._move(address, len(streams) - 1, len(streams))

    def _remove(self, stream: Stream) -> None:
        address = address_group(stream.peer)
        streams = self._streams[address]
        streams.remove(stream)
        self._count -= 1
        self._move(address, len(streams) + 1, len(streams))
        if not streams:
            del self._streams[address]

    def _move(self, address: str, before: int, now: int) -> None:
        """An address that had so many has so many now."""
        if before:
            self._addresses[before].remove(address)
            if not self._addresses[before]:
                del self._addresses[before]
        if now:
            self._addresses.setdefault(now, Urn()).add(address)


class Urn(Generic[Ball]):
    """What can be drawn from by chance: adding, removing and drawing take the same time however full it is."""

    def __init__(self) -> None:
        self._balls: list[Ball] = []
        self._places: dict[Ball, int] = {}

    def __len__(self) -> int:
        return len(self._balls)

    def __contains__(self, ball: object) -> bool:
        return ball in self._places

    def add(self, ball: Ball) -> None:
        self._places[ball] = len(self._balls)
        self._balls.append(ball)

    def remove(self, ball: Ball) -> None:
        """Take one out; the last one takes its place."""
        place, last = self._places.pop(ball), self._balls.pop()
        if place < len(self._balls):
            self._balls[place] = last
            self._places[last] = place

    def draw(self, fraction: float) -> Ball:
        """The one at that part of the whole, from 0 to 1."""
        return self._balls[min(int(fraction * len(self._balls)), len(self._balls) - 1)]
