"""TLS on every leg: data, ends and errors in all combinations; who is refused, and why."""

from __future__ import annotations

import errno
import gc
import random
import re
import select
import shlex
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.certificates import load_pfx, make_context, pin_of
from _tcprelay.command_line import parse_options
from _tcprelay.link import RawLink
from _tcprelay.openssl import new_context
from _tcprelay.options import Options
from _tcprelay.splice import Splice
from _tcprelay.system import has_interpreter_lock
from _tcprelay.tcp import RESET_ON_CLOSE, unread_bytes
from _tcprelay.threads import Threads
from _tcprelay.tls import ACCESS_DENIED, LARGE_TLS_BUFFER, SMALL_READS, SMALL_TLS_BUFFER, TLSStream
from _tcprelay.waiting import Deadline, wait_for
from tcprelay import (
    ClientOptions, ClientUp, ConnectionClosed, ConnectionFailed, LinkRefused, Published, RelayClient, RelayServer,
    Unpublished,
)  # fmt: skip

from .certificates import Certificates, tls_context
from .conftest import PATIENCE, Bench, Service, connect, read_all, read_exactly, replace, wait_until
from .ends import TLSEnd
from .peers import ROOT

RESET = RESET_ON_CLOSE


@dataclass(frozen=True)
class Way:
    """One combination of legs."""

    link: str  # plain, tls, mutual
    port: bool  # TLS on the service port
    service: bool  # TLS to the service
    version: str
    wire: str

    def __str__(self) -> str:
        return "-".join([self.link, "port" * self.port, "service" * self.service, self.version, self.wire])


WAYS = [
    Way(link, port, service, version, wire)
    for link in ("plain", "tls", "mutual")
    for port in (False, True)
    for service in (False, True)
    for version in ("1.2", "1.3")
    for wire in ("v1", "raw")
    if link != "plain" or port or service
]


def tls_option(on_links: bool, on_service: bool) -> str:
    return {(True, True): "both", (True, False): "relay", (False, True): "service", (False, False): ""}[
        on_links, on_service
    ]


class Rig:
    """A relay with the legs of a way, between a service and `connect`."""

    def __init__(self, bench: Bench, certificates: Certificates, way: Way) -> None:
        self._bench, self._certificates, self._way = bench, certificates, way
        path = certificates.path
        # tls_min 1.3 forces 1.3; for 1.2 the contexts that the relay made are capped.
        self._common: dict[str, Any] = {"wire": way.wire, "tls_min": way.version}
        self._common |= {"allow_unauthenticated": True} if way.wire == "raw" else {"token": "the-token"}
        self.server_options: dict[str, Any] = {
            **self._common, "tls": tls_option(way.link != "plain", way.port),
        }  # fmt: skip
        if way.link != "plain" or way.port:
            self.server_options |= {"cert": path("server.pem"), "key": path("server.key")}
        self.client_options: dict[str, Any] = {
            "wire": way.wire, "tls_min": way.version, "tls": tls_option(way.link != "plain", way.service),
        }  # fmt: skip
        if way.service:
            self.client_options["service_ca_file"] = path("ca.pem")
        if way.link != "plain":
            self.client_options["ca_file"] = path("ca.pem")
        if way.wire != "raw":
            self.client_options["token"] = "the-token"
        if way.link == "mutual":
            self.server_options |= {"auth": True, "ca_file": path("ca.pem")}
            self.client_options |= {"cert": path("client.pem"), "key": path("client.key")}

    def context(self, server_side: bool) -> ssl.SSLContext:
        path = self._certificates.path
        if server_side:
            context = tls_context(True, path("server.pem"), path("server.key"))
        else:
            context = tls_context(ca=path("ca.pem"))
        if self._way.version == "1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    def start(self, serve: Any) -> RelayServer:
        def serve_leg(sock: socket.socket) -> None:
            serve(TLSEnd(sock, self.context(True), True) if self._way.service else sock)

        self.server = self._bench.server(**self.server_options)
        if self._way.version == "1.2" and self.server.runtime.credentials.links is not None:
            self.server.runtime.credentials.links.maximum_version = ssl.TLSVersion.TLSv1_2
        self.client = self._bench.client(self.server, self._bench.service(serve_leg).port, **self.client_options)
        return self.server

    def connect(self) -> Any:
        sock = self._bench.connect(self.server)
        return TLSEnd(sock, self.context(False), False) if self._way.port else sock


@pytest.fixture(params=WAYS, ids=str)
def rig(bench: Bench, certificates: Certificates, request: pytest.FixtureRequest) -> Rig:
    return Rig(bench, certificates, request.param)


