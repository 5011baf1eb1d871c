"""What somebody meets who tries the relay for the first time: wrong ports and words, weak secrets, two identities."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tcprelay
from _tcprelay import state
from _tcprelay.client.greeting import SILENCE_TIMEOUT
from _tcprelay.client.loops import OwnConnections, RelayPlace, ends_of
from _tcprelay.protocol import BYE, FAIL, READY, START
from _tcprelay.signals import Signals
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline
from tcprelay import (
    ClientDown, ConnectionClosed, ConnectionFailed, Draining, LinkDown, LinkRefused, Published, RelayClient,
    RelayServer, ServiceUnreachable, ServiceUnserved, Unpublished,
)  # fmt: skip

from .certificates import Certificates, tls_context
from .conftest import PATIENCE, Bench, connect, echo, read_exactly, replace, stock_of, wait_until
from .peers import HOST, ROOT, Peers, free_port
from .peers_v1 import FakeClient, FakeServer

TOKEN = "a token of more than sixteen characters"


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


# Is it really there?


def test_a_service_that_is_not_there_is_told_at_once(bench: Bench) -> None:
    """Beside the word that it is published, once; and again when that is said again."""
    server, port = bench.server(), free_port()
    bench.client(server, port, try_service=True)
    [told] = bench.client_events.wait(ServiceUnreachable)
    assert str(told) == f"service default: nothing can be reached at 127.0.0.1:{port} now: connection refused"
    relay_port = server.relay_address[1]
    server.end(0)
    bench.client_events.wait(Unpublished)
    bench.enter(RelayServer(relay_port, 0, drain_timeout=0))
    bench.client_events.wait(Published, 2)
    bench.client_events.wait(ServiceUnreachable, 2)


def test_a_service_that_is_there_is_left_in_peace(bench: Bench) -> None:
    """It sees one connection, which ends as it began."""
    ends: list[bytes] = []
    service = bench.service(lambda sock: ends.append(sock.recv(1)))
    bench.client(bench.server(), service.port, try_service=True)
    wait_until(lambda: ends)
    assert ends == [b""]
    assert service.connections == 1
    assert not bench.client_events.of(ServiceUnreachable)


def test_of_several_workers_one_tries(peers: Peers) -> None:
    server, port = peers.server("--token", TOKEN, "--workers", "0"), free_port()
    words = "--token", TOKEN, "--workers", "2", "--try-service", "true"
    client = peers.client(server.relay_port, port, *words, "--log-level", "debug")
    client.wait_event("ServiceUnreachable")
    wait_until(lambda: len(client.events("LinkUp")) >= 8)
    client.signal(signal.SIGTERM)
    assert client.wait() == 0
    assert len(client.events("ServiceUnreachable")) == 1


def test_a_service_without_tls_is_told_so(bench: Bench) -> None:
    """--tls both is what many try first."""
    server = bench.server(tls="relay", allow_unauthenticated=True)
    options = {"tls": "both", "reject_unauthorized": False, "service_insecure": True, "try_service": True}
    bench.client(server, bench.service(lambda sock: sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")).port, **options)
    [told] = bench.client_events.wait(ServiceUnreachable)
    assert told.reason == "the service does not speak TLS: say --tls instead of --tls both"
    with pytest.raises(ConnectionResetError), bench.connect(server) as sock:
        sock.recv(1)
    [failed] = bench.client_events.wait(ConnectionFailed)
    assert failed.reason.endswith(told.reason)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "the connection was closed"), (b"\x15\x03\x03\x00\x02\x02\x28", "")]
)
def test_a_service_whose_handshake_fails_may_speak_tls(bench: Bench, data: bytes, reason: str) -> None:
    """Where it is cut off, or says itself what is wrong: only what is no TLS is called so."""

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(data)

    server, service = bench.server(), bench.service(serve)
    bench.client(server, service.port, tls="service", service_insecure=True, try_service=True)
    [told] = bench.client_events.wait(ServiceUnreachable)
    assert told.reason.startswith(f"no TLS handshake with the service: {reason}")
    assert told.reason.endswith("; does it speak TLS?")


def test_an_end_while_it_looks_is_no_word(bench: Bench) -> None:
    """A service that is silent in its handshake is not called unreachable because the client ends."""
    came: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        came.append(sock.recv(1))
        while sock.recv(1 << 16):
            pass

    client = bench.client(bench.server(), bench.service(serve).port, tls="service", service_insecure=True,
                          try_service=True)  # fmt: skip
    wait_until(lambda: came)
    client.end(0)
    assert not bench.client_events.of(ServiceUnreachable)


def test_a_service_s_certificate_that_is_not_trusted(bench: Bench, certificates: Certificates) -> None:
    context = tls_context(True, certificates.path("server.pem"), certificates.path("server.key"))

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True):
            pass

    bench.client(bench.server(), bench.service(serve).port, tls="service", try_service=True)
    [told] = bench.client_events.wait(ServiceUnreachable)
    assert told.reason.endswith("; give --service-ca-file, or --service-insecure")


def test_a_look_that_cannot_be_had_costs_no_link(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is only a look: without a thread for it the link goes on."""
    real = Threads.start

    def start(threads: Threads, function: Any, *words: Any) -> None:
        if function.__name__ == "_try":
            raise RuntimeError("cannot start a thread")
        real(threads, function, *words)

    monkeypatch.setattr(Threads, "start", start)
    server = bench.server()
    bench.client(server, bench.service(echo).port, try_service=True)
    assert not bench.client_events.of(LinkDown)


