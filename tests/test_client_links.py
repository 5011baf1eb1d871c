"""The client's side of the link protocol, with a relay server that the test plays."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

import tcprelay
from _tcprelay.addresses import Endpoint
from _tcprelay.client import stock as stock_room
from _tcprelay.client.greeting import DIAL_AGAIN, RELAY_DIAL_TIMEOUT, Greeting
from _tcprelay.client.refill import LAST_BACKOFF, Pace
from _tcprelay.client.stock import Stock, Unreachable, longest_backoff
from _tcprelay.telling import Events
from _tcprelay.link import Link
from _tcprelay.names import Addresses, Name, resolve
from _tcprelay.protocol import (
    ABORT, AUTH, BYE, CHALLENGE, CLIENT, DATA, END, FAIL, HELLO, PING, PONG, READY, REFUSED, SERVER, START, WELCOME,
    encode_frame, encode_header, prove,
)  # fmt: skip
from _tcprelay.sockets import Race
from _tcprelay.tcp import unsent_bytes
from _tcprelay.text import say_error
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline
from _tcprelay.watch import Places
from tcprelay import (
    ConnectionClosed, ConnectionFailed, ConnectionOpened, LinkDown, LinkUp, Published, RelayClient, RelayServer,
    Unpublished,
)  # fmt: skip

from .conftest import PATIENCE, connect, read_exactly, replace, stock_of, unused_port, wait_until, Bench, Service
from .ends import send_data
from .peers_v1 import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


REFUSED_WORDS = "connection refused; is the relay server running, and is this its relay port?"


def client_of(bench: Bench, server: FakeServer, service: Service | int, **options: Any) -> RelayClient:
    """A client of the played server, with one idle link unless told otherwise."""
    port = service if isinstance(service, int) else service.port
    own = {"num_conn": 1, "drain_timeout": 0.0, "on_event": bench.client_events, "try_service": False}
    options = {**own, **options}
    client: RelayClient = bench.enter(RelayClient("127.0.0.1", port, "127.0.0.1", server.port, **options))
    return client


def next_frame(link: Link) -> Any:
    return link.receive(Deadline(PATIENCE))


def test_hello_says_who_and_what(bench: Bench, server: FakeServer) -> None:
    """Version, service, client, name, idle links wanted and a fresh nonce; the same client id on every link."""
    client_of(bench, server, unused_port(), num_conn=2, name="nas")
    first, second = server.welcome(server.accept()), server.welcome(server.accept())
    for hello in (first, second):
        assert hello.fields["version"] == 1
        assert (hello.fields["service"], hello.fields["name"], hello.fields["idle"]) == ("default", "nas", 2)
    assert first.fields["client"] == second.fields["client"]
    assert first.fields["nonce"] != second.fields["nonce"]


def test_ping_is_answered(bench: Bench, server: FakeServer) -> None:
    """An idle link answers each PING with PONG."""
    client_of(bench, server, unused_port())
    link = server.accept()
    server.welcome(link)
    for _ in range(3):
        link.send(PING)
        assert next_frame(link).kind == PONG


def test_start_dials_and_ready_follows(bench: Bench, server: FakeServer) -> None:
    """START makes the client dial; READY tells that the service answered; bytes pass; the link is idle again."""
    client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link)
    for number in range(3):
        link.send(START, {"id": f"c{number}", "client": "192.0.2.1:5", "waiting": 0})
        link.stream.send(encode_header(DATA, 5) + b"early")
        link.send(END)
        assert next_frame(link).kind == READY
        view = memoryview(bytearray(5))
        assert link.recv_into(view) == 5
        assert bytes(view) == b"early"
        assert link.recv_into(view) == 0
        link.send(PING)
        assert next_frame(link).kind == PONG


def test_fail_says_why(bench: Bench, server: FakeServer) -> None:
    """A service that cannot be dialled is FAIL with the reason; the link is used again after the server's END."""
    port = unused_port()
    client_of(bench, server, port)
    link = server.accept()
    server.welcome(link)
    for _ in range(2):
        link.send(START, {"id": "c1"})
        link.stream.send(encode_header(DATA, 3) + b"abc")
        fail = next_frame(link)
        assert (fail.kind, fail.fields) == (FAIL, {"reason": f"cannot reach 127.0.0.1:{port}: connection refused"})
        link.send(END)
    assert len(bench.client_events.wait(ConnectionFailed, 2)) == 2


