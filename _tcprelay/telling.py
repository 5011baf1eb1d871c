"""Who is told of an event: the log, the tally and ``on_event``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .events import Event
from .tally import Tally


class Events:
    """Tells events to the log, to the tally and to ``on_event``.

    Of events that strangers can bring about at will, the log gets `MOST_LINES` of a kind in a second, and one line
    that counts the others; the tally and ``on_event`` get them all.
    """

    MOST_LINES = 10

    def __init__(self, logger: logging.Logger, on_event: Callable[[Event], object] | None) -> None:
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event: expected something to call, not {on_event!r:.80}")
        self._logger = logger
        self._on_event = on_event
        self.listener: Callable[[Event], object] | None = None
        """The role's own, beside ``on_event``."""
        self.log: Callable[[str, Event], object] | None = None
        """In a command: takes an event for the log, with the logger's name, and makes no record of it: that would cost
        the thread that serves a connection more than what it tells."""
        self.pass_on: Callable[[Event], object] | None = None
        """In a worker: tells the parent what is `of_all`."""
        self.tally = Tally()
        self._lock = threading.Lock()  # over the next
        self._floods: dict[type[Event], tuple[float, int]] = {}  # since when, how many

    def begin_anew(self) -> None:
        """In a process that has just been forked: what was counted is its parent's."""
        self.tally, self._lock, self._floods = Tally(), threading.Lock(), {}

    def __call__(self, event: Event) -> None:
        if event.of_all and self.pass_on is not None:
            self.pass_on(event)
            return
        self.tally.note(event)
        if self._logger.isEnabledFor(event.level) and (not event.floods or self._may_log(type(event))):
            if self.log is not None:
                self.log(self._logger.name, event)
            else:
                self._logger.log(event.level, "%s", event, extra={"event": event})
        for listener in (self.listener, self._on_event):
            try:
                if listener is not None:
                    listener(event)
            except Exception:
                self._logger.exception("on_event failed for %s", type(event).__name__)

    def _may_log(self, kind: type[Event]) -> bool:
        self.tell_floods()
        with self._lock:
            since, count = self._floods.get(kind, (time.monotonic(), 0))
            self._floods[kind] = since, count + 1
            return count < self.MOST_LINES

    def tell_floods(self) -> None:
        """Count, in a line for each kind, what was left out in a second that is over.  To be called now and then."""
        if not self._floods:
            return
        now = time.monotonic()
        with self._lock:
            over = [kind for kind, (since, _) in self._floods.items() if now - since >= 1.0]
            told = [(kind, self._floods.pop(kind)[1] - self.MOST_LINES) for kind in over]
        for kind, more in told:
            if more > 0:
                self._logger.log(kind.level, "%d more lines like that (%s) are left out", more, kind.__name__)