@pytest.mark.parametrize("port_alone", [False, True])
def test_a_relay_client_that_cannot_serve_is_told_at_the_server(
    bench: Bench, caplog: pytest.LogCaptureFixture, port_alone: bool
) -> None:
    """Its service clients are served by another one, and nothing else there shows it: once, until it can again."""
    server = bench.server()
    if not port_alone:
        bench.client(server, bench.service(echo).port, name="good")
    bench.client(server, port := free_port(), name="bad")
    for _ in range(4):
        with contextlib.suppress(ConnectionError), bench.connect(server) as sock:
            sock.sendall(b"x")
            sock.recv(1)
    said = [record.getMessage() for record in caplog.records if "cannot serve" in record.getMessage()]
    reason = f"cannot reach 127.0.0.1:{port}: connection refused"
    assert said == [f"service default: relay client bad at 127.0.0.1 cannot serve: {reason}"]


def test_a_service_that_nobody_serves_is_told_at_once(bench: Bench) -> None:
    """When the first service client waits, not when it has waited in vain; and once, until a relay client has come."""
    server = bench.server(pair_timeout=PATIENCE)
    with bench.connect(server) as first:
        [told] = bench.server_events.wait(ServiceUnserved)
        assert told.peer.endswith(f":{first.getsockname()[1]}")
        second = bench.connect(server)
        wait_until(lambda: server.counters["waiting"] == 2)
        second.close()
        assert len(bench.server_events.of(ServiceUnserved)) == 1
        client = bench.client(server, bench.service(echo).port)
        first.sendall(b"x")
        assert read_exactly(first, 1) == b"x"
    client.end(0)
    bench.server_events.wait(ClientDown)
    with bench.connect(server):
        bench.server_events.wait(ServiceUnserved, 2)


@pytest.mark.parametrize("pending", ["512", "0"])
def test_it_is_told_once_for_all_workers(peers: Peers, pending: str) -> None:
    """By their parent, where service clients wait for the first relay client; and where they may not."""
    words = "--token", TOKEN, "--workers", "2", "--max-pending", pending, "--pair-timeout", "0.3"
    process = peers.relay_process("server", "0", "0", "web=0", "--hostname", HOST, *words)
    ports = [process.port_of(name) for name in ("default", "web")]
    for port in (*ports, *ports):
        with contextlib.suppress(ConnectionResetError):
            peers.connect(port)
    wait_until(lambda: len(process.events("ConnectionFailed")) == 4)
    wait_until(lambda: len(process.events("ServiceUnserved")) == 2)  # the parent's lines, not the workers'
    assert [event["service"] for event in process.events("ServiceUnserved")] == ["default", "web"]
    if pending != "0":
        assert process.events("ConnectionFailed")[0]["reason"].endswith("; no relay client is connected")
    client = peers.client(process.relay_port, free_port(), "--token", TOKEN)
    client.signal(signal.SIGTERM)
    client.wait()
    process.wait_event("ClientDown")
    with contextlib.suppress(ConnectionResetError):  # where it may not wait, it is refused while it connects
        peers.connect(ports[0])
    wait_until(lambda: len(process.events("ServiceUnserved")) == 3)


@pytest.mark.usefixtures("workers")
def test_a_service_whose_links_are_busy_is_served(peers: Peers) -> None:
    """Nobody is told that there is no relay client, and who waits in vain is told what for."""
    server = peers.server("--token", TOKEN, "--pair-timeout", "0.3")
    words = "--token", TOKEN, "--num-conn", "1", "--max-conn", "1", "--workers", "0"
    peers.client(server.relay_port, peers.service(echo).port, *words)
    with peers.connect(server.service_port) as held:
        held.sendall(b"x")
        assert read_exactly(held, 1) == b"x"
        peers.connect(server.service_port)
        failed = server.wait_event("ConnectionFailed")
    assert failed["reason"] == "no link was idle in time (--pair-timeout)"
    assert not server.events("ServiceUnserved")


@pytest.mark.parametrize("tls", ["", "relay"])
def test_a_relay_port_that_is_silent_is_doubted_soon(bench: Bench, monkeypatch: pytest.MonkeyPatch, tls: str) -> None:
    """A service port by mistake, whose own relay client is not there yet: it waits as long as service clients do."""
    replace(monkeypatch, "SILENCE_TIMEOUT", 0.1)
    server = bench.server()
    [port] = [address[1] for address in server.service_addresses.values()]
    bench.enter(RelayClient(HOST, 1, HOST, port, 1, tls=tls, drain_timeout=0, on_event=bench.client_events))
    [told] = bench.client_events.wait(Unpublished)
    place = f"{HOST}:{port}"
    assert told.reason == f"no answer yet; is {place} the relay port of a tcprelays, and not one of its service ports?"
    assert not told.lasting


