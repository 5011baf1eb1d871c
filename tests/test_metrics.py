"""The metrics: their text in both formats, read back strictly, by promtool and by a real Prometheus."""

from __future__ import annotations

import ast
import dataclasses
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.events import FAILURES
from _tcprelay.status.metrics import METRICS, REFUSALS, Metric, content_type, escape, render
from _tcprelay.status.report import (
    ClientStatus, FailureStatus, HistogramStatus, PartyStatus, ProcessStatus, RelayStatus, ServiceStatus, Status,
)  # fmt: skip
from _tcprelay.tally import DURATION_BOUNDS, PAIRING_BOUNDS

from .conftest import echo, read_all, wait_until
from .openmetrics import ENDINGS, Fault, Family, Labels, canonical, parse, samples_of
from .peers import HOST, ROOT, Peers, RelayProcess, find, free_port, workers_of
from .samples import NOW, client_status, pairing, server_status

CLASSIC_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)")


def figures(status: Status) -> dict[tuple[str, Labels], float]:
    """All samples of a status, by what they are called."""
    return {(name, labels): value for name, labels, value in samples_of(parse(render(status, True)))}


def figure(status: Status, name: str, **labels: str) -> float:
    return figures(status)[name, tuple(sorted(labels.items()))]


def sum_of(status: Status, name: str, **labels: str) -> float:
    """What a query for the sum over all other labels gives."""
    found = [value for (one, have), value in figures(status).items() if one == name and labels.items() <= set(have)]
    assert found
    return sum(found)


# --- The text -------------------------------------------------------------------------------------------------

