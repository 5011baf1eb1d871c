"""The status of a relay as one frozen object: what the table, the page, ``/status.json`` and the metrics all show.

Each process of a role makes its own, and `merge` has one of several: each field says how.  `as_dict` and `from_dict`
are its form in JSON, whose names are those of the fields.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..carried import SLOT
from ..tally import DURATION_BOUNDS, MOST_EVENTS, PAIRING_BOUNDS

WITHDRAWN = "withdrawn, since its check fails"
"""How the problem of a service begins that a relay client has withdrawn."""
MOST_CONNECTIONS = 200
"""Connections that are shown: half of them the newest, and half those that have carried most."""


def _merged(how: Callable[[Any, Any], Any], default: Any) -> Any:
    return field(default=default, metadata={"merge": how})


def _sum(default: Any = 0) -> Any:
    """A figure that adds up over all processes."""
    return _merged(operator.add, default)


def _told(default: Any = "") -> Any:
    """What one process knows, or all alike; the first one's, where they differ."""
    return _merged(lambda one, other: one or other, default)


def _counts() -> Any:
    """Figures by name."""
    return field(default_factory=dict, metadata={"merge": _add_counts})


def _part(make: Callable[[], Any], kind: type[Any]) -> Any:
    """An object of its own."""
    return field(default_factory=make, metadata={"merge": lambda one, other: merge(one, other), "kind": kind})


def _rows(kind: type[Any], how: Callable[[Any, Any], Any]) -> Any:
    """Objects of their own."""
    return field(default=(), metadata={"merge": how, "kind": kind})


def _each(one: Sequence[Any], other: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(operator.add, one, other)) if one and other else tuple(one or other)


def _add_counts(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}


@dataclass(frozen=True, kw_only=True)
class HistogramStatus:
    """How often a figure was up to each of some bounds, in seconds; `counts` has one more, for those above all."""

    bounds: tuple[float, ...] = _told(())
    counts: tuple[int, ...] = _merged(_each, ())
    sum: float = _sum(0.0)


@dataclass(frozen=True, kw_only=True)
class FailureStatus:
    """The last connection that was never opened, or broken off; `time` is in seconds since 1970, 0 for none yet."""

    time: float = 0.0
    reason: str = ""


def _later(one: FailureStatus, other: FailureStatus) -> FailureStatus:
    return max(one, other, key=lambda failure: failure.time)


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """A service."""

    name: str = _told()
    address: str = _told()
    """Where service clients connect; on a relay client what the relay server says of that, "" while it is not
    published."""
    target: str = _told()
    """On a relay client: where the service is."""
    is_published: bool = _told(False)
    """It is one of the role's services; False of one that was taken out, while connections of it live."""
    problem: str = _told()
    """Why it cannot be reached by service clients now, as far as that is known; "" where it can."""
    links_idle: int = _sum()
    links_busy: int = _sum()
    """Links that carry a connection, or are about to."""
    links_opening: int = _sum()
    """On a relay client: those that are being opened."""
    linked: float = _merged(max, 0.0)
    """On a relay client: as in `ClientStatus`."""
    unlinked: float = _merged(max, 0.0)
    waiting: int = _sum()
    """On a relay server: service clients that wait for a link."""
    open: int = _sum()
    """Connections."""
    opened: int = _sum()
    """Connections since the start, the open ones included."""
    broken: int = _sum()
    """Of these: how many were broken off."""
    failed: Mapping[str, int] = _counts()
    """Connections that were never opened, by code (`events.FAILURES`)."""
    failures_hour: int = _sum()
    """How many were never opened, or broken off, in the last hour."""
    last_failure: FailureStatus = field(
        default_factory=lambda: FailureStatus(), metadata={"merge": _later, "kind": FailureStatus}
    )
    bytes_in: int = _sum()
    """To the service, since the start."""
    bytes_out: int = _sum()
    rate_in: float = _sum(0.0)
    """Bytes a second now, that is in the last two seconds that are over."""
    rate_out: float = _sum(0.0)
    history_in: tuple[int, ...] = _merged(_each, ())
    """Bytes in each of the last moments of `Status.slot_seconds`, the oldest first."""
    history_out: tuple[int, ...] = _merged(_each, ())
    pairing: HistogramStatus = _part(lambda: HistogramStatus(bounds=PAIRING_BOUNDS), HistogramStatus)  # noqa: RUF009
    """How long service clients have waited until their service had answered."""
    duration: HistogramStatus = _part(lambda: HistogramStatus(bounds=DURATION_BOUNDS), HistogramStatus)  # noqa: RUF009
    """How long connections have lasted that are over."""