def test_a_relay_that_was_there_is_not_doubted(bench: Bench, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that answers late, once it has: silence says nothing about the port then."""
    replace(monkeypatch, "SILENCE_TIMEOUT", 0.05)
    bench.enter(RelayClient(HOST, 1, HOST, fake.port, 1, drain_timeout=0, on_event=bench.client_events,
                            try_service=False))  # fmt: skip
    first = fake.accept()
    bench.client_events.wait(Unpublished)
    fake.welcome(first)
    bench.client_events.wait(Published)
    first.close()
    second = fake.accept()
    moment = time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > moment)
    fake.welcome(second)
    wait_until(lambda: len(bench.client_events.of(tcprelay.LinkUp)) == 2)
    assert len(bench.client_events.of(Unpublished)) == 1


@pytest.mark.parametrize(
    ("token", "status"), [("another token of more than sixteen", 3), (TOKEN, None)], ids=["refused", "welcome"]
)
def test_a_client_that_is_refused_may_end(peers: Peers, workers: str, token: str, status: int | None) -> None:
    """With a status of its own, and a word why; where it is not refused it goes on."""
    server = peers.server("--token", TOKEN)
    words = [f"{HOST}:{server.relay_port}", str(free_port()), "--token", token, "--exit-on-refusal"]
    command = [sys.executable, "-m", "tcprelay", "client", *words, "--workers", workers, "--try-service", "false"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            if status is None:
                server.wait_event("ClientUp")
                assert process.poll() is None
                process.terminate()
            said = process.communicate(timeout=PATIENCE)[1]
        finally:
            process.kill()
    assert process.returncode == (status or 0)
    refusal = "this client's token is not the server's: copy the server's, and name it in --token-file"
    assert (refusal in said) == (
        "ending, since no link can be had before something is changed (--exit-on-refusal)" in said
    )
    assert (refusal in said) == bool(status)


def test_giving_up_is_one_signal_and_none_at_the_end() -> None:
    """A further one would break open connections off."""
    with Signals() as signals:
        signals.give_up(3)
        signals.give_up(4)
        signals.done()
        assert (signals.wait(), signals.wait(), signals.status) == (signal.SIGTERM, 0, 3)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wait() == signal.SIGTERM
        signals.give_up(3)
        signals.done()
        assert (signals.wait(), signals.status) == (0, 0)


def test_without_the_option_a_refused_client_goes_on(peers: Peers, workers: str) -> None:
    server = peers.server("--token", TOKEN)
    words = f"{HOST}:{server.relay_port}", "1", "--token", f"{TOKEN}x"
    client = peers.relay_process("client", *words)
    client.wait_event("Unpublished", lasting=True)
    wait_until(lambda: len(server.events("LinkRefused")) >= 2)
    assert client.process.poll() is None


def test_who_cannot_reach_the_relay_goes_on(peers: Peers, workers: str) -> None:
    """With the option, too: it may be there later."""
    words = f"{HOST}:{free_port()}", "1", "--token", TOKEN, "--exit-on-refusal"
    client = peers.relay_process("client", *words)
    client.wait_event("Unpublished", lasting=False)
    client.signal(signal.SIGTERM)
    assert client.wait() == 0


def test_a_program_that_embeds_it_goes_on(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It hears of the refusal, and nothing ends it."""
    server = bench.server(token=TOKEN)
    with RelayClient(HOST, 1, HOST, server.relay_address[1], 1, token=f"{TOKEN}x", exit_on_refusal=True,
                     drain_timeout=0):  # fmt: skip
        bench.server_events.wait(LinkRefused, 2)
    assert "--exit-on-refusal" not in caplog.text
    assert "on_event failed" not in caplog.text


def test_what_is_no_relay_is_a_lasting_reason(bench: Bench) -> None:
    """Another service on that port, which speaks."""
    service = bench.service(lambda sock: sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(100)))
    bench.enter(RelayClient(HOST, 1, HOST, service.port, 1, drain_timeout=0, on_event=bench.client_events))
    [told, *_] = bench.client_events.wait(Unpublished)
    assert told.lasting
    assert told.reason.endswith(f"; is {HOST}:{service.port} the relay port, and not a service port?")


def test_a_reset_without_a_word(bench: Bench, fake: FakeServer) -> None:
    bench.enter(RelayClient(HOST, 1, HOST, fake.port, 1, drain_timeout=0, on_event=bench.client_events))
    link = fake.accept()
    link.receive(Deadline(PATIENCE))
    link.stream.reset_on_close()
    link.close()
    [told, *_] = bench.client_events.wait(Unpublished)
    why = "does it use --wire raw, or TLS, or is this a service port?"
    assert told.reason == f"the relay reset the link without a word; {why}"


