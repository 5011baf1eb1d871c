"""The metrics: a status as text that Prometheus reads, and others that speak its format.

There are two formats.  The classic one, version 0.0.4, stands at prometheus.io under "Exposition formats"; OpenMetrics
1.0 is made from it and is stricter.  They differ in how counters and infos are announced, in units, and in the end;
the samples are the same in both, so that a scraper may change from one to the other.

`METRICS` is the table of all of them, which docs/metrics.md shows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..events import FAILURES
from .report import HistogramStatus, PartyStatus, ServiceStatus, Status, merge
from .survey import AWAY

OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
CLASSIC = "text/plain; version=0.0.4; charset=utf-8"
"""The content types of the two formats, as their specifications have them."""
REFUSALS = (
    "version", "token", "certificate", "rights", "service", "protected", "address", "protocol", "tls", "quota", "port",
    "limit", "timeout", "draining", "lost", "system",
)  # fmt: skip
"""The codes of `events.LinkRefused`: those of docs/protocol.md that a relay server sends, and two for its log alone."""
QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")
"""How much somebody wants a content type (RFC 9110, section 12.4.2)."""

Labels = tuple[str, ...]
"""Values of labels, in the order of the metric's."""
Figure = int | float | HistogramStatus
Sample = tuple[Labels, Figure]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: what it is called, and where in a status it stands."""

    name: str
    """Without what its type adds to it."""
    type: str
    """"counter", "gauge", "histogram" or "info"."""
    labels: tuple[str, ...] = ()
    role: str = "both"
    """Which relays have it: "server", "client" or "both"."""
    help: str
    """What it is, in a sentence without quotes and backslashes, so that neither format has to escape it."""
    read: Callable[[Status], Iterable[Sample]]

    @property
    def unit(self) -> str:
        """The last word of the name, if that is a unit; else ""."""
        word = self.name.rpartition("_")[2]
        return word if word in ("bytes", "seconds") else ""

    @property
    def sample_name(self) -> str:
        """What its samples are called; those of a histogram have one of three endings behind it."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.type, "")


def content_type(accept: str) -> tuple[str, bool]:
    """Which format to answer in, by the header ``Accept`` of a request ("" where there is none): its content type, and
    whether that is OpenMetrics.

    That is taken where it is wanted more, or where it is named and wanted as much; wildcards alone get the classic
    format, as do those who want neither (RFC 9110, section 12.5.1).  Only the versions that are spoken here count.
    """
    name, quality = _want(accept, "application/openmetrics-text", "1.0.0")
    _, classic = _want(accept, "text/plain", "0.0.4")
    wanted = quality > classic or (quality == classic > 0 and name)
    return (OPEN_METRICS, True) if wanted else (CLASSIC, False)


def _want(accept: str, media: str, version: str) -> tuple[bool, float]:
    """Whether a header names a media type, and how much it wants that: the most fitting range counts."""
    ranges = ("*/*", f"{media.partition('/')[0]}/*", media)
    best, quality = (-1, False), 0.0
    for part in accept.lower().split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        found = {name.strip(): value.strip(' "\t') for name, _, value in (word.partition("=") for word in parameters)}
        weight = found.get("q", "1")
        if kind not in ranges or found.get("version", version) != version or not QUALITY.fullmatch(weight):
            continue
        fit = ranges.index(kind), "version" in found
        if fit > best:
            best, quality = fit, float(weight)
    return best[0] == len(ranges) - 1, quality


def render(status: Status, open_metrics: bool) -> str:
    """All metrics of a relay, in OpenMetrics or in the classic format; to be sent as UTF-8."""
    lines: list[str] = []
    for metric in METRICS:
        if metric.role in ("both", status.role):
            samples = [line for sample in _add_up(metric.read(status)) for line in _write(metric, *sample)]
            if samples:
                lines += [*_announce(metric, open_metrics), *samples]
    if open_metrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _add_up(samples: Iterable[Sample]) -> Iterable[Sample]:
    """What has the same labels is one sample: if it stood there twice, a scraper would drop all of them."""
    sums: dict[Labels, Figure] = {}
    for labels, value in samples:
        before = sums.get(labels)
        if isinstance(before, HistogramStatus):
            value = merge(before, value)
        elif before is not None and not isinstance(value, HistogramStatus):
            value += before
        sums[labels] = value
    return sums.items()


def _announce(metric: Metric, open_metrics: bool) -> Iterator[str]:
    if not open_metrics:
        yield f"# HELP {metric.sample_name} {metric.help}"
        yield f"# TYPE {metric.sample_name} {'gauge' if metric.type == 'info' else metric.type}"
        return
    yield f"# TYPE {metric.name} {metric.type}"
    if metric.unit:
        yield f"# UNIT {metric.name} {metric.unit}"
    yield f"# HELP {metric.name} {metric.help}"