@dataclass(frozen=True, kw_only=True)
class ClientStatus:
    """A relay client that is connected, with its links for one service."""

    service: str = _told()
    id: str = _told()
    """Random, for each of its processes' lives."""
    name: str = _told()
    address: str = _told()
    proof: str = _told()
    """What vouches for the name: "the token", "the clients file", "certificate NAME"; "" where nothing does."""
    since: float = _merged(min, 0.0)
    """Seconds since 1970."""
    problem: str = _told()
    """Why it could not reach the service when it was last asked to, or cannot be asked; "" where it can."""
    links_idle: int = _sum()
    links_busy: int = _sum()
    linked: float = _merged(max, 0.0)
    """When a link of it last came, was given to a service client or became idle again: on the host's monotonic clock,
    which no correction of the time moves."""
    unlinked: float = _merged(max, 0.0)
    """When one last ended; 0 for none yet."""
    opened: int = _sum()
    """Connections since then, as are the next three."""
    broken: int = _sum()
    bytes_in: int = _sum()
    bytes_out: int = _sum()


@dataclass(frozen=True, kw_only=True)
class RelayStatus:
    """On a relay client: a relay server, and the links to it."""

    address: str = _told()
    links_idle: int = _sum()
    links_busy: int = _sum()
    links_opening: int = _sum()
    problem: str = _told()
    """Why it gives one of the services no links, or none any more; "" where it does."""


@dataclass(frozen=True, kw_only=True)
class PartyStatus:
    """What has been carried for a service by the relay clients of one name, since the start: for the metrics."""

    service: str = _told()
    name: str = _told()
    """As far as something vouches for it; "" is all others."""
    open: int = _sum()
    opened: int = _sum()
    broken: int = _sum()
    bytes_in: int = _sum()
    bytes_out: int = _sum()


@dataclass(frozen=True, kw_only=True)
class ConnectionStatus:
    """An open connection; `id` is the one in the log."""

    id: str
    service: str
    peer: str
    via: str
    """The relay client that carries it, or on a relay client the service."""
    since: float
    """Seconds since 1970."""
    bytes_in: int
    bytes_out: int
    state: str
    """"open"; "in ended" or "out ended", where one direction has; "breaking off"."""


@dataclass(frozen=True, kw_only=True)
class EventStatus:
    """Something that happened; `text` is its line in the log."""

    time: float
    """Seconds since 1970; of the last, where it has happened `count` times."""
    kind: str
    level: str
    service: str
    text: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """What the processes of the role take, together."""

    cpu_seconds: float = _sum(0.0)
    memory_bytes: int = _sum()
    """Resident; 0 where the system does not tell."""
    descriptors: int = _sum()
    most_descriptors: int = _merged(lambda one, other: min(one, other) if one and other else one or other, 0)
    """That each process may have."""
    threads: int = _sum()


def _by(*names: str) -> Callable[[Any, Any], Any]:
    """Merges rows that are alike in these fields; in the order in which they first stand there."""

    def merge_rows(one: Sequence[Any], other: Sequence[Any]) -> tuple[Any, ...]:
        rows: dict[tuple[Any, ...], Any] = {}
        for row in (*one, *other):
            key = tuple(getattr(row, name) for name in names)
            rows[key] = merge(rows[key], row) if key in rows else row
        return tuple(rows.values())

    return merge_rows


def pick_connections(
    connections: Sequence[ItemT], age: Callable[[ItemT], Any], size: Callable[[ItemT], int]
) -> tuple[ItemT, ...]:
    """The ones that are shown: the newest, and those that have carried most; the newest first."""
    if len(connections) <= MOST_CONNECTIONS:
        picked = list(connections)
    else:
        half = MOST_CONNECTIONS // 2
        picked = heapq.nlargest(half, connections, key=age)
        newest = set(map(id, picked))
        picked += heapq.nlargest(half, (one for one in connections if id(one) not in newest), key=size)
    return tuple(sorted(picked, key=age, reverse=True))


ItemT = TypeVar("ItemT")


def _pick(one: Sequence[ConnectionStatus], other: Sequence[ConnectionStatus]) -> tuple[ConnectionStatus, ...]:
    return pick_connections(
        [*one, *other], lambda each: (each.since, each.id), lambda each: each.bytes_in + each.bytes_out
    )