SMALL = Status(
    role="client", version="1.2.3", started=1_700_000_000.5, workers=2,
    relays=(RelayStatus(address="192.0.2.1:10080"), RelayStatus(address="[2001:db8::1]:10080", problem="refused")),
    services=(
        ServiceStatus(
            name="web", target="localhost:80", links_idle=7, links_busy=1, links_opening=2, failed={"unreachable": 3},
            last_failure=FailureStatus(time=1_700_000_100.0, reason="x"),
            pairing=HistogramStatus(bounds=(0.5, 2.0), counts=(1, 2, 3), sum=12.25),
            duration=HistogramStatus(bounds=(0.01, 86400.0)),
        ),
    ),
    parties=(PartyStatus(service="web", open=1, opened=6, broken=2, bytes_in=10, bytes_out=20),),
    process=ProcessStatus(cpu_seconds=1.5, memory_bytes=4096, descriptors=30, most_descriptors=1024, threads=9),
)  # fmt: skip
OPEN_METRICS_TEXT = """\
# TYPE tcprelay_build info
# HELP tcprelay_build The version of tcprelay, and whether this is a relay server or a relay client.
tcprelay_build_info{version="1.2.3",role="client"} 1
# TYPE tcprelay_healthy gauge
# HELP tcprelay_healthy 1 where the relay does its work, 0 where it does not: the status page says why.
tcprelay_healthy 1
# TYPE tcprelay_ending gauge
# HELP tcprelay_ending 1 while the relay ends and waits for open connections, else 0.
tcprelay_ending 0
# TYPE tcprelay_workers gauge
# HELP tcprelay_workers Worker processes that there should be, 0 where the relay is a single process.
tcprelay_workers 2
# TYPE tcprelay_workers_missing gauge
# HELP tcprelay_workers_missing Worker processes that have not answered: of what they do, only what they counted before is told.
tcprelay_workers_missing 0
# TYPE tcprelay_service_reachable gauge
# HELP tcprelay_service_reachable 1 where service clients can reach the service as far as is known, else 0.
tcprelay_service_reachable{service="web"} 1
# TYPE tcprelay_relay_reachable gauge
# HELP tcprelay_relay_reachable 1 where the relay client gets links to the relay server for each of its services, else 0.
tcprelay_relay_reachable{relay="192.0.2.1:10080"} 1
tcprelay_relay_reachable{relay="[2001:db8::1]:10080"} 0
# TYPE tcprelay_links gauge
# HELP tcprelay_links Links for the service that are idle, busy with a connection, or on a relay client being opened.
tcprelay_links{service="web",state="idle"} 7
tcprelay_links{service="web",state="busy"} 1
tcprelay_links{service="web",state="opening"} 2
# TYPE tcprelay_connections_open gauge
# HELP tcprelay_connections_open Connections that are open now.
tcprelay_connections_open{service="web",client=""} 1
# TYPE tcprelay_connections_opened counter
# HELP tcprelay_connections_opened Connections that were opened, the open ones included.
tcprelay_connections_opened_total{service="web",client=""} 6
# TYPE tcprelay_connections_broken counter
# HELP tcprelay_connections_broken Opened connections that were broken off.
tcprelay_connections_broken_total{service="web",client=""} 2
# TYPE tcprelay_connections_failed counter
# HELP tcprelay_connections_failed Connections that were never opened.
tcprelay_connections_failed_total{service="web",code="unreachable"} 3
tcprelay_connections_failed_total{service="web",code="unanswered"} 0
tcprelay_connections_failed_total{service="web",code="no-link"} 0
tcprelay_connections_failed_total{service="web",code="lost"} 0
tcprelay_connections_failed_total{service="web",code="left"} 0
tcprelay_connections_failed_total{service="web",code="address"} 0
tcprelay_connections_failed_total{service="web",code="limit"} 0
tcprelay_connections_failed_total{service="web",code="tls"} 0
tcprelay_connections_failed_total{service="web",code="protocol"} 0
tcprelay_connections_failed_total{service="web",code="port"} 0
tcprelay_connections_failed_total{service="web",code="draining"} 0
tcprelay_connections_failed_total{service="web",code="system"} 0
# TYPE tcprelay_last_failure_timestamp_seconds gauge
# UNIT tcprelay_last_failure_timestamp_seconds seconds
# HELP tcprelay_last_failure_timestamp_seconds When a connection was last broken off or never opened; missing where none was.
tcprelay_last_failure_timestamp_seconds{service="web"} 1700000100.0
# TYPE tcprelay_carried_bytes counter
# UNIT tcprelay_carried_bytes bytes
# HELP tcprelay_carried_bytes Bytes that connections have carried, in to the service and out of it.
tcprelay_carried_bytes_total{service="web",client="",direction="in"} 10
tcprelay_carried_bytes_total{service="web",client="",direction="out"} 20
# TYPE tcprelay_pairing_seconds histogram
# UNIT tcprelay_pairing_seconds seconds
# HELP tcprelay_pairing_seconds How long service clients have waited until their service had answered.
tcprelay_pairing_seconds_bucket{service="web",le="0.5"} 1
tcprelay_pairing_seconds_bucket{service="web",le="2.0"} 3
tcprelay_pairing_seconds_bucket{service="web",le="+Inf"} 6
tcprelay_pairing_seconds_count{service="web"} 6
tcprelay_pairing_seconds_sum{service="web"} 12.25
# TYPE tcprelay_connection_duration_seconds histogram
# UNIT tcprelay_connection_duration_seconds seconds
# HELP tcprelay_connection_duration_seconds How long connections have lasted that are over.
tcprelay_connection_duration_seconds_bucket{service="web",le="0.01"} 0
tcprelay_connection_duration_seconds_bucket{service="web",le="86400.0"} 0
tcprelay_connection_duration_seconds_bucket{service="web",le="+Inf"} 0
tcprelay_connection_duration_seconds_count{service="web"} 0
tcprelay_connection_duration_seconds_sum{service="web"} 0.0
# TYPE process_cpu_seconds counter
# UNIT process_cpu_seconds seconds
# HELP process_cpu_seconds Processor time that all processes of the relay have taken.
process_cpu_seconds_total 1.5
# TYPE process_resident_memory_bytes gauge
# UNIT process_resident_memory_bytes bytes
# HELP process_resident_memory_bytes Memory that all processes of the relay have resident.
process_resident_memory_bytes 4096
# TYPE process_open_fds gauge
# HELP process_open_fds Descriptors that all processes of the relay have open.
process_open_fds 30
# TYPE process_max_fds gauge
# HELP process_max_fds Descriptors that the relay may have open: the limit of a process, times the workers that answer.
process_max_fds 2048
# TYPE process_threads gauge
# HELP process_threads Threads of all processes of the relay.
process_threads 9
# TYPE process_start_time_seconds gauge
# UNIT process_start_time_seconds seconds
# HELP process_start_time_seconds When the relay was started.
process_start_time_seconds 1700000000.5
# EOF
"""  # noqa: E501
CLASSIC_PARTS = (
    """\
# HELP tcprelay_build_info The version of tcprelay, and whether this is a relay server or a relay client.
# TYPE tcprelay_build_info gauge
tcprelay_build_info{version="1.2.3",role="client"} 1
# HELP tcprelay_healthy 1 where the relay does its work, 0 where it does not: the status page says why.
# TYPE tcprelay_healthy gauge
tcprelay_healthy 1
""",
    """\
# HELP tcprelay_carried_bytes_total Bytes that connections have carried, in to the service and out of it.
# TYPE tcprelay_carried_bytes_total counter
tcprelay_carried_bytes_total{service="web",client="",direction="in"} 10
tcprelay_carried_bytes_total{service="web",client="",direction="out"} 20
# HELP tcprelay_pairing_seconds How long service clients have waited until their service had answered.
# TYPE tcprelay_pairing_seconds histogram
tcprelay_pairing_seconds_bucket{service="web",le="0.5"} 1
tcprelay_pairing_seconds_bucket{service="web",le="2.0"} 3
tcprelay_pairing_seconds_bucket{service="web",le="+Inf"} 6
tcprelay_pairing_seconds_count{service="web"} 6
tcprelay_pairing_seconds_sum{service="web"} 12.25
""",
)
"""Where the classic format says it otherwise."""


def test_the_text_in_openmetrics() -> None:
    """All of it, to the letter."""
    assert render(SMALL, True) == OPEN_METRICS_TEXT


