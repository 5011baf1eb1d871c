"""Relay clients that a server knows by name: what each may do, and what is taken back."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from _tcprelay.protocol import HELLO, PING, REFUSED, WELCOME, new_nonce
from _tcprelay.server.clients import NOBODY
from _tcprelay.status.survey import is_away
from _tcprelay.waiting import Deadline
from tcprelay import (
    ClientDown, ClientUp, ConnectionClosed, ConnectionFailed, LinkDown, LinkRefused, Published, RelayClient,
    RelayServer, Unpublished,
)  # fmt: skip

from .bench.processes import find_family
from .certificates import Certificates
from .conftest import PATIENCE, Bench, echo, read_exactly, replace, wait_until
from .peers import HOST, Peers
from .peers_v1 import FakeClient

NAS, PI = "the token of the nas", "the token of the pi"
SECTIONS = {"nas": f"token = {NAS}\nservices = default\n", "pi": f"token = {PI}\nservices = web\n"}


class ClientsFile:
    """A clients file that a test changes."""

    def __init__(self, path: Path, **sections: str) -> None:
        self.path = str(path / "clients.conf")
        self.sections = {**SECTIONS, **sections}
        self.write()

    def write(self, **sections: str | None) -> None:
        """Change some sections; ``None`` takes one out."""
        self.sections = {name: text for name, text in {**self.sections, **sections}.items() if text is not None}
        Path(self.path).write_text("".join(f"[{name}]\n{text}\n" for name, text in self.sections.items()))


@pytest.fixture
def clients(tmp_path: Path) -> ClientsFile:
    return ClientsFile(tmp_path)


def serve(bench: Bench, clients: ClientsFile, **options: Any) -> RelayServer:
    return bench.server(clients=clients.path, service="web=0", **options)


def come(bench: Bench, server: RelayServer, name: str, token: str, **options: Any) -> RelayClient:
    """A relay client that may or may not be let in."""
    own: dict[str, Any] = {"num_conn": 1, "drain_timeout": 0.0, "on_event": bench.client_events, "try_service": False}
    options = {"port": 1, **own, **options}
    return bench.enter(  # type: ignore[no-any-return]
        RelayClient(HOST, relay_host=HOST, relay_port=server.relay_address[1], name=name, token=token, **options)
    )


# Who may come


def test_each_has_what_its_section_says(bench: Bench, clients: ClientsFile) -> None:
    """And the log has its name."""
    server, port = serve(bench, clients), bench.service().port
    bench.client(server, port, name="nas", token=NAS)
    bench.client(server, None, publish=f"web={HOST}:{port}", name="pi", token=PI)
    for service in ("default", "web"):
        with bench.connect(server, service) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
    assert {(event.name, event.service) for event in bench.server_events.of(ClientUp)} == {
        ("nas", "default"), ("pi", "web"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "token", "options", "told", "logged"),
    [
        (
            "nas", NAS, {"port": None, "publish": "web=1"},
            "nas may not publish web: the server's clients file gives it default",
            "nas may not publish web: the server's clients file gives it default",
        ),
        (
            "nas", PI, {},
            "the server knows no nas with this token: --name and the token have to be those of a section of",
            "its token is not that of nas in the clients file",
        ),
        (
            "who", NAS, {},
            "the server knows no who with this token: --name and the token have to be those of a section of",
            "it calls itself who, and the clients file has no such section",
        ),
        ("nas", "", {}, "the relay asks for a token", "the relay client gave up: it has no token"),
    ],
)  # fmt: skip
def test_who_may_not_is_told_what_is_lacking(
    bench: Bench, clients: ClientsFile, name: str, token: str, options: dict[str, Any], told: str, logged: str
) -> None:
    """Who does not know the token learns nothing of what there is."""
    server = serve(bench, clients)
    come(bench, server, name, token or None, **options)  # type: ignore[arg-type]
    event = bench.client_events.wait(Unpublished)[0]
    assert event.reason.removeprefix("refused by the relay: ").startswith(told)
    assert event.lasting
    assert bench.server_events.wait(LinkRefused)[0].reason.startswith(logged)
    assert not bench.client_events.of(Published)


def test_where_it_may_come_from(bench: Bench, clients: ClientsFile) -> None:
    clients.write(nas=f"{SECTIONS['nas']}from = 127.0.0.2, 2001:db8::/32\n")
    come(bench, serve(bench, clients), "nas", NAS)
    reason = "nas may not connect from 127.0.0.1: the server's clients file gives it 127.0.0.2/32, 2001:db8::/32"
    assert bench.server_events.wait(LinkRefused)[0].reason == reason


def test_no_stranger_is_let_in_from_elsewhere_by_the_file_alone(bench: Bench, clients: ClientsFile) -> None:
    """Protected mode is for servers that ask for nothing; a name alone is nothing, either."""
    server = serve(bench, clients)
    link: FakeClient = bench.enter(FakeClient(server))
    link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": new_nonce(), "name": "nas"})
    assert link.next().kind != WELCOME


def test_the_certificate_has_to_be_that_of_the_name(
    bench: Bench, clients: ClientsFile, certificates: Certificates
) -> None:
    """With --auth it is enough, and a token may be asked for as well."""
    clients.write(client="services = default\n", nas=f"token = {NAS}\nservices = default\n")
    ca, tls = certificates.path("ca.pem"), {"tls": "relay"}
    server_files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = serve(bench, clients, auth=True, ca_file=ca, **tls, **server_files)
    own = {"cert": certificates.path("client.pem"), "key": certificates.path("client.key"), "ca_file": ca, **tls}
    bench.client(server, bench.service().port, name="client", **own)
    come(bench, server, "nas", NAS, **own)
    come(bench, server, "who", NAS, **own)
    for start in (
        "its certificate is that of client: then its --name must be",
        "it calls itself who, and the clients file",
    ):
        wait_until(lambda: any(str(e.reason).startswith(start) for e in bench.server_events.of(LinkRefused)))  # noqa: B023


# How much


def test_links_of_one_identity_are_bounded(bench: Bench, clients: ClientsFile) -> None:
    """Over all relay clients of that name; others have theirs."""
    clients.write(nas=f"{SECTIONS['nas']}max-links = 3\n", pi=f"token = {PI}\nservices = *\n")
    server = serve(bench, clients)
    bench.client(server, 1, name="nas", token=NAS, num_conn=2)
    come(bench, server, "nas", NAS, num_conn=2)
    [event] = wait_until(lambda: bench.server_events.of(LinkRefused)[:1])
    assert (event.code, event.reason) == ("quota", "nas has as many links as it may have (max-links)")
    wait_until(lambda: server.counters["links_idle"] == 3)
    bench.client(server, 1, name="pi", token=PI, num_conn=4)


def test_connections_of_one_identity_are_bounded(bench: Bench, clients: ClientsFile) -> None:
    """The next one is refused at once, or goes to another identity's client; when one has ended there is room."""
    clients.write(nas=f"{SECTIONS['nas']}max-connections = 2\n", pi=f"token = {PI}\nservices = *\n")
    server, service = serve(bench, clients), bench.service()
    bench.client(server, service.port, name="nas", token=NAS, num_conn=4)

    def talk() -> socket.socket:
        sock = bench.connect(server)
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        return sock

    first, second = talk(), talk()
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason == (
        "the service cannot be reached: nas has as many connections as it may have (max-connections)"
    )
    first.close()
    bench.server_events.wait(ConnectionClosed)
    talk()
    bench.client(server, service.port, name="pi", token=PI, num_conn=1)
    wait_until(lambda: any(event.name == "pi" for event in bench.server_events.of(ClientUp)))
    talk()
    second.close()