@pytest.mark.parametrize(("name", "value"), [("round_trip", 10.0), ("unsent_bytes", 1)])
def test_a_bad_path_is_not_doubted(
    bench: Bench, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """One that is slow, or on which what was sent has not arrived."""
    replace(monkeypatch, "SILENCE_TIMEOUT", 0.05)
    replace(monkeypatch, "LINK_TIMEOUT", 0.2)
    monkeypatch.setattr(f"_tcprelay.client.greeting.{name}", lambda sock: value)
    bench.enter(RelayClient(HOST, 1, HOST, fake.port, 1, drain_timeout=0, on_event=bench.client_events))
    fake.accept()
    [told, *_] = bench.client_events.wait(Unpublished)
    assert told.reason.startswith("no answer within 0.2 s")


def test_the_silence_that_is_doubted() -> None:
    """Within a second or two, as a person waits."""
    assert SILENCE_TIMEOUT == 2.0


def test_what_passes_is_no_refusal(bench: Bench, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is full or ending takes this client later, and what is not known is no reason to end."""
    replace(monkeypatch, "FIRST_BACKOFF", 0.01)
    replace(monkeypatch, "REFUSED_BACKOFF", 0.01)
    replace(monkeypatch, "LAST_BACKOFF", 0.01)
    bench.enter(RelayClient(HOST, 1, HOST, fake.port, 1, drain_timeout=0, on_event=bench.client_events))
    codes = [("draining", False), ("limit", False), ("timeout", False), ("of tomorrow", False), ("token", True)]
    for number, (code, lasting) in enumerate(codes, 1):
        link = fake.accept()
        link.receive(Deadline(PATIENCE))
        link.refuse(code, f"reason {number}")
        link.close()
        assert bench.client_events.wait(Unpublished, number)[-1].lasting == lasting


# Wrong words


def test_who_does_not_accept_the_certificate_says_so(bench: Bench) -> None:
    """A pin that is not the server's, and a certificate that no CA has signed; neither is called cut off."""
    server = bench.server(tls="relay", allow_unauthenticated=True)
    for pin, words in (
        (f"sha256:{'0' * 64}", "the relay client gave up: this server's certificate is not the one in --pin"),
        ("", "it does not accept this server's certificate; does it have the --pin, or the --ca-file"),
    ):
        with RelayClient(HOST, 1, HOST, server.relay_address[1], 1, tls="relay", drain_timeout=0, pin=pin):
            wait_until(lambda: any(words in str(event) for event in bench.server_events.of(LinkRefused)))  # noqa: B023


def test_a_wrong_name_is_a_certificate_that_is_not_accepted(bench: Bench, certificates: Certificates) -> None:
    tls = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="relay", allow_unauthenticated=True, **tls)
    with RelayClient(HOST, 1, HOST, server.relay_address[1], 1, tls="relay", drain_timeout=0,
                     ca_file=certificates.path("ca.pem"), tls_server_name="other.example"):  # fmt: skip
        [refused, *_] = bench.server_events.wait(LinkRefused)
    assert "it does not accept this server's certificate" in refused.reason


def test_a_client_without_a_token_says_so(bench: Bench) -> None:
    """Instead of leaving without a word when it is asked for one."""
    server = bench.server(token=TOKEN)
    with RelayClient(HOST, 1, HOST, server.relay_address[1], 1, drain_timeout=0, on_event=bench.client_events):
        [refused, *_] = bench.server_events.wait(LinkRefused)
        [told] = bench.client_events.wait(Unpublished)
    assert refused.reason == "the relay client gave up: it has no token; set --token-file there"
    assert (told.reason, told.lasting) == ("the relay asks for a token; set --token-file or --token", True)


def test_on_the_raw_wire_nothing_is_said(bench: Bench, certificates: Certificates) -> None:
    """There it would be bytes of a connection."""
    context, got = tls_context(True, certificates.path("server.pem"), certificates.path("server.key")), []

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            try:
                got.append(secure.recv(100))
            except OSError:
                got.append(b"")

    relay, pin = bench.service(serve), f"sha256:{'0' * 64}"
    with RelayClient(HOST, 1, HOST, relay.port, 1, tls="relay", wire="raw", pin=pin, drain_timeout=0):
        wait_until(lambda: got)
    assert set(got) == {b""}


def test_a_plain_client_of_a_tls_service_port_is_no_relay_client(bench: Bench, certificates: Certificates) -> None:
    """The hint for one stands in the refusals of the relay port alone."""
    tls = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="both", allow_unauthenticated=True, **tls)
    with bench.connect(server) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason == (
        "no TLS handshake: it does not speak TLS, and this service port does (--tls both); "
        "with --tls the links alone would"
    )
    with connect(server.relay_address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        [refused] = bench.server_events.wait(LinkRefused)
    assert refused.reason == "it does not speak TLS; if it is a tcprelayc, add --tls there"


def test_tls_at_a_plain_relay_port(bench: Bench) -> None:
    server = bench.server()
    with RelayClient(HOST, 1, HOST, server.relay_address[1], 1, tls="relay", drain_timeout=0):
        [refused, *_] = bench.server_events.wait(LinkRefused)
    assert refused.reason.endswith("if it is a tcprelayc, add --tls here, or leave it out there")


def test_a_client_that_was_stopped_says_so(bench: Bench) -> None:
    """It is told apart from one that was cut off."""
    server = bench.server()
    bench.client(server, bench.service().port).end(PATIENCE)
    [down] = bench.server_events.wait(ClientDown)
    assert down.reason == "the relay client is ending"


@pytest.mark.parametrize(("fields", "reason"), [({}, "the relay client gave it up"), ({"reason": "a\nb"}, "a\\nb")])
def test_what_a_client_says_at_its_end(bench: Bench, fields: dict[str, str], reason: str) -> None:
    """Escaped, and in our words where it says nothing."""
    server = bench.server()
    link = bench.enter(FakeClient(server))
    link.hello()
    wait_until(lambda: server.counters["links_idle"] == 1)
    link.send(BYE, fields)
    [down] = bench.server_events.wait(ClientDown)
    assert down.reason == reason


def test_what_a_client_says_of_its_service_is_whole(bench: Bench) -> None:
    """As long as the messages are that it gives."""
    server = bench.server()
    link = bench.enter(FakeClient(server))
    link.hello()
    wait_until(lambda: server.counters["links_idle"] == 1)
    bench.connect(server)
    assert link.receive(Deadline(PATIENCE)).kind == START
    link.send(FAIL, {"reason": 200 * "x"})
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert 200 * "x" in failed.reason


def test_a_port_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 1024 for ordinary users; this machine may let everybody have those."""

    def listen(*words: object) -> None:
        raise PermissionError(13, "Permission denied")

    replace(monkeypatch, "listen", listen)
    with pytest.raises(OSError, match=r"cannot listen on \*:80: permission denied; a port below 1024 needs CAP_NET"):
        RelayServer(80, 0).start()


# A service that leads back to the relay


@pytest.mark.parametrize("target", ["127.0.0.1", "localhost"])
def test_a_service_on_its_own_service_port_is_refused(peers: Peers, workers: str, target: str) -> None:
    """One connection makes a few, not thousands, in whichever worker they come back."""
    server = peers.server("--token", TOKEN)
    words = f"{HOST}:{server.relay_port}", f"{target}:{server.service_port}", "--token", TOKEN
    client = peers.relay_process("client", *words)
    client.wait_event("Published")
    for _ in range(3):
        with pytest.raises(ConnectionResetError), peers.connect(server.service_port) as sock:
            sock.recv(1)
    reason = "that is a port of the relay's own, and leads back here; name the port of the service itself"
    failed = client.wait_event("ConnectionFailed")
    assert failed["reason"] == f"cannot reach {target}:{server.service_port}: {reason}"
    # Each worker writes its own lines: that of the failure may stand before that of the opening.
    wait_until(lambda: min(len(client.events("ConnectionFailed")), len(client.events("ConnectionOpened"))) >= 3)
    opened = len(client.events("ConnectionOpened"))
    assert opened <= 12, "a thread that notes its connection late lets it go round once more"


def test_a_chain_of_services_is_no_loop(peers: Peers, workers: str) -> None:
    """One service may be published onto the service port of another, but not that one onto the first again."""
    service = peers.service(echo)
    server = peers.server("--token", TOKEN, "--service", "web=0")
    alias, web = server.port_of("default"), server.port_of("web")
    words = f"{HOST}:{server.relay_port}", f"{HOST}:{web}", "--token", TOKEN
    client = peers.relay_process("client", *words, f"web={HOST}:{service.port}")
    for name in ("default", "web"):
        client.wait_event("Published", service=name)
    with peers.connect(alias) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    client.signal(signal.SIGTERM)
    assert client.wait() == 0
    ring = peers.relay_process("client", *words, f"web={HOST}:{alias}")
    ring.wait_event("Published", service="default")
    ring.wait_event("Published", service="web")
    with pytest.raises(ConnectionResetError), peers.connect(alias) as sock:
        sock.recv(1)
    ring.wait_event("ConnectionFailed")
    assert len(ring.events("ConnectionOpened")) <= 12


def test_it_takes_both_addresses_to_know_an_own_connection(bench: Bench, fake: FakeServer) -> None:
    """Somebody else on this host may connect from the same port, to another place: a system gives it twice."""
    ports: list[int] = []

    def serve(sock: socket.socket) -> None:
        ports.append(sock.getpeername()[1])
        echo(sock)

    service = bench.service(serve)
    bench.enter(RelayClient(HOST, service.port, HOST, fake.port, 3, drain_timeout=0, try_service=False,
                            on_event=bench.client_events))  # fmt: skip
    links = [fake.accept()]
    fake.welcome(links[0])
    for _ in range(2):
        links.append(fake.accept())
        fake.welcome(links[-1])
    far = f"{HOST}:{service.port}"
    for number, (link, port, kind) in enumerate(zip(links, [far, f"{HOST}:1", far], [READY, READY, FAIL], strict=True)):
        near = f"{HOST}:{ports[0] if ports else 1}"
        link.send(START, {"id": str(number), "client": near, "port": port})
        assert link.receive(Deadline(PATIENCE)).kind == kind
        wait_until(lambda: ports)
    [failed] = bench.client_events.wait(ConnectionFailed)
    assert "leads back here" in failed.reason


def test_own_connections_are_known_while_they_live() -> None:
    """By address and port of both ends; and nobody else's."""
    own = OwnConnections()
    near, far, other = (HOST, 40001), (HOST, 8080), ("::1", 40001, 0, 0)
    held = own.hold(near, far, 4)
    assert own.times(f"{HOST}:40001", f"{HOST}:8080") == 5
    assert own.times("127.0.0.2:40001", f"{HOST}:8080") == 0
    assert own.times(f"{HOST}:40001", f"{HOST}:1") == 0, "the same port may be used for other places"
    own.release(own.hold(other[:2], ("", 0), 0))
    own.release(held)
    assert own.times(f"{HOST}:40001", f"{HOST}:8080") == 0
    held = own.hold(other, ("::1", 8080, 0, 0), 1000)
    assert own.times("[::1]:40001", "[::1]:8080") == 255
    own.release(held)
    for nonsense in ("", "x", "x:", f"{HOST}:99999", f"{HOST}:0", "a Unix socket", "x:\u00b2"):
        assert own.times(nonsense, nonsense) == 0


def test_of_two_connections_from_one_port_the_later_one_counts() -> None:
    """Also when the first one ends."""
    own, near = OwnConnections(), ("10.0.0.5", 99)
    first, second = own.hold(near, ("192.0.2.1", 1), 0), own.hold(near, ("192.0.2.2", 1), 0)
    own.release(first)
    assert own.times("10.0.0.5:99", "192.0.2.2:1") == 1
    own.release(second)
    assert own.times("10.0.0.5:99", "192.0.2.2:1") == 0


SHARED = """
import os, sys
from _tcprelay.client.loops import OwnConnections
own = OwnConnections()
near, far = ("127.0.0.1", 40001), ("127.0.0.1", 8080)
(done, end), (begun, begin) = os.pipe(), os.pipe()
if not (child := os.fork()):
    held = own.hold(near, far, 0)
    os.write(begin, b"x")
    os.read(done, 1)
    own.release(held)
    os._exit(0)
try:
    os.read(begun, 1)
    known = own.times("127.0.0.1:40001", "127.0.0.1:8080")
finally:
    os.write(end, b"x")
    os.waitpid(child, 0)
sys.exit((known, own.times("127.0.0.1:40001", "127.0.0.1:8080")) != (1, 0))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork there are no workers")
def test_workers_know_each_other_s_connections() -> None:
    """One holds it, another is asked."""
    subprocess.run([sys.executable, "-c", SHARED], cwd=ROOT, check=True, timeout=60)


def test_where_a_service_was_dialled_is_looked_at(
    bench: Bench, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the port that START names; and that connection ends."""
    asked, ends = [], []

    def note(place: RelayPlace, far: tuple[str, int], port: str) -> bool:
        asked.append((far[1], port))
        return True

    def serve(sock: socket.socket) -> None:
        try:
            sock.recv(1)
        finally:
            ends.append(1)

    monkeypatch.setattr(RelayPlace, "is_at", note)
    service = bench.service(serve)
    bench.enter(RelayClient(HOST, service.port, HOST, fake.port, 1, drain_timeout=0, try_service=False,
                            on_event=bench.client_events))  # fmt: skip
    link = fake.accept()
    fake.welcome(link)
    link.send(START, {"id": "1", "client": f"{HOST}:1", "port": "relay:22"})
    assert link.receive(Deadline(PATIENCE)).kind == FAIL
    [failed] = bench.client_events.wait(ConnectionFailed)
    assert "leads back here" in failed.reason
    assert asked == [(service.port, "relay:22")]
    wait_until(lambda: ends)


@pytest.mark.parametrize(
    ("relay", "here", "address", "shared"),
    [
        (("127.0.0.1", 1), ("127.0.0.1", 2), "127.0.0.1:8080", True),
        (("192.0.2.1", 1), ("192.0.2.1", 2), "127.0.0.1:8080", True),
        (("192.0.2.1", 1), ("10.0.0.5", 2), "192.0.2.1:8080", True),
        (("2001:db8::1", 1, 0, 0), ("2001:db8::2", 2, 0, 0), "[2001:db8::1]:8080", True),
        (("192.0.2.1", 1), ("10.0.0.5", 2), "127.0.0.1:8080", False),
        (("192.0.2.1", 1), ("10.0.0.5", 2), "172.17.0.2:8080", False),
        (("192.0.2.1", 1), ("10.0.0.5", 2), "", False),
    ],
)
def test_two_hosts_have_the_same_loopback(relay: Any, here: Any, address: str, shared: bool) -> None:
    """What somebody does on the relay server's host is not taken for a connection of this one's."""
    assert RelayPlace(FakeSock(relay, here)).shares(address) == shared  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("relay", "here", "near", "far", "may"),
    [
        (("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 3), ("127.0.0.1", 4), True),
        (("127.0.0.1", 1), ("127.0.0.1", 2), ("192.0.2.9", 3), ("192.0.2.9", 4), True),
        (("127.0.0.1", 1), ("127.0.0.1", 2), ("192.0.2.9", 3), ("192.0.2.8", 4), False),
        (("192.0.2.1", 1), ("10.0.0.5", 2), ("10.0.0.5", 3), ("192.0.2.1", 4), True),
        (("192.0.2.1", 1), ("10.0.0.5", 2), ("127.0.0.1", 3), ("127.0.0.1", 4), False),
        (("192.0.2.1", 1), ("10.0.0.5", 2), "", "/run/x.sock", False),
        (("192.0.2.1", 1), ("10.0.0.5", 2), None, None, False),
    ],
)
def test_what_may_come_back(relay: Any, here: Any, near: Any, far: Any, may: bool) -> None:
    """A connection to the relay server's host; most are to a service elsewhere, and cost nothing."""
    assert RelayPlace(FakeSock(relay, here)).may_return(near, far) == may  # type: ignore[arg-type]


def test_a_link_that_is_lost_leads_nowhere() -> None:
    sock = socket.socket()
    sock.close()
    place = RelayPlace(sock)
    assert ends_of(sock) == (None, None)
    assert not place.shares("127.0.0.1:1")
    assert not place.is_at(("127.0.0.1", 1), "")


class FakeSock:
    """The ends of a socket."""

    def __init__(self, peer: Any, own: Any) -> None:
        self.getpeername, self.getsockname = lambda: peer, lambda: own


@pytest.mark.parametrize(
    ("relay", "here", "dialled", "address", "back"),
    [
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("192.0.2.1", 2222), "[::]:2222", True),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("192.0.2.1", 2222), "relay.example.net:2222", True),
        (("::ffff:192.0.2.1", 1, 0, 0), ("::1", 1, 0, 0), ("192.0.2.1", 2222), "0.0.0.0:2222", True),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("192.0.2.1", 2223), "[::]:2222", False),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("10.0.0.9", 2222), "[::]:2222", False),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("192.0.2.1", 2222), "", False),
        (("127.0.0.1", 10080), ("127.0.0.1", 1), ("127.0.0.1", 2222), "[::]:2222", False),
        (("192.0.2.1", 10080), ("192.0.2.1", 1), ("192.0.2.1", 2222), "[::]:2222", False),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), "/run/x.sock", "[::]:2222", False),
        (("192.0.2.1", 10080), ("10.0.0.5", 1), ("192.0.2.1", 10080), "", True),
        (("127.0.0.1", 10080), ("127.0.0.1", 1), ("::1", 10080, 0, 0), "[::]:2222", True),
        (("127.0.0.1", 10080), ("127.0.0.1", 1), ("192.0.2.9", 10080), "[::]:2222", False),
    ],
)
def test_behind_a_nat_it_is_known_by_where_it_was_dialled(
    relay: Any, here: Any, dialled: Any, address: str, back: bool
) -> None:
    """The relay's host at the service's port, unless that is this host: another network of it may have that port."""
    place = RelayPlace(FakeSock(relay, here))  # type: ignore[arg-type]
    assert place.is_at(dialled, address) == back
    if back and dialled[1] != relay[1]:
        assert place.may_return(("10.0.0.5", 1), dialled)


