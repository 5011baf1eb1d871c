"""Ports on demand: asked for, shared, refused, kept over breaks, and given back."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from _tcprelay.protocol import HELLO, REFUSED, new_nonce
from _tcprelay.server import leases
from _tcprelay.server.clients import Refusal
from _tcprelay.server.leases import Ask
from _tcprelay.server.pool import Pool
from _tcprelay.values import parse_publication
from tcprelay import (
    ClientDown, ConnectionFailed, LinkDown, LinkRefused, Listening, Published, RelayClient, RelayServer, Unpublished,
)  # fmt: skip

from .bench.processes import find_family
from .conftest import Bench, connect, connect_from, echo, read_exactly, replace, wait_until
from .peers import HOST, Peers, free_port
from .peers_v1 import FakeClient, FakeServer
from .wire import SERVER, Way, Wire

TOKEN = "the token of all the tests"


def free_range(count: int) -> tuple[int, int]:
    """So many ports in a row that nobody listens on."""
    for _ in range(100):
        first = random.randrange(20_000, 32_000)  # below those that outgoing connections have
        try:
            for port in range(first, first + count):
                socket.create_server((HOST, port)).close()
        except (OSError, OverflowError):
            continue
        return first, first + count - 1
    raise AssertionError("no free ports in a row")


def serve(bench: Bench, first: int, last: int, **options: Any) -> RelayServer:
    options = {"service_port": None, "hostname": HOST, "client_ports": f"{first}-{last}", "token": TOKEN, **options}
    return bench.server(**options)


def come(
    bench: Bench, server: RelayServer | int, asked: int, name: str = "", client_name: str = "", **options: Any
) -> RelayClient:
    """A relay client that asks for a port for an echo service."""
    port = server if isinstance(server, int) else server.relay_address[1]
    service = f"{name or 'default'}={HOST}:{bench.service().port}@{asked}"
    own: dict[str, Any] = {"num_conn": 2, "drain_timeout": 0.0, "on_event": bench.client_events, "try_service": False}
    options = {"token": TOKEN, "publish": service, "name": client_name, **own, **options}
    return bench.enter(RelayClient(relay_host=HOST, relay_port=port, **options))  # type: ignore[no-any-return]


def published(bench: Bench, count: int = 1) -> list[int]:
    """The ports that were told so far, once there are so many."""
    return [int(event.address.rpartition(":")[2]) for event in bench.client_events.wait(Published, count)]


def answers(port: int) -> bool:
    with connect(("", port)) as sock:
        sock.sendall(b"hello")
        return read_exactly(sock, 5) == b"hello"


def is_closed(port: int) -> bool:
    try:
        connect(("", port)).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it was about to be
        return False
    return False


# What is given


def test_a_certain_port_and_any(bench: Bench) -> None:
    """The server has no service of its own; names and ports are in what it tells."""
    first, last = free_range(4)
    server = serve(bench, first, last)
    come(bench, server, last, "web")
    assert published(bench) == [last]
    come(bench, server, 0, "ssh")
    assert published(bench, 2) == [last, first]
    come(bench, server, first, "ssh")
    assert bench.client_events.wait(Unpublished)[0].reason == (
        f"refused by the relay: port {first} is taken by another relay client, which had asked for any"
    )
    assert answers(first) and answers(last)
    assert set(server.service_addresses) == {f"web@{last}", f"ssh@{first}"}
    assert [event.service for event in bench.server_events.of(Listening)[1:]] == [f"web@{last}", f"ssh@{first}"]


def test_each_that_asks_for_any_has_its_own(bench: Bench) -> None:
    """And all links of one lead to its own; in whichever process, see below."""
    first, last = free_range(3)
    server = serve(bench, first, last)
    for number in range(3):
        come(bench, server, 0, "web", num_conn=3)
        published(bench, number + 1)
    assert sorted(published(bench, 3)) == [first, first + 1, last]
    wait_until(lambda: server.counters["links_idle"] == 9)
    assert all(map(answers, (first, first + 1, last)))


def test_a_full_range_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once there is room, the one that was refused gets it."""
    replace(monkeypatch, "REFUSED_BACKOFF", 0.2)
    first, last = free_range(1)
    server = serve(bench, first, last, port_lease=1)
    one = come(bench, server, 0, "web")
    published(bench)
    come(bench, server, 0, "other")
    event = bench.client_events.wait(Unpublished)[0]
    assert event.reason == f"refused by the relay: all ports that it may have are taken ({first})"
    assert not event.lasting
    one.end(0)
    wait_until(lambda: published(bench)[1:] == [first])
    assert set(server.service_addresses) == {f"other@{first}"}


