"""The account between a relay server's workers and their parent: what was handed over, and what became of it.

It is in memory that the processes share, so that no message is needed for it.  Each figure has one writer, and only
grows, but for those of how many are idle or wait now:

                    written by
    HANDED          parent      what the worker has been sent
    RETURNED        parent      of that: what it has sent back, and the parent has received
    SETTLED         worker      of that: what has found a link, or none, and needs no other any more
    LEFT            worker      of that: what is gone, and was not sent back
    IDLE, WAITING   worker      how many links are idle, and how many service clients wait for one, now
    MEMBERS         worker      how many links there are, idle or not, now

The first four are of service clients, for each service, and of links, under "" (a link is settled when its handshake is
over).  So HANDED - SETTLED are on their way to a link, and HANDED - RETURNED - LEFT are there.  It is true at each
moment, in this order: a connection is counted before it is handed over; a link that is taken is shown to be gone
before its service client is shown to be settled.  What is read in the opposite order is never more than there is.

A worker that has died is struck out, with all that it had.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from .limits import Shares

HANDED, RETURNED, SETTLED, LEFT, IDLE, WAITING, MEMBERS = FIGURES = range(7)
LINKS = ""
"""What stands for links among the names of services."""


class Account:
    """The whole account, as the parent has it.  Made before the first worker is forked."""

    def __init__(self, workers: int, services: Sequence[str], more: int = 0) -> None:
        """For these services, and for so many more that come and go."""
        self.workers = workers
        self._kinds = {name: number for number, name in enumerate([*services, LINKS])}
        self._free = deque(range(len(self._kinds), len(self._kinds) + more))
        """The numbers of those to come; one that is given back is used last."""
        kinds = len(self._kinds) + more
        self._row = len(FIGURES) * kinds
        size = workers * self._row + kinds
        self._numbers = memoryview(mmap.mmap(-1, 8 * size)).cast("q")
        self._held: list[Counter[tuple[Shares, Any]]] = [Counter() for _ in range(workers)]
        """What each worker has of the addresses' shares."""
        self.withdrawn: dict[str, str] = {}
        """Of services that a relay client has withdrawn: why all have, or "" where not all have.  Workers that are
        there already hear of it by a message."""

    def open(self, kind: str, number: int | None = None) -> int:
        """Have a row for a service that there was not before, in a worker that of this number; returns the number."""
        if number is not None:
            self._kinds[kind] = number
        elif kind not in self._kinds:
            self._kinds[kind] = self._free.popleft()
        return self._kinds[kind]

    def close(self, kind: str) -> None:
        """Give it back.  What was counted there comes to nothing by itself: see the table."""
        if (number := self._kinds.pop(kind, None)) is not None:
            self._free.append(number)

    def knows(self, kind: str) -> bool:
        """Whether there is a row for it: a service client may be there longer than its service."""
        return kind in self._kinds

    def has_members(self, kind: str) -> bool:
        """Whether any worker has links of a service."""
        return any(self.read(worker, kind, MEMBERS) > 0 for worker in range(self.workers))

    def place(self, worker: int, kind: str, figure: int) -> int:
        """Where a figure stands; those of how many wait in the parent stand behind all workers'."""
        return worker * self._row + len(FIGURES) * self._kinds[kind] + figure

    def read(self, worker: int, kind: str, figure: int) -> int:
        return self._numbers[self.place(worker, kind, figure)]

    def add(self, worker: int, kind: str, figure: int, more: int = 1) -> None:
        self._numbers[self.place(worker, kind, figure)] += more

    def write(self, worker: int, kind: str, figure: int, number: int) -> None:
        self._numbers[self.place(worker, kind, figure)] = number

    def show_queue(self, service: str, length: int) -> None:
        """So many service clients wait in the parent."""
        self._numbers[self.workers * self._row + self._kinds[service]] = length

    def count_waiting(self, service: str, without: int = -1) -> int:
        """How many service clients wait, in the parent and in all workers, `without` one of these."""
        workers = [worker for worker in range(self.workers) if worker != without]
        queue = self._numbers[self.workers * self._row + self._kinds[service]]
        return queue + sum(self.read(worker, service, WAITING) for worker in workers)

    def under_way(self, worker: int, kind: str) -> int:
        """How many a worker was sent that are not settled."""
        settled = self.read(worker, kind, SETTLED)
        return self.read(worker, kind, HANDED) - settled

    def idle(self, worker: int, service: str) -> int:
        """How many links are idle in a worker beyond those for the service clients that are on their way to them."""
        under_way = self.under_way(worker, service)
        return self.read(worker, service, IDLE) - under_way

    def present(self, worker: int, kind: str) -> int:
        """How many there are in a worker, or on their way to it or back."""
        gone = self.read(worker, kind, LEFT) + self.read(worker, kind, RETURNED)
        return self.read(worker, kind, HANDED) - gone

    def clients(self, worker: int) -> int:
        """How many service clients there are in a worker."""
        return sum(self.present(worker, kind) for kind in list(self._kinds) if kind != LINKS)

    def hold(self, worker: int, share: Shares, address: Any, more: int) -> None:
        """So much more of an address's share is in a worker."""
        if share.counts:
            held = self._held[worker]
            held[share, address] += more
            if held[share, address] <= 0:
                del held[share, address]

    def strike(self, worker: int) -> None:
        """A worker has died, and its connections with it."""
        for share, address in self._held[worker].elements():
            share.leave(address)
        self._held[worker].clear()
        for place in range(worker * self._row, (worker + 1) * self._row):
            self._numbers[place] = 0


class WorkerAccount:
    """One worker's part of the account, as that worker writes it; any thread."""

    def __init__(self, account: Account, number: int) -> None:
        self._account = account
        self.number = number
        self._lock = threading.Lock()  # over what is added to
        self.workers = account.workers
        self.open, self.close = account.open, account.close
        self.withdrawn = account.withdrawn

    def settle(self, kind: str) -> None:
        """A service client, or a link, needs no link any more."""
        with self._lock:
            if self._account.knows(kind):
                self._account.add(self.number, kind, SETTLED)

    def leave(self, kind: str) -> None:
        """It is gone."""
        with self._lock:
            if self._account.knows(kind):
                self._account.add(self.number, kind, LEFT)

    def show(self, service: str, idle: int, waiting: int) -> None:
        """So many links are idle, and service clients wait, here and now; under the pool's lock."""
        if self._account.knows(service):
            self._account.write(self.number, service, IDLE, idle)
            self._account.write(self.number, service, WAITING, waiting)

    def show_members(self, service: str, count: int) -> None:
        """So many links there are here and now; likewise."""
        if self._account.knows(service):
            self._account.write(self.number, service, MEMBERS, count)

    def count_waiting_elsewhere(self, service: str) -> int:
        return self._account.count_waiting(service, without=self.number) if self._account.knows(service) else 0
