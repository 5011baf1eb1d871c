"""What a process of either role knows for its status: connections, failures, events, and what it takes itself.

The role adds what it knows of its services and peers; what can be said of the whole role alone is `concluded`, when its
processes have been put together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import __version__
from ..carried import SLOT, Carried, current_slot
from ..runtime import Runtime
from ..splice import Splice
from ..tally import Histogram, Recent, Tally
from .report import (
    ClientStatus, ConnectionStatus, EventStatus, FailureStatus, HistogramStatus, PartyStatus, ProcessStatus,
    WITHDRAWN, ServiceStatus, Status, merge, pick_connections,
)  # fmt: skip

AWAY = "the relay client has no idle link and opens none"
AWAY_TIME = 5.0
"""Seconds without an idle link after which that is said: a relay client opens others at once, and tries again."""


def last_slot() -> int:
    """The last moment of the histories that is over."""
    return current_slot() - 1


class Surveyor:
    """Makes the status of this process.

    Parameters: the runtime, and whether what goes to services goes to links, as on a relay server.
    """

    def __init__(self, runtime: Runtime[Any], inbound_is_to_link: bool) -> None:
        self._runtime = runtime
        self._inbound_is_to_link = inbound_is_to_link
        self.started = 0.0
        """When the role has begun: seconds since 1970."""

    def survey(self, known: Status, last: int, vias: Mapping[str, str]) -> Status:
        """What is known already, and all that is common, with histories that end with the moment `last`.  What carries
        each connection stands in `vias`, by its id; the others are carried by their service."""
        runtime, now = self._runtime, time.time()
        carried, tally = runtime.splices.carried(), runtime.emit.tally.copy()
        sums: dict[str, Carried] = {}
        for (service, _), one in carried.items():
            sums.setdefault(service, Carried()).add_all(one)
        # A service that is no more is shown as long as a connection of it lives.
        names = [service.name for service in known.services] + [name for name, one in sums.items() if one.open]
        services = (self._service(name, sums.get(name), tally, now, last) for name in dict.fromkeys(names))
        events = map(show_event, sorted(tally.recent, key=lambda one: -one.time))
        common = Status(
            version=__version__, pid=os.getpid(), started=self.started, time=now, is_ending=runtime.is_ending,
            problems=tuple(runtime.pulse.complaints()), services=tuple(services), events=tuple(events),
            refused=dict(sorted(tally.refused.items())),
            parties=tuple(self._party(party, one) for party, one in sorted(carried.items())),
            open=sum(one.open for one in carried.values()), process=process_figures(),
            connections=self._connections({service.name: service.target for service in known.services}, vias, now),
        )  # fmt: skip
        return merge(known, common)

    def _bytes(self, carried: Carried) -> dict[str, Any]:
        bytes_in, bytes_out = self._ways(carried.to_link, carried.from_link)
        return {"bytes_in": bytes_in, "bytes_out": bytes_out}

    def _ways(self, to_link: Any, from_link: Any) -> tuple[Any, Any]:
        return (to_link, from_link) if self._inbound_is_to_link else (from_link, to_link)

    def _party(self, party: tuple[str, str], one: Carried) -> PartyStatus:
        service, name = party
        figures = self._bytes(one)
        return PartyStatus(service=service, name=name, open=one.open, opened=one.opened, broken=one.broken, **figures)

    def _service(self, name: str, carried: Carried | None, tally: Tally, now: float, last: int) -> ServiceStatus:
        """What is common of a service."""
        carried, trouble = carried or Carried(), tally.troubles.get(name)
        there, back = self._ways(*self._runtime.splices.history.read(name, last))
        found = ServiceStatus(
            name=name, open=carried.open, opened=carried.opened, broken=carried.broken, history_in=tuple(there),
            history_out=tuple(back), rate_in=there[-1] / SLOT, rate_out=back[-1] / SLOT, **self._bytes(carried),
        )  # fmt: skip
        if trouble is not None:
            failure = FailureStatus(time=trouble.last_at, reason=trouble.last)
            codes, count = dict(sorted(trouble.codes.items())), trouble.within_hour(now)
            found = replace(found, failed=codes, failures_hour=count, last_failure=failure)
        if (pairing := tally.pairing.get(name)) is not None:
            found = replace(found, pairing=show_histogram(pairing))
        if (duration := tally.durations.get(name)) is not None:
            found = replace(found, duration=show_histogram(duration))
        return found

    def _connections(
        self, targets: Mapping[str, str], vias: Mapping[str, str], now: float
    ) -> tuple[ConnectionStatus, ...]:
        """The open connections that are shown.  Of thousands only these are made into rows."""
        began = now - time.monotonic()
        picked = pick_connections(self._runtime.splices.snapshot(), lambda one: (one.opened, one.id), size_of)
        return tuple(
            ConnectionStatus(
                id=one.id, service=one.service, peer=one.peer, via=vias.get(one.id) or targets.get(one.service, ""),
                since=began + one.opened, state=self._state(one), **self._bytes(of_splice(one)),
            )
            for one in picked
        )  # fmt: skip

    def _state(self, splice: Splice) -> str:
        if splice.reason:
            return "breaking off"
        there, back = self._ways(splice.to_link.done, splice.from_link.done)
        return "open" if there == back else "in ended" if there else "out ended"


def of_splice(splice: Splice) -> Carried:
    """What one connection has carried."""
    carried = Carried()
    carried.add(splice)
    return carried


def size_of(splice: Splice) -> int:
    return splice.to_link.carried + splice.from_link.carried


def show_event(one: Recent) -> EventStatus:
    event = one.event
    return EventStatus(
        time=one.time, kind=type(event).__name__, level=logging.getLevelName(event.level).lower(),
        service=getattr(event, "service", ""), text=str(event), count=one.count,
    )  # fmt: skip


def show_histogram(one: Histogram) -> HistogramStatus:
    return HistogramStatus(bounds=tuple(one.bounds), counts=tuple(one.counts), sum=one.sum)


def process_figures() -> ProcessStatus:
    """What this process takes; 0 for what the system does not tell."""
    memory = descriptors = most = 0
    threads = threading.active_count()
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", "rb") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # From Linux 6.2 on; counting them takes milliseconds where there are thousands.
        descriptors = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        threads = os.stat("/proc/self/task").st_nlink - 2  # those of `_thread` as well
    with contextlib.suppress(ImportError):
        import resource

        most = max(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return ProcessStatus(
        cpu_seconds=time.process_time(), memory_bytes=memory, descriptors=descriptors, most_descriptors=most,
        threads=threads,
    )  # fmt: skip


def is_away(one: ClientStatus | ServiceStatus, now: float) -> bool:
    """Whether a relay client has lost its idle links and gets no others, though connections that it carries live on; as
    a relay server sees one, or as it sees one of its own services.

    Those prove nothing: what a relay client's host had sent before it died may take hours to reach a slow reader.
    Where all idle links were taken, and none has ended since, it may have as many links as it may.
    """
    return not one.links_idle and one.unlinked > one.linked and now - one.unlinked > AWAY_TIME


def concluded(status: Status) -> Status:
    """With what can be said of the whole role alone."""
    by_service: dict[str, list[ClientStatus]] = {}
    now, present = time.monotonic(), [one for one in status.clients if one.links_idle or one.links_busy]
    clients = [replace(one, problem=AWAY) if is_away(one, now) else one for one in present]
    for client in clients:
        by_service.setdefault(client.service, []).append(client)
    services, problems = [], list(status.problems)
    for service in status.services:
        problem = ""
        if not service.is_published:
            if not service.open:
                continue  # it was taken out, and nothing of it is left but what was counted
        elif status.role == "server":
            serving = by_service.get(service.name, [])
            if service.problem or not serving:
                problem = service.problem or "no relay client is connected"
            elif all(client.problem for client in serving):
                problem = serving[0].problem
        elif service.problem.startswith(WITHDRAWN):
            problem = service.problem  # connections that live may have links still
            problems.append(f"service {service.name} is {problem}")
        elif not (service.links_idle or service.links_busy):
            problem = service.problem or "no answer from the relay yet"
            problems.append(f"service {service.name} has no link: {problem}")
        elif service.problem and is_away(service, now):
            problem = f"no idle link: {service.problem}"  # to start it anew would break off what lives
        services.append(replace(service, problem=problem))
    if status.is_ending:
        problems.insert(0, f"the relay {status.role} is ending")
    problems += [f"worker {number} does not answer" for number in status.missing]
    return replace(status, services=tuple(services), clients=tuple(clients), problems=tuple(dict.fromkeys(problems)))