def test_a_certain_port_is_shared_by_those_of_one_service(bench: Bench) -> None:
    """Links of both are taken in turn; with another service's name the second is refused."""
    first, last = free_range(2)
    server = serve(bench, first, last)
    come(bench, server, first, "web")
    come(bench, server, first, "web")
    wait_until(lambda: server.counters["links_idle"] == 4)
    come(bench, server, first, "ssh")
    event = bench.client_events.wait(Unpublished)[0]
    assert event.reason == f"refused by the relay: port {first} is taken by service web"


def test_another_identity_is_refused(bench: Bench, tmp_path: Path) -> None:
    """The same name and port do not help; and each has the ports that its section says."""
    first, last = free_range(3)
    path = tmp_path / "clients.conf"
    path.write_text(f"[nas]\ntoken = {TOKEN}\nports = {first}-{first + 1}\n[pi]\ntoken = pi {TOKEN}\nports = {first}\n")
    server = serve(bench, first, last, token=None, client_ports=None, clients=str(path))
    come(bench, server, first, "web", client_name="nas")
    published(bench)
    come(bench, server, first, "web", client_name="nas")
    wait_until(lambda: server.counters["links_idle"] == 4)
    come(bench, server, first, "web", client_name="pi", token=f"pi {TOKEN}")
    reasons = [event.reason for event in bench.client_events.wait(Unpublished)]
    assert reasons == [f"refused by the relay: port {first} is taken by another relay client"]
    come(bench, server, last, "web", client_name="nas")
    assert bench.client_events.wait(Unpublished, 2)[1].reason == (
        f"refused by the relay: nas may not ask for port {last}: the server's clients file gives it {first}-{first + 1}"
    )


def test_what_the_server_does_not_give(bench: Bench) -> None:
    """A port outside the range, any at all, and one of its own."""
    first, last = free_range(2)
    server = serve(bench, first, last, service_port=last)
    come(bench, server, last + 1)
    assert bench.client_events.wait(Unpublished)[0].reason == (
        f"refused by the relay: port {last + 1} is not among those that relay clients may ask for: {first}-{last}"
    )
    come(bench, server, last)
    assert bench.client_events.wait(Unpublished, 2)[1].reason == (
        f"refused by the relay: port {last} is the server's own, of its service default"
    )
    come(bench, bench.server(token=TOKEN), 0)
    assert bench.client_events.wait(Unpublished, 3)[2].reason == (
        "refused by the relay: this relay server gives no ports to relay clients (--client-ports)"
    )


def test_a_port_that_another_program_has(bench: Bench) -> None:
    """A certain one is refused, and for any another one is taken."""
    first, last = free_range(2)
    with socket.create_server((HOST, first)):
        server = serve(bench, first, last)
        come(bench, server, first)
        assert bench.client_events.wait(Unpublished)[0].reason == (
            f"refused by the relay: port {first} cannot be had there: another program has it"
        )
        come(bench, server, 0, "web")
        assert published(bench) == [last]


def test_a_privileged_port_says_what_it_needs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may listen there."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    server = serve(bench, 80, 80)
    monkeypatch.setattr(leases, "listen", refuse)
    come(bench, server, 80)
    assert bench.client_events.wait(Unpublished)[0].reason == (
        "refused by the relay: port 80 cannot be had there: a port below 1024 needs CAP_NET_BIND_SERVICE"
    )


@pytest.mark.parametrize("service", ["", "a b", "web@1", "x" * 65])
def test_a_key_is_no_name(bench: Bench, service: str) -> None:
    """Nobody gets to another's port by its key, nor has a name that none can be."""
    first, last = free_range(2)
    server = serve(bench, first, last, token=None)
    come(bench, server, first, "web", token=None)
    published(bench)
    for more in ({"service_port": last}, {}):
        for name in (service, f"web@{first}"):
            link: FakeClient = bench.enter(FakeClient(server))
            hello = {"version": 1, "service": name, "client": "c", "nonce": new_nonce(), "name": "x", **more}
            link.send(HELLO, hello)
            answer = link.next()
            assert (answer.kind, answer.fields["code"]) == (REFUSED, "service")


