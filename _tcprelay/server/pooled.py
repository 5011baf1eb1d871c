"""A link and what a relay server knows of it."""

from __future__ import annotations

import time
from typing import Any

from ..addresses import show_address
from ..carried import Carried
from ..link import AnyLink
from ..protocol import BYE, PONG, Frame, LinkFault
from ..rights import Identity
from ..splice import Splice
from ..text import shown

SHUN_TIME = 1.0
"""Seconds for which a relay client that could not reach its service is asked last, so that not every service client has
to find that out anew."""
PROBLEM_TIME = 5.0
"""Seconds for which the status says so: a load balancer that sends nobody here because of it keeps the relay from
finding out that the service can be reached again."""


class Member:
    """A relay client as far as it has links for one service."""

    __slots__ = ("_noted_at", "carried", "linked", "links", "problem", "since", "unlinked")

    def __init__(self) -> None:
        self.links: set[PooledLink] = set()
        self.since = time.time()
        self.carried = Carried()
        """What was carried on links that are no more."""
        self.problem = ""
        """Why it could not reach the service when it was last asked to."""
        self.linked = time.monotonic()
        """When a link last came, was given to a service client or became idle again."""
        self.unlinked = 0.0
        """When one last ended."""
        self._noted_at = 0.0

    def note(self, problem: str) -> None:
        """It has answered: it cannot reach the service, for this reason, or "" can."""
        self.problem = problem
        self._noted_at = time.monotonic()

    @property
    def is_shunned(self) -> bool:
        """Others are to be asked first."""
        return bool(self.problem) and time.monotonic() < self._noted_at + SHUN_TIME

    @property
    def recent_problem(self) -> str:
        """The problem, as long as it says something of now."""
        return self.problem if time.monotonic() < self._noted_at + PROBLEM_TIME else ""


class PooledLink:
    """A link and what the pool knows of it."""

    def __init__(
        self, link: AnyLink, service: str, client: str, name: str, address: Any, identity: Identity | None = None
    ) -> None:
        self.link = link
        self.identity = identity
        """Who its relay client has proven to be, where the server knows them by name."""
        self.revoked = ""
        """Why it is to be closed, where its relay client has lost its right to it."""
        self.splice: Splice | None = None
        """The connection that it carries, and that has been opened."""
        self.is_counted = False
        """That connection counts among those that its identity may have."""
        self.address = address
        """Of its connection: of a proxy, maybe, where `peer` is what that has said."""
        self.service = service
        self.client = client
        """The relay client's id, random per process; of a raw link, its host."""
        self.port: int | None = None
        """That its relay client has asked for, and was given."""
        self.known_as = ""
        """The name of its relay client, where something has vouched for that; "" where anybody could say it."""
        self.proof = ""
        """What has: the token, its certificate, the clients file."""
        self.worker = 0
        """Which of its relay client's processes it leads to."""
        self.name = name
        self.peer = show_address(address)
        self.host = self.peer.rpartition(":")[0]
        self.wanted = 1
        """How many idle links its client wants."""
        self.last_heard = self.last_used = self.last_pinged = time.monotonic()
        self.pongs_due = 0
        """PINGs without an answer so far."""
        self.unproven = False
        """Not to be used before the PONG that is due."""
        self.settling = False
        """Unproven since its connection is over here, but the relay client has not shown that it has passed all bytes
        on: to a service that reads slowly, say, and hears nothing else meanwhile.  Silence says nothing then."""
        self.down = 0.0
        """Seconds for which its relay client has withdrawn the service, where it has said so in BYE."""
        self.is_doubtful = False
        """Its relay client has had it opened since the others may be dead."""
        self.moved = False
        """None of those of its relay client comes from the same host."""
        self.farewell = "the relay client gave it up"
        """Why it is given up, where the relay client has said BYE."""
        self.member = Member()
        """Its relay client, which it shares with others once it has joined the pool."""
        self.carried = Carried()
        """What its connections have carried that are over."""
        self.blocked = False
        """Its socket has not taken all of what `send` was given."""
        self._unsent = bytearray()  # of that; TLS keeps it itself

    @property
    def origin(self) -> Origin:
        return self.client, self.worker

    def send(self, frame: bytes) -> None:
        """Send a frame on an idle link, now or, where its socket is full, later by `flush`.  Raises `OSError`."""
        self._unsent += frame
        self.flush()

    def flush(self) -> None:
        """Send what can go now of what was to be sent.  Raises `OSError`."""
        self.blocked = not self.link.stream.send_now(self._unsent)

    def use(self) -> None:
        """Note that it begins or ends a connection."""
        self.last_used = time.monotonic()

    def hear(self) -> None:
        """Note that the relay client has said something."""
        self.last_heard = time.monotonic()

    def take(self, frame: Frame) -> None:
        """Note a frame between connections.  Raises `LinkFault` for a PONG without a PING: a flood of them
        would keep the keeper busy."""
        self.hear()
        if frame.kind == BYE:
            self.farewell = shown(frame.text("reason"), 400) or self.farewell
            self.down = frame.number("down", 0, 3600)
        elif frame.kind == PONG:
            self.pongs_due -= 1
            if self.pongs_due < 0:
                raise LinkFault("PONG without PING")
            if not self.pongs_due:
                self.unproven = self.settling = False


Origin = tuple[str, int]
"""A relay client, and which of its processes: links are handed out from each in turn."""
