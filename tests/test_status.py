"""The status of a relay: what is counted, what is shown of it, and how it is put together from several processes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest

from _tcprelay.carried import MOST_PARTIES, SLOT, SLOTS, Carried, History, current_slot
from _tcprelay.events import FAILURES
from _tcprelay.messages import decode_message
from _tcprelay.protocol import READY, START
from _tcprelay.splice import Splice
from _tcprelay.status.asking import Asking, answers
from _tcprelay.status.report import (
    MOST_CONNECTIONS, ClientStatus, ConnectionStatus, ServiceStatus, Status, as_dict, counted, from_dict,
    merge, pick_connections,
)  # fmt: skip
from _tcprelay.status.survey import AWAY, concluded, is_away
from _tcprelay.tally import HOUR, MOST_EVENTS, OTHERS, Histogram, Tally, Trouble
from _tcprelay.watch import Splices
from tcprelay import ConnectionFailed, ConnectionOpened, Event, LinkDown, LinkRefused, RelayClient, RelayServer

from .conftest import PATIENCE, Bench, connect, echo, read_exactly, replace as put, unused_port, wait_until
from .peers_v1 import FakeClient
from .samples import NOW, client_status, server_status

TOKEN = "a long and random secret"


def service_of(relay: RelayServer | RelayClient, name: str = "default") -> ServiceStatus:
    return next(service for service in relay.status().services if service.name == name)


# --- What is counted --------------------------------------------------------------------------------------------


def test_a_histogram() -> None:
    """A figure at a bound belongs below it."""
    histogram = Histogram((1.0, 2.0))
    for figure in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(figure)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sum == 14.0


def test_the_failures_of_an_hour() -> None:
    trouble = Trouble()
    for minute in (0, 1, 1, 30, 59):
        trouble.note(f"at {minute}", 6000.0 + 60 * minute)
    assert trouble.within_hour(6000.0 + 60 * 59) == 5
    assert trouble.within_hour(6000.0 + 60 * HOUR) == 4
    assert trouble.within_hour(6000.0 + 60 * (HOUR + 1)) == 2
    assert (trouble.last, trouble.last_at) == ("at 59", 6000.0 + 60 * 59)


def refused(peer: str, reason: str = "its token is not this server's") -> LinkRefused:
    return LinkRefused(peer=peer, code="token", reason=reason)


def test_floods_do_not_drive_out_what_else_has_happened() -> None:
    """What is alike is one with a count, also where something else came in between."""
    tally = Tally()
    tally.note(failed := ConnectionFailed(id="1", service="web", peer="x", seconds=0.0, code="limit", reason="many"))
    for number in range(1000):
        tally.note(refused(f"192.0.2.{number}"))
        if number == 500:
            tally.note(failed)
    assert [(recent.event, recent.count) for recent in tally.recent] == [(failed, 2), (refused("192.0.2.999"), 1000)]
    assert tally.refused == {"token": 1000}


def test_only_so_many_events_are_remembered() -> None:
    tally = Tally()
    for number in range(3 * MOST_EVENTS):
        tally.note(refused("x", f"reason {number}"))
    assert len(tally.recent) == MOST_EVENTS
    assert tally.recent[-1].event == refused("x", f"reason {3 * MOST_EVENTS - 1}")


def test_services_without_end_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "MOST_SERVICES", 3)
    tally = Tally()
    for number in range(9):
        record = {"id": "1", "service": f"s{number}", "peer": "x"}
        tally.note(ConnectionFailed(seconds=0.0, code="limit", reason="many", **record))
        tally.note(ConnectionOpened(via="", name="", seconds=1.0, **record))
    assert sum(trouble.codes["limit"] for trouble in tally.troubles.values()) == 9
    assert sum(sum(histogram.counts) for histogram in tally.pairing.values()) == 9
    assert list(tally.troubles) == list(tally.pairing) == ["s0", "s1", "s2", OTHERS]


# --- What was carried -------------------------------------------------------------------------------------------


def flow(carried: int = 0) -> Any:
    return SimpleNamespace(carried=carried, done=False)


class Connection(SimpleNamespace):
    """What is counted of a `Splice`."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def splice(service: str = "web", name: str = "nas", to_link: int = 0, from_link: int = 0) -> Any:
    return Connection(service=service, name=name, reason="", to_link=flow(to_link), from_link=flow(from_link))