# Secrets


@pytest.mark.parametrize("kind", ["server", "client"])
def test_a_short_token_is_warned_of(bench: Bench, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    for token, warned in (("fifteen letters", True), ("sixteen letters!", False)):
        caplog.clear()
        server = bench.server(token=token)
        if kind == "client":
            bench.client(server, 1, token=token)
        said = [record.getMessage() for record in caplog.records if record.name == f"tcprelay.{kind}"]
        assert ("the token has 15 characters: it can be guessed; take 16 or more random ones" in said) == warned


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o600, ""), (0o640, ""), (0o644, "read"), (0o660, "write to"), (0o622, "write to"), (0o666, "read and write"),
    ],
)  # fmt: skip
def test_a_secret_s_file_that_is_open_is_warned_of(
    bench: Bench, caplog: pytest.LogCaptureFixture, tmp_path: Path, mode: int, said: str
) -> None:
    """What others can read, and what they could have written."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(mode)
    bench.server(token_file=str(file))
    warned = [record.getMessage() for record in caplog.records if "its mode" in record.getMessage()]
    line = f"--token-file {file}: others can {said} it (its mode is {mode:04o})"
    assert warned == ([line] if said else [])


def test_a_key_that_is_open_is_warned_of(
    bench: Bench, certificates: Certificates, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Where it is: in a file of its own, or in the certificate's, which is no secret otherwise."""
    cert, key, both = (tmp_path / name for name in ("cert.pem", "key.pem", "both.pem"))
    cert.write_bytes(Path(certificates.path("server.pem")).read_bytes())
    key.write_bytes(Path(certificates.path("server.key")).read_bytes())
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    for path, mode in ((cert, 0o644), (key, 0o600), (both, 0o644)):
        path.chmod(mode)
    bench.server(tls="relay", cert=str(cert), key=str(key), token=TOKEN)
    assert "its mode" not in caplog.text
    key.chmod(0o644)
    bench.server(tls="relay", cert=str(cert), key=str(key), token=TOKEN)
    bench.server(tls="relay", cert=str(both), token=TOKEN)
    assert f"--key {key}: others can read it" in caplog.text
    assert f"--cert {both}: others can read it" in caplog.text