def _write(metric: Metric, values: Labels, value: Figure) -> Iterator[str]:
    labels = list(zip(metric.labels, values, strict=True))
    if not isinstance(value, HistogramStatus):
        yield f"{metric.sample_name}{_write_labels(labels)} {value!r}"
        return
    # Bounds are labels, which have to be the same text everywhere: from 0.0001 up to a million Python writes them as
    # OpenMetrics asks ("Canonical Numbers").
    bounds = [*(repr(float(bound)) for bound in value.bounds), "+Inf"]
    counts = list(itertools.accumulate(value.counts or [0] * len(bounds)))
    for bound, count in zip(bounds, counts, strict=True):
        yield f"{metric.name}_bucket{_write_labels([*labels, ('le', bound)])} {count}"
    yield f"{metric.name}_count{_write_labels(labels)} {counts[-1]}"
    yield f"{metric.name}_sum{_write_labels(labels)} {float(value.sum)!r}"


def _write_labels(labels: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels) + "}" if labels else ""


def escape(value: str) -> str:
    """The value of a label as both formats have it between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# What is read from a status


def _one(read: Callable[[Status], int | float]) -> Callable[[Status], Iterator[Sample]]:
    """One figure of the relay as a whole."""

    def samples(status: Status) -> Iterator[Sample]:
        yield (), read(status)

    return samples


def _known(read: Callable[[Status], int | float]) -> Callable[[Status], Iterator[Sample]]:
    """The same for one that not every system tells: then it is 0, and left out."""

    def samples(status: Status) -> Iterator[Sample]:
        if figure := read(status):
            yield (), figure

    return samples


def _each_service(read: Callable[[ServiceStatus], Figure]) -> Callable[[Status], Iterator[Sample]]:
    """Of those that are gone, too: what was counted does not become less."""

    def samples(status: Status) -> Iterator[Sample]:
        for one in status.services:
            yield (one.name,), read(one)

    return samples


def _each_present(read: Callable[[ServiceStatus], int]) -> Callable[[Status], Iterator[Sample]]:
    """Of those that are there: a port that was given back has nothing now, and is not to raise an alarm for ever."""

    def samples(status: Status) -> Iterator[Sample]:
        for one in _present(status):
            yield (one.name,), read(one)

    return samples


def _present(status: Status) -> list[ServiceStatus]:
    """The services that are listened for, or on a relay client those that it has been told of."""
    return [one for one in status.services if one.address or one.target]


def _each_party(read: Callable[[PartyStatus], int]) -> Callable[[Status], Iterator[Sample]]:
    """For each service what relay clients that nothing vouches for have carried, which is there from the start, and
    what those have whose names are known."""

    def samples(status: Status) -> Iterator[Sample]:
        for service in status.services:
            yield (service.name, ""), 0
        for one in status.parties:
            yield (one.service, one.name), read(one)

    return samples


def _read_bytes(status: Status) -> Iterator[Sample]:
    for direction, read in (
        ("in", _each_party(lambda one: one.bytes_in)),
        ("out", _each_party(lambda one: one.bytes_out)),
    ):
        for labels, count in read(status):
            yield (*labels, direction), count


def _read_failed(status: Status) -> Iterator[Sample]:
    for service in status.services:
        for code in [*FAILURES, *sorted(service.failed.keys() - FAILURES.keys())]:
            yield (service.name, code), service.failed.get(code, 0)


def _read_refused(status: Status) -> Iterator[Sample]:
    for code in [*REFUSALS, *sorted(set(status.refused) - set(REFUSALS))]:
        yield (code,), status.refused.get(code, 0)


def _read_links(status: Status) -> Iterator[Sample]:
    for service in _present(status):
        yield (service.name, "idle"), service.links_idle
        yield (service.name, "busy"), service.links_busy
        if status.role == "client":
            yield (service.name, "opening"), service.links_opening


def _read_clients(status: Status) -> Iterator[Sample]:
    for service in _present(status):
        yield (service.name,), sum(one.service == service.name and one.problem != AWAY for one in status.clients)


def _read_relays(status: Status) -> Iterator[Sample]:
    for one in status.relays:
        yield (one.address,), int(not one.problem)


def _read_failure_times(status: Status) -> Iterator[Sample]:
    for service in status.services:
        if service.last_failure.time:
            yield (service.name,), service.last_failure.time


def _read_build(status: Status) -> Iterator[Sample]:
    yield (status.version, status.role), 1


def _read_most_descriptors(status: Status) -> int:
    """Connections are in workers, so that the parent's own limit adds nothing."""
    return status.process.most_descriptors * max(1, status.workers - len(status.missing))