def test_the_text_in_the_classic_format() -> None:
    """Counters and infos are announced by the names of their samples, infos as gauges; no units, no end."""
    text = render(SMALL, False)
    assert all(part in text for part in CLASSIC_PARTS)
    assert "# UNIT" not in text and "# EOF" not in text and text.endswith(" 1700000000.5\n")


@pytest.mark.parametrize("status", [server_status(), client_status(), SMALL, Status(role="server")])
def test_both_formats_have_the_same_samples(status: Status) -> None:
    """In the same order: what one scraper stores under a name another finds there."""
    strict, classic = ([line for line in render(status, how).split("\n") if line[:1] != "#"] for how in (True, False))
    assert strict == classic
    assert all(CLASSIC_LINE.fullmatch(line) for line in classic[:-1])


@pytest.mark.parametrize("status", [server_status(), client_status(), SMALL, Status(role="client")])
def test_a_strict_reader_accepts_it(status: Status) -> None:
    """And finds the families of the table, in their order, each with its type, unit, help and labels."""
    families = parse(render(status, True))
    table = {metric.name: metric for metric in METRICS}
    assert list(families) == [name for name in table if name in families]
    for name, family in families.items():
        assert (family.type, family.unit, family.help) == (table[name].type, table[name].unit, table[name].help)
        for _, labels, _ in family.samples:
            assert {key for key, _ in labels} - {"le"} == set(table[name].labels)


def test_everything_of_a_server_is_there() -> None:
    """Each metric of the table that a relay server has, and none of a relay client's alone."""
    assert set(parse(render(server_status(), True))) == {one.name for one in METRICS if one.role in ("both", "server")}
    links = [labels for name, labels in figures(server_status()) if name == "tcprelay_links"]
    assert {dict(labels)["state"] for labels in links} == {"idle", "busy"}


def test_a_client_has_what_is_its_own() -> None:
    """Links that are being opened; nobody waits there, and nobody is refused."""
    assert figure(client_status(), "tcprelay_links", service="default", state="opening") == 1
    server = {"tcprelay_clients", "tcprelay_connections_waiting", "tcprelay_links_refused"}
    assert {one.name for one in METRICS if one.role == "server"} == server
    assert not server & set(parse(render(client_status(), True)))


# --- Figures --------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_status() -> None:
    """One of each kind."""
    status = server_status()
    assert figure(status, "tcprelay_build_info", version="0.1.0", role="server") == 1
    assert figure(status, "tcprelay_links", service="ssh", state="idle") == 13
    assert figure(status, "tcprelay_links", service="ssh", state="busy") == 3
    assert figure(status, "tcprelay_clients", service="ssh") == 2
    assert figure(status, "tcprelay_connections_waiting", service="backup@20001") == 2
    assert figure(status, "tcprelay_service_reachable", service="backup@20001") == 0
    assert figure(status, "tcprelay_connections_failed_total", service="ssh", code="unreachable") == 4
    assert figure(status, "tcprelay_links_refused_total", code="token") == 3
    assert figure(status, "tcprelay_connections_opened_total", service="ssh", client="office") == 41
    assert (
        figure(status, "tcprelay_carried_bytes_total", service="ssh", client="home", direction="out") == 5_368_000_000
    )
    assert figure(status, "tcprelay_pairing_seconds_bucket", service="ssh", le="0.0025") == 990
    assert figure(status, "tcprelay_pairing_seconds_count", service="ssh") == 1041
    assert figure(status, "tcprelay_pairing_seconds_sum", service="ssh") == 2.75
    assert figure(status, "tcprelay_connection_duration_seconds_bucket", service="ssh", le="60.0") == 1010
    assert figure(status, "tcprelay_last_failure_timestamp_seconds", service="ssh") == NOW - 130
    assert figure(status, "process_start_time_seconds") == NOW - 86_400 * 4


def test_health() -> None:
    """Each of the figures goes by its own field."""
    sick = figures(server_status())
    assert [sick[f"tcprelay_{name}", ()] for name in ("healthy", "ending", "workers", "workers_missing")] == [
        0,
        0,
        2,
        1,
    ]
    ending = figures(Status(role="client", is_ending=True))
    assert [ending[f"tcprelay_{name}", ()] for name in ("healthy", "ending", "workers")] == [1, 1, 0]


def test_sums_over_relay_clients_are_those_of_the_service() -> None:
    """There is no sample that has summed them up already, so that nothing counts twice."""
    status = server_status()
    for service in status.services:
        for name, wanted in (
            ("tcprelay_connections_open", service.open),
            ("tcprelay_connections_opened_total", service.opened),
            ("tcprelay_connections_broken_total", service.broken),
        ):
            assert sum_of(status, name, service=service.name) == wanted
        for direction, count in (("in", service.bytes_in), ("out", service.bytes_out)):
            assert sum_of(status, "tcprelay_carried_bytes_total", service=service.name, direction=direction) == count
        assert sum_of(status, "tcprelay_connections_failed_total", service=service.name) == sum(service.failed.values())
    assert sum_of(status, "tcprelay_connections_open") == status.open