def test_raw_s_secret_is_looked_at_and_no_token_is_not(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.server()
    assert "the token has" not in caplog.text
    bench.server(wire="raw", secret="short")
    assert "the token has 5 characters" in caplog.text


def test_what_begins_like_a_container_s_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other directories whose names begin so, and what is no file."""
    file = tmp_path / "secrets-of-others" / "token"
    file.parent.mkdir()
    file.write_text(TOKEN)
    file.chmod(0o444)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "secrets"))
    assert state.say_open(str(file))
    assert state.say_open("/dev/null") == ""


def test_a_container_s_secret_may_be_readable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker makes them so, and nobody else is there; the same goes for what systemd hands over."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o444)
    assert state.say_open(str(file)) == "others can read it (its mode is 0444)"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert state.say_open(str(file)) == ""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    monkeypatch.setattr(os.path, "realpath", lambda path: "/run/secrets/token")
    assert state.say_open(str(file)) == ""
    assert state.say_open(str(tmp_path / "none")) == ""


def run_check(role: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tcprelay", role, *words, "--check"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_configuration_with_a_secret_that_is_open_is_warned_of(tmp_path: Path) -> None:
    config = tmp_path / "c.conf"
    config.write_text(f"relay-port = 0\nservice-port = 0\ntoken = {TOKEN}\n")
    for mode, warned in ((0o644, True), (0o600, False)):
        config.chmod(mode)
        said = run_check("server", "--config", str(config)).stderr
        assert (f"{config} holds the token, and others can read it (its mode is 0644)" in said) == warned


# Where the identity is


def test_root_has_one_state_directory_in_a_shell_and_under_systemd(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that what was tried is what is started; an ordinary user's is in the home directory."""
    assert state.SYSTEM_STATE == "/var/lib/tcprelay"
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "root"))
    monkeypatch.setattr(state, "_is_root", lambda: True)
    monkeypatch.setattr(state, "SYSTEM_STATE", str(tmp_path / "lib/tcprelay"))
    assert state.state_directory() == str(tmp_path / "root/.local/state/tcprelay"), "there is no such system"
    (tmp_path / "lib").mkdir()
    assert state.state_directory() == str(tmp_path / "lib/tcprelay")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/tcprelay:/srv/two")
    monkeypatch.setattr(state, "_is_root", lambda: False)
    assert state.state_directory() == "/var/lib/tcprelay"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("HOME", "/home/user")
    assert state.state_directory() == "/home/user/.local/state/tcprelay"


