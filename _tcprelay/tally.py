"""What has happened so far, counted, and the last of it remembered: for the status, the metrics and the counters.

Only what nothing else knows is counted here; bytes, and how many connections there were, are known by `watch.Splices`.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence

from .events import ConnectionClosed, ConnectionFailed, ConnectionOpened, Event, LinkDown, LinkRefused, LinkUp

PAIRING_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: upper bounds of the buckets for how long service clients wait; the default of --pair-timeout is 20."""
DURATION_BOUNDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)
"""The same for how long connections last."""
MOST_EVENTS = 50
"""Events that are remembered."""
MOST_SERVICES = 1024
"""Services that are counted apart: with ports on demand relay clients make names."""
OTHERS = "(others)"
"""Stands for those beyond."""
HOUR = 60
"""Minutes for which failures are remembered."""


class Histogram:
    """How often a figure was up to each of some bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """For each bound the figures up to it and above the one before; behind them those above all."""
        self.sum = 0.0

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other.counts, other.sum = list(self.counts), self.sum
        return other

    def add(self, figure: float) -> None:
        self.counts[bisect_left(self.bounds, figure)] += 1
        self.sum += figure


class Trouble:
    """What has gone wrong with the connections of a service: those that were never opened, and those broken off."""

    __slots__ = ("_minutes", "codes", "last", "last_at")

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        """Of those that were never opened."""
        self.last, self.last_at = "", 0.0
        """The last reason, and when that was (seconds since 1970); "" where nothing has gone wrong yet."""
        self._minutes: deque[list[int]] = deque(maxlen=HOUR + 1)  # pairs of minute and count

    def copy(self) -> Trouble:
        other = Trouble()
        other.codes, other.last, other.last_at = self.codes.copy(), self.last, self.last_at
        other._minutes.extend(list(pair) for pair in self._minutes)
        return other

    def note(self, reason: str, now: float) -> None:
        self.last, self.last_at = reason, now
        minute = int(now / 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append([minute, 0])
        self._minutes[-1][1] += 1

    def within_hour(self, now: float) -> int:
        return sum(count for minute, count in self._minutes if minute > now / 60 - HOUR)


class Recent:
    """An event that is remembered, with those after it that say the same."""

    __slots__ = ("count", "event", "time")

    def __init__(self, event: Event, now: float, count: int = 1) -> None:
        self.event = event
        """The last of them."""
        self.time = now
        """When that was: seconds since 1970."""
        self.count = count


class Tally:
    """Counts events; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # over all that follows
        self.pairing: dict[str, Histogram] = {}
        """For each service how long its service clients waited until it had answered."""
        self.durations: dict[str, Histogram] = {}
        """For each service how long its connections lasted."""
        self.troubles: dict[str, Trouble] = {}
        self.failed = 0
        """Connections that were never opened, over all services."""
        self.refused: Counter[str] = Counter()
        """Connections to the relay port that did not become links, by code."""
        self.recent: deque[Recent] = deque(maxlen=MOST_EVENTS)

    def copy(self) -> Tally:
        """All that has been counted by now, to be read at leisure: who counts never waits for that."""
        other = Tally()
        with self._lock:
            other.pairing = {name: one.copy() for name, one in self.pairing.items()}
            other.durations = {name: one.copy() for name, one in self.durations.items()}
            other.troubles = {name: one.copy() for name, one in self.troubles.items()}
            other.failed, other.refused = self.failed, self.refused.copy()
            other.recent.extend(Recent(one.event, one.time, one.count) for one in self.recent)
        return other

    def note(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, ConnectionOpened):
                self._histogram(self.pairing, event.service, PAIRING_BOUNDS).add(event.seconds)
                return
            if isinstance(event, ConnectionClosed):
                self._histogram(self.durations, event.service, DURATION_BOUNDS).add(event.seconds)
                if not event.reason:
                    return
                self._trouble(event.service).note(event.reason, time.time())
            elif isinstance(event, ConnectionFailed):
                self.failed += 1
                trouble = self._trouble(event.service)
                trouble.codes[event.code] += 1
                trouble.note(event.reason, time.time())
            elif isinstance(event, LinkRefused):
                self.refused[event.code] += 1
            elif isinstance(event, (LinkUp, LinkDown)):
                return
            self._remember(event)

    def _histogram(self, histograms: dict[str, Histogram], service: str, bounds: Sequence[float]) -> Histogram:
        found = histograms.get(service)
        if found is None:
            found = histograms.setdefault(service if len(histograms) < MOST_SERVICES else OTHERS, Histogram(bounds))
        return found

    def _trouble(self, service: str) -> Trouble:
        found = self.troubles.get(service)
        if found is None:
            found = self.troubles.setdefault(service if len(self.troubles) < MOST_SERVICES else OTHERS, Trouble())
        return found

    def _remember(self, event: Event) -> None:
        """Keep an event; what strangers can bring about at will does not drive the others out."""
        now = time.time()
        if event.floods:
            for recent in self.recent:
                if is_alike(recent.event, event):
                    recent.event, recent.time, recent.count = event, now, recent.count + 1
                    return
        self.recent.append(Recent(event, now))


def is_alike(one: Event, other: Event) -> bool:
    """Whether two events are of one kind, about one service, and for one reason."""
    return type(one) is type(other) and all(
        getattr(one, name, "") == getattr(other, name, "") for name in ("service", "code", "reason")
    )
