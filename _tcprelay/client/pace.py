"""How many links there should be, and when."""

from __future__ import annotations

from ..sockets import Dialer
from ..tcp import Probing
from ..values import Publication

FIRST_BACKOFF = 1.0
"""Seconds of the span after a first failure; a random moment within it is taken, and each further one doubles it."""


LAST_BACKOFF = 4.0
"""Seconds at which that span stops growing while the relay server cannot be reached: a single packet every few
seconds burdens nobody, and when the way is free again the service is back soon."""


REFUSED_BACKOFF = 30.0
"""The same where the relay server refuses: somebody has to change something first.  And where a link is lost in its
handshake: the server may have more of them than it can do, and trying again soon would keep that up."""


REFILL_TIME, REFILL_RATE = 5.0, 4.0
"""Idle links that were lost are replaced within so many seconds, at so many a second where that is faster."""


class Unreachable(ConnectionError):
    """There is no connection to the relay server; the message says why."""


class RefusedByServer(ConnectionError):
    """The relay server refused a link, or its proofs were not accepted here; the message says why."""

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.lasting = code not in ("draining", "limit")
        """It will not pass by itself, or not soon."""


def longest_backoff(error: BaseException) -> float:
    """Where the span between two attempts stops growing after such a failure, in seconds."""
    passing = isinstance(error, Unreachable) or (isinstance(error, RefusedByServer) and not error.lasting)
    return LAST_BACKOFF if passing else REFUSED_BACKOFF


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


class Service:
    """A published service and the state of its links; all but the first three under `RelayClient._condition`."""

    def __init__(self, publication: Publication, most_idle: int, probing: Probing, workers: int = 1) -> None:
        self.name = publication.name
        self.target = publication.target
        self.dialer = Dialer(publication.target, probing=probing)
        self.idle = self.busy = self.connecting = 0
        self.pace = Pace(most_idle, workers)
        self.asked = 0
        """Links wanted beyond the idle ones, because service clients wait at the server: its word, see `GROWTH`."""
        self.failures = 0
        """Failures in a row; a link that has been stable resets them."""
        self.failed_at = self.retry_at = 0.0
        """When the last one was, and the moment of the next attempt."""
        self.span = 0.0
        """Seconds within which that moment was drawn."""
        self.probing = True
        """At the start and after a failure, until a link is up: one attempt at a time."""
        self.carried = 0
        """Connections that its links have begun to carry."""
        self.told: str | None = None
        """What was last told of its state: "" is published, ``None`` nothing yet, otherwise why not."""