def test_another_identity_is_warned_of(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the certificate that relay clients know may be another one; not where a directory was named."""
    home, system = tmp_path / "home", tmp_path / "system"
    for name in ("XDG_STATE_HOME", "SUDO_USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(state, "SYSTEM_STATE", str(system))
    monkeypatch.setattr(state, "_is_root", lambda: False)
    bench.server(tls="relay")
    assert "there are others" not in caplog.text
    monkeypatch.setattr(state, "_is_root", lambda: True)
    bench.server(tls="relay")
    place = home / ".local/state/tcprelay"
    assert f"certificate and token are those in {system}, and there are others in {place}: relay clients" in caplog.text
    caplog.clear()
    bench.server(tls="relay", state_dir=str(place))
    assert "there are others" not in caplog.text


def test_the_other_places_of_an_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That of whoever became root, too; and one that is the same by another name does not count."""
    real, link, admin = tmp_path / "private", tmp_path / "lib", tmp_path / "admin" / ".local/state/tcprelay"
    for place in (real, admin):
        place.mkdir(parents=True)
        (place / state.IDENTITY).touch()
    link.symlink_to(real)
    monkeypatch.setattr(state, "SYSTEM_STATE", str(link))
    monkeypatch.setenv("SUDO_USER", "admin")
    homes = {"~admin": str(tmp_path / "admin")}
    monkeypatch.setattr(os.path, "expanduser", lambda path: homes.get(path, str(tmp_path / "none")))
    assert state.other_states(str(link)) == [str(admin)]


def test_what_systemd_keeps_for_a_service_is_root_s_to_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files belong to a user that was made for it; elsewhere another owner's are refused."""
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    private = (tmp_path / "private").resolve()
    (tmp_path / "lib").symlink_to(private / "tcprelay")
    for directory, allowed in ((private / "tcprelay", True), (tmp_path / "other", False)):
        file = directory / "token"
        state.private_file(str(file), lambda: b"secret")
        for path in (directory, file):
            os.chown(path, 64789, 64789)
        monkeypatch.setattr(state, "SYSTEM_PRIVATE", f"{private}/")
        private.chmod(0o700)
        if allowed:
            assert state.private_file(str(file), lambda: b"") == str(file)
            assert state.private_file(str(tmp_path / "lib" / "token"), lambda: b"")
            private.chmod(0o755)
            with pytest.raises(PermissionError, match="user 64789, its owner"):
                state.private_file(str(file), lambda: b"")
        else:
            with pytest.raises(PermissionError, match="user 64789, its owner"):
                state.private_file(str(file), lambda: b"")


# A program that embeds it


def test_a_token_may_be_bytes(bench: Bench) -> None:
    server = bench.server(token=TOKEN.encode())
    bench.client(server, bench.service().port, token=TOKEN)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RelayServer(0, 0, token=""), ValueError, "token: expected something that is not empty"),
        (lambda: RelayClient("h", 1, "r", 1, token=b""), ValueError, "token: expected something that is not empty"),
        (lambda: RelayServer(0, 0, on_event=5), TypeError, "on_event: expected something to call, not 5"),  # type: ignore[arg-type]
        (lambda: RelayServer(0, service="web"), ValueError, "service 'web': expected NAME=PORT or NAME=ADDRESS:PORT"),
        (lambda: RelayServer(0, service=[8080]), ValueError, "service '8080': expected NAME=PORT"),
        (lambda: RelayClient("h", 1, "r"), ValueError, "--relay-port is required"),
        (lambda: RelayServer(0, 0).relay_address, RuntimeError, "this relay server has not been started"),
        (lambda: RelayServer(0, 0).service_addresses, RuntimeError, "this relay server has not been started"),
        (lambda: RelayClient("h", 1, "r:1").wait_until_published(), RuntimeError, "this relay client has not been"),
    ],
)  # fmt: skip
def test_what_a_program_gets_wrong(make: Any, error: type[Exception], message: str) -> None:
    """One clear error, which names option and value."""
    with pytest.raises(error, match=message):
        make()