@pytest.mark.parametrize(
    "fields", [{"service_port": 65536}, {"service_port": -1}, {"service_port": 0, "had_port": 1e9}]
)
def test_what_is_no_port_is_a_fault(bench: Bench, fields: dict[str, Any]) -> None:
    server = serve(bench, *free_range(1), token=None)
    link: FakeClient = bench.enter(FakeClient(server))
    link.send(HELLO, {"version": 1, "service": "web", "client": "c", "nonce": new_nonce(), **fields})
    answer = link.next()
    assert (answer.kind, answer.fields["code"]) == (REFUSED, "protocol")


def test_an_old_server_is_not_taken_for_one_that_gives_ports(bench: Bench) -> None:
    """It would put the service somewhere else, and not say so."""
    with FakeServer() as old:
        come(bench, old.port, 0, token=None)
        old.welcome(old.accept())
        event = bench.client_events.wait(Unpublished)[0]
    assert event.reason == "this relay server cannot be asked for a port: it is older than this client"
    assert not bench.client_events.of(Published)


def test_lists_and_limits_are_for_those_services_too(bench: Bench) -> None:
    """Those for all services; and a name that the server has counts, too."""
    first, last = free_range(2)
    server = serve(bench, first, last, service="web=0", deny="127.0.0.2", allow="web=127.0.0.3", limit_rate="64Ki")
    come(bench, server, first, "ssh")
    published(bench)
    with pytest.raises(ConnectionResetError):
        connect_from(bench, "127.0.0.2", first).recv(1)
    assert bench.server_events.wait(ConnectionFailed)[0].reason == "its address may not connect (--deny)"
    began = time.monotonic()
    sock = connect_from(bench, "127.0.0.4", first)
    sock.sendall(bytes(128 << 10))
    read_exactly(sock, 128 << 10)
    assert time.monotonic() - began > 1


# Breaks