@pytest.mark.parametrize(("general", "own"), [("64Ki", "1G"), ("1G", "64Ki")])
def test_the_smaller_rate_counts(bench: Bench, clients: ClientsFile, general: str, own: str) -> None:
    """That of all, or that of an identity; 192 KiB take two seconds, less what may pass at once."""
    clients.write(nas=f"{SECTIONS['nas']}limit-rate = {own}\n")
    server = serve(bench, clients, limit_rate=general)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    sock, began = bench.connect(server), time.monotonic()
    sock.sendall(bytes(192 << 10))
    read_exactly(sock, 192 << 10)
    assert 1.5 < time.monotonic() - began < 6


# What is taken back


def reload(server: RelayServer, clients: ClientsFile, **sections: str | None) -> None:
    clients.write(**sections)
    assert server.reload()


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (None, "revoked: the server does not know nas any more"),
        ("token = another one of the nas\nservices = default\n", "revoked: nas has another token now"),
        (
            f"token = {NAS}\nservices = web\n",
            "revoked: nas may not publish default: the server's clients file gives it web",
        ),
        (
            f"token = {NAS}\nservices = default\nfrom = 192.0.2.1\n",
            "revoked: nas may not connect from 127.0.0.1: the server's clients file gives it 192.0.2.1/32",
        ),
    ],
)  # fmt: skip
def test_what_is_taken_back_is_gone_when_the_reload_is_over(
    bench: Bench, clients: ClientsFile, section: str | None, reason: str
) -> None:
    """Idle links and living connections; the records say why, and others go on."""
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS, num_conn=3)
    bench.client(server, None, publish=f"web={HOST}:{bench.service().port}", name="pi", token=PI)
    held, other = bench.connect(server), bench.connect(server, "web")
    for sock in (held, other):
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    wait_until(lambda: server.counters["links_idle"] == 5)  # one was opened in the place of each
    reload(server, clients, nas=section)
    assert server.counters["links_idle"] == 2
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert (closed.service, closed.reason) == ("default", reason)
    with pytest.raises(ConnectionResetError):
        held.recv(1)
    assert {event.reason for event in bench.server_events.of(LinkDown)} == {reason}
    other.sendall(b"y")
    assert read_exactly(other, 1) == b"y"
    with bench.connect(server, "web") as sock:
        sock.sendall(b"z")
        assert read_exactly(sock, 1) == b"z"
    wait_until(lambda: any(event.lasting for event in bench.client_events.of(Unpublished)))