def test_waiting_until_all_is_published(bench: Bench) -> None:
    """For all services; at the time-out it says which is not there, and why."""
    server = bench.server(service=["web=0"])
    publish = [f"web=127.0.0.1:{bench.service().port}"]
    client = bench.enter(RelayClient(HOST, 1, HOST, server.relay_address[1], 1, publish=publish, drain_timeout=0,
                                     try_service=False, on_event=bench.client_events))  # fmt: skip
    client.wait_until_published(PATIENCE)
    assert {event.service for event in bench.client_events.of(Published)} == {"default", "web"}
    server.end(0)
    bench.client_events.wait(Unpublished)
    with pytest.raises(TimeoutError, match=rf"service \w+ is not published at {HOST}:\d+: "):
        client.wait_until_published(0)


def test_waiting_ends_with_the_client(bench: Bench, fake: FakeServer) -> None:
    """Who waits for what will never be is told."""
    client = bench.enter(RelayClient(HOST, 1, HOST, fake.port, 1, drain_timeout=0))
    fake.accept()
    with pytest.raises(TimeoutError, match=r"service default is not published at .*: no answer from the relay yet"):
        client.wait_until_published(0)
    client.end(0)
    with pytest.raises(TimeoutError, match="the relay client is ending"):
        client.wait_until_published(PATIENCE)


def test_who_waits_is_woken() -> None:
    """When the last service is published, and not at the time-out."""
    client = RelayClient(HOST, 1, HOST, 1, 1)
    [service] = stock_of(client).services
    waiting = threading.Thread(target=client._branches.wait_until_published, args=(Deadline(6 * PATIENCE),))
    waiting.start()
    wait_until(lambda: stock_of(client)._condition._waiters)  # type: ignore[attr-defined]
    stock_of(client).tell_up(service, "")
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_after_the_end_nothing_is_published(bench: Bench) -> None:
    server = bench.server()
    client = bench.client(server, bench.service().port)
    client.wait_until_published(PATIENCE)
    client.end(0)
    with pytest.raises(TimeoutError, match=r"service default is not published at .*: the relay client is ending"):
        client.wait_until_published(PATIENCE)


def test_words_of_the_log() -> None:
    """Singular and plural, and seconds that people read."""
    assert str(Draining(connections=1, seconds=9.99923)).startswith("ending: waiting up to 10 s")
    assert str(Draining(connections=1, seconds=0.34)).startswith("ending: waiting up to 0.3 s")
    assert str(Draining(connections=1, seconds=3600.0)).startswith("ending: waiting up to 3600 s")
    closed = ConnectionClosed(id="1", service="s", peer="p", reason="", seconds=1.0, bytes_in=1, bytes_out=2)
    assert str(closed).endswith("complete after 1.000 s, 1 byte in, 2 bytes out")


@pytest.mark.parametrize("count", ["0", "2"])
def test_the_end_is_told(peers: Peers, count: str) -> None:
    server = peers.server("--token", TOKEN, "--workers", count)
    assert server.relay_port
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    server.wait_message("ended")


def test_a_start_says_what_it_has_read(peers: Peers, tmp_path: Path) -> None:
    """Files and variables, in one line."""
    config = tmp_path / "c.conf"
    config.write_text("relay-port = 0\n")
    words = "--config", str(config), "--service-port", "0", "--hostname", HOST
    process = peers.relay_process("server", *words, env={"TCPRELAY_TOKEN": TOKEN})
    process.wait_message(f"the configuration is from {config}, TCPRELAY_TOKEN")
