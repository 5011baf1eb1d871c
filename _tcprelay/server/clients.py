"""A service client until its service has answered, and why one is turned away."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from ..addresses import show_address
from ..hello import Faces
from ..link import Link
from ..protocol import ABORT
from ..proxy_header import HeaderFault, begins_header, may_begin_header
from ..streams import Stream
from ..system import ssl
from ..text import connection_id, say_error, shown
from ..tls import TLSStream

EARLY_BYTES = 65536
"""How much a service client may send before READY; it is kept, to be offered to another link after a FAIL."""

SURE = 16
"""Bytes after which it is certain whether a stream begins with a PROXY protocol header."""
UNTRUSTED = "it sent a PROXY protocol header, and --accept-proxy-protocol does not name its address"


class Refusal(Exception):
    """Why a service client or a link is turned away: for the log, and in REFUSED for the relay client.  The code is one
    of `events.FAILURES`, or of the link protocol."""

    def __init__(self, reason: str, code: str, told: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.told = told or reason

    def apart(self) -> Refusal:
        """The same without a traceback: kept in a variable, that would hold the connection until the collector runs."""
        return Refusal(str(self), self.code, self.told)


TOO_MANY_CONNECTIONS = Refusal("too many connections at once (--max-connections)", "limit")
TOO_MANY_WAIT = Refusal("too many service clients wait for a link (--max-pending)", "limit")
GONE = "its port was given back: the relay client that had asked for it is gone"
ENDING = "the relay server is ending"


def unreachable(reason: str) -> Refusal:
    """Of a service client whose service none of the relay clients can reach: why the last of them could not."""
    return Refusal(f"the service cannot be reached: {reason}", "unreachable")


def no_link(has_client: bool) -> Refusal:
    """Of a service client that has waited in vain."""
    more = "" if has_client else "; no relay client is connected"
    return Refusal(f"no link was idle in time (--pair-timeout){more}", "no-link")


class Unacknowledged(ConnectionError):
    """Nothing that was sent on a link has been acknowledged for a while, and no byte of the service client's was."""


class NoLinkHere(Exception):
    """In a worker: it has no link for a service client now, but its parent may find one elsewhere."""


NOBODY: frozenset[str] = frozenset()


def make_stream(
    sock: socket.socket, name: str, address: Any, context: ssl.SSLContext | None, faces: Faces | None = None
) -> Stream:
    """The stream over an accepted socket, with TLS where there is a context; before its handshake.  What it asks for
    first may choose another one, where it is to see one of several `faces`."""
    if context is None:
        return Stream(sock, name, address)
    return TLSStream(sock, name, context, address, server_side=True, faces=faces)


class WaryStream(Stream):
    """A stream whose peer is no proxy that is believed, so that a PROXY protocol header would be a fault.

    Its first bytes are looked at, in whatever pieces and however late they come.  Where they are a header, receiving
    raises `HeaderFault`, and nothing of the last piece is passed on.
    """

    def __init__(self, stream: Stream, start: bytes | bytearray) -> None:
        """Goes on with the socket of another, of which these bytes were received."""
        super().__init__(stream.sock, stream.name, stream.peer)
        self.received = stream.received
        self._start = bytearray(start[:SURE])
        self._is_wary = may_begin_header(self._start)

    def calls(self) -> tuple[Callable[[memoryview], int], Callable[[memoryview], int]]:
        receive, send = super().calls()
        return (self._receive if self._is_wary else receive), send

    def recv_into(self, view: memoryview) -> int:
        return self._look(view, super().recv_into(view)) or 0

    def recv_now(self, view: memoryview) -> int | None:
        return self._look(view, super().recv_now(view))

    def _receive(self, view: memoryview) -> int:
        return self._look(view, self.sock.recv_into(view)) or 0

    def _look(self, view: memoryview, count: int | None) -> int | None:
        if self._is_wary and count:
            self._start += view[: min(count, SURE)]
            self._is_wary = may_begin_header(self._start)
            if begins_header(self._start):
                raise HeaderFault(UNTRUSTED)
        return count