def test_counters_are_there_from_the_start() -> None:
    """With 0, so that the first failure, connection and refusal already raise something."""
    new = Status(role="server", services=(ServiceStatus(name="a"), ServiceStatus(name="b")))
    for service in ("a", "b"):
        for code in FAILURES:
            assert figure(new, "tcprelay_connections_failed_total", service=service, code=code) == 0
        for name in ("opened", "broken"):
            assert figure(new, f"tcprelay_connections_{name}_total", service=service, client="") == 0
        for direction in ("in", "out"):
            assert figure(new, "tcprelay_carried_bytes_total", service=service, client="", direction=direction) == 0
        for name, bounds in (("pairing", PAIRING_BOUNDS), ("connection_duration", DURATION_BOUNDS)):
            assert figure(new, f"tcprelay_{name}_seconds_count", service=service) == 0
            for bound in bounds:
                assert figure(new, f"tcprelay_{name}_seconds_bucket", service=service, le=canonical(bound)) == 0
    for code in REFUSALS:
        assert figure(new, "tcprelay_links_refused_total", code=code) == 0


def test_what_has_not_happened_or_is_not_known_is_left_out() -> None:
    """A failure at the time 0, or a process without memory, would be wrong figures."""
    names = {name for name, _ in figures(Status(role="client", services=(ServiceStatus(name="a"),)))}
    assert {name for name in names if name.startswith("process_")} == {
        "process_cpu_seconds_total", "process_start_time_seconds",
    }  # fmt: skip
    assert "tcprelay_last_failure_timestamp_seconds" not in names


def test_a_code_that_is_new_is_told() -> None:
    """Behind those that are known."""
    service = ServiceStatus(name="a", failed={"later": 2})
    status = Status(role="server", services=(service,), refused={"later": 3})
    assert figure(status, "tcprelay_connections_failed_total", service="a", code="later") == 2
    assert figure(status, "tcprelay_links_refused_total", code="later") == 3


def test_a_service_that_is_gone_keeps_what_it_has_counted() -> None:
    """A port that was given back: counters do not end with it, and what is now does, which would raise alarms."""
    gone = ServiceStatus(name="a@20000", opened=5, failed={"port": 1}, problem="no relay client is connected")
    status = Status(
        role="server", services=(gone,), parties=(PartyStatus(service="a@20000", name="nas", opened=5),)
    )  # fmt: skip
    assert figure(status, "tcprelay_connections_opened_total", service="a@20000", client="nas") == 5
    assert figure(status, "tcprelay_connections_failed_total", service="a@20000", code="port") == 1
    assert figure(status, "tcprelay_pairing_seconds_count", service="a@20000") == 0
    now = {"tcprelay_links", "tcprelay_clients", "tcprelay_connections_waiting", "tcprelay_service_reachable"}
    assert now <= set(parse(render(server_status(), True)))
    assert not now & set(parse(render(status, True)))


def test_a_service_that_is_not_published_is_there() -> None:
    """On a relay client, which knows no address for it."""
    assert figure(client_status(), "tcprelay_service_reachable", service="web") == 0
    assert figure(client_status(), "tcprelay_links", service="web", state="idle") == 0


@pytest.mark.parametrize(
    ("workers", "missing", "most"), [(0, (), 1000), (2, (), 2000), (2, (1,), 1000), (1, (0,), 1000)]
)
def test_descriptors_of_workers(workers: int, missing: tuple[int, ...], most: int) -> None:
    """The limit is one of each process, and the open ones are those of all."""
    process = ProcessStatus(descriptors=30, most_descriptors=1000)
    status = Status(role="server", workers=workers, missing=missing, process=process)
    assert figure(status, "process_max_fds") == most
    assert figure(status, "process_open_fds") == 30


# --- Labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"), ("a\\b", r"a\\b"), ('say "x"', r"say \"x\""), ("a\nb", r"a\nb"), ("\\n", r"\\n"),
        ('\\"\n', r"\\\"\n"), ("köln {a=b}, c", "köln {a=b}, c"),
    ],
)  # fmt: skip
def test_values_of_labels_are_escaped(value: str, text: str) -> None:
    """And read back they are what they were."""
    assert escape(value) == text
    status = Status(role="server", parties=(PartyStatus(service="a", name=value, opened=7),))
    assert f'client="{text}"' in render(status, False)
    assert figure(status, "tcprelay_connections_opened_total", service="a", client=value) == 7


def test_what_nothing_vouches_for_makes_no_label() -> None:
    """A relay client's own name for itself, its address, the texts of problems and of events."""
    client = ClientStatus(service="a", id="b" * 16, name="stranger", address="192.0.2.66")
    sample = server_status()
    status = dataclasses.replace(
        server_status(), clients=(*sample.clients, client), problems=("stranger says so",), events=sample.events
    )
    text = render(status, True)
    assert not re.search(r"<script|stranger|192\.0\.2|no link was idle", text)