def test_a_port_is_kept_for_a_while(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client comes back to it, also as another process of the same name, and it is given back afterwards."""
    first, last = free_range(2)
    server = serve(bench, first, last, port_lease=1)
    for number in (1, 2):
        client = come(bench, server, 0, "web", client_name="nas")
        assert published(bench, number)[-1] == first
        wait_until(lambda: server._intake.leases._leases[first].was_used)  # type: ignore[attr-defined]
        client.end(0)
        bench.server_events.wait(ClientDown, number)
    assert not is_closed(first)
    wait_until(lambda: is_closed(first))
    assert server.service_addresses == {}


def test_who_waits_where_a_port_is_given_back_is_refused(bench: Bench) -> None:
    first, last = free_range(1)
    server = serve(bench, first, last, port_lease=1)
    client = come(bench, server, first, "web")
    published(bench)
    client.end(0)
    bench.server_events.wait(ClientDown)
    with connect(("", first)) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason == "its port was given back: the relay client that had asked for it is gone"
    assert failed.service == f"web@{first}"
    come(bench, server, first, "web")
    published(bench, 2)
    assert answers(first)


def test_after_a_restart_of_the_server_it_asks_for_the_one_it_had(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gets another one where that is taken; the address that is told is right each time."""
    for name in ("FIRST_BACKOFF", "LAST_BACKOFF", "REFUSED_BACKOFF"):
        replace(monkeypatch, name, 0.05)
    first, last = free_range(3)
    relay_port = free_port()
    own = {"on_event": bench.server_events, "token": TOKEN, "client_ports": f"{first}-{last}", "hostname": HOST}
    first_one = {"relay_host": HOST, "relay_port": relay_port, "token": TOKEN, "publish": "x=1@0", "try_service": False}
    with RelayServer(relay_port, **own, drain_timeout=0), RelayClient(**first_one):  # type: ignore[arg-type]
        wait_until(lambda: not is_closed(first))
        come(bench, relay_port, 0, "web")
        assert published(bench) == [first + 1]
    with RelayServer(relay_port, **own, drain_timeout=0):  # type: ignore[arg-type]
        wait_until(lambda: not is_closed(first + 1))
        assert answers(first + 1)
        assert set(published(bench)) == {first + 1}
    with socket.create_server((HOST, first + 1)), RelayServer(relay_port, **own, drain_timeout=0):  # type: ignore[arg-type]
        wait_until(lambda: published(bench)[-1] == first)
        assert answers(first)


def test_another_address_is_told_although_nothing_was_lost_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server was started anew between two links: no attempt has failed."""
    first, _ = free_range(1)
    with FakeServer() as relay:
        come(bench, relay.port, 0, "web", token=None, num_conn=1)
        for number, port in enumerate((first, first + 1), 1):
            link = relay.accept()
            hello = relay.welcome(link, service_port=port, address=f"127.0.0.1:{port}")
            assert hello.fields["had_port"] == (0 if number == 1 else first)
            assert published(bench, number)[-1] == port
            link.close()
        assert not bench.client_events.of(Unpublished)


def test_over_a_network_that_is_gone(lay_wire: Callable[..., Wire], peers: Peers, workers: str) -> None:
    """For less than the lease its port is kept; for longer somebody else may get it, and then another one is told."""
    wire = lay_wire(Way(delay=0.01))
    first, last = 20_000, 20_001  # in a network of the test's own
    words = "--token", TOKEN, "--port-lease", "3", "--client-ports", f"{first}-{last}", "--heartbeat", "0.4"
    with wire.server.inside():
        server = peers.relay_process("server", "--relay-port", "10080", *words)
    server.wait_event("Listening", service="")
    with wire.client.inside():
        client = peers.relay_process("client", f"{SERVER}:10080", "22@0", "--token", TOKEN, "--try-service", "false")
    client.wait_event("Published", address=f"{SERVER}:{first}")
    with wire.hole():
        server.wait_event("ClientDown", service=f"default@{first}")
    wait_until(lambda: len(server.events("ClientUp")) == 2, 30)
    assert {str(event["service"]) for event in server.events("ClientUp")} == {f"default@{first}"}
    with wire.hole():
        server.wait_message(f"port {first} of service default is given back")
        with wire.server.inside():
            other = peers.relay_process(
                "client", "127.0.0.1:10080", "22@0", "--token", TOKEN, "--try-service", "false", "--name", "other"
            )
        other.wait_event("Published", address=f"127.0.0.1:{first}")
    client.wait_event("Published", 30, address=f"{SERVER}:{last}")
    for relay in (client, other, server):
        relay.kill()


def ask(server: RelayServer, client: str, *, port: int = 0, had: int = 0, called: str = "nas", host: str = HOST) -> int:
    """Ask for a port without opening a link; returns which it is."""
    key = server._intake.ask(Ask("web", port, had, client, called, "", host))
    return int(key.rpartition("@")[2])


def test_what_nobody_has_used_is_not_taken_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own links may be on their way; and it is over soon, although the lease is long."""
    first, last = free_range(4)
    server = serve(bench, first, last)
    assert ask(server, "one") == first
    assert ask(server, "another") == first + 1
    assert ask(server, "one") == first
    monkeypatch.setattr(leases.Leases, "UNUSED", 0.5)
    wait_until(lambda: is_closed(first) and is_closed(first + 1))


def test_what_was_used_is_taken_over_from_the_same_host_alone(bench: Bench) -> None:
    """By a relay client of the same name that has had no port itself."""
    first, last = free_range(4)
    server = serve(bench, first, last)
    assert ask(server, "one") == first
    server._intake.leases._leases[first].was_used = True  # type: ignore[attr-defined]
    assert ask(server, "two", host="192.0.2.1") == first + 1
    assert ask(server, "three", called="pi") == first + 2
    assert ask(server, "four", had=last) == last
    assert ask(server, "five") == first


def test_a_link_that_is_refused_does_not_keep_its_port(bench: Bench, tmp_path: Path) -> None:
    """Its rights are judged by what is in force when it asks, not by those that it came with."""
    first, last = free_range(2)
    server = serve(bench, first, last, token=None)
    runtime = server.runtime
    runtime.options = dataclasses.replace(runtime.options, client_ports=(), service_port=0)
    with pytest.raises(Refusal, match="this relay server gives no ports"):
        ask(server, "one")
    assert server.service_addresses == {}


def test_idle_links_of_a_service_that_is_no_more_are_closed(bench: Bench) -> None:
    """Should there be any: the keeper lives on."""
    first, last = free_range(1)
    server = serve(bench, first, last)
    come(bench, server, first, "web")
    wait_until(lambda: server.counters["links_idle"] == 2)
    server._intake._end_service(f"web@{first}")  # type: ignore[attr-defined]
    reason = "its port was given back: the relay client that had asked for it is gone"
    assert {event.reason for event in bench.server_events.wait(LinkDown, 2)[:2]} == {reason}
    assert server.counters["links_idle"] == 0


# What is taken back


def test_ports_are_taken_back(bench: Bench) -> None:
    """At once, with their links; those that may stay do."""
    first, last = free_range(2)
    server = serve(bench, first, last)
    come(bench, server, first, "web")
    come(bench, server, last, "ssh")
    published(bench, 2)
    wait_until(lambda: server.counters["links_idle"] == 4)
    assert server.reload(client_ports=str(last))
    wait_until(lambda: is_closed(first))
    assert {event.reason for event in bench.server_events.of(LinkDown)} == {
        f"revoked: port {first} is not among those that relay clients may ask for any more"
    }
    assert answers(last)
    assert bench.server_events.wait(LinkRefused)[0].code == "rights"


# With workers


def test_workers_share_what_is_asked_for(peers: Peers, workers: str) -> None:
    """The links of all processes on both sides lead to one port, and to each of several; a worker that has died gets
    them again, and they are given back when the client has gone."""
    first, last = free_range(3)
    words = "--token", TOKEN, "--port-lease", "1", "--client-ports", f"{first}-{last}"
    server = peers.relay_process("server", "--relay-port", "0", "--hostname", HOST, *words)
    server.wait_event("Listening", service="")
    service = peers.service(echo)
    client = peers.relay_process(
        "client", "--relay-host", HOST, "--relay-port", str(server.relay_port), "--token", TOKEN,
        "--publish", f"any={HOST}:{service.port}@0", "--publish", f"web={HOST}:{service.port}@{last}",
    )  # fmt: skip
    client.wait_event("Published", service="any", address=f"{HOST}:{first}")
    client.wait_event("Published", service="web", address=f"{HOST}:{last}")
    for port in (first, last):
        socks = [peers.connect(port) for _ in range(12)]
        for sock in socks:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
        for sock in socks:
            sock.close()
    assert is_closed(first + 1)
    client.signal(signal.SIGTERM)
    assert client.wait() == 0
    wait_until(lambda: is_closed(first) and is_closed(last))
    client = peers.relay_process(
        "client", f"{HOST}:{server.relay_port}", f"{HOST}:{service.port}@{first + 1}", "--token", TOKEN
    )
    client.wait_event("Published", service="default", address=f"{HOST}:{first + 1}")
    with peers.connect(first + 1) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"


# The words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web=80@0", "web=localhost:80@0"),
        ("80@20000", "default=localhost:80@20000"),
        ("nas:80@1", "default=nas:80@1"),
        ("app=unix:/run/a@2", "app=unix:/run/a@2"),
        ("app=unix:/run/a@b", "app=unix:/run/a@b"),
    ],
)
def test_the_words_of_a_publication(text: str, said: str) -> None:
    assert str(parse_publication(text)) == said
    assert parse_publication(said) == parse_publication(text)


