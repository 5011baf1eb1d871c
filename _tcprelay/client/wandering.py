"""Whether this host has slept, or has come to another network: then idle links may be dead, and nothing says so.

`Whereabouts` notices it, by two signs that cost nothing on the wire.  The clock that goes on while a host sleeps
(CLOCK_BOOTTIME, which Linux has) runs ahead of the one that does not.  And the address from which this host would reach
the relay server is another one, or is there again.

`Doubts` knows the links that are idle.  After such a moment each of them has to bring a frame, which the relay server
is asked for by ``doubtful`` in the HELLO of a new link; those that bring none are given up and replaced.  So links that
are well stay, and no connection is touched.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from ..link import AnyLink

PROOF_TIME = 0.75
"""Seconds that idle links have, from when a new link is up, to show that they live; four round trips where that is
more.  What is given up in vain costs a new link, so it need not be long."""
LEAST_SLEEP = 1.0
"""Seconds asleep that are worth a look: who sleeps for less has lost nothing."""


class Whereabouts:
    """How long this host has slept, and by which address it reaches the relay server; for one thread."""

    def __init__(self) -> None:
        self._asleep = seconds_asleep()
        self._address = ""
        """The last one that was known."""
        self._was_away = False
        """There was no way to the relay server at the last look."""

    @property
    def is_known(self) -> bool:
        """There was an address at a look."""
        return bool(self._address)

    def look(self, relay: tuple[int, Any] | None) -> str:
        """What has happened since the last look, "" for nothing; `relay` is the family and the address of the relay
        server, ``None`` where that has not been reached yet."""
        asleep, before = seconds_asleep(), self._asleep
        self._asleep = asleep
        address, known = (address_towards(*relay), self._address) if relay else ("", "")
        was_away, self._was_away = self._was_away, bool(known and not address)
        self._address = address or known
        if asleep - before >= LEAST_SLEEP:
            return f"this host has slept for {asleep - before:.0f} s"
        if known and address and address != known:
            return f"this host's address has changed from {known} to {address}"
        if was_away and address:
            return "this host's network was gone, and is back"
        return ""


def seconds_asleep() -> float:
    """How long this host has slept since it was started; 0 where the system does not tell."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    if boottime is None:
        return 0.0
    return time.clock_gettime(boottime) - time.clock_gettime(time.CLOCK_MONOTONIC)


def address_towards(family: int, address: Any) -> str:
    """The address of this host's from which a packet to there would come; "" where there is no way.  Nothing is
    sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return ""


class Doubts:
    """Links that are idle, with nothing under way on them, and those of them that may be dead; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # over all that follows
        self._quiet: dict[AnyLink, bool] = {}
        """Whether it is to be reset: not where bytes of its last connection may be under way still."""
        self._doubted: set[AnyLink] = set()
        self._given_up: set[AnyLink] = set()
        self._due = 0.0
        """When those in doubt are to be given up; 0 is not yet."""

    def settle(self, link: AnyLink, reset: bool = True) -> None:
        """A link is idle, and something has just come in on it, or it is new."""
        with self._lock:
            self._quiet[link] = reset
            self._doubted.discard(link)

    def leave(self, link: AnyLink) -> bool:
        """It is no longer idle, or is at its end; True where it has been given up."""
        with self._lock:
            self._quiet.pop(link, None)
            self._doubted.discard(link)
            given_up = link in self._given_up
            self._given_up.discard(link)
            return given_up

    def doubt_all(self) -> int:
        """All that are idle now have to prove themselves, once `begin` has been called; returns how many."""
        with self._lock:
            self._doubted |= self._quiet.keys()
            self._due = 0.0
            return len(self._doubted)

    def begin(self, round_trip: float) -> None:
        """A new link is up, on which the relay server was asked to have the others prove themselves."""
        with self._lock:
            if self._doubted and not self._due:
                self._due = time.monotonic() + max(PROOF_TIME, 4 * round_trip)

    def give_up(self) -> float:
        """Wake those that have not proven themselves in time, so that they end; returns the moment of the next call,
        infinity where none is needed."""
        with self._lock:
            if not self._due:
                return float("inf")
            if time.monotonic() < self._due:
                return self._due
            for link in self._doubted:
                if self._quiet.pop(link):
                    link.stream.reset_on_close()  # it is dead: see `Splice.check_time`
                link.stream.wake()
            self._given_up |= self._doubted
            self._doubted.clear()
            self._due = 0.0
            return float("inf")
