"""Services that are checked: withdrawn from the relay while they are down, and back as soon as they are."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from _tcprelay.client.checks import DOWN_INTERVAL
from _tcprelay.client.stock import Service as Published
from _tcprelay.client.stock import Stock
from _tcprelay.server.withdrawals import LONGEST, MOST_CLIENTS, Withdrawals
from _tcprelay.status.report import WITHDRAWN
from _tcprelay.values import parse_check_path, parse_publication
from _tcprelay.waiting import Stop
from _tcprelay.watch import Places
from tcprelay import ConnectionFailed, RelayClient, ServiceBack, ServiceDown, ServiceUnserved

from .conftest import PATIENCE, Bench, Service, connect, echo, read_all, read_exactly, replace, wait_until
from .peers import HOST, Peers, RelayProcess, workers_of
from .test_desk import status_of

SOON = 2.0
"""Seconds that are clearly less than the 20 for which a service client waits for a link."""
OFTEN = "--check-service", "0.2"


class Switch:
    """A service that can be stopped and started again, on the same port."""

    def __init__(self, serve: Callable[[socket.socket], object] = echo) -> None:
        self._serve = serve
        self._runs = [Service(serve)]
        self.port = self._runs[0].port

    def start(self) -> None:
        self._runs.append(Service(self._serve, port=self.port))

    def stop(self) -> None:
        """Refuse connections from now on; those that live go on."""
        self._runs[-1].refuse()

    def close(self) -> None:
        for run in self._runs:
            run.close()


@pytest.fixture
def switch() -> Iterator[Switch]:
    made = Switch()
    yield made
    made.close()


def has_told(relay: RelayProcess, kind: str, count: int) -> bool:
    return len(relay.events(kind)) == count


def has_replaced(relay: RelayProcess, pid: int) -> bool:
    """Whether another of its two workers has taken the place of this one."""
    now = workers_of(relay)
    return pid not in now and len(now) == 2


def is_served(port: int) -> bool:
    """Whether a service client that comes now gets its bytes back."""
    with connect((HOST, port)) as sock:
        try:
            sock.sendall(b"ping")
            return sock.recv(4) == b"ping"
        except ConnectionResetError:
            return False


def refused_within(port: int) -> float:
    """Seconds until a service client is refused."""
    began = time.monotonic()
    with connect((HOST, port)) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    return time.monotonic() - began


# --- What becomes of service clients --------------------------------------------------------------------------


def test_all_are_down(peers: Peers, workers: str, switch: Switch) -> None:
    """Service clients are refused at once, those who wait already included; and served again when it is back."""
    server = peers.server()
    client = peers.client(server.relay_port, switch.port, *OFTEN)
    assert is_served(server.service_port)
    switch.stop()
    client.wait_event("ServiceDown", service="default")
    server.wait_event("ClientDown", service="default")
    wait_until(lambda: refused_within(server.service_port) < SOON, 5)
    for _ in range(5):
        assert refused_within(server.service_port) < SOON
    failed = server.wait_event("ConnectionFailed", code="unreachable")
    assert "refused" in failed["reason"]
    assert not server.events("ServiceUnserved")
    switch.start()
    began = time.monotonic()
    wait_until(lambda: is_served(server.service_port))
    assert time.monotonic() - began < 1 + SOON / 2
    assert client.wait_event("ServiceBack", service="default")["seconds"] > 0
    assert len(client.events("ServiceDown")) == len(client.events("Published")) == 1


def test_another_relay_client_serves_meanwhile(peers: Peers, workers: str, switch: Switch) -> None:
    """Under load nobody is refused while one service of two goes down and comes back, again and again."""
    server, other = peers.server(), peers.service(echo)
    one = peers.client(server.relay_port, switch.port, *OFTEN, "--name", "flaps")
    peers.client(server.relay_port, other.port, *OFTEN, "--name", "stays")
    port, done, lost = server.service_port, threading.Event(), list[str]()

    def load() -> None:
        while not done.is_set():
            try:
                with connect((HOST, port)) as sock:
                    sock.sendall(b"ping")
                    read_exactly(sock, 4)
            except (OSError, AssertionError) as error:
                lost.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 4):
            switch.stop()
            wait_until(partial(has_told, one, "ServiceDown", number))
            switch.start()
            wait_until(partial(has_told, one, "ServiceBack", number))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    # A connection that was accepted by the service's kernel, and by nobody else, is lost with it.
    refused = [event for event in server.events("ConnectionFailed") if event["code"] != "left"]
    assert not refused
    opened = server.events("ConnectionOpened")
    assert len(opened) > 100
    assert {str(event["name"]) for event in opened[-20:]} >= {"stays"}


def test_who_meets_a_dead_service_waits_for_another(peers: Peers, workers: str, switch: Switch) -> None:
    """It is there, and all its links are busy: that is no reason to refuse anybody."""
    server, other = peers.server(), peers.service(echo)
    peers.client(server.relay_port, other.port, "--max-conn", "1", "--num-conn", "1", "--name", "busy")
    busy = peers.connect(server.service_port)
    busy.sendall(b"1")
    assert read_exactly(busy, 1) == b"1"
    switch.stop()
    dead = peers.client(server.relay_port, switch.port, "--name", "dead")
    waiting = peers.connect(server.service_port)
    waiting.sendall(b"2")
    dead.wait_event("ConnectionFailed", code="unreachable")
    busy.close()
    assert read_exactly(waiting, 1) == b"2"
    assert not server.events("ConnectionFailed")


def test_who_has_failed_is_asked_last_for_a_while(
    bench: Bench, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every service client has to find out anew that a service is dead; but one does, from time to time."""
    replace(monkeypatch, "SHUN_TIME", 1000.0)
    server = bench.server()
    bench.client(server, bench.service(echo).port, num_conn=4)
    bench.client(server, switch.port, num_conn=4)
    switch.stop()
    port = server.service_addresses["default"][1]
    for _ in range(10):
        assert is_served(port)
        wait_until(lambda: server.counters["links_idle"] >= 8)
    assert len(bench.client_events.of(ConnectionFailed)) == 1
    replace(monkeypatch, "SHUN_TIME", 0.0)
    for pooled in server._pool.members():
        pooled.member.note(pooled.member.problem)
    for _ in range(4):
        assert is_served(port)
        wait_until(lambda: server.counters["links_idle"] >= 8)
    assert len(bench.client_events.of(ConnectionFailed)) > 1


