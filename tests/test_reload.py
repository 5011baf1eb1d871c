"""SIGHUP, and `reload`: the configuration is read again, and what changes does so while connections go on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.client.stock import Service, Stock
from _tcprelay.client.workers import ClientWorkers
from _tcprelay.values import parse_publication
from _tcprelay.watch import Places
from tcprelay import ConnectionClosed, ConnectionFailed, LinkDown, Published, RelayClient, RelayServer, Unpublished

from .conftest import Bench, connect, echo, read_exactly, stock_of, unused_port, wait_until
from .peers import HOST, Peers, RelayProcess

TOKEN = "the token of all the tests"


def talk(sock: socket.socket) -> None:
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"


# What the relay client publishes


@pytest.fixture
def two(bench: Bench) -> tuple[RelayServer, RelayClient]:
    """A server with three services, and a client that publishes two of them."""
    server = bench.server(service=["web=0", "ssh=0"], token=TOKEN)
    port = bench.service().port
    client = bench.client(server, port, publish=f"web={HOST}:{port}", token=TOKEN)
    return server, client


def publish(client: RelayClient, *services: str) -> None:
    """Have it publish these, and no default one."""
    assert client.reload(port=None, publish=list(services))


def test_a_service_is_added_while_others_go_on(bench: Bench, two: tuple[RelayServer, RelayClient]) -> None:
    server, client = two
    held, port = bench.connect(server), bench.service().port
    talk(held)
    downs = len(bench.client_events.of(LinkDown))
    assert client.reload(publish=[*map(str, client.options.publish), f"ssh={HOST}:{port}"])
    wait_until(lambda: any(event.service == "ssh" for event in bench.client_events.of(Published)))
    for service in ("default", "web", "ssh"):
        with bench.connect(server, service) as sock:
            talk(sock)
    talk(held)
    assert len(bench.client_events.of(LinkDown)) == downs


def test_a_service_is_taken_away_while_others_go_on(
    bench: Bench, two: tuple[RelayServer, RelayClient], caplog: pytest.LogCaptureFixture
) -> None:
    """Its idle links are given up at once and in peace; what lives on it ends by itself."""
    caplog.set_level("INFO")
    server, client = two
    held = bench.connect(server)
    talk(held)
    wait_until(lambda: server.counters["links_idle"] == 4)
    publish(client, *map(str, client.options.publish))
    wait_until(lambda: server.counters["links_idle"] == 2)
    assert "service default is published no more" in caplog.messages
    reasons = {event.reason for event in bench.server_events.of(LinkDown)}
    assert reasons == {"it publishes this service no more"}
    with bench.connect(server, "web") as sock:
        talk(sock)
    talk(held)
    held.close()
    bench.server_events.wait(ConnectionClosed, 2)
    assert {event.reason for event in bench.server_events.of(ConnectionClosed)} == {""}
    assert {event.service for event in bench.server_events.wait(LinkDown, 3)} == {"default"}
    assert not bench.client_events.of(Unpublished)


def test_a_service_leads_elsewhere(bench: Bench, two: tuple[RelayServer, RelayClient]) -> None:
    """New connections do; nobody is refused on the way."""
    server, client = two
    held = bench.connect(server, "web")
    talk(held)

    def greet(sock: socket.socket) -> None:
        sock.sendall(b"another")

    publish(client, f"web={HOST}:{bench.service(greet).port}")
    wait_until(lambda: any(event.reason for event in bench.server_events.of(LinkDown)))

    def is_another() -> bool:
        with bench.connect(server, "web") as sock:
            sock.sendall(b"hello")
            return read_exactly(sock, 5) == b"anoth"

    wait_until(is_another)
    talk(held)
    assert not bench.server_events.of(ConnectionFailed)


def test_what_was_taken_away_can_come_back(bench: Bench, two: tuple[RelayServer, RelayClient]) -> None:
    """Many times, and nothing is left behind (see the fixture that looks)."""
    server, client = two
    services = [*map(str, client.options.publish), f"ssh={HOST}:{bench.service().port}"]
    for _ in range(5):
        publish(client, services[0])
        wait_until(lambda: server.counters["links_idle"] == 2)
        publish(client, *services)
        wait_until(lambda: server.counters["links_idle"] == 4)
    with bench.connect(server, "ssh") as sock:
        talk(sock)


def test_a_mistake_leaves_all_as_it_was(bench: Bench, two: tuple[RelayServer, RelayClient]) -> None:
    server, client = two
    before = client.options
    mistakes: list[dict[str, Any]] = [
        {"publish": ["web=1", "web=2"]},
        {"pin": "x"},
        {"token_file": "/nowhere", "token": None},
        {"max_conn": -1},
        {"nonsense": 1},
    ]
    for mistake in mistakes:
        assert not client.reload(**mistake)
    assert client.options == before
    assert server.counters["links_idle"] == 4


def test_services_that_never_had_a_link_leave_nothing(bench: Bench) -> None:
    """While the relay server cannot be reached (see the fixture that looks at descriptors)."""
    client = bench.enter(RelayClient(HOST, 1, HOST, unused_port(), 1, token=TOKEN, drain_timeout=0, try_service=False))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        assert client.reload(publish=[f"web={HOST}:{number + 1}"])
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 6)


def test_a_new_service_comes_with_the_new_token(bench: Bench) -> None:
    """And not a moment before it: it would be refused, and that is told."""
    server = bench.server(token=TOKEN, service="web=0")
    client = bench.client(server, bench.service().port, token=TOKEN)
    assert server.reload(token="another one for the tests")
    assert client.reload(token="another one for the tests", publish=f"web={HOST}:{bench.service().port}")
    wait_until(lambda: any(event.service == "web" for event in bench.client_events.of(Published)))
    assert not bench.client_events.of(Unpublished)


# What a server takes


def test_the_limits_of_a_server(bench: Bench) -> None:
    """They count for what connects from now on."""
    server = bench.relay(token=TOKEN)
    first = bench.connect(server)
    talk(first)
    assert server.reload(max_connections=1)
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert "--max-connections" in bench.server_events.wait(ConnectionFailed)[0].reason
    assert server.reload(max_connections=None, max_per_address=2)
    second, third = bench.connect(server), bench.connect(server)
    talk(second)
    talk(third)  # the first one came before there was a limit
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert "--max-per-address" in bench.server_events.wait(ConnectionFailed, 2)[1].reason
    for sock in (first, second, third):
        sock.close()
    bench.server_events.wait(ConnectionClosed, 3)
    with bench.connect(server) as sock:
        talk(sock)
    assert server.reload(pair_timeout=0.1, idle_timeout=0.2)
    quiet = bench.connect(server)
    talk(quiet)
    with pytest.raises(ConnectionResetError):
        quiet.recv(1)


def test_what_only_a_restart_can_change(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Is told in one line, and stays; all else counts."""
    caplog.set_level("INFO")
    server = bench.server(token=TOKEN)
    port = server.relay_address[1]
    assert server.reload(relay_port=1, hostname="::1", pair_timeout=3, heartbeat=2)
    assert caplog.messages[-2:] == [
        "only a restart can change --relay-port, --hostname",
        "the configuration is reloaded; changed: --pair-timeout, --heartbeat",
    ]
    assert (server.options.relay_port, server.options.hostname, server.options.pair_timeout) == (0, "", 3.0)
    connect(("", port)).close()