def test_what_was_carried_never_becomes_less() -> None:
    """Whoever asks while connections come and go sees each of them once."""
    splices, seen, over = Splices(0, 0), [], threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            one: Splice = splice()
            splices.add(one)
            for _ in range(3):
                one.to_link.carried += 1
            splices.remove(one)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3000):
            found = splices.carried().get(("web", "nas"), Carried())
            seen.append((found.opened, found.to_link, found.open))
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    last = splices.carried()["web", "nas"]
    seen.append((last.opened, last.to_link, last.open))
    assert [one[:2] for one in seen] == sorted(one[:2] for one in seen)
    assert all(open <= 4 for *_, open in seen)
    assert last.to_link == 3 * last.opened and last.open == 0


def test_names_without_end_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each service, and none becomes less when a connection ends."""
    put(monkeypatch, "MOST_PARTIES", 4)
    splices, living, seen = Splices(0, 0), [], list[int]()
    for number in range(20):
        living.append(one := splice(name=f"n{number}", to_link=1))
        splices.add(one)
        if number % 2:
            splices.remove(living.pop(0))
        seen.append(sum(found.opened for (service, _), found in splices.carried().items() if service == "web"))
    assert seen == list(range(1, 21))
    assert set(splices.carried()) == {*(("web", f"n{number}") for number in range(4)), ("web", OTHERS)}
    for number in range(20):
        splices.add(splice(service=f"s{number}", name="nas"))
    assert len(splices.carried()) <= 2 * 4 + 1 and splices.carried()[OTHERS, OTHERS].opened > 0
    assert MOST_PARTIES >= 1000  # what is meant


def test_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes stand in the moment in which they were noted; what is older than the history is forgotten."""
    now, carried = 1000 * SLOT, {("web", "a"): Carried(to_link=10, from_link=5), ("web", ""): Carried(from_link=1)}
    monkeypatch.setattr(time, "monotonic", lambda: now)
    history = History()
    history.look(lambda: carried)
    assert history.read("web", current_slot()) == ([0] * (SLOTS - 1) + [10], [0] * (SLOTS - 1) + [6])
    carried["web", "a"].to_link += 7
    history.look(lambda: pytest.fail("it was looked at a moment ago"))
    now += 3 * SLOT
    history.look(lambda: carried)
    there, _ = history.read("web", current_slot())
    assert there[-5:] == [0, 10, 0, 0, 7]
    assert history.read("web", current_slot() - 1)[0][-4:] == [0, 10, 0, 0]
    now += SLOTS * SLOT
    history.look(lambda: carried)
    assert history.read("web", current_slot()) == ([0] * SLOTS, [0] * SLOTS)
    assert history.read("other", current_slot()) == ([0] * SLOTS, [0] * SLOTS)


# --- Put together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [server_status(), client_status(), Status()])
def test_there_and_back(status: Status) -> None:
    """Through JSON."""
    assert from_dict(json.loads(json.dumps(as_dict(status)))) == status