def test_a_port_for_the_default_service() -> None:
    client = RelayClient(HOST, 80, HOST, 1, service_port=20000)
    assert [str(service) for service in client.options.services] == [f"default={HOST}:80@20000"]
    with pytest.raises(ValueError, match="--service-port is of no use without --port"):
        RelayClient(relay_host=HOST, relay_port=1, publish="web=80", service_port=0)
    with pytest.raises(ValueError, match="--wire raw cannot ask for a port"):
        RelayClient(HOST, 80, HOST, 1, service_port=0, wire="raw")
    with pytest.raises(ValueError, match="--wire raw cannot ask for a port"):
        RelayServer(1, client_ports="1-2", wire="raw", service_port=3)


# Whose a port is


def leases_of(server: RelayServer) -> dict[int, leases.Lease]:
    """What is given out, by port."""
    assert server._leases
    return server._leases._leases


def is_reset(bench: Bench, host: str, port: int) -> bool:
    """Whether a connection from there is reset, and not answered."""
    try:
        sock = connect_from(bench, host, port)
        sock.sendall(b"x")
        return not sock.recv(1)
    except ConnectionResetError:
        return True


def hello_for(bench: Bench, server: RelayServer, token: str, **fields: Any) -> Any:
    link = bench.enter(FakeClient(server))
    return link.hello(token=token.encode(), **{"service": "web", "service_port": 0, **fields}).fields