def test_a_connection_that_lives_goes_on(bench: Bench, switch: Switch) -> None:
    """Its link is given up behind it; others are refused although it is there."""
    server = bench.server()
    client = bench.client(server, switch.port, check_service=0.2)
    sock = bench.connect(server)
    sock.sendall(b"one")
    assert read_exactly(sock, 3) == b"one"
    switch.stop()
    bench.client_events.wait(ServiceDown)
    wait_until(lambda: server.counters["links_idle"] == 0)
    assert refused_within(server.service_addresses["default"][1]) < SOON
    sock.sendall(b"two")
    assert read_exactly(sock, 3) == b"two"
    [status] = client.status().services
    assert status.problem.startswith(WITHDRAWN)
    assert not client.status().is_healthy
    assert server.status().services[0].problem == "withdrawn by its relay client: connection refused"
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""
    wait_until(lambda: client.status().services[0].links_busy == 0)
    wait_until(lambda: client.counters["links_idle"] == 0)
    [status] = server.status().services
    assert status.problem.startswith("withdrawn by its relay client: ")
    switch.start()
    bench.client_events.wait(ServiceBack)
    wait_until(lambda: server.counters["links_idle"] == 2)
    wait_until(lambda: client.status().is_healthy)
    assert not server.status().services[0].problem


def test_who_waits_already_is_turned_away(bench: Bench, switch: Switch) -> None:
    """All links were busy when the service went down, and somebody waited for one."""
    server = bench.server()
    bench.client(server, switch.port, num_conn=1, max_conn=1, check_service=0.2)
    busy = bench.connect(server)
    busy.sendall(b"1")
    assert read_exactly(busy, 1) == b"1"
    waiting = bench.connect(server)
    wait_until(lambda: server.counters["waiting"] == 1)
    began = time.monotonic()
    switch.stop()
    bench.client_events.wait(ServiceDown)
    busy.close()  # the link is given up, instead of being given to the next one
    with pytest.raises(ConnectionResetError):
        waiting.recv(1)
    assert time.monotonic() - began < PATIENCE
    assert bench.server_events.wait(ConnectionFailed)[-1].code == "unreachable"
    assert not bench.server_events.of(ServiceUnserved)