def test_what_has_the_same_labels_is_one_sample() -> None:
    """Its figures are added up: of two a scraper would drop all."""
    party, service = PartyStatus(service="a", name="n", opened=3), ServiceStatus(name="a", pairing=pairing(1, sum=0.5))
    status = Status(role="server", services=(service, service), parties=(party, party))
    assert figure(status, "tcprelay_connections_opened_total", service="a", client="n") == 6
    assert figure(status, "tcprelay_pairing_seconds_count", service="a") == 2
    assert figure(status, "tcprelay_pairing_seconds_sum", service="a") == 1.0


# --- The table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: str(metric.name))
def test_a_metric_of_the_table_is_as_it_should_be(metric: Metric) -> None:
    """A name of ours or a usual one, that does not end as samples of another type do; help without what is escaped."""
    assert re.fullmatch(r"(tcprelay|process)(_[a-z]+)+", metric.name)
    assert not metric.name.endswith(tuple(ending for endings in ENDINGS.values() for ending in endings if ending))
    assert metric.type in ENDINGS and metric.role in ("both", "server", "client")
    assert not set(metric.labels) & {"le", "quantile", "job", "instance"}
    assert re.fullmatch(r"[A-Z0-9][^\"\\\n]{10,110}\.", metric.help)


def test_the_bounds_are_written_canonically() -> None:
    """Python and OpenMetrics agree within these, which `render` relies on."""
    assert all(0.0001 <= bound < 1e6 and repr(bound) == canonical(bound) for bound in PAIRING_BOUNDS + DURATION_BOUNDS)
    numbers = 0.0, 0.001, 0.95, 1.7, 10.0, 1e-10, 1e-05, 0.0001, 100000.0, 1e6, 1e10, 1.1e23
    assert [canonical(number) for number in numbers] == [
        "0.0", "0.001", "0.95", "1.7", "10.0", "1e-10", "1e-05", "0.0001", "100000.0", "1e+06", "1e+10", "1.1e+23",
    ]  # fmt: skip


def test_all_refusals_are_known() -> None:
    """Those that the protocol has, but for the one that relay clients send; and each that the code gives."""
    section = (ROOT / "docs/protocol.md").read_text().partition("| code | when | what to do |")[2].partition("\n\n")[0]
    told = {code for line in section.splitlines() for code in re.findall(r"`([a-z-]+)`", line.split(" | ")[0])}
    assert told - set(REFUSALS) == {"pin"} and len(told) > 10
    given = set()
    for path in (ROOT / "_tcprelay/server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal" and len(node.args) > 1:
                code = node.args[1]
                parts = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
                given |= {part.value for part in parts if isinstance(part, ast.Constant)}
    assert len(given) > 15
    assert given <= {*REFUSALS, *FAILURES}


def test_the_counts_in_the_document() -> None:
    """How many samples a relay has, as docs/metrics.md says it: for itself, for a service, for a relay client."""

    def count(role: str, services: int, parties: int) -> int:
        services_ = tuple(
            ServiceStatus(name=f"s{n}", address="x", last_failure=FailureStatus(time=1.0)) for n in range(services)
        )
        parties_ = tuple(PartyStatus(service="s0", name=f"n{n}") for n in range(parties))
        process = ProcessStatus(memory_bytes=1, descriptors=1, most_descriptors=1, threads=1)
        return len(figures(Status(role=role, services=services_, parties=parties_, process=process)))

    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| (server|client) \| (\d+) \| (\d+) \| (\d+|none) \|$", text, re.M)
    assert [row[0] for row in rows] == ["server", "client"]
    for role, own, service, party in rows:
        assert count(role, 0, 0) == int(own)
        assert count(role, 3, 0) - count(role, 2, 0) == int(service)
        assert party == "none" or count(role, 1, 2) - count(role, 1, 1) == int(party)


# --- What is asked for ----------------------------------------------------------------------------------------

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "is_open_metrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text ; Version=\"1.0.0\" ; charset=utf-8", True),
        ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=0.5, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0.9, text/plain;q=0.5", True),
        ("text/plain, application/openmetrics-text", True),
        ("application/openmetrics-text, */*", True),
        ("application/openmetrics-text;q=0, text/plain;q=0.1", False),
        ("application/openmetrics-text;q=0", False),
        ("text/plain;q=0, application/openmetrics-text;q=0.001", True),
        ("application/openmetrics-text;q=0, */*", False),
        ("application/*, text/*;q=0.5", True),
        ("*/*;q=0.9, application/openmetrics-text;q=0.3", False),
        ("application/openmetrics-text;version=1.0.0;q=0.2, application/openmetrics-text, text/plain;q=0.5", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;q=2, text/plain", False),
        (";;,=,application/openmetrics-text;q", False),
    ],
)  # fmt: skip
def test_the_format_that_is_asked_for(accept: str, is_open_metrics: bool) -> None:
    """By its quality values; of what cannot be read or is not spoken here nothing comes, and nothing fails."""
    said, found = content_type(accept)
    assert found is is_open_metrics
    assert said == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
        if is_open_metrics
        else "text/plain; version=0.0.4; charset=utf-8"
    )


