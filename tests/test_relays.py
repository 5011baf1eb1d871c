"""Several relay servers, one client: links to each, and what is down costs the others nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import subprocess
import sys
from typing import Any

import pytest

from _tcprelay.addresses import Endpoint
from _tcprelay.client import branches as branches_room
from _tcprelay.client.stock import Service, begin_all
from _tcprelay.names import Addresses, Name
from _tcprelay.values import parse_publication
from tcprelay import (
    ClientDown, ClientOptions, ConnectionClosed, LinkRefused, Published, RelayClient, RelayServer, ServiceBack,
    ServiceDown, ServiceStatus, Unpublished,
)  # fmt: skip

from .certificates import Certificates
from .conftest import PATIENCE, Bench, echo, read_exactly, unused_port, wait_until
from .peers import HOST, ROOT, Peers

TOKEN = "a long and random secret"


def relay_of(server: RelayServer, host: str = HOST) -> str:
    return f"{host}:{server.relay_address[1]}"


def client_of(bench: Bench, *servers: RelayServer | str, **options: Any) -> RelayClient:
    """A client of all of these, with an echo behind it."""
    relays = [one if isinstance(one, str) else relay_of(one) for one in servers]
    own = {"num_conn": 2, "drain_timeout": 0.0, "try_service": False, "on_event": bench.client_events, **options}
    client: RelayClient = bench.enter(RelayClient(HOST, bench.service(echo).port, relay=relays, **own))
    return client


def answers(bench: Bench, server: RelayServer, service: str = "default") -> bool:
    """Whether a service client gets its echo through this relay server."""
    with bench.connect(server, service) as sock:
        sock.sendall(b"x")
        return read_exactly(sock, 1) == b"x"


def of(server: RelayServer, name: str) -> list[ServiceStatus]:
    """What a relay server says of a service."""
    return [service for service in server.status().services if service.name == name]


def digest_of(certificates: Certificates) -> str:
    """The SHA-256 of the servers' certificate, in hexadecimal."""
    with open(certificates.path("server.pem")) as file:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(file.read())).hexdigest()


def two(bench: Bench, **options: Any) -> tuple[RelayServer, RelayServer]:
    return bench.server(token=TOKEN, **options), bench.server(token=TOKEN, **options)


# --- Options ----------------------------------------------------------------------------------------------------