def test_two_processes_as_one() -> None:
    """Figures add up, histories and histograms moment by moment; names stand once."""
    one = server_status()
    [ssh, *_] = one.services
    other = replace(
        one, pid=7, started=1.0, problems=("another",), missing=(0,), connections=(), events=one.events[:1], open=4,
        services=(replace(ssh, address="", failed={"limit": 2, "no-link": 1}, last_failure=replace(
            ssh.last_failure, time=NOW - 1, reason="the later one")),),
        clients=(replace(one.clients[0], since=NOW - 86_400 * 9),),
    )  # fmt: skip
    both = merge(one, other)
    assert (both.pid, both.started, both.workers) == (one.pid, one.started, one.workers)
    assert (both.problems, both.missing, both.open) == ((*one.problems, "another"), (0, 1), 7)
    assert [service.name for service in both.services] == [service.name for service in one.services]
    row = both.services[0]
    assert (row.address, row.opened, row.bytes_out) == (ssh.address, 2 * ssh.opened, 2 * ssh.bytes_out)
    assert row.failed == {"limit": 2, "no-link": 2, "unreachable": 4}
    assert row.last_failure.reason == "the later one"
    assert row.history_out == tuple(2 * count for count in ssh.history_out)
    assert row.pairing.counts == tuple(2 * count for count in ssh.pairing.counts)
    assert row.pairing.bounds == ssh.pairing.bounds
    home = both.clients[0]
    assert (home.since, home.links_idle, home.name) == (NOW - 86_400 * 9, 16, "home")
    assert len(both.clients) == len(one.clients) and len(both.events) == len(one.events) + 1
    assert [event.time for event in both.events] == sorted((event.time for event in both.events), reverse=True)
    assert both.process.memory_bytes == 2 * one.process.memory_bytes
    assert both.process.most_descriptors == one.process.most_descriptors
    assert merge(one, Status()) == merge(Status(), one) == one


def test_what_is_left_of_a_process_that_is_no_more() -> None:
    """What it has counted, and nothing that it had."""
    left = counted(server_status())
    assert next((one.name, one.opened, one.broken) for one in left.services) == ("ssh", 1041, 2)
    assert left.refused == server_status().refused
    assert sum(party.bytes_out for party in left.parties) == sum(party.bytes_out for party in server_status().parties)
    gone = (left.open, left.clients, left.connections, left.process.memory_bytes)
    assert gone == (0, (), (), 0)
    assert not any(service.links_idle or service.open or service.rate_in for service in left.services)
    assert not any(party.open for party in left.parties)


def test_which_connections_are_shown() -> None:
    """The newest, and those that have carried most; the newest first."""

    def connection(number: int) -> ConnectionStatus:
        return ConnectionStatus(
            id=str(number), service="web", peer="", via="", since=float(number), bytes_in=0,
            bytes_out=1000 if number % 100 == 0 else number % 7, state="open",
        )  # fmt: skip

    connections = [connection(number) for number in range(10_000)]
    shown = pick_connections(connections, lambda one: one.since, lambda one: one.bytes_out)
    assert len(shown) == MOST_CONNECTIONS
    assert [one.since for one in shown] == sorted((one.since for one in shown), reverse=True)
    assert {f"{number}" for number in range(9900, 10_000)} <= {one.id for one in shown}
    assert {f"{number}" for number in range(0, 10_000, 100)} <= {one.id for one in shown}
    few = connections[:50]
    assert pick_connections(few, lambda one: one.since, lambda one: one.bytes_out) == tuple(reversed(few))


def test_why_a_service_cannot_be_reached() -> None:
    """On a server where there is no relay client, or none that reaches it; on a client where there is no link."""
    server = concluded(replace(server_status(), missing=(), problems=()))
    assert [service.problem for service in server.services] == ["", "", "no relay client is connected"]
    assert server.is_healthy
    one, other, *rest = (replace(client, problem="") for client in server.clients)
    half = concluded(replace(server, clients=(replace(one, problem="it is off"), other, *rest)))
    assert half.services[0].problem == ""
    none = concluded(replace(server, clients=(replace(one, problem="it is off"), replace(other, problem="so is it"))))
    assert none.services[0].problem == "it is off"
    client = concluded(replace(client_status(), problems=()))
    assert [bool(service.problem) for service in client.services] == [False, True]
    assert client.problems == (f"service web has no link: {client.services[1].problem}",)
    ending = concluded(replace(server, is_ending=True, missing=(3,)))
    assert ending.problems == ("the relay server is ending", "worker 3 does not answer")


