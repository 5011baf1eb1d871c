"""The parent of a relay client's worker processes: each keeps its share of the links, and the parent tells of each
service whether it can be reached, once for all of them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ..client_options import ClientOptions
from ..events import Published, Unpublished
from ..processes import WorkerProcess, Workers
from ..role import Relay
from .stock import MOST_REASONS


class ClientWorkers(Workers):
    """The parent of a relay client's workers.

    Parameters: the client; how many workers; and what has a new process be one of them, with its number and the count.
    """

    def __init__(self, client: Relay[ClientOptions], count: int, become_one_of: Callable[[int, int], None]) -> None:
        super().__init__(client, count)
        self._become_one_of = become_one_of
        self._published: dict[str, set[int]] = {service.name: set() for service in client.options.services}
        """Which workers have links of each service."""
        self._told: dict[str, set[str]] = {name: set() for name in self._published}
        """What was told of each service since it was published, or "" where it is: each reason once."""
        self._addresses: dict[str, str] = {}
        """Where each was last told to be."""

    def become(self, worker: WorkerProcess, intake: socket.socket) -> None:
        self._become_one_of(worker.number, len(self.workers))

    def renewed(self) -> None:
        names = {service.name for service in self.role.options.services}
        for table in (self._published, self._told, self._addresses):
            for name in table.keys() - names:
                del table[name]
        for name in names:
            self._published.setdefault(name, set())
            self._told.setdefault(name, set())

    def lost(self, worker: WorkerProcess) -> None:
        for numbers in self._published.values():
            numbers.discard(worker.number)

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """A service is published while one of the workers has links for it."""
        service, reason = fields["service"], fields.get("reason", "")
        if service not in self._published:
            return  # published no more
        moved = not reason and fields["address"] != self._addresses.get(service)
        if event == "Published":
            self._published[service].add(worker.number)
        else:
            self._published[service].discard(worker.number)
            if self._published[service]:
                return
        told = self._told[service]
        if reason not in told or moved:
            few = told - {""} if reason and len(told) < MOST_REASONS else set()
            self._told[service] = few | {reason}
            self._addresses[service] = fields.get("address", "")
            self.emit(Unpublished(**fields) if reason else Published(**fields))