def test_the_first_and_further_ones() -> None:
    options = RelayClient(HOST, 1, "a.example", 10, relay=["b.example:20", "[::1]:30"]).options
    assert options.relays == [Endpoint("a.example", 10), Endpoint("b.example", 20), Endpoint("::1", 30)]
    assert RelayClient(HOST, 1, relay="b.example:20").options.relays == [Endpoint("b.example", 20)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"relay": ["a:1", "a:1"]}, "the relay server a:1 stands there twice"),
        ({"relay_host": "a", "relay_port": 1, "relay": ["a:1"]}, "the relay server a:1 stands there twice"),
        ({"relay": ["a:0"]}, "no port of a relay server"),
        ({"relay": ["a:1"], "relay_all": True, "via": "socks5://proxy:1080"}, "--relay-all looks names up here"),
        ({"relay": ["a"]}, "expected HOST:PORT"),
        ({"relay": ["unix:/x"]}, "a relay server has no Unix socket"),
        ({}, "--relay-host is required"),
        ({"relay_host": "a", "relay": ["b:1"]}, "--relay-port is required"),
        ({"relay": ["a:1", "b:1"], "max_conn": 15}, "over all services and relay servers"),
        ({"relay": ["a:1"], "tls": "true", "pin": f"b:1=sha256:{'0' * 64}"}, "names no relay server of these: a:1"),
        ({"relay": ["a:1"], "tls": "true", "pin": [f"sha256:{'0' * 64}"] * 2}, "--pin stands there twice"),
        ({"relay": ["a:1"], "pin": f"a:1=sha256:{'0' * 64}"}, "--pin is of no use without --tls"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RelayClient(HOST, 1, **options)


def test_whose_pin_it_is() -> None:
    """One of its own goes before the one of all."""
    first, other = f"sha256:{'0' * 64}", f"sha256:{'1' * 64}"
    options = RelayClient(HOST, 1, relay=["a:1", "b:2"], tls="true", pin=[first, f"b:2={other.upper()}"]).options
    assert [options.pin_of(relay) for relay in options.relays] == [first, other]
    assert isinstance(options, ClientOptions) and list(map(str, options.pin)) == [first, f"b:2={other}"]


# --- Several ----------------------------------------------------------------------------------------------------


def test_published_at_all_of_them(bench: Bench) -> None:
    """Each is told once, by its name; the status has them all."""
    one, other = two(bench)
    client = client_of(bench, one, other, token=TOKEN)
    client.wait_until_published(PATIENCE)
    published = wait_until(lambda: len(found := bench.client_events.of(Published)) == 2 and found)
    assert {event.relay for event in published} == {relay_of(one), relay_of(other)}
    assert set(client.status().services[0].address.split(", ")) == {event.address for event in published}
    assert {event.address for event in published} == {
        f"{HOST}:{server.service_addresses['default'][1]}" for server in (one, other)
    }
    assert answers(bench, one) and answers(bench, other)
    wait_until(lambda: all(row.links_idle >= 2 and not row.links_opening for row in client.status().relays))
    status = client.status()
    assert [(row.address, row.problem) for row in status.relays] == [(relay_of(one), ""), (relay_of(other), "")]
    assert status.is_healthy and len(status.services) == 1 and status.services[0].links_idle >= 4
    assert one.status().clients[0].id == other.status().clients[0].id


def test_one_that_is_down_costs_the_others_nothing(bench: Bench) -> None:
    """Neither at the start nor later; the log says which, and it comes back by itself."""
    port, other = unused_port(), bench.server(token=TOKEN)
    client = client_of(bench, f"{HOST}:{port}", other, token=TOKEN)
    client.wait_until_published(PATIENCE)
    assert answers(bench, other)
    [down] = bench.client_events.wait(Unpublished)
    assert (down.relay, "refused" in down.reason) == (f"{HOST}:{port}", True)
    row = next(row for row in client.status().relays if row.address == down.relay)
    assert "refused" in row.problem and client.status().is_healthy
    with RelayServer(port, 0, token=TOKEN, drain_timeout=0) as one:
        wait_until(lambda: one.counters["links_idle"] == 2)
        assert answers(bench, one)
        sock = bench.connect(other)
        sock.sendall(b"x")
        read_exactly(sock, 1)
    sock.sendall(b"y")  # the one that has ended was the other's affair
    assert read_exactly(sock, 1) == b"y" and answers(bench, other)
    assert [event.relay for event in bench.client_events.of(Published)].count(relay_of(other)) == 1


def test_connections_that_live_end_with_their_relay_server_alone(bench: Bench) -> None:
    one, other = two(bench, drain_timeout=0)
    client_of(bench, one, other, token=TOKEN)
    wait_until(lambda: one.counters["links_idle"] == other.counters["links_idle"] == 2)
    socks = [bench.connect(server) for server in (one, other)]
    for sock in socks:
        sock.sendall(b"x")
        read_exactly(sock, 1)
    one.end(0)
    with pytest.raises(ConnectionResetError):
        socks[0].recv(1)
    socks[1].sendall(b"y")
    assert read_exactly(socks[1], 1) == b"y"


def test_each_has_its_own_pin(bench: Bench, certificates: Certificates) -> None:
    """A wrong one keeps that relay server out, and no other; one without is verified as ever."""
    servers = [bench.server(token=TOKEN, **secured(certificates)) for _ in range(3)]
    pin = f"sha256:{digest_of(certificates)}"
    right, wrong, vouched = servers
    pins = [f"{relay_of(right)}={pin}", f"{relay_of(wrong)}=sha256:{'0' * 64}"]
    client_of(bench, *servers, token=TOKEN, tls="relay", pin=pins)
    [refused, *_] = bench.server_events.wait(LinkRefused)
    assert "--pin" in refused.reason
    assert answers(bench, right) and answers(bench, vouched)
    [down] = bench.client_events.wait(Unpublished)
    assert down.relay == relay_of(wrong) and down.lasting
    assert wrong.counters["links_idle"] == 0


def test_one_without_a_pin_is_verified(bench: Bench, certificates: Certificates) -> None:
    """The token is too short to vouch, and no CA has signed the certificate."""
    one, other = (bench.server(token="short", **secured(certificates)) for _ in range(2))
    pin = f"{relay_of(one)}=sha256:{digest_of(certificates)}"
    client_of(bench, one, other, token="short", tls="relay", pin=pin)
    assert answers(bench, one)
    [down] = bench.client_events.wait(Unpublished)
    assert (down.relay, "certificate" in down.reason) == (relay_of(other), True)


def test_a_port_is_asked_for_at_each(bench: Bench) -> None:
    """Each gives one of its own, and says which."""
    ports = [unused_port(), unused_port()]
    servers = [bench.server(token=TOKEN, service_port=None, client_ports=f"{port}") for port in ports]
    client_of(bench, *servers, token=TOKEN, service_port=0)
    published = wait_until(lambda: len(found := bench.client_events.of(Published)) == 2 and found)
    assert {event.address for event in published} == {f"{HOST}:{port}" for port in ports}
    for port in ports:
        with socket.create_connection((HOST, port), PATIENCE) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_a_service_that_comes_and_goes_does_so_at_all(bench: Bench) -> None:
    one, other = (bench.server(token=TOKEN, service=["web=0"]) for _ in range(2))
    client, web = client_of(bench, one, other, token=TOKEN), bench.service(echo)
    wait_until(lambda: client.counters["links_idle"] == 4)
    assert client.reload(publish=f"web={HOST}:{web.port}")
    wait_until(lambda: client.counters["links_idle"] == 8)
    assert answers(bench, one, "web") and answers(bench, other, "web")
    assert client.reload(publish=[])
    wait_until(lambda: not any(service.links_idle for one in (one, other) for service in of(one, "web")))
    assert {event.service for event in bench.server_events.wait(ClientDown, 2)} == {"web"}
    assert answers(bench, one) and answers(bench, other)


def test_links_are_bounded_over_all(bench: Bench) -> None:
    """--max-conn is for all relay servers together."""
    one, other = two(bench)
    client = client_of(bench, one, other, token=TOKEN, max_conn=5)
    wait_until(lambda: client.counters["links_idle"] == 4)
    socks = [bench.connect(one) for _ in range(3)]
    for sock in socks:
        sock.sendall(b"x")
    wait_until(lambda: client.counters["open"] == 3)
    status = client.status().services[0]
    assert status.links_idle + status.links_busy + status.links_opening <= 5


# --- All addresses of a name ------------------------------------------------------------------------------------


class Found:
    """What a name server says of any name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[str] | None = []
        """``None`` where it says nothing."""
        real = Name.addresses

        def addresses(name: Name, *words: Any, **more: Any) -> Addresses:
            if name._host != "relay.example":
                return real(name, *words, **more)
            if self.hosts is None:
                raise socket.gaierror(socket.EAI_AGAIN, "cannot look up relay.example: the name server does not answer")
            return [(socket.AF_INET, (host, name._port)) for host in self.hosts]

        monkeypatch.setattr(Name, "addresses", addresses)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    return Found(monkeypatch)


def secured(certificates: Certificates) -> dict[str, Any]:
    """What gives a relay server TLS on its links."""
    return {"cert": certificates.path("server.pem"), "key": certificates.path("server.key"), "tls": "relay"}


def start_servers(bench: Bench, *hosts: str) -> tuple[int, dict[str, RelayServer]]:
    """Relay servers with one relay port, each at an address of its own."""
    port = unused_port()
    servers = {}
    for host in hosts:
        options: dict[str, Any] = {
            "hostname": host,
            "token": TOKEN,
            "on_event": bench.server_events,
            "drain_timeout": 0,
        }
        servers[host] = bench.enter(RelayServer(port, 0, **options))
    return port, servers


def test_addresses_appear_and_vanish(bench: Bench, found: Found) -> None:
    """What appears gets links, and what vanishes is given up in peace: what lives there goes on to its end."""
    port, servers = start_servers(bench, "127.0.0.1", "127.0.0.2", "127.0.0.3")
    one, other, third = servers.values()
    found.hosts = ["127.0.0.1", "127.0.0.2"]
    client = client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN)
    wait_until(lambda: one.counters["links_idle"] == other.counters["links_idle"] == 2)
    host, at = other.service_addresses["default"]
    with socket.create_connection((host, at), PATIENCE) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        found.hosts = ["127.0.0.1", "127.0.0.3"]
        wait_until(lambda: third.counters["links_idle"] == 2 and other.counters["links_idle"] == 0)
        sock.sendall(b"y")
        assert read_exactly(sock, 1) == b"y"
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason == ""
    wait_until(lambda: [row.address for row in client.status().relays] == [f"127.0.0.1:{port}", f"127.0.0.3:{port}"])
    assert one.counters["links_idle"] == 2 and other.counters["links_idle"] == 0
    found.hosts = ["127.0.0.1", "127.0.0.2"]
    wait_until(lambda: other.counters["links_idle"] == 2)


def test_a_name_that_nobody_knows_is_told(bench: Bench, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name itself is dialled then, which says why; once there are addresses they take its place."""
    monkeypatch.setattr(branches_room, "FIRST_LOOK", 0.1)
    port, servers = start_servers(bench, "127.0.0.1")
    found.hosts = None
    client = client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN)
    [down] = bench.client_events.wait(Unpublished)
    assert (down.relay, "cannot look up" in down.reason) == (f"relay.example:{port}", True)
    found.hosts = ["127.0.0.1"]
    wait_until(lambda: servers["127.0.0.1"].counters["links_idle"] == 2)
    wait_until(lambda: [row.address for row in client.status().relays] == [f"127.0.0.1:{port}"])