def test_a_new_worker_knows_what_is_withdrawn(peers: Peers, switch: Switch) -> None:
    """Of either role: the parent has heard of it."""
    two = "--workers", "2"
    server = peers.server(*two)
    client = peers.client(server.relay_port, switch.port, *OFTEN, *two)
    switch.stop()
    client.wait_event("ServiceDown")
    server.wait_event("ClientDown")
    wait_until(lambda: refused_within(server.service_port) < SOON, 5)
    for relay in (server, client):
        relay.expected_error = "worker "
        for pid in workers_of(relay):  # the client's first one, which checks for both, too
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(has_replaced, relay, pid))
            assert refused_within(server.service_port) < SOON
    switch.start()
    wait_until(lambda: is_served(server.service_port))


# --- The checks -----------------------------------------------------------------------------------------------


class Web:
    """A service that notes what it is asked, and answers as it is told."""

    def __init__(self, bench: Bench, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.ends: list[str] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self.silent = threading.Event()
        self.silent.set()
        self.port = bench.service(self._serve).port

    def _serve(self, sock: socket.socket) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            head = b""
            while b"\r\n\r\n" not in head and (piece := sock.recv(4096)):
                head += piece
            self.asked.append(head)
            self.silent.wait(PATIENCE)
            sock.sendall(self.answer)
            sock.shutdown(socket.SHUT_WR)
            self.ends.append("whole" if sock.recv(1) == b"" else "more")
        except ConnectionResetError:
            self.ends.append("reset")
        finally:
            with self._lock:
                self._now -= 1


def test_the_request(bench: Bench) -> None:
    """It names the service's host and port, and its connection is closed normally, with a long answer, too."""
    web, server = Web(bench), bench.server()
    bench.client(server, web.port, check_service=0.1, check_http=["/health?deep=1"])
    wait_until(lambda: len(web.ends) > 2)
    first = web.asked[0].decode().split("\r\n")
    assert first[0] == "GET /health?deep=1 HTTP/1.1"
    assert f"Host: {HOST}:{web.port}" in first
    assert "Connection: close" in first
    web.answer = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(30_000)
    count = len(web.ends)
    wait_until(lambda: len(web.ends) > count + 2)
    assert set(web.ends) == {"whole"}
    assert not bench.client_events.of(ServiceDown)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "GET /health is answered by 503 Service Unavailable"),
        (b"HTTP/1.0 404 Not\x1b[31m Found\r\n\r\n", "GET /health is answered by 404 Not"),
        (b"SSH-2.0-x\r\n", "no HTTP answer to GET /health"),
        (b"", "no HTTP answer to GET /health"),
        (bytes(100_000), "no HTTP answer to GET /health"),
    ],
)
def test_answers_that_are_failures(bench: Bench, answer: bytes, reason: str) -> None:
    web, server = Web(bench), bench.server()
    bench.client(server, web.port, check_service=0.1, check_http=["/health"])
    web.answer = answer
    down = bench.client_events.wait(ServiceDown)[0]
    assert down.reason.startswith(reason)
    assert "\x1b" not in str(down)
    web.answer = b"HTTP/1.1 302 Found\r\nLocation: /login\r\n\r\n"
    bench.client_events.wait(ServiceBack)
    wait_until(lambda: server.counters["links_idle"] == 2)