def test_data_and_half_close_both_ways(rig: Rig) -> None:
    """The service client ends its direction with data in flight, and the whole answer still comes."""
    data, answer = random.Random(1).randbytes(700_001), random.Random(2).randbytes(900_001)
    seen: list[bytes] = []

    def serve(sock: Any) -> None:
        seen.append(read_all(sock))
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)

    rig.start(serve)
    sock = rig.connect()
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == answer
    assert seen == [data]
    [closed] = rig._bench.server_events.wait(ConnectionClosed)
    assert (closed.bytes_in, closed.bytes_out, closed.reason) == (700_001, 900_001, "")


def test_the_service_ends_first(rig: Rig) -> None:
    """After the service's end with data in flight towards it, all of that still arrives."""
    data = random.Random(3).randbytes(800_000)
    got: list[bytes] = []

    def serve(sock: Any) -> None:
        first = read_exactly(sock, 1)
        sock.sendall(b"answer")
        sock.shutdown(socket.SHUT_WR)
        got.append(first + read_all(sock))

    rig.start(serve)
    sock = rig.connect()
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    assert read_all(sock) == b"answer"
    sender.join(PATIENCE)
    sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: got)
    assert got == [data]


def test_aborts_and_truncation_are_errors(rig: Rig) -> None:
    """The service's RST, and on TLS its FIN without close_notify, reach the service client as an error."""

    def serve(sock: Any) -> None:
        read_exactly(sock, 1)
        sock.sendall(b"part")
        raw = getattr(sock, "sock", sock)
        read_exactly(sock, 1)
        if raw is sock:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()  # TLS: no close_notify

    rig.start(serve)
    sock = rig.connect()
    sock.sendall(b"1")
    assert read_exactly(sock, 4) == b"part"
    sock.sendall(b"2")
    with pytest.raises(OSError):
        assert sock.recv(1)
    assert rig._bench.server_events.wait(ConnectionClosed)[0].reason


def test_the_service_speaks_first(rig: Rig) -> None:
    """A banner needs no byte of the service client's (on the raw wire it does)."""
    raw = rig._way.wire == "raw"

    def serve(sock: Any) -> None:
        if raw:
            read_exactly(sock, 1)
        sock.sendall(b"banner")
        sock.shutdown(socket.SHUT_WR)

    rig.start(serve)
    sock = rig.connect()
    if raw:
        sock.sendall(b"x")
    assert read_all(sock) == b"banner"


def tls_server(certificates: Certificates, name: str = "server", **more: Any) -> dict[str, Any]:
    return {"tls": "relay", "cert": certificates.path(f"{name}.pem"), "key": certificates.path(f"{name}.key"), **more}


def refused(bench: Bench, server: RelayServer, service: Service, **options: Any) -> str:
    """Why a client with these options does not get a link."""
    bench.enter(
        RelayClient(
            options.pop("relay_host_name", "localhost"), service.port, "127.0.0.1", server.relay_address[1], 1,
            on_event=bench.client_events, **options,
        )
    )  # fmt: skip
    [event, *_] = bench.client_events.wait(Unpublished)
    assert not bench.client_events.of(Published)
    assert server.counters["links_idle"] == 0
    return str(event.reason)


@pytest.mark.parametrize(
    ("certificate", "options", "words"),
    [
        ("server", {}, "the certificate is not accepted: unable to get local issuer certificate"),
        ("expired", {"ca_file": "ca.pem"}, "the certificate is not accepted: certificate has expired"),
        ("foreign", {"ca_file": "ca.pem"}, "the certificate is not accepted: unable to get local issuer certificate"),
        ("elsewhere", {"ca_file": "ca.pem"}, "the certificate is not accepted: IP address mismatch"),
        ("server", {"ca_file": "ca.pem", "tls_server_name": "other.example"}, "Hostname mismatch"),
        ("server", {"pin": "sha256:" + "0" * 64}, "not the one in --pin; compare it with what the server says"),
    ],
)
def test_a_server_that_cannot_be_verified_is_refused(
    bench: Bench, certificates: Certificates, certificate: str, options: dict[str, str], words: str
) -> None:
    """The client says why, and what can be done."""
    server = bench.server(**tls_server(certificates, certificate))
    chosen = {name: certificates.path(value) if name == "ca_file" else value for name, value in options.items()}
    assert words in refused(bench, server, bench.service(), tls="relay", **chosen)
    bench.server_events.wait(LinkRefused)


def accepted(bench: Bench, server: RelayServer, **options: Any) -> None:
    bench.client(server, bench.service().port, **options)
    with bench.connect(server) as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"


