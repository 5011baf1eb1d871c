"""What workers and their parent show each other."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence


class WorkerGauges:
    """What workers and their parent show each other in shared memory; each number has one writer.

    A worker shows how many links are idle, how many service clients wait, how many of those that the parent has sent
    are settled (they have a link, or are gone), for each service; how many links have arrived, how many service
    clients have left, and how many connections there are.  The parent shows how many service clients wait with it.
    The order counts: who takes a link shows first that there is one less, and then that the service client is settled;
    so what the parent reads, in the opposite order, is never more than there is.
    """

    IDLE, WAITING, SETTLED, OF_SERVICE = 0, 1, 2, 3

    def __init__(self, workers: int, services: Sequence[str]) -> None:
        self.workers = workers
        self._services = {name: number for number, name in enumerate(services)}
        self._row = len(services) * self.OF_SERVICE + 3
        self._memory = mmap.mmap(-1, 8 * (workers * self._row + len(services)))
        self._numbers = memoryview(self._memory).cast("q")
        self._me = 0
        self._lock = threading.Lock()  # over the numbers that `settle` and the two behind it count up

    # In a worker

    def become(self, number: int) -> None:
        self._me = number
        for index in range(number * self._row, (number + 1) * self._row):
            self._numbers[index] = 0

    def show(self, service: str, idle: int, waiting: int) -> None:
        start = self._start(self._me, service)
        self._numbers[start + self.IDLE] = idle
        self._numbers[start + self.WAITING] = waiting

    def settle(self, service: str) -> None:
        with self._lock:
            self._numbers[self._start(self._me, service) + self.SETTLED] += 1

    def links_arrived(self) -> None:
        with self._lock:
            self._numbers[(self._me + 1) * self._row - 2] += 1

    def client_left(self) -> None:
        with self._lock:
            self._numbers[(self._me + 1) * self._row - 3] += 1

    def show_open(self, count: int) -> None:
        self._numbers[(self._me + 1) * self._row - 1] = count

    def are_links_wanted(self, service: str) -> bool:
        """Whether service clients wait elsewhere."""
        return self.count_waiting(service) > self._numbers[self._start(self._me, service) + self.WAITING]

    # Anywhere

    def count_waiting(self, service: str) -> int:
        own = self._numbers[self.workers * self._row + self._services[service]]
        return own + sum(self.waiting(number, service) for number in range(self.workers))

    # In the parent

    def idle(self, number: int, service: str, sent: int) -> int:
        """How many links are idle in a worker beyond those for the service clients that are on their way to it."""
        under_way = self.under_way(number, service, sent)
        return self._numbers[self._start(number, service) + self.IDLE] - under_way

    def under_way(self, number: int, service: str, sent: int) -> int:
        return sent - self._numbers[self._start(number, service) + self.SETTLED]

    def waiting(self, number: int, service: str) -> int:
        return self._numbers[self._start(number, service) + self.WAITING]

    def links_under_way(self, number: int, sent: int) -> int:
        return sent - self._numbers[(number + 1) * self._row - 2]

    def clients(self, number: int, sent: int) -> int:
        """How many of the service clients that a worker was sent, and has not sent back, have not left."""
        return sent - self._numbers[(number + 1) * self._row - 3]

    def open(self, number: int) -> int:
        return self._numbers[(number + 1) * self._row - 1]

    def show_queue(self, service: str, length: int) -> None:
        self._numbers[self.workers * self._row + self._services[service]] = length

    def _start(self, number: int, service: str) -> int:
        return number * self._row + self._services[service] * self.OF_SERVICE