def test_the_certificate_is_that_of_the_name(bench: Bench, found: Found, certificates: Certificates) -> None:
    """With TLS the name in the options counts, whichever address is dialled."""
    port = unused_port()
    server = bench.enter(
        RelayServer(port, 0, hostname="127.0.0.2", token=TOKEN, drain_timeout=0, **secured(certificates))
    )
    found.hosts = ["127.0.0.2"]
    client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN, tls="relay",
              ca_file=certificates.path("ca.pem"))  # fmt: skip
    [down] = bench.client_events.wait(Unpublished)
    assert "relay.example" in down.reason and server.counters["links_idle"] == 0


# --- Commands ---------------------------------------------------------------------------------------------------


def test_a_command_with_two(peers: Peers, workers: str) -> None:
    """With workers each is told once; one that is killed and comes back is served again, and the other all the time."""
    target = peers.service(echo)
    one, other = peers.server("--token", TOKEN), peers.server("--token", TOKEN)
    places = [f"{HOST}:{server.relay_port}" for server in (one, other)]
    client = peers.relay_process(
        "client", "--relay-host", places[0], "--relay", places[1], "--port", str(target.port), "--token", TOKEN,
        "--num-conn", "4",
    )  # fmt: skip
    for place in places:
        client.wait_event("Published", relay=place)

    def serves(port: int) -> bool:
        with socket.create_connection((HOST, port), PATIENCE) as sock:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"

    assert serves(one.service_port) and serves(other.service_port)
    relay_port, service_port = one.relay_port, one.service_port
    one.kill()
    client.wait_event("Unpublished", relay=places[0])
    for _ in range(20):
        assert serves(other.service_port)
    words = "--relay-port", str(relay_port), "--service-port", str(service_port), "--hostname", HOST
    again = peers.relay_process("server", *words, "--token", TOKEN)
    again.wait_event("ClientUp")
    wait_until(lambda: len([e for e in client.events("Published") if e["relay"] == places[0]]) == 2)
    assert serves(service_port)
    assert len([e for e in client.events("Published") if e["relay"] == places[1]]) == 1


