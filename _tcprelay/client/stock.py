"""The links of a relay client by their state, and how many are missing; no I/O.

Backing off: after a failure, one link at a time tries again, at a random moment within a span that doubles.  The first
that gets through, or that is left after losses, brings the others after it at a measured pace, so that a thousand
clients do not fall upon a relay server that has just been restarted.  A link that START takes is replaced at once.

Any thread; one condition is over all of it, and the keeper waits on that.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable

from ..link import AnyLink
from ..sockets import Dialer
from ..status.report import WITHDRAWN, ServiceStatus
from ..system import random_fraction
from ..values import Publication
from ..waiting import Stop
from ..watch import Places
from .refill import (
    EAGER_SPAN, EAGER_TIME, FIRST_BACKOFF, GROWTH, LAST_BACKOFF, REFUSED_BACKOFF, WITHDRAWN_AGAIN, Pace,
)  # fmt: skip

MOST_HANDSHAKES = 256
"""Links that are being opened at once: as many handshakes as each relay server takes."""
MOST_REASONS = 16
"""Reasons that are remembered as told."""
STABLE_TIME = 10.0
"""Seconds that a link must have been up for its loss to count as the first."""


class Unreachable(ConnectionError):
    """There is no connection to the relay server; the message says why."""


class RefusedByServer(ConnectionError):
    """The relay server refused a link, its proofs were not accepted here, or it is none; the message says why."""

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.passing = code in ("draining", "limit")
        """It passes soon."""
        self.lasting = code in LASTING
        """It does not pass by itself."""


LASTING = (
    "", "version", "token", "certificate", "rights", "service", "protected", "address", "protocol", "tls",
)  # fmt: skip
"""The codes of what does not pass before a setting is changed; "" is what is found wrong here.  An unknown one is like
a time-out."""


def longest_backoff(error: BaseException) -> float:
    """Where the span between two attempts stops growing after such a failure, in seconds."""
    passing = isinstance(error, (Unreachable, RuntimeError, MemoryError))
    passing = passing or (isinstance(error, RefusedByServer) and error.passing)
    return LAST_BACKOFF if passing else REFUSED_BACKOFF


class Service:
    """A published service and the state of its links; all but the first three under `Stock._condition`."""

    def __init__(self, publication: Publication, most_idle: int, workers: int = 1) -> None:
        self.publication = publication
        self.name = publication.name
        self.target = publication.target
        self.port = publication.port
        """The port that the relay server is asked for; 0 is any, ``None`` one that it has for this name."""
        self.had = 0
        """The one that it gave last."""
        self.address = ""
        """Where the service was last told to be."""
        self.dialer = Dialer(publication.target)
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
        self.trying = True
        """At the start and after a failure, until a link is up: one attempt at a time."""
        self.stop: Stop | None = None
        """Requested when nothing more is to come over its links: at the end, or when it is published no more."""
        self.carried = 0
        """Connections that its links have begun to carry."""
        self.told: str | None = None
        """What was last told of its state: "" is published, ``None`` nothing yet, otherwise why not."""
        self.reasons: set[str] = set()
        """Those that were told since it was published: each is told once, also where they take turns."""
        self.failing = ""
        """Why the last attempt has failed, until a link is up."""
        self.linked = self.unlinked = 0.0
        """When a link last came, was taken or became idle again; and when an idle one last ended."""
        self.remarks: set[str] = set()
        """Why it got no further links, as far as that was told."""
        self.is_known = False
        """A link of it has been up: the relay is where it was looked for."""
        self.down = ""
        """Why it is withdrawn: its check fails.  It has no idle links then, and none is opened."""
        self.down_again = 0.0
        """When the relay server is to be told so once more."""
        self.is_probing = False
        """One link is to be opened at once, whatever else is under way."""

    def begin(self) -> None:
        """Make what its links wait on.  Raises `OSError`."""
        self.stop = Stop()

    def close(self) -> None:
        """Give that back."""
        if self.stop is not None:
            self.stop.close()


class Stock:
    """The services and their links to one relay server.

    Parameters: the services; how many idle links each should have; the places that there are for links; how many may be
    opened at once; and the condition that is over all of it, and that all relay servers' stocks share.
    """

    def __init__(
        self, services: list[Service], most_idle: int, places: Places, handshakes: int, condition: threading.Condition
    ) -> None:
        self.services = services
        self._most_idle = most_idle
        self._places = places
        self._most_handshakes = handshakes
        self._condition = condition  # over the services' states and what follows
        self._handshakes = handshakes
        """Links that may be opened at once: half as many after a failure, and with each that is up one more."""
        self._links: set[AnyLink] = set()
        self._leaving: list[Service] = []
        """Services that are published no more, and may have links still."""
        self._eager_until = 0.0
        self._ending = False

    def count_idle(self) -> int:
        with self._condition:
            return sum(service.idle for service in self.services)

    # For the role

    def survey(self) -> tuple[ServiceStatus, ...]:
        """The services with their links in this process, for the status."""
        with self._condition:
            return tuple(
                ServiceStatus(
                    name=service.name, address=service.address if service.told == "" else "",
                    target=str(service.target), is_published=is_published,
                    problem=say_problem(service) or service.failing,
                    links_idle=service.idle, links_busy=service.busy, links_opening=service.connecting,
                    linked=service.linked, unlinked=service.unlinked,
                )
                for services, is_published in ((self.services, True), (self._leaving, False))
                for service in services
            )  # fmt: skip

    def missing(self, publications: list[Publication]) -> list[Publication]:
        """Those of them that are not published yet."""
        there = {service.publication for service in self.services}
        return [publication for publication in publications if publication not in there]

    def replace(self, publications: list[Publication], fresh: list[Service]) -> None:
        """Publish these from now on, of which some services are `fresh`.

        A service that is published elsewhere, or on another port, is another one.  Idle links of those that go are
        given up in peace; connections that live go on.
        """
        with self._condition:
            services = {service.publication: service for service in (*self.services, *fresh)}
            gone = [service for service in self.services if service.publication not in publications]
            self.services = [services[publication] for publication in publications]
            self._leaving += gone
            for service in gone:
                if service.stop is not None:
                    service.stop.request()
                self._forget(service)
            self._condition.notify_all()

    # Services that cannot be reached, and hosts that move

    def withdraw(self, key: str, reason: str) -> None:
        """The service whose publication reads like that is down: it is to have no links until it is back."""
        with self._condition:
            for service in self._published_as(key):
                has_links = service.idle or service.busy or service.connecting  # which tell the relay server of it
                service.down_again = time.monotonic() + WITHDRAWN_AGAIN * bool(has_links)
                was_down, service.down = service.down, reason  # first: links that are woken look at it
                if not was_down and service.stop is not None and not self._ending:
                    service.stop.request()
            self._condition.notify_all()

    def restore(self, key: str) -> None:
        """It is back: all its links are wanted at once."""
        with self._condition:
            for service in self._published_as(key):
                if service.down and service.stop is not None and not self._ending:
                    service.stop.take_back()
                service.down = ""
                service.pace.fill()
            self._condition.notify_all()

    def _published_as(self, key: str) -> list[Service]:
        return [service for service in self.services if str(service.publication) == key]

    def hasten(self) -> None:
        """This host may have lost its links, and its network may not be back yet: open one link of each service at
        once, and try again soon for a while."""
        with self._condition:
            self._eager_until = time.monotonic() + EAGER_TIME
            for service in self.services:
                service.is_probing, service.retry_at, service.span = not service.down, 0.0, 0.0
            self._condition.notify_all()

    @property
    def is_eager(self) -> bool:
        """It tries again soon."""
        return time.monotonic() < self._eager_until

    # For the keeper

    def take_missing(self, now: float) -> tuple[list[tuple[Service, int]], float]:
        """How many links of each service are to be opened now, which count as connecting from here on, and when to look
        again; under the condition."""
        if self._ending:
            return [], math.inf
        missing = [(service, *self._take_missing(service, now)) for service in self.services]
        moment = min([moment for *_, moment in missing], default=math.inf)
        return [(service, count) for service, count, _ in missing if count], moment

    @property
    def is_empty(self) -> bool:
        """Whether there is no link, and none to come; under the condition."""
        return not (self.services or self._leaving)

    def _take_missing(self, service: Service, now: float) -> tuple[int, float]:
        """How many links to open now, and when to look again."""
        if service.down and now >= service.down_again:
            service.down_again = now + WITHDRAWN_AGAIN
            service.is_probing = not service.busy
        if service.is_probing and self._places.enter():
            service.is_probing = False
            service.connecting += 1
            return 1, now
        if service.down:
            return 0, service.down_again
        if now < service.retry_at:
            return 0, service.retry_at
        wanted, moment = service.pace.wanted(now)
        wanted += min(service.asked, self._most_idle + GROWTH * service.busy) - service.idle - service.connecting
        room = self._handshakes - sum(other.connecting for other in self.services)
        if service.trying:
            wanted = min(wanted, 1 - service.connecting)
        elif wanted <= room:
            service.asked = 0
        count = 0
        while count < min(wanted, room) and self._places.enter():
            count += 1
        service.connecting += count
        return count, moment

    # For a link's thread

    def fail(
        self, service: Service, began: float, reason: str, longest: float = LAST_BACKOFF, ending: bool = False
    ) -> bool:
        """An attempt that began then has failed: wait, longer each time.  True where that is to be told."""
        with self._condition:
            service.connecting -= 1
            service.failing = reason
            self._back_off(service, began, longest)
            self._forget(service)
            return not ending and service in self.services and self._should_tell(service, reason)

    def doubt(self, service: Service, reason: str) -> bool:
        """An attempt has not failed yet, but may well.  True where that is to be told."""
        with self._condition:
            return not (service.is_known or self._ending) and self._should_tell(service, reason)

    def _should_tell(self, service: Service, reason: str) -> bool:
        """Whether the state of a service is to be told that has no link for this reason; then it counts as told."""
        if service.idle + service.busy or service.down or reason in service.reasons:
            return False
        if len(service.reasons) >= MOST_REASONS:
            service.reasons.clear()
        service.reasons.add(reason)
        service.told = reason
        return True

    def remark(self, service: Service, reason: str) -> bool:
        """Whether it is to be told that a service, which has links, gets no more for this reason: once for each."""
        with self._condition:
            fresh = service.idle + service.busy > 0 and reason not in service.remarks
            if fresh and len(service.remarks) < MOST_REASONS:
                service.remarks.add(reason)
            return fresh

    def add(self, link: AnyLink, service: Service, waiting: int) -> None:
        """A link is up: it counts as idle, and others may follow it.  So many service clients wait at the server."""
        with self._condition:
            self._links.add(link)
            service.connecting -= 1
            service.failing, service.linked = "", time.monotonic()
            self._handshakes = min(self._most_handshakes, self._handshakes + 1)
            service.idle += 1
            service.asked = max(0, waiting - 1)  # this one serves the first
            if service.trying and service.failures and not self.is_eager:
                service.pace.begin(time.monotonic())
            service.trying = False
            self._condition.notify_all()

    def tell_up(self, service: Service, address: str) -> bool:
        """Whether it is to be told that the service can be reached at this address."""
        with self._condition:
            if service.down:
                return False  # this link says so, and is given up
            tell = service in self.services and (service.told != "" or service.address != address)
            service.told = ""
            service.address = address
            service.is_known = True
            service.reasons.clear()
            self._condition.notify_all()  # who waits until all is published
            return tell

    def use(self, service: Service, waiting: int, idle: int = 1) -> None:
        """A link, which counts as so many `idle` ones, begins to carry a connection; so many service clients wait."""
        with self._condition:
            service.idle -= idle
            service.busy += 1
            service.linked = time.monotonic()
            service.carried += 1
            service.asked = waiting
            if service.idle + service.connecting < self._most_idle + waiting:
                self._condition.notify_all()  # the keeper opens more

    def shift(self, service: Service, idle: int = 0, busy: int = 0) -> None:
        """Count so many more links as idle and as busy."""
        with self._condition:
            service.idle += idle
            service.busy += busy
            if idle > 0:
                service.linked = time.monotonic()
            if idle < 0:
                self._condition.notify_all()  # the keeper opens another

    def remove(self, link: AnyLink, service: Service, since: float, carried: int, was_idle: bool) -> None:
        """A link is down that was up since then, when so many connections of its service had been carried."""
        with self._condition:
            self._links.discard(link)
            service.idle -= 1
            if was_idle:
                service.unlinked = time.monotonic()
                service.pace.lose(service.unlinked)
            # A relay that takes links and drops them is no better than one that refuses them; but a link
            # that was lost with a connection, or given up here, says nothing about the relay.
            if time.monotonic() - since >= STABLE_TIME or service.carried != carried or not was_idle:
                service.failures, service.retry_at = 0, 0.0
            else:
                self._back_off(service, since)
            self._forget(service)

    def _forget(self, service: Service) -> None:
        """A link is gone: of a service that is published no more it may have been the last."""
        if service in self._leaving and not (service.idle or service.busy or service.connecting):
            self._leaving.remove(service)
            if service.stop is not None:
                service.stop.close()

    def _back_off(self, service: Service, began: float, longest: float = LAST_BACKOFF) -> None:
        """Set the moment of the next attempt, after one that began then has failed."""
        if began >= service.failed_at:  # those under way at the same time count once
            service.failed_at = time.monotonic()
            service.failures += 1
            self._handshakes = max(len(self.services), self._handshakes // 2)  # each service may try one
            service.span = FIRST_BACKOFF if service.failures == 1 else min(longest, 2 * service.span or FIRST_BACKOFF)
            if self.is_eager and longest <= LAST_BACKOFF:
                service.span = EAGER_SPAN
            # Measured from its beginning: one that took long to fail has been waiting already.
            service.retry_at = max(service.failed_at, began + service.span * random_fraction())
            service.trying = True
        self._condition.notify_all()

    # The end

    def leave(self) -> None:
        """A link's thread ends."""
        self._places.leave()
        with self._condition:
            self._condition.notify_all()

    def end(self) -> None:
        """Open no further links, and give up those that are idle."""
        with self._condition:
            self._ending = True
            for service in self.services:
                if service.stop is not None:
                    service.stop.request()
            self._condition.notify_all()

    def close(self) -> None:
        """Give back what links have waited on, when there are none any more."""
        for service in (*self.services, *self._leaving):
            if service.stop is not None:
                service.stop.close()

    def wake_all(self) -> None:
        """Wake the threads that wait for something on a link."""
        with self._condition:  # a link is closed after it has left the set
            for link in self._links:
                link.wake()


def begin_all(services: Iterable[Service]) -> None:
    """Have all of them begin, or none.  Raises `OSError`."""
    begun: list[Service] = []
    try:
        for service in services:
            service.begin()
            begun.append(service)
    except BaseException:
        for service in begun:
            service.close()
        raise


def say_problem(service: Service) -> str:
    """Why a service has no links, as far as that is known."""
    return f"{WITHDRAWN}: {service.down}" if service.down else service.told or ""