def two_owners(bench: Bench, tmp_path: Path, first: int, last: int, **options: Any) -> RelayServer:
    path = tmp_path / "clients.conf"
    path.write_text("".join(f"[{n}]\ntoken = {n} {TOKEN}\nports = {first}-{last}\n" for n in ("nas", "pi")))
    return serve(bench, first, last, token=None, client_ports=None, clients=str(path), **options)


def test_any_is_for_its_owner(bench: Bench, tmp_path: Path) -> None:
    first, last = free_range(2)
    server = two_owners(bench, tmp_path, first, last)
    found = [hello_for(bench, server, f"{n} {TOKEN}", name=n, client="the same")["service_port"] for n in ("nas", "pi")]
    assert found == [first, last]


def test_any_is_no_certain_one(bench: Bench) -> None:
    first, last = free_range(2)
    server = serve(bench, first, last)
    found = [hello_for(bench, server, TOKEN, client="c", service_port=port)["service_port"] for port in (first, 0)]
    assert found == [first, last]


def test_a_revoked_one_is_given_to_nobody(bench: Bench) -> None:
    first, last = free_range(2)
    server = serve(bench, first, last)
    assert hello_for(bench, server, TOKEN, client="c")["service_port"] == first
    leases_of(server)[first].revoked = True
    assert hello_for(bench, server, TOKEN, client="c")["service_port"] == last
    assert (
        hello_for(bench, server, TOKEN, client="c", service_port=first)["reason"]
        == f"port {first} is about to be given back"
    )


def test_a_port_that_is_used_does_not_expire(bench: Bench) -> None:
    first, last = free_range(1)
    server = serve(bench, first, last, port_lease=1)
    come(bench, server, 0, "web")
    published(bench)
    lease = leases_of(server)[first]
    old = lease.seen = time.monotonic() - 100
    wait_until(lambda: lease.seen > old or not leases_of(server))
    assert answers(first)


def test_had_has_to_be_its_own(bench: Bench) -> None:
    first, last = free_range(2)
    server = serve(bench, first, first)
    assert hello_for(bench, server, TOKEN, had_port=last)["service_port"] == first


def test_a_kept_port_is_for_who_had_it(bench: Bench) -> None:
    first, last = free_range(2)
    server = serve(bench, first, last)
    client = come(bench, server, 0, "web", client_name="nas")
    assert published(bench) == [first]
    client.end(0)
    bench.server_events.wait(ClientDown)
    come(bench, server, 0, "web", client_name="pi")
    assert published(bench, 2)[1] == last


def test_an_identity_s_ports_are_taken_back(bench: Bench, tmp_path: Path) -> None:
    first, last = free_range(2)
    server = two_owners(bench, tmp_path, first, last)
    for number, port in enumerate((first, last), 1):
        come(bench, server, port, f"web{number}", client_name="nas", token=f"nas {TOKEN}")
    published(bench, 2)
    wait_until(lambda: server.counters["links_idle"] == 4)
    path = tmp_path / "clients.conf"
    path.write_text(path.read_text().replace(f"{first}-{last}", str(last), 1))
    assert server.reload()
    assert len(bench.server_events.of(LinkDown)) == 2
    wait_until(lambda: set(server.service_addresses) == {f"web2@{last}"})
    assert answers(last)


@pytest.mark.parametrize("certain", [True, False])
def test_ports_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch, certain: bool) -> None:
    replace(monkeypatch, "MOST_LEASES", 1)
    first, last = free_range(2)
    server = serve(bench, first, last)
    hello_for(bench, server, TOKEN, client="a")
    assert (
        hello_for(bench, server, TOKEN, client="b", service_port=last * certain)["reason"]
        == "too many ports are given out"
    )


