"""The parent of a relay client's worker processes: each keeps its share of the links, and the parent tells of each
service whether it can be reached, once for all of them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ..client_options import ClientOptions
from ..events import Published, Unpublished
from ..messages import encode_message
from ..processes import WorkerProcess, Workers
from ..role import Relay
from .stock import MOST_REASONS


class ClientWorkers(Workers):
    """The parent of a relay client's workers.  What it knows is of each service at each relay server.

    Parameters: the client; how many workers; and what has a new process be one of them, with its number and the count.
    """

    def __init__(self, client: Relay[ClientOptions], count: int, become_one_of: Callable[[int, int], None]) -> None:
        super().__init__(client, count)
        self._become_one_of = become_one_of
        self._published: dict[tuple[str, str], set[int]] = {}
        """Which workers have links."""
        self._told: dict[tuple[str, str], set[str]] = {}
        """What was told since it was published, or "" where it is: each reason once."""
        self._addresses: dict[tuple[str, str], str] = {}
        """Where it was last told to be."""

    def become(self, worker: WorkerProcess, intake: socket.socket) -> None:
        self._become_one_of(worker.number, len(self.workers))

    def renewed(self) -> None:
        names = self._names
        for table in (self._published, self._told, self._addresses):
            for key in [key for key in table if key[0] not in names]:
                del table[key]

    @property
    def _names(self) -> set[str]:
        return {service.name for service in self.role.options.services}

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        """A service is withdrawn, or is back: one of the workers checks them for all."""
        if "withdrawn" in message:
            self.role.obey(message)
            for other in self.workers:
                if other.pid and other is not worker:
                    other.send(encode_message(message))

    def lost(self, worker: WorkerProcess) -> None:
        for numbers in self._published.values():
            numbers.discard(worker.number)

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """A service is published at a relay server while one of the workers has links for it there."""
        key, reason = (fields["service"], fields["relay"]), fields.get("reason", "")
        if fields["service"] not in self._names:
            return  # published no more
        moved = not reason and fields["address"] != self._addresses.get(key)
        published, told = self._published.setdefault(key, set()), self._told.setdefault(key, set())
        if event == "Published":
            published.add(worker.number)
        else:
            published.discard(worker.number)
            if published:
                return
        if reason not in told or moved:
            few = told - {""} if reason and len(told) < MOST_REASONS else set()
            self._told[key] = few | {reason}
            self._addresses[key] = fields.get("address", "")
            self.emit(Unpublished(**fields) if reason else Published(**fields))