@pytest.mark.parametrize("refusing", [1, 2])
def test_the_end_at_a_refusal(peers: Peers, refusing: int) -> None:
    """--exit-on-refusal ends it where all relay servers refuse it, and not for one of them."""
    tokens = ["another long secret" if number < refusing else TOKEN for number in range(2)]
    servers = [peers.server("--token", token) for token in tokens]
    words = [word for server in servers for word in ("--relay", f"{HOST}:{server.relay_port}")]
    command = [sys.executable, "-m", "tcprelay", "client", *words, "--port", "1", "--token", TOKEN, "--exit-on-refusal"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            servers[0].wait_event("LinkRefused")
            if refusing == 1:
                servers[1].wait_event("ClientUp")
                assert process.poll() is None
                process.terminate()
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == (3 if refusing == 2 else 0)


def test_the_pin_is_that_of_the_name(bench: Bench, found: Found, certificates: Certificates) -> None:
    """It counts for all addresses behind it: what is not told for an address is no leave to take anybody."""
    port = unused_port()
    server = bench.enter(RelayServer(port, 0, hostname="127.0.0.2", token=TOKEN, drain_timeout=0,
                                     on_event=bench.server_events, **secured(certificates)))  # fmt: skip
    found.hosts, name = ["127.0.0.2"], f"relay.example:{port}"
    wrong = client_of(bench, name, relay_all=True, token=TOKEN, tls="relay", pin=f"{name}=sha256:{'0' * 64}")
    [refused, *_] = bench.server_events.wait(LinkRefused)
    assert "--pin" in refused.reason and server.counters["links_idle"] == 0
    wrong.end(0)
    client_of(bench, name, relay_all=True, token=TOKEN, tls="relay", pin=f"{name}=sha256:{digest_of(certificates)}")
    wait_until(lambda: server.counters["links_idle"] == 2)


def test_a_name_server_that_is_silent_takes_nothing_away(
    bench: Bench, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor once it is so late that the name itself would be dialled."""
    monkeypatch.setattr(branches_room, "FIRST_LOOK", 0.0)
    port, servers = start_servers(bench, "127.0.0.1", "127.0.0.2")
    found.hosts = list(servers)
    client = client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN)
    wait_until(lambda: all(server.counters["links_idle"] == 2 for server in servers.values()))
    looks = count_looks(client, monkeypatch)
    found.hosts = None
    wait_until(lambda: len(looks) > 1)  # the first may have begun before
    assert [row.address for row in client.status().relays] == [f"{host}:{port}" for host in servers]
    assert not bench.client_events.of(Unpublished)


def test_an_address_that_has_vanished_is_shown_while_connections_live(bench: Bench, found: Found) -> None:
    port, servers = start_servers(bench, "127.0.0.1", "127.0.0.2")
    other = servers["127.0.0.2"]
    found.hosts = list(servers)
    client = client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN)
    wait_until(lambda: all(server.counters["links_idle"] == 2 for server in servers.values()))
    with socket.create_connection(other.service_addresses["default"], PATIENCE) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        found.hosts = ["127.0.0.1"]
        wait_until(lambda: other.counters["links_idle"] == 0)
        assert [row.address for row in client.status().relays] == [f"{host}:{port}" for host in servers]
    wait_until(lambda: [row.address for row in client.status().relays] == [f"127.0.0.1:{port}"])


def test_a_relay_server_that_cannot_be_added_yet(
    bench: Bench, found: Found, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For want of descriptors, say: what was made for it is given back, others do not notice, and it is tried again."""
    port, servers = start_servers(bench, "127.0.0.1", "127.0.0.2")
    found.hosts, other = ["127.0.0.1"], servers["127.0.0.2"]
    client = client_of(bench, f"relay.example:{port}", relay_all=True, token=TOKEN)
    wait_until(lambda: servers["127.0.0.1"].counters["links_idle"] == 2)
    begin, refused = Service.begin, list[Service]()

    def refuse_once(service: Service) -> None:
        if not refused:
            refused.append(service)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        begin(service)

    monkeypatch.setattr(Service, "begin", refuse_once)
    found.hosts = list(servers)
    wait_until(lambda: other.counters["links_idle"] == 2)
    assert f"no links to 127.0.0.2:{port} yet: too many open files" in caplog.text
    assert "unexpected error" not in caplog.text
    assert len(client.status().relays) == 2 and not bench.client_events.of(Unpublished)


def test_all_services_begin_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Service(parse_publication(text), 2) for text in ("one=1", "two=2"))
    monkeypatch.setattr(other, "begin", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        begin_all([one, other])
    assert one.stop is not None and one.stop.fileno() == -1


def test_a_relay_server_that_appears_while_a_service_is_down(
    bench: Bench, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears so at once, and gets no links until the service is back."""
    port, servers = start_servers(bench, "127.0.0.1", "127.0.0.2")
    found.hosts, target, other = ["127.0.0.1"], unused_port(), servers["127.0.0.2"]
    client = bench.enter(
        RelayClient(
            HOST, target, relay=[f"relay.example:{port}"], relay_all=True, token=TOKEN, num_conn=2,
            check_service=0.1, drain_timeout=0, on_event=bench.client_events,
        )
    )  # fmt: skip
    bench.client_events.wait(ServiceDown)
    found.hosts = list(servers)
    wait_until(lambda: other.status().services[0].problem.startswith("withdrawn by its relay client"))
    looks = count_looks(client, monkeypatch)
    wait_until(lambda: len(looks) > 1)
    wait_until(lambda: not other.status().clients)
    wait_until(lambda: not any(row.links_idle or row.links_opening for row in client.status().relays))
    with socket.create_server((HOST, target)):
        bench.client_events.wait(ServiceBack)
        wait_until(lambda: other.counters["links_idle"] == 2)


def count_looks(client: RelayClient, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that it has looked for addresses since."""
    looks, look = list[int](), client._branches._look

    def count() -> None:
        look()
        looks.append(1)

    monkeypatch.setattr(client._branches, "_look", count)
    return looks
