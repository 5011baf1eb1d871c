"""What happens, told once: the log, the counters and ``on_event`` listen."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, told once: the log, the counters and ``on_event`` all get the same object.

    A class says its line in the log, with its fields in it, and the level of that line.
    """

    level = logging.INFO
    says = ""
    floods = False
    """Strangers can bring it about as often as they like: see `Events`."""
    of_all = False
    """It is about the role as a whole: of several workers the parent tells it, once for all of them."""

    def __str__(self) -> str:
        return self.says.format_map({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp(Event):
    """A link is ready for a connection."""

    level = logging.DEBUG
    says = "service {service}: link with {peer} is up"
    service: str
    peer: str
    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown(Event):
    """A link is gone."""

    level = logging.DEBUG
    says = "service {service}: link with {peer} is down: {reason}"
    service: str
    peer: str
    client: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(Event):
    """A service client and its service are connected; `via` is the relay client, or the service that was dialled."""

    id: str
    service: str
    peer: str
    via: str

    def __str__(self) -> str:
        return f"[{self.id}] service {self.service}: connection from {self.peer} opened via {self.via}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed(Event):
    """The closing record of a connection.  `bytes_in` went to the service; `reason` is empty if all is whole."""

    id: str
    service: str
    peer: str
    bytes_in: int
    bytes_out: int
    seconds: float
    reason: str

    def __str__(self) -> str:
        outcome = f"broken off ({self.reason})" if self.reason else "complete"
        return (
            f"[{self.id}] service {self.service}: connection from {self.peer} {outcome}"
            f" after {self.seconds:.3f} s, {say_bytes(self.bytes_in)} in, {say_bytes(self.bytes_out)} out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionFailed(Event):
    """The closing record of a connection that was never opened: the service client gets an RST."""

    level = logging.WARNING
    says = "[{id}] service {service}: connection from {peer} refused: {reason}"
    floods = True
    id: str
    service: str
    peer: str
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Event):
    """`end` has begun; open connections have until the drain time-out."""

    connections: int
    seconds: float

    def __str__(self) -> str:
        seconds = f"{self.seconds:.1f}".removesuffix(".0")
        return f"ending: waiting up to {seconds} s for open connections: {self.connections}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening(Event):
    """The server listens for the clients of `service`, or for relay clients where that is empty.  Told of each address
    where ``hostname`` has several."""

    service: str
    address: str

    def __str__(self) -> str:
        return f"listening for {f'clients of {self.service}' if self.service else 'relay clients'} on {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUp(Event):
    """The first link of a relay client for a service is in the pool."""

    says = "service {service}: relay client {name} at {peer} is connected"
    of_all = True
    service: str
    client: str
    name: str
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDown(Event):
    """The last link of a relay client for a service is gone."""

    says = "service {service}: relay client {name} at {peer} is gone: {reason}"
    of_all = True
    service: str
    client: str
    name: str
    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRefused(Event):
    """A connection to the relay port did not become a link."""

    level = logging.WARNING
    says = "link from {peer} refused: {reason}"
    floods = True
    peer: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNotMade(LinkRefused):
    """Its client, or the path, gave the link up before the handshake was complete; it was not refused."""

    level = logging.INFO
    says = "link from {peer} did not come about: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptPaused(Event):
    """Connections cannot be taken for a moment.  Told once a second at most."""

    level = logging.WARNING
    says = "cannot take a connection, trying again: {reason}"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(Event):
    """The service can be reached through the relay, for the first time or again."""

    says = "service {service}: {target} is published at {address}"
    of_all = True
    service: str
    target: str
    relay: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpublished(Event):
    """No link to the relay can be had.  The client goes on trying; told again only when the reason changes.  It is
    `lasting` where it will not pass by itself: the relay refuses this client, or is none."""

    level = logging.WARNING
    says = "service {service}: no link to the relay at {relay}, trying again: {reason}"
    of_all = True
    service: str
    relay: str
    reason: str
    lasting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceUnreachable(Event):
    """The service is published, and the client could not reach it when it tried."""

    level = logging.WARNING
    says = "service {service}: nothing can be reached at {target} now: {reason}"
    service: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceUnserved(Event):
    """A service client has come, and no relay client is connected for its service.  Told once until one is."""

    level = logging.WARNING
    says = "service {service}: {peer} has connected, and no relay client is there"
    service: str
    peer: str


def say_bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


class Events:
    """Tells events to the log, to the counters and to ``on_event``.

    Of events that strangers can bring about at will, the log gets `MOST_LINES` of a kind in a second, and one line
    that counts the others; the counters and ``on_event`` get them all.
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
        self._lock = threading.Lock()  # over the two below
        self.counts = {"connections": 0, "failed": 0, "broken": 0, "bytes_in": 0, "bytes_out": 0}
        self._floods: dict[type[Event], tuple[float, int]] = {}  # since when, how many

    def __call__(self, event: Event) -> None:
        if event.of_all and self.pass_on is not None:
            self.pass_on(event)
            return
        with self._lock:
            if isinstance(event, ConnectionClosed):
                self.counts["connections"] += 1
                self.counts["broken"] += bool(event.reason)
                self.counts["bytes_in"] += event.bytes_in
                self.counts["bytes_out"] += event.bytes_out
            elif isinstance(event, ConnectionFailed):
                self.counts["failed"] += 1
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