def test_a_service_that_was_taken_out_is_no_problem() -> None:
    """While a connection of it lives it is shown; afterwards it is not, whatever a dead worker knew of it."""
    left = ServiceStatus(name="old", open=1, opened=3)
    client = concluded(replace(client_status(), problems=(), services=(client_status().services[0], left)))
    assert client.is_healthy and [service.name for service in client.services] == ["default", "old"]
    gone = concluded(replace(client, services=(client.services[0], replace(left, open=0))))
    assert [service.name for service in gone.services] == ["default"]


def asking(own: Status, count: int = 2) -> tuple[Asking, list[Status], Callable[[int, Status], None]]:
    """What asks so many workers, the statuses that it has concluded, and what has a worker answer."""
    told: list[Status] = []
    one = Asking(count, lambda last: own, lambda question: list(range(count)))

    def answer(worker: int, status: Status) -> None:
        for message in answers(one._number, status):
            one.hear(worker, *decode_message(message))

    return one, told, answer


def counting(opened: int) -> Status:
    return Status(services=(ServiceStatus(name="web", opened=opened, failures_hour=1),), version="x")


def test_a_worker_that_answers_and_dies_is_counted_once() -> None:
    """Also where the others have not answered yet; and its successor begins at nothing."""
    own = Status(role="server", services=(ServiceStatus(name="web", is_published=True),))
    one, told, answer = asking(own)
    for counts in ((10, 100), (11, 100)):
        one.ask(told.append)
        answer(0, counting(counts[0]))
        answer(1, counting(counts[1]))
    one.ask(told.append)
    answer(0, counting(12))
    one.lose(0)
    answer(1, counting(100))
    one.ask(told.append)
    answer(0, counting(1))
    answer(1, counting(101))
    assert [status.services[0].opened for status in told] == [110, 111, 112, 114]
    assert told[2].missing == (0,)
    assert told[3].services[0].failures_hour == 2  # an hour passes for a dead one, too


def test_an_answer_in_many_pieces_and_one_that_is_late() -> None:
    own = Status(role="server", services=(ServiceStatus(name="web", is_published=True),))
    one, told, answer = asking(own, 1)
    one.ask(told.append)
    big = replace(
        server_status(), services=tuple(replace(server_status().services[0], name=f"s{n}") for n in range(300))
    )
    assert len(answers(1, big)) > 2
    answer(0, big)
    assert told[0].open == big.open
    one.ask(told.append)
    late = answers(one._number - 1, big)
    for message in late:
        one.hear(0, *decode_message(message))
    assert len(told) == 1
    answer(0, Status())
    assert len(told) == 2


# --- Of real relays ---------------------------------------------------------------------------------------------