def _newest_events(one: Sequence[EventStatus], other: Sequence[EventStatus]) -> tuple[EventStatus, ...]:
    return tuple(sorted((*one, *other), key=lambda event: -event.time)[:MOST_EVENTS])


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a relay is doing: see `tcprelay.Relay.status`."""

    role: str = _told()
    """"server" or "client"."""
    version: str = _told()
    pid: int = _told(0)
    address: str = _told()
    """Of a relay server: where relay clients connect; of a relay client: of its relay server."""
    started: float = _told(0.0)
    """Seconds since 1970, as is the next."""
    time: float = _told(0.0)
    """The moment of this status."""
    is_ending: bool = _told(False)
    """Open connections have until the drain time-out."""
    problems: tuple[str, ...] = _merged(lambda one, other: tuple(dict.fromkeys((*one, *other))), ())
    """Why the role does not do its work: one sentence each.  Empty where it does."""
    workers: int = _told(0)
    """How many worker processes there should be; 0 where there are none."""
    missing: tuple[int, ...] = _merged(lambda one, other: tuple(sorted({*one, *other})), ())
    """The numbers of those that have not answered: what they do is left out."""
    services: tuple[ServiceStatus, ...] = _rows(ServiceStatus, _by("name"))
    clients: tuple[ClientStatus, ...] = _rows(ClientStatus, _by("service", "id"))
    relays: tuple[RelayStatus, ...] = _rows(RelayStatus, _by("address"))
    """On a relay client: the relay servers."""
    parties: tuple[PartyStatus, ...] = _rows(PartyStatus, _by("service", "name"))
    open: int = _sum()
    """How many connections are open."""
    connections: tuple[ConnectionStatus, ...] = _rows(ConnectionStatus, _pick)
    """Up to `MOST_CONNECTIONS` of them."""
    events: tuple[EventStatus, ...] = _rows(EventStatus, _newest_events)
    """The last ones, the newest first; links that come and go, and connections that went well, are left out."""
    refused: Mapping[str, int] = _counts()
    """Connections to the relay port that did not become links, by code."""
    process: ProcessStatus = _part(ProcessStatus, ProcessStatus)  # noqa: RUF009
    slot_seconds: float = _told(SLOT)
    """How long a moment of the histories is."""

    @property
    def is_healthy(self) -> bool:
        """Whether the role does its work."""
        return not self.problems


StatusT = TypeVar("StatusT")


def merge(one: StatusT, other: StatusT) -> StatusT:
    """Two objects of one class as one, field by field: first comes what the parent knows."""
    return type(one)(
        **{
            item.name: item.metadata["merge"](getattr(one, item.name), getattr(other, item.name))
            for item in dataclasses.fields(one)  # type: ignore[arg-type]
        }
    )


def counted(status: Status) -> Status:
    """What has been counted alone: what it was of a process that is no more, or does not answer, so that no sum becomes
    less."""
    services = tuple(
        ServiceStatus(
            name=one.name, opened=one.opened, broken=one.broken, failed=one.failed, failures_hour=one.failures_hour,
            last_failure=one.last_failure, bytes_in=one.bytes_in, bytes_out=one.bytes_out, pairing=one.pairing,
            duration=one.duration,
        )
        for one in status.services
    )  # fmt: skip
    parties = tuple(dataclasses.replace(one, open=0) for one in status.parties)
    process = ProcessStatus(cpu_seconds=status.process.cpu_seconds)
    return Status(services=services, parties=parties, events=status.events, refused=status.refused, process=process)


def as_dict(status: Any) -> Any:
    """What `json.dumps` takes."""
    if dataclasses.is_dataclass(status):
        return {item.name: as_dict(getattr(status, item.name)) for item in dataclasses.fields(status)}
    if isinstance(status, (tuple, list)):
        return [as_dict(item) if dataclasses.is_dataclass(item) else item for item in status]
    return status


def from_dict(found: Mapping[str, Any]) -> Status:
    """A `Status` from what `as_dict` has made of it, in another process of the same version."""
    return _restore(Status, found)


def _restore(kind: type[StatusT], found: Mapping[str, Any]) -> StatusT:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        value, part = found[item.name], item.metadata.get("kind")
        if isinstance(value, list):
            value = tuple(_restore(part, row) for row in value) if part else tuple(value)
        elif part:
            value = _restore(part, value)
        values[item.name] = value
    return kind(**values)
