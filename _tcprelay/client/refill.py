"""When a relay client's links are wanted: how many at a time after losses, how soon after this host has slept, and how
often of a service that is down; no I/O."""

from __future__ import annotations

FIRST_BACKOFF = 1.0
"""Seconds of the span after a first failure; a random moment within it is taken, and each further one doubles it."""
LAST_BACKOFF = 4.0
"""Seconds at which that span stops growing while the relay server cannot be reached: a single packet every few
seconds is no burden, and when the way is free again the service is back soon."""
REFUSED_BACKOFF = 30.0
"""The same where the relay server refuses: a setting has to be changed first.  And where a link is lost in its
handshake: the server may have more of them than it can do, and trying again soon would keep that up."""
REFILL_TIME, REFILL_RATE = 5.0, 4.0
"""Idle links that were lost are replaced within so many seconds, at so many a second where that is faster."""
GROWTH = 24
"""Links that may be opened at once for each one in use, beyond the idle ones, where the server says that more service
clients wait: 200 that come together have theirs after one round from a pool of 8, as with relays that open one for
each; and a number that is not true opens three pools more for each connection that is real."""
WITHDRAWN_AGAIN = 60.0
"""Seconds after which the relay server is told once more, by a link that is given up at once, that a service is
withdrawn: it believes it for `WITHDRAWN_TIME`, and may have been started anew meanwhile."""
WITHDRAWN_TIME = 600
"""Seconds for which that holds.  A relay client that has vanished meanwhile makes nobody wait in vain for longer."""
EAGER_TIME, EAGER_SPAN = 30.0, 0.5
"""For so many seconds after this host has woken up or moved it tries again within the second figure: a network takes a
while to be back, and nobody else has lost his links at this moment."""


class Pace:
    """How many idle links there should be: all, or after losses one, and from then on more at a measured pace."""

    def __init__(self, most: int, workers: int = 1) -> None:
        """`most` is one worker's share, of so many."""
        self._most = most
        self._first = 1.0 / workers
        self._rate = max(REFILL_RATE / workers, most / REFILL_TIME)
        self._level, self._since = float(most), 0.0

    def level(self, now: float) -> float:
        return min(self._most, self._level + self._rate * (now - self._since))

    def wanted(self, now: float) -> tuple[int, float]:
        """How many there should be, and the moment from which on it is one more."""
        level = self.level(now)
        if level == self._most:
            return self._most, float("inf")
        return max(1, int(level)), now + (1 - level % 1) / self._rate + 0.001

    def lose(self, now: float) -> None:
        """An idle link is lost: it is to be replaced, but not at once."""
        self._level, self._since = max(0.0, self.level(now) - 1), now

    def begin(self, now: float) -> None:
        """The first link is up again."""
        self._level, self._since = self._first, now

    def fill(self) -> None:
        """All are wanted at once."""
        self._level = float(self._most)