def test_the_status_of_both(bench: Bench) -> None:
    """Who is there, through what, since when, and how much went through; it moves while connections live."""
    before = time.time()
    server = bench.server(token=TOKEN, service="web=0", service_port=None)
    target = bench.service()
    publish = f"web=127.0.0.1:{target.port}"
    client = bench.client(server, None, publish=publish, token=TOKEN, name="nas")
    sock = bench.connect(server, "web")
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    wait_until(lambda: server.status().services[0].bytes_out == 5)
    # A link that is in its handshake, or looked at by the keeper, is not idle.
    status = wait_until(lambda: (found := server.status()).services[0].links_idle == 2 and found)
    assert (status.role, status.version, status.problems, status.workers) == ("server", "0.1.0", (), 0)
    assert before <= status.started <= status.time <= time.time()
    assert status.address.endswith(f":{server.relay_address[1]}")
    [web] = status.services
    assert web.address.endswith(f":{server.service_addresses['web'][1]}")
    assert (web.name, web.open, web.opened, web.waiting, web.problem) == ("web", 1, 1, 0, "")
    assert web.links_busy == 1
    assert (web.bytes_in, web.bytes_out, sum(web.pairing.counts), sum(web.duration.counts)) == (5, 5, 1, 0)
    [nas] = status.clients
    assert (nas.service, nas.name, nas.address, nas.proof) == ("web", "nas", "127.0.0.1", "the token")
    assert (nas.links_idle, nas.links_busy, nas.opened, nas.bytes_in) == (web.links_idle, 1, 1, 5)
    assert before <= nas.since <= status.time
    [party] = status.parties
    assert (party.service, party.name, party.open, party.bytes_out) == ("web", "nas", 1, 5)
    [connection] = status.connections
    peer = "{}:{}".format(*sock.getsockname())
    assert (connection.service, connection.peer, connection.via) == ("web", peer, "nas at 127.0.0.1")
    assert connection.id == bench.server_events.of(ConnectionOpened)[0].id and connection.state == "open"
    assert before <= connection.since <= status.time
    mine = client.status()
    assert (mine.role, mine.address) == ("client", f"127.0.0.1:{server.relay_address[1]}")
    [web] = mine.services
    assert (web.name, web.target, web.open, web.bytes_in) == ("web", f"127.0.0.1:{target.port}", 1, 5)
    assert web.address == f"127.0.0.1:{server.service_addresses['web'][1]}"
    assert [(one.id, one.peer, one.via) for one in mine.connections] == [(connection.id, peer, web.target)]
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
    # What lasted is counted when the connection's end is told, behind all else.
    ended = wait_until(lambda: sum((found := server.status()).services[0].duration.counts) and found)
    assert (ended.open, ended.services[0].opened, sum(ended.services[0].duration.counts)) == (0, 1, 1)
    [nas] = ended.clients
    assert (nas.opened, nas.bytes_in, nas.bytes_out, nas.broken) == (1, 5, 5, 0)
    assert client.status().is_healthy and server.status().is_healthy


def test_it_is_frozen(bench: Bench) -> None:
    status = bench.server().status()
    with pytest.raises(FrozenInstanceError):
        status.open = 7  # type: ignore[misc]


def test_it_can_be_asked_for_at_any_time() -> None:
    """Before the start, and after the end."""
    server = RelayServer(0, 0)
    assert server.status().services == () and server.status().started == 0
    client = RelayClient("127.0.0.1", 1, "127.0.0.1", unused_port())
    assert client.status().services[0].problem == "no answer from the relay yet"
    with server:
        assert [service.name for service in server.status().services] == ["default"]
    assert server.status().problems == ("the relay server is ending",)


def test_a_direction_that_has_ended(bench: Bench) -> None:
    release = threading.Event()

    def serve(sock: socket.socket) -> None:
        while sock.recv(100):
            pass
        release.wait(PATIENCE)

    server = bench.relay(serve)
    sock = bench.connect(server)
    sock.sendall(b"x" * 70_000)
    sock.shutdown(socket.SHUT_WR)
    try:
        wait_until(lambda: [one.state for one in server.status().connections] == ["in ended"])
    finally:
        release.set()


def test_the_rate_now(bench: Bench) -> None:
    """What was carried in a moment stands in the history, and the rate is that of the last one that is over."""
    server = bench.relay()
    sock = bench.connect(server)

    def send_and_look() -> Any:
        sock.sendall(b"x" * 1000)
        read_exactly(sock, 1000)
        found = service_of(server)
        return found.rate_in > 0 and found

    found = wait_until(send_and_look)
    assert found.rate_in == found.history_in[-1] / SLOT
    wait_until(lambda: sum(service_of(server).history_in[-10:]) == service_of(server).bytes_in)