def test_no_link_joins_what_was_given_back() -> None:
    pool = Pool([], 1, 1)
    try:
        with pytest.raises(Refusal, match="the port was given back meanwhile"):
            pool.join(SimpleNamespace(service="web@1", client="c"))  # type: ignore[arg-type]
    finally:
        pool.selector.close()


def test_workers_again(peers: Peers, workers: str) -> None:
    first, last = free_range(2)
    words = "--token", TOKEN, "--port-lease", "1", "--client-ports", f"{first}-{last}"
    server = peers.relay_process("server", "--relay-port", "0", "--hostname", HOST, *words)
    server.expected_error = "worker"
    service = peers.service(echo)

    def use() -> None:
        for _ in range(6):
            with peers.connect(first) as sock:
                sock.sendall(b"x")
                assert read_exactly(sock, 1) == b"x"

    def start(name: str, port: int) -> Any:
        return peers.relay_process(
            "client", "--relay-host", HOST, "--relay-port", str(server.relay_port), "--token", TOKEN,
            "--publish", f"{name}={HOST}:{service.port}@{port}",
        )  # fmt: skip

    for _ in range(2):
        client = start("web", first)
        client.wait_event("Published", address=f"{HOST}:{first}")
        use()
        other = start("ssh", first)
        assert "is taken by service web" in other.wait_event("Unpublished")["reason"]
        other.signal(signal.SIGTERM)
        assert other.wait() == 0
        client.signal(signal.SIGTERM)
        assert client.wait() == 0
        wait_until(lambda: is_closed(first))


def test_a_worker_that_has_died(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_WORKERS", "2")
    first, last = free_range(1)
    words = "--token", TOKEN, "--client-ports", f"{first}-{last}"
    server = peers.relay_process("server", "--relay-port", "0", "--hostname", HOST, *words)
    server.expected_error = "worker"
    service = peers.service(echo)
    client = peers.relay_process(
        "client", f"{HOST}:{server.relay_port}", f"{HOST}:{service.port}@{first}", "--token", TOKEN
    )
    client.wait_event("Published")
    children = [pid for pid in find_family(server.process.pid) if pid != server.process.pid]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(server.events("ClientUp")) == 2)
    for _ in range(6):
        with peers.connect(first) as sock:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"


def test_lists_for_ports_on_demand(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "denied").write_text("127.0.0.3\n")
    first, last = free_range(1)
    server = serve(bench, first, last, deny="127.0.0.2", deny_file=str(tmp_path / "denied"))
    come(bench, server, first, "web")
    published(bench)
    assert [is_reset(bench, f"127.0.0.{n}", first) for n in (2, 3, 4)] == [True, True, False]
    assert [event.reason for event in bench.server_events.wait(ConnectionFailed, 2)] == [
        "its address may not connect (--deny)",
        "its address may not connect (--deny-file)",
    ]


def test_revoke_leaves_the_leases_that_may_stay(bench: Bench, tmp_path: Path) -> None:
    first, last = free_range(2)
    server = two_owners(bench, tmp_path, first, last)
    for port in (first, last):
        hello_for(bench, server, f"nas {TOKEN}", name="nas", service_port=port)
    path = tmp_path / "clients.conf"
    path.write_text(path.read_text().replace(f"{first}-{last}", str(last), 1))
    held = dict(leases_of(server))
    assert server.reload()
    assert [held[port].revoked for port in (first, last)] == [True, False]


def test_ports_of_identities_are_given_back(bench: Bench, tmp_path: Path) -> None:
    first, last = free_range(1)
    server = two_owners(bench, tmp_path, first, last, port_lease=1)
    # and no links at the first look: the acceptor sleeps without a lease
    client = come(bench, server, 0, "web", client_name="nas", token=f"nas {TOKEN}")
    published(bench)
    client.end(0)
    wait_until(lambda: server.service_addresses == {})


def test_the_rate_of_a_service_on_demand(bench: Bench) -> None:
    first, last = free_range(1)
    server = serve(bench, first, last, limit_rate="web=64Ki", service="web=0")
    come(bench, server, first, "web")
    published(bench)
    with connect(("", first)) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        [splice] = server.runtime.splices.snapshot()
        assert splice.to_link.pace and splice.to_link.pace.rate == 65536