def test_a_connection_that_is_being_opened_is_taken_back(
    bench: Bench, clients: ClientsFile, certificates: Certificates
) -> None:
    """Its service has been asked, and has not answered yet: the service client is refused, and no link is left."""
    server = serve(bench, clients)
    asked = threading.Event()

    def never(sock: socket.socket) -> None:
        asked.set()
        sock.recv(1 << 16)  # the beginning of a TLS handshake, which it does not answer
        sock.recv(1)

    bench.client(server, bench.service(never).port, name="nas", token=NAS, tls="service", num_conn=1)
    waiting = bench.connect(server)
    waiting.sendall(b"x")
    assert asked.wait(PATIENCE)
    reload(server, clients, nas=None)
    with pytest.raises(ConnectionResetError):
        waiting.recv(1)
    assert server.counters["links_idle"] == 0
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason.startswith("the link was lost before the service answered")


def test_a_right_that_stays_is_not_touched(bench: Bench, clients: ClientsFile) -> None:
    """Whatever else changes in its section."""
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    reload(server, clients, pi=None, nas=f"token = {NAS}\nservices = *\nfrom = 127.0.0.0/8\nmax-links = 9\n")
    sock.sendall(b"y")
    assert read_exactly(sock, 1) == b"y"
    assert not bench.server_events.of(LinkDown)


def test_limits_reach_the_links_that_are_there(bench: Bench, clients: ClientsFile) -> None:
    """They live for days, and the next connection over them is one by the limits of today."""
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS, num_conn=4)
    held = bench.connect(server)
    held.sendall(b"x")
    assert read_exactly(held, 1) == b"x"
    reload(server, clients, nas=f"{SECTIONS['nas']}max-connections = 1\n")
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert bench.server_events.wait(ConnectionFailed)[0].reason.endswith("(max-connections)")
    assert not bench.server_events.of(LinkDown)


def test_a_ping_brings_nonces_to_who_is_known_by_name(bench: Bench, clients: ClientsFile) -> None:
    server = serve(bench, clients, heartbeat=0.2)
    link: FakeClient = bench.enter(FakeClient(server))
    link.hello(token=NAS.encode(), name="nas")
    ping = link.next()
    assert (ping.kind, len(ping.fields["nonces"])) == (PING, 2)


