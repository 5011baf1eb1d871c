"""What happens: an event is told once, and the log, the tally and ``on_event`` listen (see `telling`)."""

from __future__ import annotations

import dataclasses
import logging
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
    """A service client and its service are connected; `via` is the relay client, or the service that was dialled.

    `name` is the relay client's, on a relay server.  `seconds` is how long the service client has waited for that, and
    on a relay client how long its service has taken.
    """

    id: str
    service: str
    peer: str
    via: str
    name: str
    seconds: float

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
    """The closing record of a connection that was never opened: the service client gets an RST.  `code` is the kind of
    reason: see `FAILURES`."""

    level = logging.WARNING
    says = "[{id}] service {service}: connection from {peer} refused: {reason}"
    floods = True
    id: str
    service: str
    peer: str
    seconds: float
    code: str
    reason: str


FAILURES = {
    "unreachable": "the relay client cannot reach the service",
    "unanswered": "the service, or the way to it, has not answered in time",
    "no-link": "no link was idle in time",
    "lost": "a link was lost, or the connection itself was",
    "left": "the service client went away while it waited",
    "address": "its address may not connect",
    "limit": "there are as many as there may be",
    "tls": "there was no TLS handshake",
    "protocol": "a PROXY protocol header was missing, wrong or not believed",
    "port": "the port was given back",
    "draining": "the relay is ending",
    "system": "the system had no descriptor, memory or thread for it, or something unexpected has happened",
}
"""The codes of `ConnectionFailed`, and what each says."""


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
class ServiceDown(Event):
    """A service's check fails (``--check-service``): the relay client has withdrawn it from the relay until it is
    back."""

    level = logging.WARNING
    says = "service {service}: withdrawn from the relay, since the check of {target} fails: {reason}"
    service: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceBack(Event):
    """The check of a service that was withdrawn so many `seconds` ago has succeeded: it has its links again."""

    service: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"service {self.service}: the check of {self.target} is well again after {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceUnserved(Event):
    """A service client has come, and no relay client is connected for its service.  Told once until one is."""

    level = logging.WARNING
    says = "service {service}: {peer} has connected, and no relay client is there"
    service: str
    peer: str


def say_bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"