# --- The reader of the tests ----------------------------------------------------------------------------------

HISTOGRAM = """\
# TYPE a histogram
a_bucket{le="1.0"} 2
a_bucket{le="+Inf"} 3
a_count 3
a_sum 4.5
# EOF
"""


def test_the_reader_takes_what_is_right() -> None:
    """A family of each type, and an empty exposition."""
    text = "# TYPE b_seconds counter\n# UNIT b_seconds seconds\n# HELP b_seconds It.\n"
    text += 'b_seconds_total{x="1\\n\\"\\\\"} 1e+06\n'
    found = parse(text + HISTOGRAM)
    assert found["b_seconds"] == Family(
        "b_seconds", "counter", "seconds", "It.", [("b_seconds_total", (("x", '1\n"\\'),), 1e6)]
    )
    assert [name for name, _, _ in found["a"].samples] == ["a_bucket", "a_bucket", "a_count", "a_sum"]
    assert parse("# EOF\n") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# TYPE a gauge\na 1\n",
        "# TYPE a gauge\na 1\n# EOF",
        "# TYPE a gauge\na 1\n# EOF\n# EOF\n",
        "# TYPE a gauge\r\na 1\r\n# EOF\n",
        "# TYPE a gauge\n\na 1\n# EOF\n",
        "# a comment\n# EOF\n",
        "a 1\n# EOF\n",
        "# HELP a It.\n# TYPE a gauge\na 1\n# EOF\n",
        "# TYPE a gauge\na 1\n# HELP a It.\n# EOF\n",
        "# TYPE a gauge\n# TYPE a gauge\na 1\n# EOF\n",
        "# TYPE a untyped\na 1\n# EOF\n",
        "# TYPE a gauge\n# UNIT a seconds\na 1\n# EOF\n",
        "# TYPE a gauge\na 1\na 2\n# EOF\n",
        "# TYPE a gauge\na{x=\"1\",x=\"2\"} 1\n# EOF\n",
        "# TYPE a gauge\na{x=\"1\"} 1\na{y=\"1\"} 1\n# EOF\n",
        "# TYPE a gauge\na{x=\"1\\\"} 1\n# EOF\n",
        "# TYPE a gauge\na{x=\"1\"2\"} 1\n# EOF\n",
        "# TYPE a gauge\na{__x=\"1\"} 1\n# EOF\n",
        "# TYPE a gauge\na  1\n# EOF\n",
        "# TYPE a gauge\na one\n# EOF\n",
        "# TYPE a gauge\na_total 1\n# EOF\n",
        "# TYPE a counter\na 1\n# EOF\n",
        "# TYPE a counter\na_total -1\n# EOF\n",
        "# TYPE a_total counter\na_total 1\n# EOF\n",
        "# TYPE a counter\na_total 1\n# TYPE a_created gauge\na_created 1\n# EOF\n",
        "# TYPE a info\na_info 2\n# EOF\n",
        "# TYPE a gauge\na{x=\"1\"} 1\n# TYPE b gauge\nb 1\na{x=\"2\"} 1\n# EOF\n",
        "# TYPE a histogram\na_bucket{x=\"1\",le=\"+Inf\"} 1\na_bucket{x=\"2\",le=\"+Inf\"} 1\n"
        "a_count{x=\"1\"} 1\na_sum{x=\"1\"} 1.0\na_count{x=\"2\"} 1\na_sum{x=\"2\"} 1.0\n# EOF\n",
        HISTOGRAM.replace('a_bucket{le="+Inf"} 3\n', ""),
        HISTOGRAM.replace('le="1.0"} 2', 'le="1.0"} 4'),
        HISTOGRAM.replace('le="1.0"', 'le="1"'),
        HISTOGRAM.replace("a_count 3", "a_count 4"),
        HISTOGRAM.replace("a_sum 4.5\n", ""),
        HISTOGRAM.replace('{le="1.0"} 2', '{le="1.0"} 1.5'),
    ],
)  # fmt: skip
def test_the_reader_takes_nothing_else(text: str) -> None:
    """What it would let pass, it would let pass in the metrics."""
    with pytest.raises(Fault):
        parse(text)


# --- Prometheus -----------------------------------------------------------------------------------------------