def test_names_are_compared_whole(
    bench: Bench, clients: ClientsFile, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of certificates as they stand there: escaped and cut for the log two long ones may look alike."""
    names = [f"склад-москва-{number}" for number in (1, 2)]
    clients.write(nas=None, pi=None, **dict.fromkeys(names, "services = default\n"))
    ca = certificates.path("ca.pem")
    files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = serve(bench, clients, auth=True, ca_file=ca, tls="relay", **files)
    replace(monkeypatch, "certificate_name", lambda stream: names[1])
    own = {"cert": certificates.path("client.pem"), "key": certificates.path("client.key"), "ca_file": ca}
    come(bench, server, names[0], None, tls="relay", **own)  # type: ignore[arg-type]
    assert bench.server_events.wait(LinkRefused)[0].reason.startswith("its certificate is that of ")
    assert not bench.client_events.of(Published)
    bench.client(server, 1, name=names[1], tls="relay", **own)


def test_a_file_that_is_wrong_leaves_all_as_it_was(
    bench: Bench, clients: ClientsFile, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    clients.write(nas=f"token = {NAS}\nservices = mail\n")
    assert not server.reload()
    said = f"cannot reload, all stays as it was: {clients.path}, line 3: there is no service mail here"
    assert any(message.startswith(said) for message in caplog.messages)
    assert server.counters["links_idle"] == 2
    bench.client(server, bench.service().port, name="nas", token=NAS)


def test_links_without_a_name_are_taken_back_when_names_are_asked_for(bench: Bench, clients: ClientsFile) -> None:
    server = bench.server(token=NAS, service="web=0")
    bench.client(server, bench.service().port, name="nas", token=NAS)
    assert server.reload(token=None, clients=clients.path)
    assert {event.reason for event in bench.server_events.of(LinkDown)} == {
        "revoked: relay clients have to be known by name now"
    }
    wait_until(lambda: server.counters["links_idle"] == 2)  # it is known, and comes again by its name


def test_a_handshake_that_began_before_is_looked_at_again(bench: Bench, clients: ClientsFile) -> None:
    """It has proven itself by what was in force then."""
    server = serve(bench, clients)
    link: FakeClient = bench.enter(FakeClient(server))
    nonce = new_nonce()
    link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "name": "nas", "token": True})
    challenge = link.next()
    reload(server, clients, nas=None)
    answer = link.answer(challenge, NAS.encode(), nonce, "default", "c")
    assert (answer.kind, answer.fields["reason"]) == (REFUSED, "revoked: the server does not know nas any more")
    assert server.counters["links_idle"] == 0


def test_with_workers_nothing_is_delivered_behind_the_word(peers: Peers, clients: ClientsFile, workers: str) -> None:
    """All workers have given up what was revoked when the parent says that the configuration is reloaded."""
    got: list[int] = []

    def count(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            got.append(len(data))
            sock.sendall(data)

    service = peers.service(count)
    words = "--clients", clients.path, "--service", "web=0"
    server = peers.server(*words)
    peers.client(server.relay_port, service.port, "--token", NAS, "--name", "nas", "--num-conn", "4")
    socks = [peers.connect(server.service_port) for _ in range(4)]
    for sock in socks:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    clients.write(nas=None)
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    before = sum(got)
    for sock in socks:
        with pytest.raises(ConnectionError):
            for _ in range(2):
                sock.sendall(b"y")
                assert sock.recv(1) == b"y"
    assert sum(got) == before
    closed = wait_until(lambda: len(found := server.events("ConnectionClosed")) == 4 and found)
    assert {str(event["reason"]) for event in closed} == {"revoked: the server does not know nas any more"}


# What is counted, and who is told


def test_a_late_handshake_leaves_nothing(bench: Bench, clients: ClientsFile) -> None:
    server = serve(bench, clients)
    link = bench.enter(FakeClient(server))
    nonce = new_nonce()
    link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "name": "nas", "token": True})
    challenge = link.next()
    reload(server, clients, nas=None)
    link.answer(challenge, NAS.encode(), nonce, "default", "c")
    assert not server._pool.members()
    assert server._quotas[0].count("nas") == 0
    bench.server_events.wait(ClientDown)


def test_quotas_come_to_nothing(bench: Bench, clients: ClientsFile) -> None:
    clients.write(nas=f"{SECTIONS['nas']}max-links = 3\nmax-connections = 1\n")
    server = serve(bench, clients)
    for number in range(2):
        client = come(bench, server, "nas", NAS, num_conn=2, port=bench.service().port)
        bench.client_events.wait(Published, number + 1)
        sock = bench.connect(server)
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        client.end(0)
        bench.server_events.wait(ClientDown, number + 1)
        wait_until(lambda: [quota.count("nas") for quota in server._quotas] == [0, 0])


def test_the_pool_s_limit_takes_no_quota(bench: Bench, clients: ClientsFile) -> None:
    clients.write(nas=f"{SECTIONS['nas']}max-links = 3\n")
    server = serve(bench, clients)
    server._pool.most = 0
    assert bench.enter(FakeClient(server)).hello(token=NAS.encode(), name="nas").fields["code"] == "limit"
    assert server._quotas[0].count("nas") == 0


def test_a_link_that_was_out_when_it_was_revoked(bench: Bench, clients: ClientsFile) -> None:
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    broken: list[Any] = []
    for way in ("carry", "put"):
        pooled, _ = server._pool.take("default", NOBODY, Deadline(0))
        pooled.revoked = "revoked: for a test"
        if way == "carry":
            fake: Any = SimpleNamespace(break_off=lambda *words, **more: broken.append((words, more)))
            server._links.carry(pooled, fake)
            server._links.drop(pooled, "x")
        else:
            server._links.give_back(pooled)
    assert broken == [(("revoked: for a test",), {"hurry": True, "close_link": True})]
    assert [event.reason for event in bench.server_events.of(LinkDown)] == 2 * ["revoked: for a test"]


def test_who_is_revoked_is_told(bench: Bench, clients: ClientsFile) -> None:
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    reload(server, clients, nas=None)
    for event in bench.client_events.wait(LinkDown, 2)[:2]:
        assert event.reason == "refused by the relay: revoked: the server does not know nas any more"


def test_who_has_too_many_connections_loses_no_link(bench: Bench, clients: ClientsFile) -> None:
    clients.write(nas=f"{SECTIONS['nas']}max-connections = 1\n")
    server = serve(bench, clients)
    bench.client(server, bench.service().port, name="nas", token=NAS)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert not bench.server_events.of(LinkDown)


def test_a_dead_worker_s_links_count_no_more(peers: Peers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEST_WORKERS", "2")
    path = tmp_path / "clients.conf"
    path.write_text(f"[nas]\ntoken = {NAS}\nservices = default\nmax-links = 4\n")
    server = peers.server("--clients", str(path), "--log-level", "debug")
    server.expected_error = "worker"
    monkeypatch.setenv("TEST_WORKERS", "0")
    peers.client(server.relay_port, peers.service(echo).port, "--token", NAS, "--name", "nas", "--num-conn", "4")
    wait_until(lambda: len(server.events("LinkUp")) == 4)
    children = sorted(pid for pid in find_family(server.process.pid) if pid != server.process.pid)
    os.kill(children[1], signal.SIGKILL)
    wait_until(lambda: len(server.events("LinkUp")) >= 6, 20)


def test_a_relay_client_at_its_limit_is_well(bench: Bench, clients: ClientsFile) -> None:
    """It serves with all the links that it may have: that it is refused another one, now or long ago, is no problem."""
    clients.write(nas=f"{SECTIONS['nas']}max-links = 2\n")
    server = serve(bench, clients)
    client = bench.client(server, bench.service().port, name="nas", token=NAS, num_conn=2)
    for count in (1, 2):
        sock = bench.connect(server)
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        bench.server_events.wait(LinkRefused, count)
    status = client.status()
    assert (status.services[0].links_busy, status.services[0].links_idle) == (2, 0)
    assert (status.services[0].problem, status.relays[0].problem, status.is_healthy) == ("", "", True)
    assert not is_away(status.services[0], time.monotonic() + 60)
    assert server.status().services[0].problem == ""