# The commands


class Files:
    """The configuration files of two commands."""

    def __init__(self, path: Path) -> None:
        self.paths = {role: path / f"{role}.conf" for role in ("server", "client")}

    def write(self, role: str, *lines: str) -> None:
        self.paths[role].write_text("\n".join(lines) + "\n")

    def start(self, peers: Peers, role: Any) -> RelayProcess:
        return peers.relay_process(role, "--config", str(self.paths[role]))


def reload(relay: RelayProcess, said: str) -> None:
    relay.signal(signal.SIGHUP)
    relay.wait_message(said)


def test_a_command_reads_its_file_again(peers: Peers, tmp_path: Path, workers: str) -> None:
    """Tokens, limits, the log's level, services: on both sides, with living connections, whatever processes there
    are."""
    files, service = Files(tmp_path), peers.service(echo)
    ports = "relay-port = 0", "service = web=0", "service = ssh=0", f"hostname = {HOST}"
    files.write("server", *ports, f"token = {TOKEN}")
    server = files.start(peers, "server")
    relay = f"relay-host = {HOST}", f"relay-port = {server.relay_port}"
    files.write("client", *relay, f"token = {TOKEN}", f"publish = web={HOST}:{service.port}")
    client = files.start(peers, "client")
    client.wait_event("Published", service="web")
    held = peers.connect(server.port_of("web"))
    talk(held)

    files.write("client", *relay, f"token = {TOKEN}", f"publish = ssh={HOST}:{service.port}")
    reload(client, "the configuration is reloaded; changed: --publish")
    client.wait_event("Published", service="ssh")
    server.wait_event("ClientUp", service="ssh")
    with peers.connect(server.port_of("ssh")) as sock:
        talk(sock)
    talk(held)
    held.close()
    server.wait_event("ClientDown", service="web")

    files.write("server", *ports, "token = another one for the tests", "max-per-address = 1", "log-level = debug")
    reload(server, "the configuration is reloaded; changed: --token, --log-level, --max-per-address")
    files.write("client", *relay, "token = another one for the tests", f"publish = web={HOST}:{service.port}")
    reload(client, "the configuration is reloaded; changed: --token, --publish")
    server.wait_event("LinkUp", service="web")  # which stands there at level debug alone
    with peers.connect(server.port_of("web")) as sock:
        talk(sock)
        with pytest.raises(ConnectionResetError), peers.connect(server.port_of("web")) as other:
            other.recv(1)
    wait_until(lambda: len(server.events("ConnectionClosed")) == 3)  # its share is given back

    server.expected_error = client.expected_error = "cannot reload"
    files.write("server", *ports, "token = x", "nonsense = 1")
    reload(server, f"cannot reload, all stays as it was: {files.paths['server']}, line 6: unknown option nonsense")
    files.write("client", *relay, "token =")
    reload(client, "cannot reload, all stays as it was: ")
    files.paths["server"].unlink()
    server.signal(signal.SIGHUP)
    server.wait_message(f"cannot reload, all stays as it was: cannot read {files.paths['server']}: no such file")
    with peers.connect(server.port_of("web")) as sock:
        talk(sock)