def test_no_two_at_once_and_none_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not answer is down, and is never asked twice at once."""
    replace(monkeypatch, "CHECK_TIMEOUT", 0.3)
    web, server = Web(bench), bench.server()
    bench.client(server, web.port, check_service=0.05, check_http=["/"])
    web.silent.clear()
    try:
        assert bench.client_events.wait(ServiceDown)[0].reason == "no answer to GET / within 0.3 s"
    finally:
        web.silent.set()
    bench.client_events.wait(ServiceBack)
    checks = web.most
    assert checks <= 4  # those that were given up may be there still, in the service


def test_a_service_that_is_started_anew(bench: Bench, switch: Switch) -> None:
    """One check that fails is not enough."""
    refused, server = threading.Event(), bench.server()
    replaced = RelayClient("127.0.0.1", switch.port, "127.0.0.1", server.relay_address[1], check_service=0.05,
                           drain_timeout=0.0, on_event=bench.client_events)  # fmt: skip
    bench.enter(replaced)
    checks, [links] = replaced._checks, replaced._branches.links()
    wait_until(lambda: server.counters["links_idle"] == 8)
    reach, calls = links.reach, list[int]()

    def fail_once(service: Published) -> object:
        calls.append(1)
        if len(calls) % 2:
            refused.set()
            raise ConnectionRefusedError("for once")
        return reach(service)

    links.reach = fail_once  # type: ignore[method-assign, assignment]
    assert refused.wait(PATIENCE)
    wait_until(lambda: len(calls) > 6)
    assert not bench.client_events.of(ServiceDown)
    assert checks._checks


def test_a_failed_connection_has_it_checked_at_once(bench: Bench, switch: Switch) -> None:
    """Not when the next check is due."""
    server = bench.server()
    bench.client(server, switch.port, check_service=1000)
    switch.stop()
    assert refused_within(server.service_addresses["default"][1]) < SOON
    bench.client_events.wait(ServiceDown)
    switch.start()
    began = time.monotonic()
    bench.client_events.wait(ServiceBack)
    wait_until(lambda: server.counters["links_idle"] == 2)
    assert time.monotonic() - began < 2 * DOWN_INTERVAL + 0.5


def test_with_a_proxy_header(bench: Bench) -> None:
    """As a service client's connection begins, with one that says nothing."""
    seen: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        seen.append(sock.recv(4096))

    server = bench.server()
    bench.client(server, bench.service(serve).port, check_service=0.1, proxy_protocol=["v1"], check_http=["/"])
    wait_until(lambda: seen)
    assert seen[0].startswith(b"PROXY UNKNOWN\r\n")


def test_a_reload_begins_and_ends_checks(bench: Bench, switch: Switch) -> None:
    server = bench.server()
    client = bench.client(server, switch.port)
    switch.stop()
    client.reload(check_service=0.1)
    bench.client_events.wait(ServiceDown)
    wait_until(lambda: server.counters["links_idle"] == 0)
    client.reload(check_service=0.0)
    wait_until(lambda: server.counters["links_idle"] == 2)


# --- Bookkeeping ----------------------------------------------------------------------------------------------


def test_what_relay_clients_have_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds where all have said so that are there; not after one is gone without a word, nor for ever."""
    now = [1000.0]
    monkeypatch.setattr("_tcprelay.server.withdrawals.time.monotonic", lambda: now[0])
    book, there = Withdrawals(), {("web", "a"), ("web", "b"), ("ssh", "c")}
    assert book.why("web", there) == ""
    book.note("web", "a", 600, "refused")
    assert book.why("web", there) == ""
    assert book.why("web", there - {("web", "b")}) == "refused"
    assert book.why("web", set()) == "refused"
    assert book.why("ssh", there) == ""
    book.leave("web", "a")
    assert book.why("web", set()) == "refused"
    book.leave("web", "b")  # it may be back any moment
    assert book.why("web", set()) == ""
    book.note("web", "a", 600, "refused")
    book.forget("web", "a")
    assert book.why("web", set()) == ""
    book.note("web", "a", 1e9, "refused")
    now[0] += LONGEST + 1
    assert book.why("web", set()) == "" and book.services() == []
    for number in range(2 * MOST_CLIENTS):
        book.note("web", str(number), 600, "refused")
    assert len(book._said["web"]) == MOST_CLIENTS


def test_a_withdrawn_service_gets_no_links_but_tells_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One link every few minutes, which is given up at once; all of them when it is back."""
    service = Published(parse_publication("web=80"), 8)
    stock, now = Stock([service], 8, Places(100), 256, threading.Condition()), [1000.0]
    monkeypatch.setattr("_tcprelay.client.stock.time.monotonic", lambda: now[0])
    service.stop = Stop()
    try:
        service.trying, service.idle = False, 1
        stock.withdraw("web=localhost:80", "refused")
        service.idle = 0  # it has said so
        assert service.stop.requested
        assert stock._take_missing(service, now[0])[0] == 0
        now[0] += 300
        assert [stock._take_missing(service, now[0])[0] for _ in range(3)] == [1, 0, 0]
        service.connecting = 0
        stock.restore("web=localhost:80")
        assert not service.stop.requested
        assert stock._take_missing(service, now[0])[0] == 8
    finally:
        service.stop.close()