def test_a_link_is_replaced_as_soon_as_it_is_started(bench: Bench, server: FakeServer) -> None:
    """START leaves too few idle links: another HELLO comes although no byte has flowed."""
    client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    assert server.welcome(server.accept()).kind == HELLO


def test_as_many_links_as_service_clients_wait(bench: Bench, server: FakeServer) -> None:
    """START with 5 waiting brings 5 links for them and one to stay idle, all at once; the answers ask for no more."""
    client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1", "waiting": 5})
    links = [server.accept() for _ in range(6)]
    for number, more in enumerate(links):
        server.welcome(more, waiting=max(0, 5 - number))
    server._listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.accept()


def test_links_grow_as_they_are_really_started(bench: Bench, server: FakeServer) -> None:
    """A server that says that a million wait, and starts nothing, gets a second pool and not one link more; each
    START allows for 24."""
    client = client_of(bench, server, bench.service(), num_conn=3)
    links: list[Link] = []

    def welcome_all(count: int) -> None:
        while len(links) < count:
            links.append(server.accept())
            server.welcome(links[-1], waiting=10**6)
        wait_until(lambda: client.counters["links_idle"] == count - client.counters["open"])
        server._listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()
        server._listener.settimeout(PATIENCE)

    welcome_all(6)
    links[0].send(START, {"id": "c1", "waiting": 10**6})
    assert next_frame(links[0]).kind == READY
    welcome_all(31)


def test_max_conn_bounds_the_links(bench: Bench, server: FakeServer) -> None:
    """However many wait, the client has no more links than it may."""
    client_of(bench, server, bench.service(), max_conn=3)
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1", "waiting": 50})
    for _ in range(2):
        server.welcome(server.accept())
    server._listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.accept()


def test_bye_of_the_server_is_obeyed(bench: Bench, server: FakeServer) -> None:
    """A link that the server gives up is closed, and replaced where it was needed."""
    client_of(bench, server, unused_port())
    link = server.accept()
    server.welcome(link)
    link.send(BYE)
    with pytest.raises(EOFError):
        next_frame(link)
    server.welcome(server.accept())


def test_a_silent_server_is_left(bench: Bench, server: FakeServer) -> None:
    """Without a PING for 2.5 heartbeats the client takes the link for dead and opens another."""
    client_of(bench, server, unused_port())
    server.welcome(server.accept(), heartbeat=0.1)
    began = time.monotonic()
    [down] = bench.client_events.wait(LinkDown)
    assert down.reason == "no PING in time"
    assert 0.2 <= time.monotonic() - began < 2
    server.welcome(server.accept())


def test_an_ending_client_says_bye_and_serves_what_crossed(bench: Bench, server: FakeServer) -> None:
    """START that crosses BYE is answered, carried to its end, and then the link is closed."""
    client = client_of(bench, server, bench.service(lambda s: s.sendall(b"still here")), drain_timeout=PATIENCE)
    link = server.accept()
    server.welcome(link)
    wait_until(lambda: client.counters["links_idle"] == 1)
    ender = threading.Thread(target=client.end)
    ender.start()
    assert next_frame(link).kind == BYE
    link.send(START, {"id": "c1"})
    assert next_frame(link).kind == READY
    view = memoryview(bytearray(10))
    have = 0
    while have < 10:
        have += link.recv_into(view[have:])
    assert bytes(view) == b"still here"
    assert link.recv_into(view) == 0
    link.send(END)
    with pytest.raises(EOFError):
        next_frame(link)
    ender.join(PATIENCE)
    assert not ender.is_alive()


def test_the_client_wants_the_server_to_know_the_token(bench: Bench, server: FakeServer) -> None:
    """A server that does not ask for the token, or proves nothing, is not trusted with the service."""
    client_of(bench, server, unused_port(), token="secret-token")
    link = server.accept()
    server.welcome(link)
    [event] = bench.client_events.wait(Unpublished)
    assert "did not prove that it knows the token" in event.reason
    assert not bench.client_events.of(Published)


