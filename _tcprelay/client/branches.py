"""The relay servers that a client has links to, each with a stock of its own, and the keeper that looks after them.

    keeper ─▶ Branches.look                 which relay servers there are, by the names behind which they stand
              Stock.take_missing ─▶ Links.open   for each of them what is missing there

A relay server that is down has a pace and a backoff of its own, and costs the others nothing.  With --relay-all a name
stands for all its addresses: one that appears gets links, and one that vanishes is given up in peace.  A name server
that does not answer takes none away.

One condition is over all stocks, and the keeper, a thread that lives as long as the client, waits on it.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from ..addresses import Endpoint, host_of
from ..client_options import ClientOptions
from ..names import Name
from ..runtime import Runtime
from ..status.report import WITHDRAWN, RelayStatus, ServiceStatus
from ..status.survey import is_away
from ..text import say_error
from ..threads import JOIN_TIMEOUT
from ..values import Publication
from ..waiting import Deadline
from .links import Links
from .stock import Service, Stock, begin_all, say_problem

FIRST_LOOK = 2.0
"""Seconds that a name server has at the start before the name itself is dialled, which tells why there is none."""


class Branch:
    """A relay server, and the links to it."""

    def __init__(self, relay: Endpoint, called: Endpoint, stock: Stock, links: Links) -> None:
        self.relay = relay
        self.called = called
        """As it stands in the options: the same, or the name of several."""
        self.stock = stock
        self.links = links


class Branches:
    """The relay servers that a client has links to.

    Parameters: the runtime; what makes a branch for a relay server, by where it is and what it is called in the
    options; and what makes the services of one from what is published.
    """

    def __init__(
        self, runtime: Runtime[ClientOptions], make: Callable[[Endpoint, Endpoint, Branches], Branch],
        make_services: Callable[[list[Publication]], list[Service]],
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._make = make
        self._make_services = make_services
        self.condition = threading.Condition()  # over all stocks, and what follows
        self._all: list[Branch] = []
        self._leaving: list[Branch] = []
        """Those that are no more, and may have links still."""
        self._ending = False
        self.changing = threading.Lock()
        """Held while a relay server is added, and while what is published changes: it would be added with what was."""
        self._names = {relay: Name(relay.host, relay.port) for relay in runtime.options.relays}
        self.told_of: Callable[[Links], object] = lambda links: None
        """Called with the links to each further relay server, before any is opened."""
        self._began = 0.0
        self.keeper: threading.Thread | None = None
        """The thread that opens links and looks after all; from `begin` on."""
        self._opens_none = threading.Event()
        """No further links are opened: the end has begun."""

    # For the role

    def begin(self) -> threading.Thread:
        """Get ready to open links; returns the keeper, with whose start that begins.  Raises `OSError`."""
        self._began = time.monotonic()
        if not self._runtime.options.relay_all:
            for relay in self._names:
                self._add(relay, relay)
        self.keeper = self._runtime.own_thread(self._keep, "keeper", self._runtime.cut)
        return self.keeper

    def missing(self, publications: list[Publication]) -> list[tuple[Branch, list[Service]]]:
        """The services of these that there are not yet, for each relay server.  Raises `OSError`."""
        with self.condition:
            branches = list(self._all)
        fresh = [(branch, self._make_services(branch.stock.missing(publications))) for branch in branches]
        begin_all(itertools.chain(*(services for _, services in fresh)))
        return fresh

    def replace(self, publications: list[Publication], fresh: list[tuple[Branch, list[Service]]]) -> None:
        """Publish these from now on, of which some are `fresh`, at all relay servers: see `Stock.replace`."""
        for branch, services in fresh:
            branch.stock.replace(publications, services)

    def count(self) -> int:
        """How many relay servers there are."""
        with self.condition:
            return len(self._all)

    def links(self) -> list[Links]:
        """Of each relay server."""
        with self.condition:
            return [branch.links for branch in self._all]

    def count_idle(self) -> int:
        with self.condition:
            return sum(branch.stock.count_idle() for branch in self._all)

    def survey(self) -> tuple[tuple[ServiceStatus, ...], tuple[RelayStatus, ...]]:
        """The services with their links, and the relay servers, for the status."""
        with self.condition:
            branches = [*self._all, *self._leaving]
            rows = [branch.stock.survey() for branch in branches]
        relays, now = [], time.monotonic()
        for branch, services in zip(branches, rows, strict=True):
            why = next(filter(None, (_say_lost(service, now) for service in services)), "")
            relays.append(
                RelayStatus(
                    address=str(branch.relay), links_idle=sum(service.links_idle for service in services),
                    links_busy=sum(service.links_busy for service in services),
                    links_opening=sum(service.links_opening for service in services), problem=why,
                )
            )  # fmt: skip
        addresses: dict[str, dict[str, None]] = {}
        for service in itertools.chain(*rows):
            addresses.setdefault(service.name, {}).update({service.address: None} if service.address else {})
        published = {name: ", ".join(found) for name, found in addresses.items()}
        return tuple(replace(one, address=published[one.name]) for one in itertools.chain(*rows)), tuple(relays)

    def wait_until_published(self, deadline: Deadline) -> tuple[str, str] | None:
        """Wait until each service has links to a relay server; at the deadline or the end returns one that has none,
        and why."""
        with self.condition:
            while True:
                told: dict[str, list[Service]] = {one.name: [] for one in self._runtime.options.services}
                for branch in self._all:
                    for service in branch.stock.services:
                        told.setdefault(service.name, []).append(service)
                missing = [
                    (name, next(filter(None, map(say_problem, services)), ""))
                    for name, services in told.items()
                    if all(service.told != "" for service in services)
                ]
                left = deadline.remaining()
                if self._ending:
                    return (missing or [(name, "") for name in told])[0][0], "the relay client is ending"
                if not missing:
                    return None
                if left == 0:
                    name, reason = missing[0]
                    return name, reason or "no answer from the relay yet"
                self.condition.wait(left)

    def end(self) -> None:
        """Open no further links, and give up those that are idle."""
        with self.condition:
            self._ending = True
            for branch in self._all:
                branch.stock.end()
            self.condition.notify_all()
        if self.keeper is not None and self.keeper.ident is not None:
            self._opens_none.wait(JOIN_TIMEOUT)

    def wake_all(self) -> None:
        """Wake the threads that wait for something on a link."""
        for branch in (*self._all, *self._leaving):
            branch.stock.wake_all()

    def close(self) -> None:
        """Give back what links have waited on, when there are none any more."""
        for branch in (*self._all, *self._leaving):
            branch.stock.close()

    # The keeper

    def _keep(self) -> None:
        """Open the links that are missing, and look at the time every so often, until `Runtime.stop` is requested; from
        then on only the latter, until `Runtime.cut` is."""
        runtime, splices = self._runtime, self._runtime.splices
        next_sweep = time.monotonic()
        while not runtime.stop.requested:
            runtime.pulse.keep("keeper")
            moments = [links.look_around() for links in self.links()]
            for branch, service, count in self._wait_for_missing(min([next_sweep, *moments])):
                for _ in range(count):
                    branch.links.open(service)
            if time.monotonic() >= next_sweep:
                splices.sweep()
                runtime.emit.tell_floods()
                if runtime.options.relay_all:
                    self._look()
                next_sweep = time.monotonic() + splices.interval
        self._opens_none.set()
        while not runtime.cut.requested:  # while connections drain, their time-outs still count
            runtime.pulse.keep("keeper")
            runtime.cut.wait(splices.interval)
            splices.sweep()

    def _wait_for_missing(self, until: float) -> list[tuple[Branch, Service, int]]:
        """How many links are to be opened where; waits until some are, or for the moment `until`, or the end."""
        with self.condition:
            now, found, moment = time.monotonic(), [], until
            for branch in self._all:
                missing, again = branch.stock.take_missing(now)
                found += [(branch, service, count) for service, count in missing]
                moment = min(moment, again)
            if not (found or self._ending):
                self.condition.wait(max(0.0, moment - now))
        return found

    def _look(self) -> None:
        """Have a branch for each address behind the names, and none for others."""
        for called, name in self._names.items():
            here = [branch for branch in self._all if branch.called == called]
            wanted = self._addresses(called, name, bool(here))
            if wanted is None:
                continue
            there = {branch.relay for branch in here}
            for relay in wanted:
                if relay in there:
                    continue
                try:
                    self._add(relay, called)
                except OSError as error:  # for want of descriptors, say
                    self._runtime.log.warning("no links to %s yet: %s", relay, say_error(error))
            for branch in here:
                if branch.relay not in wanted:
                    self._give_up(branch)
        with self.condition:
            self._leaving = [branch for branch in self._leaving if not branch.stock.is_empty]

    def _addresses(self, called: Endpoint, name: Name, has_any: bool) -> list[Endpoint] | None:
        """Where a relay server of this name is; ``None`` where nothing is known yet, or not any more."""
        try:
            found = name.addresses(Deadline(0), math.inf)
        except OSError:
            is_late = time.monotonic() - self._began > FIRST_LOOK
            return [called] if is_late and not has_any else None
        return list(dict.fromkeys(Endpoint(host_of(address), called.port) for _, address in found))

    def _add(self, relay: Endpoint, called: Endpoint) -> None:
        """Keep links to one more.  Raises `OSError`."""
        with self.changing:
            branch = self._make(relay, called, self)
            begin_all(branch.stock.services)
            with self.condition:
                if self._ending:
                    branch.stock.end()
                self._all.append(branch)  # only the keeper opens links of it, and that is this thread
            self.told_of(branch.links)
        with self.condition:
            self.condition.notify_all()
        if relay != called:
            self._runtime.log.info("%s is at %s, too: links are kept to it", called, relay)

    def _give_up(self, branch: Branch) -> None:
        with self.changing:
            with self.condition:
                self._all.remove(branch)
                self._leaving.append(branch)
            branch.stock.replace([], [])
        self._runtime.log.info("%s is no more at %s: its links are given up", branch.called, branch.relay)


def _say_lost(service: ServiceStatus, now: float) -> str:
    """Why a relay server gives a service no links; "" where it does, or is to give none."""
    is_wanted = service.is_published and not service.problem.startswith(WITHDRAWN)
    has_none = not (service.links_idle or service.links_busy)
    return service.problem if is_wanted and (has_none or is_away(service, now)) else ""