@pytest.mark.parametrize("text", ["/health", "web=/a?b=c", "/x=y"])
def test_paths(text: str) -> None:
    assert str(parse_check_path(text)) == text


@pytest.mark.parametrize("text", ["", "health", "web=health", "/a b", "/\r\nX: y", "we b=/a", "http://x/", "/\u00e9"])
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(ValueError, match=r"a path as it stands in a URL|a name of"):
        parse_check_path(text)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"check_http": ["/"]}, "--check-http is of no use without --check-service"),
        ({"check_service": 1, "check_http": ["/", "/b"]}, "--check-http stands there twice for all services"),
        ({"check_service": 1, "check_http": ["web=/"]}, "--check-http: no service is named web"),
        ({"check_service": -1}, "a number of seconds from 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RelayClient("localhost", 80, "relay", 1, **options)


def test_workers_know_what_is_withdrawn_and_what_is_back(peers: Peers, workers: str, switch: Switch) -> None:
    """While a connection lives its relay client is there all the time; /healthz says how it is, from every worker."""
    server = peers.server("--status", "0")
    client = peers.client(server.relay_port, switch.port, *OFTEN)
    with ExitStack() as stack:
        for _ in range(4):  # in each worker some
            sock = stack.enter_context(peers.connect(server.service_port))
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
        switch.stop()
        client.wait_event("ServiceDown")
        wait_until(lambda: refused_within(server.service_port) < SOON)

        def problem() -> str:
            return str(status_of(server)["services"][0]["problem"])

        wait_until(lambda: problem().startswith("withdrawn by its relay client"))
        assert not server.events("ClientDown")
        switch.start()
        client.wait_event("ServiceBack")
        wait_until(lambda: is_served(server.service_port))
        wait_until(lambda: not problem())  # of what was noted before, too: a load balancer looks at it
        sock.sendall(b"y")
        assert read_exactly(sock, 1) == b"y"


def test_a_new_worker_opens_no_links_of_a_service_that_is_down(peers: Peers, switch: Switch) -> None:
    """Whether it is the one that checks for all, or another."""
    server = peers.server("--workers", "0", "--status", "0")
    client = peers.client(server.relay_port, switch.port, *OFTEN, "--workers", "2", "--num-conn", "4")
    client.expected_error = "worker "
    switch.stop()
    client.wait_event("ServiceDown")
    wait_until(lambda: status_of(server)["clients"] == [])
    for pid in workers_of(client):
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(has_replaced, client, pid))
        opened = time.monotonic() + 1.5  # long enough to open links that nobody should have
        wait_until(lambda opened=opened: time.monotonic() > opened)  # type: ignore[misc]
        wait_until(lambda: status_of(server)["clients"] == [])  # one may just be saying that it is withdrawn


def test_a_relay_server_is_not_lost_where_one_service_is_down(bench: Bench, switch: Switch) -> None:
    """The other one has its links there; and what is withdrawn is to have none."""
    server = bench.server(service="web=0")
    publish = [f"default={switch.port}", f"web={bench.service().port}"]
    client = bench.client(server, None, publish=publish, check_service=0.2)
    switch.stop()
    bench.client_events.wait(ServiceDown)
    wait_until(lambda: server.counters["links_idle"] == 2)
    status = client.status()
    assert [bool(one.problem) for one in status.services] == [True, False]
    assert [one.problem for one in status.relays] == [""]