def test_the_token_never_crosses_the_wire(bench: Bench, server: FakeServer) -> None:
    """AUTH is the proof over both nonces, and a wrong proof of the server's is refused."""
    client_of(bench, server, unused_port(), token="secret-token")
    link = server.accept()
    hello = next_frame(link)
    link.send(CHALLENGE, {"nonce": "server-nonce"})
    auth = next_frame(link)
    parts = (hello.fields["nonce"], "server-nonce", "default", hello.fields["client"])
    assert (auth.kind, auth.fields) == (AUTH, {"proof": prove(b"secret-token", CLIENT, *parts)})
    link.send(WELCOME, {"proof": prove(b"other-token", SERVER, *parts)})
    [event] = bench.client_events.wait(Unpublished)
    assert "did not prove that it knows the token" in event.reason


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (encode_frame(REFUSED, {"code": "x", "reason": "not\nyou"}), r"refused by the relay: not\nyou"),
        (encode_frame(CHALLENGE, {"nonce": "n"}), "the relay asks for a token; set --token-file or --token"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the relay port answers with HTTP"),
        (b"SSH-2.0-OpenSSH\r\n", "the relay port answers with SSH"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "not the link protocol"),
        (b"", "closed the link without a word"),
    ],
)
def test_why_there_is_no_link_is_told_once(bench: Bench, server: FakeServer, answer: bytes, words: str) -> None:
    """The reason, whatever the server answers, in one event however often it is tried."""
    client_of(bench, server, unused_port())
    for _ in range(2):
        link = server.accept()
        next_frame(link)
        link.sock.sendall(answer)
        link.stream.close_normally()
        link.close()
    wait_until(lambda: bench.client_events.of(Unpublished))
    server.welcome(server.accept())
    bench.client_events.wait(Published)
    [event] = bench.client_events.of(Unpublished)
    assert words in event.reason


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "FIRST_BACKOFF", 0.02)
    replace(monkeypatch, "LAST_BACKOFF", 0.1)
    replace(monkeypatch, "REFUSED_BACKOFF", 0.1)


pytestmark = pytest.mark.usefixtures("quick_backoff")


def test_a_relay_that_is_not_there_is_told_once_and_found_later(bench: Bench) -> None:
    """The client goes on trying, says so once, and publishes when the relay is there."""
    server = bench.server()
    port = server.relay_address[1]
    server.end()
    client = bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", port, 2, on_event=bench.client_events))
    bench.client_events.wait(Unpublished)
    service = stock_of(client).services[0]
    wait_until(lambda: service.failures >= 5)
    assert [event.reason for event in bench.client_events.of(Unpublished)] == [REFUSED_WORDS]
    again = bench.enter(RelayServer(port, 0))
    wait_until(lambda: again.counters["links_idle"] == 2)
    assert len(bench.client_events.of(Published)) == 1