@pytest.mark.peer("promtool")
@pytest.mark.parametrize("status", [server_status(), client_status(), SMALL])
def test_promtool_has_nothing_to_say(status: Status) -> None:
    """It reads the classic format, and knows what names, types and units should be like."""
    done = subprocess.run(
        [find("promtool"), "check", "metrics"], input=render(status, False), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Desk(http.server.ThreadingHTTPServer):
    """Serves the metrics of a status, which a test may replace, in the format that is asked for or in the classic
    one; counts the content types that it has sent."""

    def __init__(self, status: Status, classic: bool) -> None:
        super().__init__((HOST, 0), Answer)
        self.status, self.classic = status, classic
        self.sent: Counter[str] = Counter()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Desk

    def do_GET(self) -> None:
        said, open_metrics = content_type("" if self.server.classic else self.headers.get("Accept", ""))
        body = render(self.server.status, open_metrics).encode()
        self.send_response(200)
        self.send_header("Content-Type", said)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent[said.partition(";")[0]] += 1

    def log_message(self, *words: Any) -> None:
        pass


class Prometheus:
    """A real Prometheus, which scrapes targets on loopback every second, and has the alerts of deploy/alerts.yaml."""

    def __init__(self, peers: Peers, credentials: Path | None = None, **ports: int) -> None:
        """The ports of the targets by the names of their jobs, and the file of a token for all of them."""
        state, port = peers.path / "prometheus", free_port()
        state.mkdir()
        known = {"authorization": {"credentials_file": str(credentials)}} if credentials else {}
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [f"{HOST}:{one}"]}], **known} for job, one in ports.items()
        ]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        rules = [str(ROOT / "deploy/alerts.yaml")]
        config = {"global": every, "scrape_configs": jobs, "rule_files": rules}
        (state / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._api = f"http://{HOST}:{port}"
        words = f"--storage.tsdb.path={state}/data", f"--web.listen-address={HOST}:{port}", "--log.level=warn"
        self._program = peers.program(find("prometheus"), f"--config.file={state}/prometheus.yml", *words)
        wait_until(self._is_ready)

    def ask(self, path: str, **fields: str) -> Any:
        """What its HTTP API answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self._api}{path}?{urllib.parse.urlencode(fields)}", timeout=10) as answer:
            return json.load(answer)["data"] if path.startswith("/api") else answer.read()

    def query(self, expression: str) -> list[float]:
        """The values that an expression has now, in no order."""
        return [float(row["value"][1]) for row in self.ask("/api/v1/query", query=expression)["result"]]

    def wait_for(self, expression: str, *values: float) -> None:
        wait_until(lambda: sorted(self.query(expression)) == sorted(values), timeout=20)

    def targets(self) -> dict[str, tuple[str, str]]:
        """How each job's target is, and the last error."""
        found = self.ask("/api/v1/targets")["activeTargets"]
        return {target["labels"]["job"]: (target["health"], target["lastError"]) for target in found}

    def alerts(self) -> set[tuple[str, str, str]]:
        """The alerts that are true: their names, and the job and service of each."""
        found = [alert["labels"] for alert in self.ask("/api/v1/alerts")["alerts"]]
        return {(labels["alertname"], labels["job"], labels.get("service", "")) for labels in found}

    def _is_ready(self) -> bool:
        assert self._program.process.poll() is None, f"prometheus ended:\n{self._program.output}"
        try:
            return bool(self.ask("/-/ready"))
        except (OSError, urllib.error.HTTPError):
            return False


@pytest.fixture
def desks() -> Iterator[tuple[Desk, Desk]]:
    """One that answers as it is asked, and one in the classic format."""
    with closing(Desk(server_status(), False)) as one, closing(Desk(server_status(), True)) as other:
        yield one, other


@pytest.mark.peer("prometheus")
def test_prometheus_scrapes_both_formats(peers: Peers, desks: tuple[Desk, Desk]) -> None:
    """It finds the same figures in both, and in all of them those of the status."""
    prometheus = Prometheus(peers, strict=desks[0].server_port, classic=desks[1].server_port)
    prometheus.wait_for("up", 1, 1)
    prometheus.wait_for("tcprelay_connections_opened_total", *[0, 0, 20, 1000, 41] * 2)
    assert prometheus.targets() == {"strict": ("up", ""), "classic": ("up", "")}
    assert "application/openmetrics-text" in desks[0].sent and set(desks[1].sent) == {"text/plain"}
    for job in ("strict", "classic"):
        found = {}
        for row in prometheus.ask("/api/v1/query", query=f'{{job="{job}",__name__=~"(tcprelay|process)_.*"}}')[
            "result"
        ]:
            labels = {key: value for key, value in row["metric"].items() if key not in ("job", "instance")}
            found[labels.pop("__name__"), tuple(sorted(labels.items()))] = float(row["value"][1])
        # A label without a value is as good as none.
        wanted = {
            (name, tuple(label for label in labels if label[1])): value
            for (name, labels), value in figures(server_status()).items()
        }
        assert found == wanted
    median = 'histogram_quantile(0.5, tcprelay_pairing_seconds_bucket{job="strict",service="ssh"})'
    assert 0 < prometheus.query(median)[0] < 0.001
    assert prometheus.query('sum by (service) (tcprelay_connections_open{job="strict"}) > 0') == [3]


@pytest.mark.peer("prometheus")
def test_a_counter_rises_by_what_was_added(peers: Peers, desks: tuple[Desk, Desk]) -> None:
    """The first failure of a kind included."""
    desk, status = desks[0], server_status()
    prometheus = Prometheus(peers, relay=desk.server_port)
    opened, failed = 'tcprelay_connections_opened_total{client="home"}', 'tcprelay_connections_failed_total{code="tls"}'
    prometheus.wait_for(opened, 1000)
    [home, *others], [ssh, *more] = status.parties, status.services
    parties = dataclasses.replace(home, opened=1005), *others
    services = dataclasses.replace(ssh, failed={"tls": 1}), *more
    desk.status = dataclasses.replace(status, parties=parties, services=services)
    prometheus.wait_for(opened, 1005)
    assert prometheus.query(f"max_over_time({opened}[5m]) - min_over_time({opened}[5m])") == [5]
    assert len([value for value in prometheus.query(f"increase({failed}[5m])") if value > 0]) == 1


def status_port(relay: RelayProcess) -> int:
    """Where a relay answers that was started with ``--status 0``."""
    found = relay.wait_for(lambda line: re.search(rf"the status is at http://{HOST}:(\d+)/", line))
    return int(found[1])


@pytest.mark.peer("prometheus")
def test_prometheus_and_real_relays(peers: Peers, workers: str) -> None:
    """It sees what has passed through them, by the name of the relay client, which a token vouches for, and who was
    turned away."""
    token, other, own = (peers.path / name for name in ("token", "other", "status"))
    for path in (token, other, own):
        path.write_text(f"the {path.name} one, which is long enough\n")
        path.chmod(0o600)
    asked = "--status", "0", "--status-token-file", str(own)
    server = peers.server("--service", "web=0", "--pair-timeout", "0.1", "--token-file", str(token), *asked)
    service = peers.service(echo).port
    client = peers.client(server.relay_port, service, "--name", "nas", "--token-file", str(token), *asked)
    prometheus = Prometheus(peers, own, server=status_port(server), client=status_port(client))
    prometheus.wait_for("up", 1, 1)
    assert prometheus.targets() == {"server": ("up", ""), "client": ("up", "")}
    assert prometheus.query('tcprelay_build_info{role="server",job="server"}') == [1]
    prometheus.wait_for("sum by (job) (tcprelay_workers)", int(workers), int(workers))

    carried = 'sum by (job, client) (tcprelay_carried_bytes_total{service="default",direction="%s"}) > 0'
    opened = 'sum by (job, client) (tcprelay_connections_opened_total{service="default"}) > 0'
    for count, total in ((1000, 1000), (500, 1500)):
        with peers.connect(server.service_port) as sock:
            sock.sendall(bytes(count))
            sock.shutdown(socket.SHUT_WR)
            assert len(read_all(sock)) == count
        for direction in ("in", "out"):
            prometheus.wait_for(carried % direction, total, total)
    prometheus.wait_for(opened, 2, 2)
    names = {row["metric"].get("client", "") for row in prometheus.ask("/api/v1/query", query=opened)["result"]}
    assert names == {"nas", ""}  # a relay client does not name itself
    for job in ("server", "client"):
        prometheus.wait_for(f'sum(tcprelay_pairing_seconds_count{{job="{job}"}})', 2)

    with peers.connect(server.port_of("web")) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    prometheus.wait_for('tcprelay_connections_failed_total{service="web"} > 0', 1)
    assert (
        len(prometheus.query('increase(tcprelay_connections_failed_total{code="no-link",service="web"}[5m]) > 0')) == 1
    )
    stranger = "--relay-host", HOST, "--relay-port", str(server.relay_port), "--host", HOST, "--port", str(service)
    peers.relay_process("client", *stranger, "--token-file", str(other)).wait_event("Unpublished")
    assert wait_until(lambda: prometheus.query('tcprelay_links_refused_total{code="token"} > 0'), timeout=20)

    wait_until(lambda: prometheus.alerts() == {("TcprelayServiceUnreachable", "server", "web")}, timeout=20)
    [group] = prometheus.ask("/api/v1/rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


@pytest.mark.peer("prometheus")
def test_nothing_counts_backwards_when_a_worker_dies(peers: Peers) -> None:
    """What it had told stays, so that Prometheus sees no restart, which would count everything once more."""
    server, client = peers.relay(peers.service(echo).port, "--workers", "2", "--status", "0")
    prometheus = Prometheus(peers, server=status_port(server), client=status_port(client))
    for _ in range(8):  # each worker gets some
        with peers.connect(server.service_port) as sock:
            sock.sendall(bytes(100))
            sock.shutdown(socket.SHUT_WR)
            assert len(read_all(sock)) == 100
    carried = 'sum by (job) (tcprelay_carried_bytes_total{direction="in"})'
    prometheus.wait_for(carried, 800, 800)
    server.expected_error = "worker "
    for pid in workers_of(server):
        os.kill(pid, signal.SIGKILL)
    for worker in ("0", "1"):
        server.wait_message(f"worker {worker} (process ")
    killed = time.time()
    wait_until(lambda: min(prometheus.query('timestamp(up{job="server"})')) > killed + 1, timeout=20)
    assert prometheus.query(carried) == [800, 800]
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    names = [metric.name + ending for metric in METRICS for ending in endings.get(metric.type, ())]
    assert {name: set(prometheus.query(f'resets({name}{{job="server"}}[1m])')) for name in names} == {
        name: {0} for name in names
    }