METRICS = (
    Metric(name="tcprelay_build", type="info", labels=("version", "role"), read=_read_build,
           help="The version of tcprelay, and whether this is a relay server or a relay client."),
    Metric(name="tcprelay_healthy", type="gauge", read=_one(lambda status: int(status.is_healthy)),
           help="1 where the relay does its work, 0 where it does not: the status page says why."),
    Metric(name="tcprelay_ending", type="gauge", read=_one(lambda status: int(status.is_ending)),
           help="1 while the relay ends and waits for open connections, else 0."),
    Metric(name="tcprelay_workers", type="gauge", read=_one(lambda status: status.workers),
           help="Worker processes that there should be, 0 where the relay is a single process."),
    Metric(name="tcprelay_workers_missing", type="gauge", read=_one(lambda status: len(status.missing)),
           help="Worker processes that have not answered: of what they do, only what they counted before is told."),
    Metric(name="tcprelay_links_refused", type="counter", labels=("code",), role="server", read=_read_refused,
           help="Connections to the relay port that did not become links."),
    Metric(name="tcprelay_service_reachable", type="gauge", labels=("service",),
           read=_each_present(lambda one: int(not one.problem)),
           help="1 where service clients can reach the service as far as is known, else 0."),
    Metric(name="tcprelay_relay_reachable", type="gauge", labels=("relay",), role="client", read=_read_relays,
           help="1 where the relay client gets links to the relay server for each of its services, else 0."),
    Metric(name="tcprelay_clients", type="gauge", labels=("service",), role="server", read=_read_clients,
           help="Relay clients that have links for the service; each worker process of a relay client counts as one."),
    Metric(name="tcprelay_links", type="gauge", labels=("service", "state"), read=_read_links,
           help="Links for the service that are idle, busy with a connection, or on a relay client being opened."),
    Metric(name="tcprelay_connections_waiting", type="gauge", labels=("service",), role="server",
           read=_each_present(lambda one: one.waiting),
           help="Service clients that wait for a link now."),
    Metric(name="tcprelay_connections_open", type="gauge", labels=("service", "client"),
           read=_each_party(lambda one: one.open),
           help="Connections that are open now."),
    Metric(name="tcprelay_connections_opened", type="counter", labels=("service", "client"),
           read=_each_party(lambda one: one.opened),
           help="Connections that were opened, the open ones included."),
    Metric(name="tcprelay_connections_broken", type="counter", labels=("service", "client"),
           read=_each_party(lambda one: one.broken),
           help="Opened connections that were broken off."),
    Metric(name="tcprelay_connections_failed", type="counter", labels=("service", "code"), read=_read_failed,
           help="Connections that were never opened."),
    Metric(name="tcprelay_last_failure_timestamp_seconds", type="gauge", labels=("service",), read=_read_failure_times,
           help="When a connection was last broken off or never opened; missing where none was."),
    Metric(name="tcprelay_carried_bytes", type="counter", labels=("service", "client", "direction"), read=_read_bytes,
           help="Bytes that connections have carried, in to the service and out of it."),
    Metric(name="tcprelay_pairing_seconds", type="histogram", labels=("service",),
           read=_each_service(lambda one: one.pairing),
           help="How long service clients have waited until their service had answered."),
    Metric(name="tcprelay_connection_duration_seconds", type="histogram", labels=("service",),
           read=_each_service(lambda one: one.duration),
           help="How long connections have lasted that are over."),
    Metric(name="process_cpu_seconds", type="counter", read=_one(lambda status: float(status.process.cpu_seconds)),
           help="Processor time that all processes of the relay have taken."),
    Metric(name="process_resident_memory_bytes", type="gauge", read=_known(lambda status: status.process.memory_bytes),
           help="Memory that all processes of the relay have resident."),
    Metric(name="process_open_fds", type="gauge", read=_known(lambda status: status.process.descriptors),
           help="Descriptors that all processes of the relay have open."),
    Metric(name="process_max_fds", type="gauge", read=_known(_read_most_descriptors),
           help="Descriptors that the relay may have open: the limit of a process, times the workers that answer."),
    Metric(name="process_threads", type="gauge", read=_known(lambda status: status.process.threads),
           help="Threads of all processes of the relay."),
    Metric(name="process_start_time_seconds", type="gauge", read=_one(lambda status: float(status.started)),
           help="When the relay was started."),
)  # fmt: skip
"""All metrics, in the order in which they are written.

What connections have carried is told for each service and each relay client, and for nothing that sums those up: `sum
by (service)` in a query does that.  Names of relay clients are those that something vouches for, and are bounded
(`carried.MOST_PARTIES`); what strangers say makes no label.
"""