def test_ways_to_trust_a_server(bench: Bench, certificates: Certificates) -> None:
    """A CA file, another name, a pin in any spelling, or, with a warning, nothing."""
    elsewhere = bench.server(**tls_server(certificates, "elsewhere"))
    ca = certificates.path("ca.pem")
    accepted(bench, elsewhere, tls="relay", ca_file=ca, tls_server_name="elsewhere.example")
    accepted(bench, elsewhere, tls="relay", reject_unauthorized=False)
    pin = pin_of(ssl.PEM_cert_to_DER_cert(Path(certificates.path("expired.pem")).read_text()))
    accepted(bench, bench.server(**tls_server(certificates, "expired")), tls="relay", pin=pin)


def test_no_verification_is_said_at_every_start(
    bench: Bench, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """--reject-unauthorized false is a warning."""
    accepted(bench, bench.server(**tls_server(certificates)), tls="relay", reject_unauthorized=False)
    assert "--reject-unauthorized false: whoever is on the way can pose as the relay server" in caplog.text


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize(
    ("name", "at_server"),
    [("", "it showed no certificate"), ("foreign", "the certificate is not accepted"), ("expired", "has expired")],
)
def test_a_client_whose_certificate_is_not_accepted(
    bench: Bench, certificates: Certificates, name: str, at_server: str, version: str
) -> None:
    """Both logs have the reason (with TLS 1.3 the client learns it late), nothing is pooled, and it backs off."""
    server = bench.server(**tls_server(certificates, auth=True, ca_file=certificates.path("ca.pem"), tls_min="1.2"))
    if version == "1.2":
        assert server.runtime.credentials.links is not None
        server.runtime.credentials.links.maximum_version = ssl.TLSVersion.TLSv1_2
    own = {"cert": certificates.path(f"{name}.pem"), "key": certificates.path(f"{name}.key")} if name else {}
    reason = refused(bench, server, bench.service(), tls="relay", ca_file=certificates.path("ca.pem"), **own)
    assert "certificate" in reason or "alert" in reason or "handshake failure" in reason
    [event, *_] = bench.server_events.wait(LinkRefused)
    assert at_server in event.reason


def test_the_name_in_a_client_s_certificate_is_told(bench: Bench, certificates: Certificates) -> None:
    """It stands in the events, so that the log shows who is connected."""
    server = bench.server(**tls_server(certificates, auth=True, ca_file=certificates.path("ca.pem")))
    bench.client(
        server, bench.service().port, tls="relay", ca_file=certificates.path("ca.pem"), name="nas",
        cert=certificates.path("client.pem"), key=certificates.path("client.key"),
    )  # fmt: skip
    assert bench.server_events.of(ClientUp)[0].name == "nas (certificate client)"


def test_a_plain_client_on_a_tls_port(bench: Bench, certificates: Certificates) -> None:
    """Both sides say what is wrong."""
    server = bench.server(**tls_server(certificates))
    assert refused(bench, server, bench.service()) == "refused by the relay: it speaks TLS; add --tls"
    assert "it does not speak TLS" in bench.server_events.wait(LinkRefused)[0].reason


def test_protected_mode_before_the_handshake(
    bench: Bench, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link from another host costs no TLS handshake; its client, TLS or plain, still learns what to do."""
    replace(monkeypatch, "is_loopback", lambda address: False)
    server = bench.server(**{**tls_server(certificates), "token": None})
    with connect(server.relay_address) as silent:
        assert read_all(silent) == ACCESS_DENIED
    ca = {"tls": "relay", "ca_file": certificates.path("ca.pem")}
    assert "set --token-file on both sides" in refused(bench, server, bench.service(), **ca)
    assert {event.code for event in bench.server_events.of(LinkRefused)} == {"protected"}
    bench.client_events.events.clear()
    assert "the relay port answers with TLS" in refused(bench, server, bench.service())


def test_a_tls_client_on_a_plain_port(bench: Bench) -> None:
    """Likewise."""
    server = bench.server()
    reason = refused(bench, server, bench.service(), tls="relay")
    assert reason == (
        "what answers there does not speak TLS: is it the relay port of a tcprelays that was started with --tls? "
        "A service port answers as its service does"
    )
    assert "it speaks TLS" in bench.server_events.wait(LinkRefused)[0].reason


def test_a_plain_service_client_on_a_tls_service_port(bench: Bench, certificates: Certificates) -> None:
    """It gets an RST or an alert, never the service; a silent one is dropped at the deadline."""
    server = bench.server(**{**tls_server(certificates), "tls": "both"})
    sock = bench.connect(server)
    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert b"HTTP" not in until_broken(sock)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason.startswith("no TLS handshake: it does not speak TLS")


def until_broken(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except OSError:
        pass
    return data


def test_a_service_that_cannot_be_verified(bench: Bench, certificates: Certificates) -> None:
    """It counts as one that cannot be reached; --service-insecure accepts it."""
    context = tls_context(True, certificates.path("foreign.pem"), certificates.path("foreign.key"))

    def serve(sock: socket.socket) -> None:
        end = TLSEnd(sock, context, True)
        end.sendall(b"hello")
        end.shutdown(socket.SHUT_WR)

    server = bench.server(**tls_server(certificates))
    service = bench.service(serve)
    both = {"tls": "both", "ca_file": certificates.path("ca.pem"), "service_ca_file": certificates.path("ca.pem")}
    client = bench.client(server, service.port, **both)
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    [failed] = bench.client_events.wait(ConnectionFailed)
    assert "the certificate is not accepted" in failed.reason
    client.end(0)
    wait_until(lambda: server.counters["links_idle"] == 0)
    bench.client(server, service.port, **both, service_insecure=True)
    assert read_all(bench.connect(server)) == b"hello"


def test_a_separate_certificate_for_the_service_ports(bench: Bench, certificates: Certificates) -> None:
    """Service clients see --service-cert, relay clients --cert."""
    service = {"service_cert": certificates.path("elsewhere.pem"), "service_key": certificates.path("elsewhere.key")}
    server = bench.server(**{**tls_server(certificates, **service), "tls": "both"})
    names = []
    for address in (server.relay_address, server.service_addresses["default"]):
        context = tls_context(ca=certificates.path("ca.pem"))
        with connect(address) as sock, context.wrap_socket(sock) as tls:
            names.append(tls.getpeercert()["subject"][0][0][1])  # type: ignore[index]
    assert names == ["server", "elsewhere"]


# PFX


@pytest.mark.parametrize("passphrase", ["", "pass word"])
@pytest.mark.parametrize("of", ["server", "rsa"])
@pytest.mark.parametrize(
    "kind",
    [
        (),
        ("-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1"),
        ("-legacy", "-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-RC2-40", "-macalg", "sha1"),
    ],
    ids=["openssl3", "3des", "rc2"],
)
def test_pfx_files(
    bench: Bench, certificates: Certificates, tmp_path: Path, kind: tuple[str, ...], of: str, passphrase: str
) -> None:
    """Of OpenSSL 3, of older ones and of Windows, EC and RSA, with a chain, with and without a passphrase."""
    chain = ("-certfile", certificates.path("ca.pem"))
    pfx = Certificates(certificates.directory).make_pfx(f"{tmp_path.name}", of, passphrase, *chain, *kind)
    server = bench.server(tls="relay", pfx=pfx, passphrase=passphrase)
    accepted(bench, server, tls="relay", ca_file=certificates.path("ca.pem"))


def test_a_key_never_lies_on_the_disk(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What openssl is asked for is encrypted, its arguments hold no secret, and it is loaded from memory."""
    pfx = certificates.make_pfx("secret", "server", "hunter2")
    seen: list[Any] = []
    real = subprocess.run

    def run(command: list[str], **more: Any) -> Any:
        done = real(command, **more)
        seen.append((command, done.stdout))
        return done

    monkeypatch.setattr("_tcprelay.system.subprocess.run", run)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    load_pfx(tls_context(True), pfx, "hunter2")
    assert seen
    for command, output in seen:
        assert "hunter2" not in " ".join(command)
        assert b"BEGIN PRIVATE KEY" not in output
    assert any(b"BEGIN ENCRYPTED PRIVATE KEY" in output for _, output in seen)
    assert not list(tmp_path.iterdir())


def test_without_the_openssl_command(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to make PEM files where it is."""
    pfx = certificates.make_pfx("noopenssl", "server", "x")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(OSError, match="make PEM files where it is"):
        load_pfx(tls_context(True), pfx, "x")


# One paste, and reloading


def test_a_start_with_tls_alone(bench: Bench, tmp_path: Path) -> None:
    """A certificate and a token are made, kept for their owner alone, used again, and told for the other side."""
    state = tmp_path / "state"
    server = bench.server(tls="relay", state_dir=str(state))
    files = {path.name: path for path in state.iterdir()}
    assert set(files) == {"identity.pem", "token"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    words = server.invitation(with_secrets=True).splitlines()[1].split()
    token = files["token"].read_text().strip()
    assert words[words.index("--token") + 1] == token
    assert "--pin" not in words  # the token vouches for the certificate
    accepted(bench, server, tls="relay", token=token)
    [pin] = re.findall(r"add --pin (sha256:\w{64})", server.invitation(with_secrets=False))
    accepted(bench, server, tls="relay", pin=pin, token=token)
    hidden = server.invitation(with_secrets=False)
    assert token not in hidden
    assert str(files["token"]) in hidden
    before = {name: path.read_bytes() for name, path in files.items()}
    bench.server(tls="relay", state_dir=str(state))
    assert {name: path.read_bytes() for name, path in files.items()} == before


def test_the_pasted_line_is_accepted_by_the_parser(bench: Bench, tmp_path: Path) -> None:
    """As it stands, with a port put in."""
    server = bench.server(tls="relay", state_dir=str(tmp_path / "state"), service="web=0")
    line = server.invitation(with_secrets=True).splitlines()[1].replace("PORT", "22").replace("HOST", "relay")
    options = parse_options("tcprelayc", "", ClientOptions, line.split()[1:]).options
    assert options.tls == "relay"
    assert [str(service) for service in options.services] == ["default=localhost:22", "web=localhost:22"]


@pytest.mark.parametrize(
    ("options", "own", "named", "note"),
    [
        ({"public_host": "relay.example.net"}, "9.9.9.9", "relay.example.net", False),
        ({"hostname": "127.0.0.1"}, "9.9.9.9", "127.0.0.1", False),
        ({}, "9.9.9.9", "9.9.9.9", False),
        ({}, "2620:fe::9", "[2620:fe::9]", False),
        ({}, "10.0.0.1", "HOST", True),
        ({}, "100.64.0.1", "HOST", True),
        ({"hostname": "0.0.0.0"}, "", "HOST", True),
    ],
)
def test_the_pasted_line_names_what_others_can_reach(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], own: str, named: str,
    note: bool,
) -> None:  # fmt: skip
    """What is given, or the default route's address where it is public; a bare host name says nothing elsewhere."""

    class Socket(socket.socket):
        def connect(self, address: Any) -> None:
            if self.type != socket.SOCK_DGRAM:
                super().connect(address)
            elif not own or (":" in address[0]) != (":" in own):
                raise OSError(errno.ENETUNREACH, "Network is unreachable")

        def getsockname(self) -> Any:
            return (own, 1) if self.type == socket.SOCK_DGRAM else super().getsockname()

    server = bench.server(tls="relay", state_dir=str(tmp_path / "state"), **options)
    monkeypatch.setattr(socket, "socket", Socket)
    said = server.invitation(with_secrets=False)
    words = shlex.split(said.splitlines()[1])
    assert words[:5] == ["tcprelayc", f"{named}:{server.relay_address[1]}", "PORT", "--tls", "--token-file"]
    assert ("(HOST: a name or address" in said) == note


def test_the_public_host_is_told(bench: Bench) -> None:
    """A relay client says where its service is, which is where the server is reached."""
    server = bench.server(public_host="relay.example.net")
    bench.client(server, bench.service().port)
    [published] = bench.client_events.wait(Published)
    assert published.address == f"relay.example.net:{server.service_addresses['default'][1]}"


def test_reloading(bench: Bench, certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New connections get the new certificate and token, living ones go on, and what does not load changes nothing."""
    cert, key, token = tmp_path / "cert", tmp_path / "key", tmp_path / "token"

    def install(name: str, secret: str) -> None:
        cert.write_text(Path(certificates.path(f"{name}.pem")).read_text())
        key.write_text(Path(certificates.path(f"{name}.key")).read_text())
        token.write_text(secret)

    def pin_now() -> str:
        with connect(server.relay_address) as sock, tls_context().wrap_socket(sock) as tls:
            return pin_of(tls.getpeercert(binary_form=True) or b"")

    install("server", "old-token")
    server = bench.server(tls="relay", cert=str(cert), key=str(key), token_file=str(token))
    bench.client(server, bench.service().port, tls="relay", reject_unauthorized=False, token="old-token")
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    first = pin_now()
    install("rsa", "new-token")
    assert server.reload()
    assert pin_now() != first
    sock.sendall(b"y")
    assert sock.recv(1) == b"y"
    accepted(bench, server, tls="relay", reject_unauthorized=False, token="new-token")
    second = pin_now()
    key.write_text("no key")
    assert not server.reload()
    assert "cannot reload, all stays as it was" in caplog.text
    assert pin_now() == second


# Streams


def tls_pair(stack: ExitStack, certificates: Certificates, version: str) -> tuple[TLSStream, TLSStream]:
    """Two TLS streams over a TCP connection, after their handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = stack.enter_context(socket.create_connection(listener.getsockname()))
        near = stack.enter_context(listener.accept()[0])
    path = certificates.path
    contexts = tls_context(True, path("server.pem"), path("server.key")), tls_context(ca=path("ca.pem"))
    if version == "1.2":
        contexts[0].maximum_version = ssl.TLSVersion.TLSv1_2
    one = TLSStream(near, "server", contexts[0], server_side=True)
    two = TLSStream(far, "client", contexts[1], server_hostname="localhost")
    thread = threading.Thread(target=one.handshake, args=(Deadline(PATIENCE),))
    thread.start()
    two.handshake(Deadline(PATIENCE))
    thread.join(PATIENCE)
    return one, two


def drain(stream: TLSStream, size: int = 5000) -> bytes:
    data = bytearray()
    view = memoryview(bytearray(size))
    while count := stream.recv_into(view):
        data += view[:count]
    return bytes(data)


def test_little_is_taken_ahead(certificates: Certificates) -> None:
    """Where little may be: what is decrypted ahead waits like any other queue, whatever is asked for at once."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        one._raw = memoryview(bytearray(LARGE_TLS_BUFFER))
        one.room = 32768
        data = random.Random(1).randbytes(100_000)
        two.send(data)
        wait_until(lambda: unread_bytes(one.sock) > 100_000)
        before, piece = unread_bytes(one.sock), memoryview(bytearray(512))
        count = one.recv_into(piece)
        assert piece[:count] == data[:count] and count > 0
        assert before - unread_bytes(one.sock) == 32768
        two.end()
        assert bytes(piece[:count]) + drain(one) == data


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_ending_with_data_in_flight_loses_nothing(certificates: Certificates, version: str) -> None:
    """Bytes that have arrived, encrypted or not, when the direction is ended are still received."""
    for size in (1, 16384, 16385, 100_000, 300_000):
        with ExitStack() as stack:
            one, two = tls_pair(stack, certificates, version)
            data = random.Random(size).randbytes(size)
            two.send(data[: size // 2])
            view = memoryview(bytearray(1))
            got = bytes(view[: one.recv_into(view)]) if size > 1 else b""
            one.send(b"from here")
            one.end()
            two.send(data[size // 2 :])
            two.end()
            assert got + drain(one) == data
            assert drain(two) == b"from here"


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("cut", [False, True])
def test_the_opening_exchange_over_tls(
    certificates: Certificates, version: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that are here before it begins, both ends, and a cut that is none; TLS on both legs, one thread."""
    replace(monkeypatch, "OPENING_TIME", 6 * PATIENCE)
    with ExitStack() as stack:
        stream, far = tls_pair(stack, certificates, version)
        link, far_link = tls_pair(stack, certificates, version)
        splice, threads = Splice("1", "test", stream, RawLink(link)), Threads()
        view = memoryview(bytearray(100))
        for piece in (b"go", b"question"):
            far.send(piece)
        assert stream.recv_into(view[:2]) == 2  # and has taken the next record from the socket
        far_link.send(b"greeting")

        def run() -> None:
            splice.run(threads)
            stream.close()
            link.close()

        threads.start(run)
        assert far.recv_into(view) == 8
        assert far_link.recv_into(view) == 8
        far.send(b"question")
        if cut:
            far.sock.shutdown(socket.SHUT_WR)
            assert far_link.recv_into(view) == 8
            with pytest.raises(ConnectionResetError):
                drain(far_link)
        else:
            far.end()
            assert drain(far_link) == b"question"
            far_link.send(b"answer")
            far_link.end()
            assert drain(far) == b"answer"
            assert len(threads) == 1
        threads.end(Deadline(PATIENCE))
        assert splice.reason == ("server: cut off without TLS close_notify" if cut else "")


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_cut_at_a_record_boundary_is_no_end(certificates: Certificates, version: str) -> None:
    """FIN without close_notify, with whole records before it: what came is delivered, then an error, each time."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, version)
        two.send(b"whole record")
        two.sock.shutdown(socket.SHUT_WR)
        view = memoryview(bytearray(100))
        assert one.recv_into(view) == 12
        for _ in range(2):
            with pytest.raises(ConnectionResetError, match="without TLS close_notify"):
                one.recv_into(view)


def test_contexts_are_made_in_one_place() -> None:
    """One in the product and one in the tests: what must hold in every Python is set there."""
    makers = re.compile(r"ssl\.(SSLContext|(_?create_\w+_context))\(")
    patterns = "tcprelay*.py", "_tcprelay/**/*.py", "deploy/*.py", "tests/**/*.py"
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    places = [path.name for path in sources for _ in makers.findall(path.read_text())]
    assert sorted(places) == ["certificates.py", "openssl.py"]


def test_a_damaged_record_stays_an_error(certificates: Certificates) -> None:
    """After a record that cannot be decrypted no further receive may look like an end."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        two.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        view = memoryview(bytearray(100))
        for _ in range(3):
            with pytest.raises(ssl.SSLError):
                one.recv_into(view)


def test_both_directions_at_once_from_two_threads(certificates: Certificates) -> None:
    """One thread sends, one receives, on each side, for a while."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        data = random.Random(5).randbytes(8_000_000)
        results: dict[str, bytes] = {}

        def send(stream: TLSStream) -> None:
            for start in range(0, len(data), 100_000):
                stream.send(data[start : start + 100_000])
            stream.end()

        def receive(name: str, stream: TLSStream) -> None:
            results[name] = drain(stream, 70_000)

        threads = [
            threading.Thread(target=send, args=(one,)),
            threading.Thread(target=send, args=(two,)),
            threading.Thread(target=receive, args=("one", one)),
            threading.Thread(target=receive, args=("two", two)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == {"one": data, "two": data}


def test_the_service_s_name_is_checked(bench: Bench, certificates: Certificates) -> None:
    """A certificate of the right CA for another host is not the service's."""
    context = tls_context(True, certificates.path("elsewhere.pem"), certificates.path("elsewhere.key"))
    server = bench.server()
    service = bench.service(lambda sock: TLSEnd(sock, context, True))
    bench.client(server, service.port, tls="service", service_ca_file=certificates.path("ca.pem"))
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert (
        "the certificate is not accepted: IP address mismatch" in bench.client_events.wait(ConnectionFailed)[0].reason
    )


def test_tls_of_the_server_alone_is_no_guard(
    bench: Bench, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protected mode holds with TLS, too: a certificate of the server's says nothing about who connects."""
    replace(monkeypatch, "is_loopback", lambda address: False)
    server = bench.server(**tls_server(certificates))
    reason = refused(bench, server, bench.service(), tls="relay", ca_file=certificates.path("ca.pem"))
    assert "accepts links from its own machine alone" in reason


def test_the_system_s_policy_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenSSL's configuration asks for TLS 1.3, --tls-min 1.2, which is the default, does not undo it."""
    real = new_context

    def strict(server_side: bool) -> ssl.SSLContext:
        context = real(server_side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    def oldest(version: str) -> int:
        return make_context(Options(tls_min=version), True).minimum_version

    assert [oldest("1.2"), oldest("1.3")] == [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
    replace(monkeypatch, "new_context", strict)
    assert [oldest("1.2"), oldest("1.3")] == [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_oldest_version_can_be_raised(bench: Bench, certificates: Certificates, side: str) -> None:
    """With --tls-min 1.3 on one side, a peer that speaks no more than 1.2 is refused."""
    ca = certificates.path("ca.pem")
    server = bench.server(**tls_server(certificates, tls_min="1.3" if side == "server" else "1.2"))
    client = RelayClient(
        "localhost", 1, "127.0.0.1", server.relay_address[1], 1, on_event=bench.client_events,
        tls="relay", ca_file=ca, tls_min="1.3" if side == "client" else "1.2",
    )  # fmt: skip
    capped = client if side == "server" else server
    assert capped.runtime.credentials.links is not None
    capped.runtime.credentials.links.maximum_version = ssl.TLSVersion.TLSv1_2
    bench.enter(client)
    assert bench.client_events.wait(Unpublished)[0].reason.startswith(("TLS: ", "refused by the relay"))


def test_a_name_that_no_certificate_can_have(bench: Bench, certificates: Certificates) -> None:
    """It is told like any other reason, and leaves no socket open."""
    server = bench.server(**tls_server(certificates))
    options = {"ca_file": certificates.path("ca.pem"), "tls_server_name": ".example"}
    reason = refused(bench, server, bench.service(), tls="relay", **options)
    assert reason == ".example cannot be the name in a certificate"


def test_records_that_did_not_fit_are_sent_later(certificates: Certificates) -> None:
    """`send_now` on a full socket keeps what is left, and everything after it follows in order."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        data = random.Random(9).randbytes(9_000_000)
        place = 0
        while one.send_now(bytearray(data[place : place + 100_000])):
            place += 100_000
        place += 100_000
        assert place < len(data)
        assert not one.send_now(bytearray())
        results: list[bytes] = []
        reader = threading.Thread(target=lambda: results.append(drain(two, 70_000)))
        reader.start()
        one.send(data[place:])
        one.end()
        reader.join(PATIENCE)
        assert results == [data]


def test_a_fault_that_is_found_while_ending_stays_one(certificates: Certificates) -> None:
    """A damaged record behind good ones, met when the own direction is ended: the good ones, then the error."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        two.send(b"good")
        two.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        view = memoryview(bytearray(2))
        wait_for(one.fd, select.POLLIN, Deadline(PATIENCE))
        assert one.recv_into(view) == 2
        one.end()
        assert one.recv_into(view) == 2
        for _ in range(2):
            with pytest.raises(ssl.SSLError):
                one.recv_into(view)


def test_buffers_shrink_after_bulk_traffic(certificates: Certificates) -> None:
    """An idle link does not keep the buffer of the download that it once carried."""
    with ExitStack() as stack:
        one, two = tls_pair(stack, certificates, "1.3")
        sender = threading.Thread(target=two.send, args=(bytes(2_000_000),))
        sender.start()
        view = memoryview(bytearray(100_000))
        have = 0
        while have < 2_000_000:
            have += one.recv_into(view)
        sender.join(PATIENCE)
        assert len(one._raw) == LARGE_TLS_BUFFER
        for _ in range(SMALL_READS + 1):
            two.send(b"small")
            one.recv_into(view)
        assert len(one._raw) == SMALL_TLS_BUFFER


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cert": "server.pem"}, "--cert is of no use without --tls"),
        ({"ca_file": "ca.pem", "tls": "relay"}, "--ca-file is of no use without --auth"),
        ({"service_cert": "server.pem", "tls": "relay"}, "--service-cert is of no use without --tls both"),
    ],
)
def test_what_secures_nothing_is_refused(certificates: Certificates, options: dict[str, str], words: str) -> None:
    """A server that was given a certificate and would not use it does not start."""
    with pytest.raises(ValueError, match=words):
        RelayServer(0, 0, **options)  # type: ignore[arg-type]


def test_ending_while_bulk_data_comes_in(certificates: Certificates) -> None:
    """What `end` decrypts for the receiver counts as data: the peer's next half record is no flood."""
    data = random.Random(7).randbytes(1 << 20)
    contexts = [tls_context(), tls_context(True)]
    contexts[1].load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))
    near, far = socket.socketpair()
    with near, far:
        sender = TLSStream(near, "sender", contexts[0])
        receiver = TLSStream(far, "receiver", contexts[1], server_side=True)

        def send() -> None:
            sender.handshake(Deadline(PATIENCE))
            sender.send(data)
            sender.end()

        thread = threading.Thread(target=send)
        thread.start()
        receiver.handshake(Deadline(PATIENCE))
        got, view = bytearray(), memoryview(bytearray(1 << 18))
        while len(receiver._raw) < 1 << 18:  # bulk traffic: it takes more at once
            got += view[: receiver.recv_into(view)]
        count = receiver.sock.recv_into(receiver._raw)
        with receiver._tls_lock:
            receiver._feed(count)  # more than the receiving thread has room for,
        receiver.end()  # and before it asks for the rest the sending thread ends its direction
        while count := receiver.recv_into(view):
            got += view[:count]
        thread.join(PATIENCE)
    assert got == data


@pytest.mark.skipif(
    not has_interpreter_lock(),
    reason="free-threaded Pythons leave to the collector what threads have shared, rings or not",
)
def test_broken_connections_leave_no_rings(bench: Bench, certificates: Certificates) -> None:
    """Whatever ends a TLS connection, it is freed at once, and not when Python's collector happens to run: what
    OpenSSL has allocated for it weighs much more than the collector knows."""
    path = certificates.path
    server = bench.server(tls="both", cert=path("server.pem"), key=path("server.key"), token="t")
    context = tls_context(True, path("server.pem"), path("server.key"))

    def serve(sock: socket.socket) -> None:
        with TLSEnd(sock, context, True) as end:
            word = end.recv(1)
            if word == b"r":
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif word == b"d":
                until_broken(sock)

    trust = {"ca_file": path("ca.pem"), "service_ca_file": path("ca.pem")}
    bench.client(server, bench.service(serve).port, tls="both", token="t", **trust)
    trusting = tls_context()

    def leave(address: tuple[str, int], way: str) -> None:
        sock = connect(address)
        with sock:
            if way != "no handshake":
                end = TLSEnd(sock, trusting, False)
                end.sendall({"reset by the service": b"r", "damaged": b"d"}.get(way, b"x"))
                if way == "reset by the service":
                    with pytest.raises(OSError):
                        end.recv(1)
            if way == "damaged":
                sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
                until_broken(sock)
            if way == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for way in ("reset by the service", "reset", "cut off", "damaged", "no handshake"):
            leave(server.service_addresses["default"], way)
        leave(server.relay_address, "cut off")
        leave(server.relay_address, "no handshake")
        bench.server_events.wait(LinkRefused, 2)
        wait_until(lambda: server.counters["broken"] + server.counters["failed"] == 5)
        wait_until(lambda: len(server.runtime.threads._parked) == len(server.runtime.threads))
        gc.collect()
        kept = [repr(thing) for thing in gc.garbage if isinstance(thing, TLSStream)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert kept == []