@pytest.mark.parametrize(
    ("code", "spans"),
    [
        ("", [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
        ("timeout", [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
        ("draining", [1.0, 2.0, 4.0, 4.0, 4.0, 4.0]),
        ("token", [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
    ],
)
def test_the_span_of_the_backoff_doubles_up_to_its_cap(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch, code: str, spans: list[float]
) -> None:
    """Full jitter: each wait is a random part of a span that doubles with every failure, and longer where the
    server refuses, or the link is lost in its handshake, than where it cannot be reached or is ending."""
    for name, seconds in (("FIRST_BACKOFF", 1.0), ("LAST_BACKOFF", 4.0), ("REFUSED_BACKOFF", 30.0)):
        replace(monkeypatch, name, seconds)
    seen: list[float] = []

    class Spy:
        """Stands in for the random part of the span."""

        def __rmul__(self, span: float) -> float:
            seen.append(span)
            return 0.0

    replace(monkeypatch, "random_fraction", Spy)
    client_of(bench, server, unused_port())
    while len(seen) < len(spans):
        link = server.accept()
        assert next_frame(link).kind == HELLO
        if code:
            link.send(REFUSED, {"code": code, "reason": "no"})
        link.stream.close_normally()
        link.close()
    assert seen[: len(spans)] == spans


def test_attempts_that_fail_together_count_once(bench: Bench, server: FakeServer) -> None:
    """Those that were under way when one failed say nothing new; and what took long has been waiting already."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", server.port, 8)
    [service] = stock_of(client).services
    began = time.monotonic()
    with stock_of(client)._condition:
        for _ in range(8):
            stock_of(client)._back_off(service, began)
    assert service.failures == 1
    with stock_of(client)._condition:
        stock_of(client)._back_off(service, time.monotonic())
    assert service.failures == 2
    service.failed_at = 0.0
    with stock_of(client)._condition:
        stock_of(client)._back_off(service, time.monotonic() - 2 * LAST_BACKOFF)
    assert service.retry_at == service.failed_at, "tries again at once"


def test_the_span_follows_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doubles up to the cap of the present failure: soon again once the server cannot be reached at all, and from
    there on, not from the number of attempts, where it takes connections and loses them."""
    for name, seconds in (("FIRST_BACKOFF", 1.0), ("LAST_BACKOFF", 4.0), ("REFUSED_BACKOFF", 30.0)):
        replace(monkeypatch, name, seconds)
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 1)
    [service] = stock_of(client).services
    unreachable, lost = Unreachable("no route"), EOFError("the relay closed the link without a word")
    spans = []
    for error in [unreachable] * 9 + [lost] * 5 + [unreachable, lost]:
        service.failed_at = 0.0
        with stock_of(client)._condition:
            stock_of(client)._back_off(service, time.monotonic(), longest_backoff(error))
        spans.append(service.span)
    assert spans == [1, 2, *[4] * 7, 8, 16, 30, 30, 30, 4, 8]


def test_a_relay_that_cannot_be_reached_is_tried_soon(bench: Bench) -> None:
    """The reason is the system's, and the span stays short."""
    client = bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", unused_port(), 1, on_event=bench.client_events))
    [service] = stock_of(client).services
    wait_until(lambda: service.failures >= 9)
    assert service.span <= LAST_BACKOFF
    assert {event.reason for event in bench.client_events.of(Unpublished)} == {REFUSED_WORDS}


def test_a_client_bounds_its_own_handshakes() -> None:
    """As many links are opened at once as every server takes; half as many after a failure, one more with each that
    is up.  Nobody who waits at the server is forgotten meanwhile."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 8, max_conn=1000)
    [service] = stock_of(client).services
    service.trying = False

    def take() -> int:
        return stock_of(client)._take_missing(service, time.monotonic())[0]

    service.asked, service.busy = 300, 100
    assert [take(), take()] == [256, 0]
    stock_of(client).add(Mock(), service, waiting=300)
    assert [take(), take()] == [1, 0]
    stock_of(client).fail(service, time.monotonic(), "lost")
    assert stock_of(client)._handshakes == 128
    for _ in range(100):
        stock_of(client).add(Mock(), service, waiting=400)
    assert stock_of(client)._handshakes == 228
    assert service.connecting == 155
    service.pace, service.retry_at = Pace(8), 0.0
    assert [take(), take()] == [228 - 155, 0]


@pytest.mark.parametrize("waiting", [0, 200])
def test_the_bound_delays_no_usual_burst(waiting: int) -> None:
    """The first links of a client, and those for a burst of service clients, are all opened in one go."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 8, max_conn=1000)
    [service] = stock_of(client).services
    service.trying, service.asked, service.busy = False, waiting, 50
    assert stock_of(client)._take_missing(service, time.monotonic())[0] == 8 + waiting
    assert service.asked == 0


@pytest.mark.parametrize(("most", "workers", "rate"), [(8, 1, 4.0), (20, 1, 4.0), (100, 1, 20.0), (4, 2, 2.0)])
def test_lost_idle_links_come_back_at_a_pace(most: int, workers: int, rate: float) -> None:
    """One at once, the rest at 4 a second, or so many that the pool is full within 5 s; workers share that."""
    pace = Pace(most, workers)
    assert pace.wanted(100.0) == (most, math.inf)
    pace.lose(100.0)
    assert pace.wanted(100.0)[0] == most - 1
    for _ in range(most):
        pace.lose(100.0)
    now, counts, moments = 100.0, [], []
    while now < math.inf:
        count, following = pace.wanted(now)
        counts.append(count)
        moments.append(now)
        now = following
    assert counts == [1, *range(1, most + 1)]
    assert moments[-1] - 100.0 == pytest.approx(most / rate, abs=0.01)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.25), (2, 0.75)])
def test_workers_begin_with_a_link_each_and_go_on_later(workers: int, seconds: float) -> None:
    """So that all of them together have one link more than a single one would have, and no more."""
    pace = Pace(8, workers)
    pace.begin(100.0)
    count, moment = pace.wanted(100.0)
    assert count == 1
    while count == 1:
        now = moment
        count, moment = pace.wanted(now)
    assert now == pytest.approx(100.0 + seconds, abs=0.01)


def test_a_lost_pool_is_filled_at_that_pace(bench: Bench, server: FakeServer) -> None:
    """All links of a stable pool are lost at once: the first comes back at once, the others one by one."""
    client = client_of(bench, server, unused_port(), num_conn=8)
    links = [server.accept() for _ in range(1)]
    server.welcome(links[0])
    for _ in range(7):
        links.append(server.accept())
        server.welcome(links[-1])
    wait_until(lambda: client.counters["links_idle"] == 8)
    stock_of(client).services[0].carried += 1  # as if they had been up for long
    lost_at = time.monotonic()
    for link in links:
        link.wake()
    server.welcome(server.accept())
    for _ in range(3):
        server.welcome(server.accept())
    assert time.monotonic() - lost_at > 0.7, "three more take three quarters of a second"


def test_after_a_failure_one_link_probes(bench: Bench, server: FakeServer) -> None:
    """At the start and while the relay refuses, a client with many links tries with one at a time."""
    client = client_of(bench, server, unused_port(), num_conn=5)
    for _ in range(3):
        link = server.accept()
        next_frame(link)
        link.close()
    probe = server.accept()
    server._listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.accept()
    server._listener.settimeout(PATIENCE)
    server.welcome(probe)
    for _ in range(4):
        server.welcome(server.accept())
    wait_until(lambda: client.counters["links_idle"] == 5)


def test_an_unknown_relay_host_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At boot a name server may only not know it yet: that is told, once, and the client goes on trying."""
    asked, known = threading.Semaphore(0), threading.Event()

    def look_up(host: str, port: int) -> Addresses:
        asked.release()
        if known.is_set():
            return resolve("127.0.0.1", port)
        raise socket.gaierror(socket.EAI_NONAME, f"unknown host {host}")

    replace(monkeypatch, "resolve", look_up)
    monkeypatch.setattr(Name, "FAILED_TIME", 0.0)
    replace(monkeypatch, "FIRST_BACKOFF", 0.05)
    server = bench.server()
    port = server.relay_address[1]
    client = bench.enter(RelayClient("localhost", 1, "relay.example", port, 1, on_event=bench.client_events))
    for _ in range(3):
        assert asked.acquire(timeout=PATIENCE)
    [event] = bench.client_events.of(Unpublished)
    assert event.reason == "unknown host relay.example"
    known.set()
    wait_until(lambda: client.counters["links_idle"])


def test_log_lines_of_a_connection_bear_its_id(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening and closing lines of both relays begin with the same id."""
    caplog.set_level(logging.INFO)
    server = bench.relay()
    with connect(server.service_addresses["default"]) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    wait_until(lambda: sum("complete after" in record.getMessage() for record in caplog.records) == 2)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("[")]
    assert len(lines) == 4
    assert len({line[:10] for line in lines}) == 1


def test_a_relay_that_welcomes_and_drops_is_backed_off_from(bench: Bench, server: FakeServer) -> None:
    """Links that are lost soon, or taken back, count as failures, unless they carried a connection."""
    client = client_of(bench, server, bench.service())
    service = stock_of(client).services[0]
    for number in range(3):
        link = server.accept()
        server.welcome(link)
        if number == 1:
            link.send(BYE)
        else:
            link.close()
        wait_until(lambda n=number: service.failures == n + 1)  # type: ignore[misc]
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    assert next_frame(link).kind == READY
    link.close()
    wait_until(lambda: service.failures == 0)


def test_silence_after_a_connection_is_no_loss(bench: Bench, server: FakeServer) -> None:
    """The server may still be passing bytes on: the link is given up with BYE, replaced, and not closed; and a
    START that crosses BYE is served."""
    client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link, heartbeat=0.1)
    for _ in range(2):
        link.send(START, {"id": "c1"})
        link.send(END)
        assert next_frame(link).kind == READY
        assert link.recv_into(memoryview(bytearray(1))) == 0
        if not link.machine.leaving:
            assert next_frame(link).kind == BYE
            server.welcome(server.accept(), heartbeat=15)
    with pytest.raises(EOFError):
        next_frame(link)