def test_failures_and_their_codes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind one; the last reason stands there, and the event with it."""
    server = bench.server(pair_timeout=0.1, deny="127.0.0.2")
    with connect(server.service_addresses["default"]) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    with connect(server.service_addresses["default"], source="127.0.0.2") as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    bench.client(server, unused_port())
    with bench.connect(server) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    status = wait_until(lambda: (found := server.status()).services[0].failures_hour == 3 and found)
    [service] = status.services
    assert service.failed == {"address": 1, "no-link": 1, "unreachable": 1}
    assert set(service.failed) <= set(FAILURES)
    assert "cannot reach" in service.last_failure.reason and service.last_failure.time <= status.time
    assert "cannot reach" in service.problem  # all its relay clients
    assert server.counters["failed"] == 3
    newest = status.events[0]
    assert (newest.kind, newest.level, newest.service) == ("ConnectionFailed", "warning", "default")
    assert newest.text.endswith(service.last_failure.reason)


def test_a_service_that_can_be_reached_again_has_no_problem(bench: Bench) -> None:
    server, port = bench.server(), unused_port()
    bench.client(server, port)
    with bench.connect(server) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert service_of(server).problem
    with socket.create_server(("127.0.0.1", port)) as listener:
        sock = bench.connect(server)
        sock.sendall(b"x")
        far, _ = listener.accept()
        with far:
            wait_until(lambda: service_of(server).open)
            assert service_of(server).problem == ""


def test_who_was_refused(bench: Bench) -> None:
    """With the code; what it calls itself is not believed."""
    server = bench.server(token=TOKEN)
    bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", server.relay_address[1], token="another long secret"))
    status = wait_until(lambda: (found := server.status()).refused and found)
    assert status.refused == {"token": 1}
    assert status.clients == () and status.services[0].problem == "no relay client is connected"


def test_names_that_nobody_vouches_for_are_none(bench: Bench) -> None:
    """Shown to people, and no label of what is counted."""
    server = bench.server()
    bench.client(server, bench.service().port, name="<script>")
    sock = bench.connect(server)
    sock.sendall(b"x")
    read_exactly(sock, 1)
    status = server.status()
    assert [(one.name, one.proof) for one in status.clients] == [("<script>", "")]
    assert [(one.service, one.name) for one in status.parties] == [("default", "")]


def test_a_client_without_a_link_is_not_healthy(bench: Bench) -> None:
    """It says why, and for which service; with a link it is well again."""
    port = unused_port()
    client = bench.enter(RelayClient("127.0.0.1", bench.service().port, "127.0.0.1", port))
    wait_until(lambda: "refused" in client.status().services[0].problem)
    status = client.status()
    assert status.problems == (f"service default has no link: {status.services[0].problem}",)
    bench.enter(RelayServer(port, 0))
    wait_until(lambda: client.status().is_healthy)
    assert client.status().services[0].problem == ""


def test_an_end_that_has_begun(bench: Bench) -> None:
    server = bench.relay()
    sock = bench.connect(server)
    sock.sendall(b"x")
    read_exactly(sock, 1)
    ender = threading.Thread(target=server.end, args=(PATIENCE,))
    ender.start()
    try:
        status = wait_until(lambda: (found := server.status()).is_ending and found)
        assert status.problems == ("the relay server is ending",) and status.open == 1
    finally:
        sock.close()
        ender.join(PATIENCE)


# --- Threads that hang ------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from _tcprelay.watch import Pulse

    monkeypatch.setattr(Pulse, "EVERY", 0.1)
    monkeypatch.setattr(Pulse, "LATE", 4.0)  # the keepers look once a second
    yield


def test_a_keeper_that_hangs(bench: Bench, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status says so, and that it moves again."""
    server, hold = bench.relay(), threading.Event()
    monkeypatch.setattr(server.runtime.splices, "sweep", lambda: hold.wait(2 * PATIENCE))
    try:
        wait_until(lambda: any("the keeper has not moved" in one for one in server.status().problems))
    finally:
        hold.set()
    wait_until(lambda: server.status().is_healthy)


