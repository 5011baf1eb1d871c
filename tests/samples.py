"""Statuses that are made up, with something in every field, for tests of what shows them."""

from __future__ import annotations

from _tcprelay.carried import SLOTS
from _tcprelay.status.report import (
    MOST_CONNECTIONS, ClientStatus, ConnectionStatus, EventStatus, FailureStatus, HistogramStatus, PartyStatus,
    ProcessStatus, RelayStatus, ServiceStatus, Status,
)  # fmt: skip
from _tcprelay.tally import DURATION_BOUNDS, PAIRING_BOUNDS

NOW = 1_790_000_000.0
"""The moment of these statuses."""


def pairing(*counts: int, sum: float = 0.0) -> HistogramStatus:
    return HistogramStatus(bounds=PAIRING_BOUNDS, counts=(*counts, *[0] * (15 - len(counts))), sum=sum)


def duration(*counts: int, sum: float = 0.0) -> HistogramStatus:
    return HistogramStatus(bounds=DURATION_BOUNDS, counts=(*counts, *[0] * (9 - len(counts))), sum=sum)


def waves(most: int) -> tuple[int, ...]:
    """A history that goes up and down."""
    return tuple(most * (number % 30) // 30 for number in range(SLOTS))


def server_status() -> Status:
    """Of a relay server with three services, two of which are served."""
    ssh = ServiceStatus(
        name="ssh", address="[::]:2222", is_published=True, links_idle=13, links_busy=3, open=3, opened=1041, broken=2,
        failed={"unreachable": 4, "no-link": 1}, failures_hour=2,
        last_failure=FailureStatus(time=NOW - 130, reason="no link was idle in time (--pair-timeout)"),
        bytes_in=10_433_221, bytes_out=5_368_709_120, rate_in=1_204.5, rate_out=1_843_200.0,
        history_in=waves(2_000), history_out=waves(4_000_000), pairing=pairing(900, 90, 40, 8, 3, sum=2.75),
        duration=duration(0, 10, 300, 500, 200, 20, 6, 2, sum=86_400.25),
    )  # fmt: skip
    web = ServiceStatus(
        name="web", address="203.0.113.7:8080", is_published=True,
        links_idle=8, opened=20, bytes_in=4_000, bytes_out=1_234_567,
        history_in=waves(10), history_out=waves(1000), pairing=pairing(20, sum=0.011),
        duration=duration(3, 17, sum=1.5),
    )  # fmt: skip
    nas = ServiceStatus(
        name="backup@20001", address="[::]:20001", is_published=True, waiting=2, problem="no relay client is connected",
        history_in=(0,) * SLOTS, history_out=(0,) * SLOTS, failed={"no-link": 17}, failures_hour=17,
        last_failure=FailureStatus(
            time=NOW - 3, reason="no link was idle in time (--pair-timeout); no relay client is connected"
        ),
    )  # fmt: skip
    script = "<script>alert(1)</script>"
    clients = (
        ClientStatus(service="ssh", id="a" * 16, name="home", address="198.51.100.23", proof="the token",
                     since=NOW - 86_400 * 3, links_idle=8, links_busy=2, opened=1000, broken=2, bytes_in=10_000_000,
                     bytes_out=5_368_000_000),
        ClientStatus(service="ssh", id="b" * 16, name="office", address="[2001:db8::17]",
                     proof="certificate office.example", since=NOW - 61, links_idle=5, links_busy=1, opened=41,
                     problem="the service cannot be reached: connection refused", bytes_in=433_221,
                     bytes_out=709_120),
        ClientStatus(service="web", id="c" * 16, name=script, address="192.0.2.200", since=NOW - 5, links_idle=8,
                     opened=20, bytes_in=4_000, bytes_out=1_234_567),
    )  # fmt: skip
    parties = (
        PartyStatus(service="ssh", name="home", open=2, opened=1000, broken=2, bytes_in=10_000_000,
                    bytes_out=5_368_000_000),
        PartyStatus(service="ssh", name="office", open=1, opened=41, bytes_in=433_221, bytes_out=709_120),
        PartyStatus(service="web", opened=20, bytes_in=4_000, bytes_out=1_234_567),
    )  # fmt: skip
    connections = tuple(
        ConnectionStatus(id=f"7ae78df{number}", service="ssh", peer=f"192.0.2.{number}:5031{number}",
                         via="office at [2001:db8::17]" if number == 2 else "home at 198.51.100.23",
                         since=NOW - 100 * number, bytes_in=100 * number, bytes_out=1_000_000 * (3 - number),
                         state="in ended" if number == 1 else "open")
        for number in (1, 2, 3)
    )  # fmt: skip
    events = (
        EventStatus(time=NOW - 3, kind="ConnectionFailed", level="warning", service="backup@20001", count=17,
                    text="[7ae78df9] service backup@20001: connection from 192.0.2.9:40000 refused: no link was idle "
                         "in time (--pair-timeout); no relay client is connected"),
        EventStatus(time=NOW - 5, kind="ClientUp", level="info", service="web", count=1,
                    text=f"service web: relay client {script} at 192.0.2.200 is connected"),
        EventStatus(time=NOW - 40, kind="LinkRefused", level="warning", service="", count=3,
                    text="link from 192.0.2.66:41000 refused: its token is not this server's"),
    )  # fmt: skip
    process = ProcessStatus(
        cpu_seconds=12.5, memory_bytes=33_554_432, descriptors=41, most_descriptors=65_536, threads=12
    )
    return Status(
        role="server", version="0.1.0", pid=4711, address="[::]:10080", started=NOW - 86_400 * 4, time=NOW, workers=2,
        missing=(1,), problems=("worker 1 does not answer",), services=(ssh, web, nas), clients=clients, open=3,
        parties=parties, connections=connections, events=events, refused={"token": 3, "timeout": 1}, process=process,
    )  # fmt: skip


def client_status() -> Status:
    """Of a relay client with two services, one of which is published."""
    ssh = ServiceStatus(
        name="default", address="relay.example.net:2222", is_published=True,
        target="localhost:22", links_idle=7, links_busy=1,
        links_opening=1, open=1, opened=12, bytes_in=5_000, bytes_out=70_000, rate_in=10.0, rate_out=250.5,
        history_in=waves(20), history_out=waves(500), pairing=pairing(12, sum=0.004), duration=duration(0, 11, sum=3.0),
    )  # fmt: skip
    web = ServiceStatus(
        name="web", target="unix:/run/web.sock", is_published=True,
        problem="the relay server refuses it: nas may not publish web",
        history_in=(0,) * SLOTS, history_out=(0,) * SLOTS,
    )  # fmt: skip
    connection = ConnectionStatus(id="0badcafe", service="default", peer="192.0.2.1:50311", via="localhost:22",
                                  since=NOW - 12, bytes_in=5, bytes_out=7, state="open")  # fmt: skip
    return Status(
        role="client", version="0.1.0", pid=815, address="relay.example.net:10080", started=NOW - 3600, time=NOW,
        problems=("service web has no link: the relay server refuses it: nas may not publish web",),
        services=(ssh, web), parties=(PartyStatus(service="default", opened=12, bytes_in=5_000, bytes_out=70_000),),
        relays=(
            RelayStatus(address="relay.example.net:10080", links_idle=7, links_busy=1, links_opening=1),
            RelayStatus(address="192.0.2.80:10080", problem="connection refused; is the relay server running?"),
        ),
        open=1, connections=(connection,), process=ProcessStatus(cpu_seconds=0.25, memory_bytes=20_000_000, threads=9),
    )  # fmt: skip


def crowded_status(services: int = 30, clients: int = 100, connections: int = 10_000, events: int = 50) -> Status:
    """Of a relay server with more of everything than is shown at once; a tenth of the services have no relay client."""
    names = [f"service{number}" for number in range(services)]
    served = [name for number, name in enumerate(names) if number % 10 < 9]
    rows = tuple(
        ServiceStatus(
            name=name, address=f"[::]:{20_000 + number}", links_idle=8, links_busy=3, open=3, opened=100 * number,
            bytes_in=1_000 * number, bytes_out=1_000_000 * number, rate_in=100.0 * number**2,
            rate_out=float(number % 3) * 10.0**number if number < 8 else 0.0, history_in=waves(1000 * number),
            history_out=waves(3000),
        )
        if name in served
        else ServiceStatus(
            name=name, address=f"[::]:{20_000 + number}", problem="no relay client is connected", opened=number,
            history_in=waves(0), history_out=waves(0),
        )
        for number, name in enumerate(names)
    )  # fmt: skip
    people = tuple(
        ClientStatus(service=served[number % len(served)], id=f"{number:016x}", name=f"host-{number}.example.net",
                     address=f"198.51.100.{number % 250}", proof="the clients file", since=NOW - 60 * number,
                     links_idle=8, links_busy=number % 4, opened=number, bytes_in=number, bytes_out=10 * number)
        for number in range(clients)
    )  # fmt: skip
    open_now = tuple(
        ConnectionStatus(id=f"{0xABC00000 + number:x}", service=served[number % len(served)],
                         peer=f"192.0.2.{number % 250}:{1024 + number}", since=NOW - number,
                         bytes_in=number * 7919 % 10_007, bytes_out=number * 104_729 % 1_000_003, state="open",
                         via=f"host-{number % 50}.example.net at 198.51.100.7")
        for number in range(min(connections, MOST_CONNECTIONS))
    )  # fmt: skip
    happened = tuple(
        EventStatus(time=NOW - 7 * number, kind="LinkDown", level="warning" if number % 3 else "error",
                    count=1 + number % 5, service=names[number % services], text=f"event {number}: a link was lost")
        for number in range(events)
    )  # fmt: skip
    return Status(
        role="server", version="0.1.0", pid=4712, address="[::]:10080", started=NOW - 3600, time=NOW, services=rows,
        clients=people, open=connections, connections=open_now, events=happened,
        process=ProcessStatus(cpu_seconds=3.5, memory_bytes=50_000_000, descriptors=410, threads=30),
    )  # fmt: skip