def test_when_no_port_is_free_the_client_goes_on_trying(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """EADDRNOTAVAIL, which a host gets that has used up its ephemeral ports, is no reason to end: it is told,
    a service client meanwhile is refused, and both come back."""
    real, broken = Race._begin, threading.Event()

    def connect_unless_broken(*words: Any) -> socket.socket | None:
        if broken.is_set():
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return real(*words)

    monkeypatch.setattr(Race, "_begin", connect_unless_broken)
    server = bench.server()
    broken.set()
    port = server.relay_address[1]
    service = bench.service()
    client = bench.enter(RelayClient("127.0.0.1", service.port, "127.0.0.1", port, 1, on_event=bench.client_events))
    [event] = bench.client_events.wait(Unpublished)
    assert event.reason == "cannot assign requested address"
    broken.clear()
    wait_until(lambda: client.counters["links_idle"])
    broken.set()
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    broken.clear()
    wait_until(lambda: client.counters["links_idle"])
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"


def test_an_unexpected_error_loses_no_count_of_links(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails as a link comes up, it counts neither as connecting nor as idle afterwards."""
    emit, failed = Events.__call__, threading.Event()

    def fail_once(events: Events, event: tcprelay.Event) -> None:
        if isinstance(event, LinkUp) and not failed.is_set():
            failed.set()
            raise MemoryError
        emit(events, event)

    monkeypatch.setattr(Events, "__call__", fail_once)
    client = client_of(bench, server, unused_port())
    first = server.accept()
    server.welcome(first)
    with pytest.raises((EOFError, ConnectionError)):
        next_frame(first)
    server.welcome(server.accept())
    wait_until(lambda: client.counters["links_idle"] == 1)
    [service] = stock_of(client).services
    assert (service.connecting, service.idle, service.busy) == (0, 1, 0)


@pytest.mark.parametrize("ends", [True, False])
def test_the_end_is_heard_out_before_a_link_is_given_up(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The service has closed, and two pieces are still on the way to it: the link goes on if END comes behind them."""
    replace(monkeypatch, "HEAR_OUT_TIME", PATIENCE if ends else 0.2)
    client_of(bench, server, bench.service(lambda sock: None))
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    assert next_frame(link).kind == READY
    assert link.recv_into(memoryview(bytearray(1))) == 0
    for piece in (b"first", b"second", b"third"):
        send_data(link, piece)
        wait_until(lambda: unsent_bytes(link.sock) == 0)
    if not ends:
        with pytest.raises((EOFError, ConnectionError)):
            next_frame(link)
        [closed] = bench.client_events.wait(ConnectionClosed)
        assert closed.reason
        return
    link.send(END)
    link.send(PING)
    assert next_frame(link).kind == PONG
    [closed] = bench.client_events.wait(ConnectionClosed)
    assert (closed.reason, closed.bytes_in) == ("", 16)
    link.send(START, {"id": "c2"})
    assert next_frame(link).kind == READY


def test_fail_after_the_service_client_has_gone_leaves_the_link_whole(bench: Bench, server: FakeServer) -> None:
    """ABORT instead of END ends the connection as well, and the link is idle for both."""
    client_of(bench, server, unused_port())
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    link.send(ABORT, {"reason": "gone"})
    assert next_frame(link).kind == FAIL
    link.send(PING)
    assert next_frame(link).kind == PONG
    assert not bench.client_events.of(LinkDown)


def test_a_link_that_has_done_its_work_is_replaced_at_once(bench: Bench, server: FakeServer) -> None:
    """BYE with `again` says nothing about the relay: however many such links there are, the pool stays full."""
    client = client_of(bench, server, bench.service(lambda sock: None), num_conn=4)
    links: list[Link] = []
    for _ in range(4):  # the first one before the others
        links.append(server.accept())
        server.welcome(links[-1])
    for _ in range(12):
        wait_until(lambda: client.counters["links_idle"] == 4)
        links.pop(0).send(BYE, {"again": True})
        links.append(server.accept())
        server.welcome(links[-1])
    assert stock_of(client).services[0].pace.level(time.monotonic()) == 4


def test_a_link_that_leaves_counts_once(bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not idle while the server may still pass bytes on, nor twice away when a START crosses its BYE."""
    replace(monkeypatch, "is_held_back", lambda sock, sent: True)
    gone = threading.Event()
    client = client_of(bench, server, bench.service(lambda sock: gone.wait(PATIENCE)))
    link = server.accept()
    server.welcome(link)
    for _ in range(2):
        gone.clear()
        link.send(START, {"id": "c1"})
        assert next_frame(link).kind == READY
        [service] = stock_of(client).services
        assert (service.idle, service.busy) == (0, 1)
        link.send(END)
        gone.set()
        assert link.recv_into(memoryview(bytearray(1))) == 0
        if link.machine.leaving:
            break
        assert next_frame(link).kind == BYE
        assert (service.idle, service.busy) == (0, 0)
    link.close()


def test_a_start_that_is_read_late_dials_nobody(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is gone by then: its service client has been refused, and its request must not be carried out."""
    read_on, real = threading.Event(), Stock.use

    def late(stock: Stock, *words: Any, **more: Any) -> None:
        read_on.wait(PATIENCE)
        real(stock, *words, **more)

    monkeypatch.setattr(Stock, "use", late)
    service = bench.service()
    client_of(bench, server, service)
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    link.stream.send(encode_header(DATA, 5) + b"early")
    link.stream.reset_on_close()
    link.close()
    read_on.set()
    [down] = bench.client_events.wait(LinkDown)
    assert down.reason == "the link was lost before its connection began"
    assert service.connections == 0


def test_who_waits_is_not_forgotten_while_links_are_bounded() -> None:
    """What could not be opened at once is opened later, without the server saying it again."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 8, max_conn=1000)
    [service] = stock_of(client).services
    service.trying, service.asked, service.busy = False, 300, 100
    assert stock_of(client)._take_missing(service, time.monotonic())[0] == 256
    stock_of(client)._handshakes = 1000
    assert stock_of(client)._take_missing(service, time.monotonic())[0] == 8 + 300 - 256
    assert stock_of(client)._take_missing(service, time.monotonic())[0] == 0


@pytest.mark.parametrize(("count", "number", "most"), [(4, 0, 64), (3, 0, 86), (3, 2, 85)])
def test_workers_share_the_bound_of_handshakes_and_the_pace(count: int, number: int, most: int) -> None:
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 8)
    client._become_one_of(number, count)
    assert (stock_of(client)._handshakes, stock_of(client)._most_handshakes) == (most, most)
    [service] = stock_of(client).services
    for _ in range(8):
        service.pace.lose(100.0)
    assert service.pace.level(101.0) == pytest.approx(4.0 / count)


def test_a_link_on_which_no_ping_comes_is_reset(bench: Bench, server: FakeServer) -> None:
    """A FIN would be sent again and again on a dead path, and the answers to it keep the other side in the dark."""
    client_of(bench, server, unused_port())
    link = server.accept()
    server.welcome(link, heartbeat=0.05)
    with pytest.raises(ConnectionResetError):
        next_frame(link)
    assert bench.client_events.wait(LinkDown)[0].reason == "no PING in time"


def test_a_link_that_losses_hold_back_is_replaced(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BYE follows its connection; what crosses that is still served, and another link takes its place."""
    replace(monkeypatch, "is_held_back", lambda sock, sent: True)
    client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link)
    for number in range(2):
        link.send(START, {"id": f"c{number}"})
        link.send(END)
        assert next_frame(link).kind == READY
        assert link.recv_into(memoryview(bytearray(1))) == 0
        if not number:
            assert next_frame(link).kind == BYE
            server.welcome(server.accept())
    link.close()
    [down] = bench.client_events.wait(LinkDown)
    assert down.reason == "it has lost packets, and a new one will be faster"


@pytest.mark.parametrize("tls", ["", "relay"])
@pytest.mark.parametrize("path", ["", "; the path is slow"])
def test_a_relay_that_says_nothing(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tls: str, path: str
) -> None:
    """It is given up in time, from the TCP connection on, and told with what is known of the path."""
    replace(monkeypatch, "LINK_TIMEOUT", 0.2)
    replace(monkeypatch, "say_path", lambda sock: path)
    client_of(bench, server, unused_port(), tls=tls)
    server.accept()
    [event] = bench.client_events.wait(Unpublished)
    why = path or f"; is 127.0.0.1:{server.port} the relay port of a tcprelays?"
    assert event.reason == f"no answer within 0.2 s{why}"


def test_the_relay_is_dialled_once_more_beside(server: FakeServer) -> None:
    """With the time-outs that protocol.md says."""
    relay = Endpoint("127.0.0.1", server.port)
    runtime = RelayClient("127.0.0.1", 1, "127.0.0.1", server.port).runtime
    dialer = Greeting(runtime, relay, relay, 8, "id", 0)._way.dialer
    assert (dialer._timeout, dialer.again) == (RELAY_DIAL_TIMEOUT, DIAL_AGAIN)


def test_a_slow_path_is_told_when_the_relay_is_back(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tcprelay")
    replace(monkeypatch, "say_path", lambda sock: "; the path is slow")
    client_of(bench, server, unused_port())
    server.welcome(server.accept())
    bench.client_events.wait(LinkUp)
    assert f"a link with 127.0.0.1:{server.port} is up; the path is slow" in caplog.messages


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_lack_of_threads_is_an_attempt_that_failed(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It ends nothing, and no count is lost."""
    real, failed = Threads.start, threading.Event()

    def start(threads: Threads, *words: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise error
        real(threads, *words)

    monkeypatch.setattr(Threads, "start", start)
    client = client_of(bench, server, unused_port(), max_conn=1)
    server.welcome(server.accept())
    wait_until(lambda: client.counters["links_idle"] == 1)
    [event] = bench.client_events.of(Unpublished)
    assert event.reason == say_error(error)


def test_an_unexpected_error_as_a_connection_opens(
    bench: Bench, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no longer watched over, its service is let go, and it has its closing record."""
    emit = Events.__call__

    def fail(events: Events, event: tcprelay.Event) -> None:
        if isinstance(event, ConnectionOpened):
            raise MemoryError
        emit(events, event)

    monkeypatch.setattr(Events, "__call__", fail)
    client = client_of(bench, server, bench.service())
    link = server.accept()
    server.welcome(link)
    link.send(START, {"id": "c1"})
    with pytest.raises((EOFError, ConnectionError)):
        next_frame(link)
    bench.client_events.wait(ConnectionClosed)
    assert not client.runtime.splices.snapshot()


def test_each_service_may_try_one_link() -> None:
    """However often handshakes fail, one that hangs for one service does not keep the others from trying."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1, 8, publish=["web=127.0.0.1:2", "ssh=127.0.0.1:3"])
    with stock_of(client)._condition:
        for service in stock_of(client).services * 10:
            stock_of(client)._back_off(service, time.monotonic())
    assert stock_of(client)._handshakes == 3


def make_stock(places: int = 8) -> tuple[Stock, stock_room.Service]:
    service = stock_room.Service(tcprelay.Publication("web", Endpoint("localhost", 1)), 4)
    return Stock([service], 4, Places(places), 8, threading.Condition()), service


@pytest.mark.parametrize("change", ["add", "use", "shift", "fail", "leave", "end"])
def test_the_keeper_is_woken(change: str) -> None:
    """By whatever may have links to be opened, or make it end: it would find out a second later by itself."""
    stock, service = make_stock()
    stock._condition = condition = MagicMock()
    changes: dict[str, Callable[[], object]] = {
        "add": lambda: stock.add(Mock(), service, 0), "use": lambda: stock.use(service, 0),
        "shift": lambda: stock.shift(service, idle=-1), "fail": lambda: stock.fail(service, 0.0, "no"),
        "leave": stock.leave, "end": stock.end,
    }  # fmt: skip
    changes[change]()
    condition.notify_all.assert_called_once_with()


def test_nothing_is_waited_for_at_the_end() -> None:
    """The keeper has to go."""
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", 1)
    branches = client._branches
    branches.condition = condition = MagicMock()
    branches.end()
    assert branches._wait_for_missing(time.monotonic() + 1000) == []
    condition.wait.assert_not_called()


def test_a_link_that_is_gone_leaves_its_place_and_is_not_woken() -> None:
    """Its descriptor may already be another's."""
    stock, service = make_stock(places=1)
    link = Mock()
    assert stock.take_missing(0.0)[0] == [(service, 1)]
    assert not stock._places.enter()
    stock.add(link, service, 0)
    stock.wake_all()
    link.wake.assert_called_once_with()
    stock.remove(link, service, time.monotonic(), 0, was_idle=False)
    stock.leave()
    stock.wake_all()
    link.wake.assert_called_once_with()
    assert service.pace.level(time.monotonic()) == 4, "it was lost with its connection"
    assert stock._places.enter()


def test_a_failure_is_told_where_no_other_link_is_up() -> None:
    """And that a service is published, once."""
    stock, service = make_stock()
    assert [stock.tell_up(service, ""), stock.tell_up(service, "")] == [True, False]
    service.busy = 1
    assert not stock.fail(service, 0.0, "no")
    service.busy = 0
    assert [stock.fail(service, 0.0, "no"), stock.fail(service, 0.0, "no")] == [True, False]
    stock.add(Mock(), service, 0)
    assert service.pace.wanted(time.monotonic())[0] == 1, "others follow at a measured pace"
