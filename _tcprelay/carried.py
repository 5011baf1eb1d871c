"""What connections have carried: so far, and in each moment of the last minutes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping

from .splice import Splice

Party = tuple[str, str]
"""A service, and the name of a relay client as far as that has been proven: "" elsewhere."""
MOST_PARTIES = 1024
"""Pairs of these that are counted apart: names are made elsewhere."""
SLOT = 2.0
"""Seconds that count as one moment."""
SLOTS = 150
"""How many of them are remembered: five minutes."""


class Carried:
    """What the connections of a service with one relay client have carried so far."""

    __slots__ = ("broken", "from_link", "open", "opened", "to_link")

    def __init__(self, opened: int = 0, broken: int = 0, to_link: int = 0, from_link: int = 0) -> None:
        self.opened = opened
        """How many there have been."""
        self.broken = broken
        """How many of them were broken off."""
        self.open = 0
        """How many there are."""
        self.to_link = to_link
        self.from_link = from_link
        """Bytes."""

    def add(self, splice: Splice) -> None:
        """Count a connection in."""
        self.opened += 1
        self.to_link += splice.to_link.carried
        self.from_link += splice.from_link.carried

    def add_all(self, other: Carried) -> None:
        """Count others in."""
        self.open += other.open
        self.opened += other.opened
        self.broken += other.broken
        self.to_link += other.to_link
        self.from_link += other.from_link


def current_slot() -> int:
    """The number of the moment that it is now: the same in all processes of a host."""
    return int(time.monotonic() / SLOT)


class History:
    """The bytes that each service has carried in each of the last moments.  One thread writes; any may read."""

    def __init__(self) -> None:
        self._looked = 0.0
        self._services: dict[str, _Ring] = {}

    def look(self, carried: Callable[[], Mapping[Party, Carried]]) -> None:
        """Note what has been carried by now, unless that was done a moment ago; to be called now and then."""
        now = time.monotonic()
        if now - self._looked < SLOT / 4:
            return
        self._looked = now
        sums: dict[str, tuple[int, int]] = {}
        for (service, _), one in carried().items():
            there, back = sums.get(service, (0, 0))
            sums[service] = there + one.to_link, back + one.from_link
        slot = current_slot()
        for service, both in sums.items():
            ring = self._services.get(service)
            if ring is None:
                ring = self._services[service] = _Ring(slot)
            ring.note(slot, both)

    def read(self, service: str, last: int) -> tuple[list[int], list[int]]:
        """Bytes to and from the links in each of the `SLOTS` moments up to `last`, the oldest first."""
        ring = self._services.get(service)
        if ring is None:
            return [0] * SLOTS, [0] * SLOTS
        return ring.read(0, last), ring.read(1, last)


class _Ring:
    """Of one service."""

    __slots__ = ("_bytes", "_newest", "_seen")

    def __init__(self, slot: int) -> None:
        self._bytes = array("q", bytes(8 * SLOTS)), array("q", bytes(8 * SLOTS))
        self._newest = slot
        self._seen = 0, 0

    def note(self, slot: int, carried: tuple[int, int]) -> None:
        """So much has been carried in all by now."""
        for number in range(max(self._newest + 1, slot - SLOTS + 1), slot + 1):
            for ring in self._bytes:
                ring[number % SLOTS] = 0
        self._newest = slot
        for ring, now, before in zip(self._bytes, carried, self._seen, strict=True):
            ring[slot % SLOTS] += max(0, now - before)
        self._seen = carried

    def read(self, way: int, last: int) -> list[int]:
        ring, newest = self._bytes[way], self._newest
        return [ring[n % SLOTS] if newest - SLOTS < n <= newest else 0 for n in range(last - SLOTS + 1, last + 1)]