# Reloads that fail late, and what a parent tells


def test_max_conn(bench: Bench) -> None:
    server = bench.server(token=TOKEN)
    client = bench.client(server, bench.service().port, token=TOKEN)
    assert client.reload(max_conn=3)
    assert client.runtime.places.most == 3


def test_stock_tells_nothing_of_what_is_gone() -> None:
    service = Service(parse_publication("web=1"), 1)
    stock = Stock([service], 1, Places(9), 1, threading.Condition())
    service.begin()
    service.connecting = 1
    stock.replace([], [])
    assert not stock.fail(service, time.monotonic(), "why")
    stock.close()


def test_a_reload_that_fails_late(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.server(token=TOKEN)
    client = bench.client(server, bench.service().port, token=TOKEN)
    before = client.options, client.runtime.credentials

    def fail(publication: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(client._branches, "_make_services", fail)
    assert not client.reload(publish="web=1", token="another token of the tests")
    assert (client.options, client.runtime.credentials) == before
    assert stock_of(client).services[0].name == "default" and len(stock_of(client).services) == 1


def test_max_pending(bench: Bench) -> None:
    server = bench.server(token=TOKEN)
    assert server.reload(max_pending=1)
    for _ in range(2):
        bench.connect(server)
    assert "--max-pending" in bench.server_events.wait(ConnectionFailed)[0].reason


def test_workers_tell_once(bench: Bench) -> None:
    client = RelayClient(HOST, 80, HOST, 1, publish="web=81", on_event=bench.client_events)
    workers = ClientWorkers(client, 2, lambda number, count: None)

    def tell(worker: int, address: str) -> None:
        fields = {"service": "web", "target": "t", "relay": "r", "address": address}
        workers.tell("Published", fields, workers.workers[worker])

    for worker, address in ((0, "a:1"), (1, "a:1"), (0, "a:2")):
        tell(worker, address)
    assert [event.address for event in bench.client_events.of(Published)] == ["a:1", "a:2"]
    assert client.renew(publish=None)
    workers.renewed()
    tell(0, "a:3")
    assert client.renew(publish="web=81")
    workers.renewed()
    tell(0, "a:2")
    assert [event.address for event in bench.client_events.of(Published)] == ["a:1", "a:2", "a:2"]
    workers.selector.close()