def test_an_acceptor_that_hangs(bench: Bench, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server, hold = bench.relay(), threading.Event()
    monkeypatch.setattr(server._listeners, "look", lambda: hold.wait(2 * PATIENCE) and 0.1)
    with suppress(OSError):
        bench.connect(server).close()
    try:
        wait_until(lambda: any("the acceptor has not moved" in one for one in server.status().problems))
    finally:
        hold.set()
    wait_until(lambda: server.status().is_healthy)


def test_idle_threads_are_not_late(bench: Bench, impatient: None) -> None:
    """With nothing to do they say that they live, longer than they may be silent."""
    server, since = bench.relay(echo, token=TOKEN), time.monotonic()
    wait_until(lambda: server.status().is_healthy is False or time.monotonic() - since > 5.0)
    assert server.status().is_healthy


def test_an_event_is_told_as_before(bench: Bench) -> None:
    """All that the tally counts has reached ``on_event`` as well."""
    server = bench.server(pair_timeout=0.05)
    for _ in range(3):
        with bench.connect(server) as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
    events: list[Event] = bench.server_events.wait(ConnectionFailed, 3)
    assert [event.code for event in events] == ["no-link"] * 3  # type: ignore[attr-defined]
    assert service_of(server).failed == {"no-link": 3}


def test_a_client_whose_links_are_all_busy_is_healthy(bench: Bench) -> None:
    """It does all that it may, and is not to be restarted for that."""
    server = bench.server()
    client = bench.client(server, bench.service().port, num_conn=1, max_conn=1)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    [service] = client.status().services
    assert (service.links_idle, service.links_busy, service.problem) == (0, 1, "")
    assert client.status().is_healthy


def test_a_client_that_gets_no_further_links_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Service clients cannot reach it, though a connection lives; to start it anew would break that off."""
    put(monkeypatch, "AWAY_TIME", 0.1)
    server = bench.server(drain_timeout=6 * PATIENCE)
    client = bench.client(server, bench.service().port, num_conn=2)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    end = threading.Thread(target=server.end)
    end.start()

    def says_so() -> bool:
        status = client.status()
        [service], [relay] = status.services, status.relays
        assert (service.links_busy, status.is_healthy) == (1, True)
        said = service.problem == f"no idle link: {relay.problem}"
        return said and not service.links_idle and "refused" in service.problem

    try:
        wait_until(says_so)
    finally:
        sock.close()
        end.join()
    wait_until(lambda: not client.status().is_healthy)


def test_a_relay_client_that_has_lost_its_idle_links(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that lives does not prove that it is there: a dead host's last bytes may wait for a slow reader."""
    put(monkeypatch, "AWAY_TIME", 0.1)
    server = bench.server()
    first, second, third = [bench.enter(FakeClient(server)) for _ in range(3)]
    for link in (first, second):
        link.hello()
    second.close()
    wait_until(lambda: len(bench.server_events.of(LinkDown)) == 1)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert first.next().kind == START
    first.send(READY)
    wait_until(lambda: service_of(server).open)
    [one] = server.status().clients
    assert not is_away(one, time.monotonic() + 60)  # its last idle link was taken: it may have as many as it may
    third.hello()
    third.close()
    wait_until(lambda: service_of(server).problem == AWAY)
    assert [(one.problem, one.links_busy) for one in server.status().clients] == [(AWAY, 1)]
    assert server.status().is_healthy
    bench.enter(FakeClient(server)).hello()
    wait_until(lambda: service_of(server).problem == "")
    assert service_of(server).open == 1


@pytest.mark.parametrize(
    ("idle", "busy", "linked", "unlinked", "is_away"),
    [
        (0, 1, -9.0, -8.0, True),
        (0, 0, -9.0, -8.0, True),  # it has none here any more
        (1, 0, -9.0, -8.0, False),
        (0, 1, -8.0, -9.0, False),  # the last idle link was taken: it may have as many as it may
        (0, 1, -9.0, 0.0, False),
    ],
)
def test_which_relay_client_is_away(idle: int, busy: int, linked: float, unlinked: float, is_away: bool) -> None:
    """Of workers one may have its idle link, or have given one out last, or have had the last one that ended."""
    now = time.monotonic()
    nobody = Status(role="server", services=(ServiceStatus(name="ssh", is_published=True),))
    client = ClientStatus(service="ssh", id="a", links_busy=1, linked=now - 60.0)
    other = replace(client, links_idle=idle, links_busy=busy, linked=now + linked, unlinked=now + unlinked)
    for one, another in ((client, other), (other, client)):
        found = concluded(merge(replace(nobody, clients=(one,)), replace(nobody, clients=(another,))))
        assert (found.clients[0].problem, found.services[0].problem) == ((AWAY, AWAY) if is_away else ("", ""))
        assert found.is_healthy


def test_a_relay_client_without_links_is_none() -> None:
    """What is remembered of it says only something of one that has some elsewhere."""
    left = ClientStatus(service="ssh", id="a", linked=1.0, unlinked=2.0)
    found = concluded(Status(role="server", services=(ServiceStatus(name="ssh", is_published=True),), clients=(left,)))
    assert found.clients == () and found.services[0].problem == "no relay client is connected"


@pytest.mark.parametrize(
    ("idle", "linked", "told"), [(0, -9.0, True), (1, -9.0, False), (0, -1.0, False)]
)  # fmt: skip
def test_other_links_of_a_service_count(idle: int, linked: float, told: bool) -> None:
    """Of another process, or to another relay server."""
    now, reason = time.monotonic(), "connection refused"
    lost = ServiceStatus(name="ssh", is_published=True, problem=reason, linked=now - 60.0, unlinked=now - 8.0)
    there = ServiceStatus(name="ssh", is_published=True, links_busy=1, links_idle=idle, linked=now + linked)
    for one, other in ((lost, there), (there, lost)):
        found = concluded(merge(Status(role="client", services=(one,)), Status(role="client", services=(other,))))
        assert found.services[0].problem == (f"no idle link: {reason}" if told else "")
        assert found.is_healthy


def test_connections_that_were_broken_off(bench: Bench) -> None:
    """They count for the service and for the relay client, among the failures of the hour, and with their reason."""
    server = bench.relay(token=TOKEN, idle_timeout=0.2)
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    service = wait_until(lambda: (one := service_of(server)).failures_hour and not one.open and one)
    assert (service.opened, service.broken, service.failures_hour, service.failed) == (1, 1, 1, {})
    assert "idle" in service.last_failure.reason
    status = wait_until(lambda: (one := server.status()).clients[0].broken and one)
    assert [party.broken for party in status.parties] == [client.broken for client in status.clients] == [1]
    assert server.counters["broken"] == 1


def test_who_waits_is_shown(bench: Bench) -> None:
    server = bench.server()
    with bench.connect(server) as one, bench.connect(server) as other:
        one.sendall(b"x")
        other.sendall(b"x")
        wait_until(lambda: service_of(server).waiting == 2)
    client = bench.client(server, bench.service().port)
    wait_until(lambda: service_of(server).waiting == 0)
    assert client.status().services[0].waiting == 0


def test_what_went_over_links_that_are_no_more_counts(bench: Bench) -> None:
    """For the relay client as long as it is there: idle links come and go."""
    server = bench.server()
    bench.client(server, bench.service().port)
    sock = bench.connect(server)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    sock.close()
    wait_until(lambda: server.counters["open"] == 0 and any(one.carried.opened for one in server._pool.members()))
    [used] = [pooled for pooled in server._pool.members() if pooled.carried.opened]
    wait_until(lambda: server._pool.hold(used))
    server._links.drop(used, "for once")
    [row] = server.status().clients
    assert (row.opened, row.bytes_in, row.bytes_out) == (1, 5, 5)