class ServiceClient:
    """A service client until its service has answered: its stream, and the bytes that it sent early."""

    def __init__(self, service: str, sock: socket.socket, address: Any, faces: Faces | None = None) -> None:
        self.id = connection_id()
        self.service = service
        self.address = address
        """Where its connection comes from: a proxy, maybe."""
        self.origin = address
        """Where it comes from itself, which `peer` shows."""
        self.introduced = 0
        """Bytes of the PROXY protocol header that has said so; they are taken already."""
        self.is_wary = False
        """A PROXY protocol header would be a fault: see `WaryStream`; before TLS, what is no handshake is one maybe."""
        self.peer = show_address(address)
        self.stream = make_stream(sock, f"service client {self.peer}", address, faces.first if faces else None, faces)
        self.early = bytearray()
        self.ended = False
        """It has ended its direction: all that it sends is in `early`."""
        self.exposed = False
        """The link that it is offered to has taken bytes."""
        self.gone = ""
        """Why it is no longer there, or is not to be."""
        self.fault = ""
        """The same as a code."""
        self.failed = NOBODY
        """Ids of relay clients that could not reach their service."""
        self.reason = ""
        """Why the last of them could not."""
        self.waited, self.queued = 0.0, False
        """Seconds that it has been in the parent and in other workers, and whether the parent had no link for it."""
        self.visited: list[int] = []
        """For the parent: the workers none of whose relay clients could reach the service."""
        self.unsettled = False
        """It counts among those that have no link yet: see `Intake.settle`."""
        self.passed_on = False
        """It has been sent back to the parent."""
        self.may_hold_more = True
        """To be asked again without poll: TLS may hold more, or there was more than fitted."""
        self._since = time.monotonic()
        self.record = {"id": self.id, "service": service, "peer": self.peer}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    @property
    def state(self) -> dict[str, Any]:
        """What another worker has to know of it, beside its early bytes."""
        return {"service": self.service, "address": self.address, "id": self.id, "since": self._since,
                "origin": self.origin, "introduced": self.introduced, "ended": self.ended,
                "failed": list(self.failed), "reason": self.reason, "visited": self.visited}  # fmt: skip

    def resume(self, fields: dict[str, Any], early: bytes) -> None:
        """Go on from such a state."""
        self._since, self.waited, self.queued = fields["since"], fields["waited"], fields["queued"]
        if "id" in fields:
            self.id = self.record["id"] = fields["id"]
            self.ended, self.failed, self.reason = fields["ended"], frozenset(fields["failed"]), fields["reason"]
            self.visited = fields["visited"]
            self.early = bytearray(early)
            self.stream.received = len(early)
            if fields["introduced"]:
                self.introduce(tuple(fields["origin"]), fields["introduced"])

    def introduce(self, origin: Any, count: int) -> None:
        """Note where it really comes from, as a header of so many bytes has said."""
        self.origin, self.introduced = origin, count
        self.peer = self.record["peer"] = show_address(origin)
        self.stream.peer, self.stream.name = origin, f"service client {self.peer}"
        self.stream.received += count

    def be_wary(self) -> None:
        """A PROXY protocol header from it is a fault."""
        self.is_wary = True
        if not self.stream.secure:
            self.stream = WaryStream(self.stream, self.early)

    @property
    def was_check(self) -> bool:
        """It was a proxy's own, most likely to see whether somebody listens: it has come for nobody, and is gone
        without a byte."""
        left = self.gone or self.ended
        return bool(self.introduced and self.origin == self.address and left and not self.early)

    @property
    def may_send_more(self) -> bool:
        return not self.ended and not self.gone and len(self.early) < EARLY_BYTES

    def read_early(self) -> None:
        """Take some of what it has sent, without waiting; a little, so that sending it on never blocks."""
        piece = bytearray(min(4096, EARLY_BYTES - len(self.early)))
        try:
            count = self.stream.recv_now(memoryview(piece))
        except OSError as error:
            self.gone = f"{self.stream.name}: {say_error(error)}"
            self.fault = "protocol" if isinstance(error, HeaderFault) else "left"
            return
        if count == 0:
            self.ended = True
        self.may_hold_more = count == len(piece) or (count is not None and self.stream.holds_bytes())
        self.early += piece[: count or 0]

    def look(self, waited: bool) -> None:
        """Before a link is spent on it: is it still there?  Raises `Refusal`."""
        if not self.early and not self.ended:
            self.read_early()
        if self.gone:
            raise Refusal(self.gone, self.fault)
        if self.ended and not self.early and waited:
            # It may be waiting for a greeting with its own direction ended (on the raw wire in vain: nothing would
            # start the link); far more often it has left.
            raise Refusal("the service client went away while it waited", "left")

    def pass_early(self, link: Link, out: bytearray, start: int) -> None:
        """Append to `out` the frames for the early bytes from `start` on, and for its end."""
        if len(self.early) > start:
            out += link.pack_header(len(self.early) - start)
            out += self.early[start:]
        if self.gone and not link.has_ended:
            out += link.pack_control(ABORT, {"reason": shown(self.gone)})
        elif self.ended:
            out += link.pack_end()
