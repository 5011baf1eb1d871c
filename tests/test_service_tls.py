"""TLS with service clients and with services: which certificate is shown to whom, and what both sides agree to speak.

With real peers: openssl, curl and nginx with HTTP/2, and gRPC's own client and server.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.certificates import Offers, ask_for_certificate
from _tcprelay.client.offers import choose_offer
from _tcprelay.command_line import parse_options
from _tcprelay.hello import LONGEST_HELLO, Faces, Hello, HelloReader, parse_hello
from _tcprelay.openssl import host_names
from _tcprelay.runtime import Credentials, Runtime
from _tcprelay.server.faces import pair_files
from tcprelay import ClientOptions, ConnectionFailed, RelayClient, RelayServer, ServerOptions

from .certificates import Certificates, tls_context
from .conftest import Bench, no_peer, read_all, stock_of
from .peers import HOST, ROOT, Peers, curl, find, run

BOTH = "h2,http/1.1"
VERSIONS = pytest.mark.parametrize("version", ["1.2", "1.3"])


@pytest.fixture(scope="module")
def certs(certificates: Certificates) -> Certificates:
    """More certificates: for several names, for a wildcard, for no name."""
    made = {
        "first": "DNS:first.example",
        "second": "DNS:second.example,DNS:also.example,IP:127.0.0.1",
        "wild": "DNS:*.wild.example",
        "exact": "DNS:www.wild.example",
        "nameless": "",
    }
    for name, san in made.items():
        certificates.make(name, "ca", san)
    whole = Path(certificates.path("second.key")).read_text() + Path(certificates.path("second.pem")).read_text()
    Path(certificates.path("second-whole.pem")).write_text(whole)
    return certificates


def pair(certs: Certificates, name: str) -> tuple[str, str]:
    return certs.path(f"{name}.pem"), certs.path(f"{name}.key")


def given(certs: Certificates, *names: str) -> list[str]:
    """The options of a relay server for these certificates on its service port."""
    words = ["--tls", "service"]
    for name in names:
        cert, key = pair(certs, name)
        words += ["--service-cert", cert, "--service-key", key]
    return words


# --- What a client asks for -----------------------------------------------------------------------------------


def hello_of(name: str | None, protocols: list[str]) -> bytes:
    """The first message of Python's own client."""
    context = tls_context()
    if protocols:
        context.set_alpn_protocols(protocols)
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def read_pieces(data: bytes, size: int) -> tuple[Hello | None, int]:
    """What is read of a message that comes in pieces, and how many bytes that took."""
    reader = HelloReader()
    for place in range(0, len(data), size):
        if (hello := reader.feed(data[place : place + size])) is not None:
            return hello, place + size
    return None, len(data)


@pytest.mark.parametrize("size", [1, 7, 1 << 14])
@pytest.mark.parametrize(
    ("name", "protocols"),
    [(None, []), ("www.example.net", []), (None, ["h2"]), ("WWW.Example.net", ["h2", "http/1.1", "x" * 255])],
)
def test_what_a_client_asks_for(name: str | None, protocols: list[str], size: int) -> None:
    """In whatever pieces it comes, and also where each byte has a record of its own."""
    data, expected = hello_of(name, protocols), Hello((name or "").lower(), tuple(protocols))
    assert read_pieces(data, size)[0] == expected
    assert read_pieces(data, size)[1] >= len(data)  # and not before all of it is there
    split = b"".join(data[:3] + b"\0\1" + bytes([byte]) for byte in data[5:])
    assert read_pieces(split, size)[0] == expected


def test_a_dot_at_the_end_and_bytes_that_are_no_ascii() -> None:
    data = hello_of("www.example.net", ["h2"])
    assert read_pieces(data.replace(b"example.net", b"example.ne."), 99)[0] == Hello("www.example.ne", ("h2",))
    assert read_pieces(data.replace(b"example.net", b"ex\xffmple.net"), 99)[0] == Hello()


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"\x15\x03\x01\x00\x02\x02\x28", b"\x16\x03\x01\x00\x00"])
def test_what_is_no_hello_asks_for_nothing(start: bytes) -> None:
    """It is told at the first byte, or at the end of the record: OpenSSL says what is wrong with it."""
    assert read_pieces(start, 1)[0] == Hello()


def test_a_hello_that_is_cut_or_changed_anywhere() -> None:
    """Nothing is raised, whatever stands there."""
    data = hello_of("www.example.net", ["h2", "http/1.1"])
    for place in range(len(data)):
        assert read_pieces(data[:place], 1 << 14)[0] is None
        for value in (0, 1, 0x7F, 0xFF):
            read_pieces(data[:place] + bytes([value]) + data[place + 1 :], 1 << 14)
        parse_hello(data[9 : 9 + place])


def test_a_hello_without_end() -> None:
    """It is given up at some length, and asks for nothing."""
    record = b"\x16\x03\x01\x10\x00" + b"\1\xff\xff\xff" + bytes(4092)
    hello, count = read_pieces(record + (b"\x16\x03\x01\x10\x00" + bytes(4096)) * 9, 1000)
    assert hello == Hello()
    assert LONGEST_HELLO < count < LONGEST_HELLO + 2000


# --- Names ----------------------------------------------------------------------------------------------------


def test_the_names_in_a_certificate(certs: Certificates) -> None:
    """Host names alone, of one that has expired, too, and where the extension is critical."""
    certs.make("critical", "ca", "critical,DNS:critical.example,email:x@example.net,DNS:*.two.example")
    expected = {
        "first": ["first.example"],
        "second": ["second.example", "also.example"],
        "wild": ["*.wild.example"],
        "nameless": [],
        "expired": ["localhost"],
        "rsa": ["localhost"],
        "critical": ["critical.example", "*.two.example"],
    }
    for name, names in expected.items():
        assert host_names(ask_for_certificate(tls_context(True, *pair(certs, name)))) == names


CHOICES = [
    ("first.example", "first"),
    ("second.example", "second"),
    ("SECOND.Example", "second"),
    ("also.example", "second"),
    ("any.wild.example", "wild"),
    ("ANY.Wild.Example", "wild"),
    ("www.wild.example", "exact"),
    ("wild.example", "first"),
    ("two.labels.wild.example", "first"),
    ("unknown.example", "first"),
    ("", "first"),
]


@pytest.mark.parametrize(("name", "chosen"), CHOICES)
def test_which_certificate_is_for_a_name(name: str, chosen: str) -> None:
    """One label for ``*``, and a name that stands there before one with ``*``; else the first one."""
    contexts = {one: tls_context(True) for one in ("first", "second", "wild", "exact", "late")}
    names = {
        "first": ["First.example"], "second": ["second.example", "also.example"], "wild": ["*.wild.example"],
        "exact": ["www.wild.example"], "late": ["second.example", "*.wild.example"],
    }  # fmt: skip
    faces = Faces((contexts[one], names[one]) for one in contexts)
    assert faces.choose(Hello(name.lower())) is contexts[chosen]


def s_client(port: int, *words: str) -> subprocess.CompletedProcess[bytes]:
    return run(find("openssl"), "s_client", "-connect", f"{HOST}:{port}", *words)


def subject(done: subprocess.CompletedProcess[bytes]) -> str:
    found = re.search(rb"subject=\s*CN ?= ?(\S+)", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1].decode()


@pytest.mark.peer("openssl")
@VERSIONS
def test_openssl_sees_the_certificate_that_it_asks_for(
    peers: Peers, certs: Certificates, workers: str, version: str
) -> None:
    """It is verified by the name; certificates whose key is in their own file stand among those with one."""
    words = given(certs, "first", "wild", "exact")
    server = peers.server(*words, "--service-cert", certs.path("second-whole.pem"))
    peers.client(server.relay_port, peers.service(read_all).port)
    tls = f"-tls{version.replace('.', '_')}"
    for name, chosen in CHOICES:
        done = s_client(server.service_port, tls, *(("-servername", name) if name else ("-noservername",)))
        assert subject(done) == chosen, name
    verified = "-verify_return_error", "-CAfile", certs.path("ca.pem"), "-verify_hostname", "any.wild.example"
    done = s_client(server.service_port, tls, "-servername", "any.wild.example", *verified)
    assert (done.returncode, b"Verify return code: 0 (ok)" in done.stdout) == (0, True)


@pytest.mark.parametrize("name", ["first.example", "second.example"])
def test_pfx_files(bench: Bench, certs: Certificates, name: str) -> None:
    """They may be repeated as well."""
    files = [certs.make_pfx(f"{one}-face", one, "phrase") for one in ("first", "second")]
    server = bench.server(tls="service", service_pfx=files, passphrase="phrase")
    bench.client(server, bench.service().port)
    context = tls_context(ca=certs.path("ca.pem"))
    context.check_hostname = True
    with context.wrap_socket(bench.connect(server), server_hostname=name) as sock:
        assert sock.getpeercert()["subject"] == ((("commonName", name.partition(".")[0]),),)  # type: ignore[index]


@VERSIONS
def test_a_session_is_for_its_name_alone(bench: Bench, certs: Certificates, version: str) -> None:
    """A ticket that came with one certificate is good where that is shown, and nowhere else."""
    pairs = [pair(certs, name) for name in ("first", "second")]
    server = bench.server(
        tls="service", service_cert=[cert for cert, _ in pairs], service_key=[key for _, key in pairs]
    )
    bench.client(server, bench.service().port)
    context = tls_context()
    wanted = ssl.TLSVersion.TLSv1_3 if version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.minimum_version = context.maximum_version = wanted

    def visit(name: str, session: Any = None) -> tuple[bytes, bool, Any]:
        with context.wrap_socket(bench.connect(server), server_hostname=name, session=session) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"  # behind it the ticket of TLS 1.3 is here
            return sock.getpeercert(True) or b"", bool(sock.session_reused), sock.session

    first, _, session = visit("first.example")
    assert session is not None
    assert visit("first.example", session)[:2] == (first, True)
    second, reused, own = visit("second.example", session)
    assert (host_names(second)[0], reused) == ("second.example", False)
    assert visit("second.example", own)[:2] == (second, True)


# --- Files ----------------------------------------------------------------------------------------------------


def test_which_key_is_for_which_certificate(certs: Certificates) -> None:
    first, second, wild = (certs.path(f"{name}.pem") for name in ("first", "second", "wild"))
    whole = certs.path("second-whole.pem")
    assert pair_files([first, wild], []) == [(first, ""), (wild, "")]
    assert pair_files([first, wild], ["a", "b"]) == [(first, "a"), (wild, "b")]
    assert pair_files([first, whole, wild], ["a", "b"]) == [(first, "a"), (whole, ""), (wild, "b")]
    with pytest.raises(ValueError, match=rf"--service-cert 3 have no key in them \({re.escape(first)}, "):
        pair_files([first, second, whole, wild], ["a", "b"])
    with pytest.raises(FileNotFoundError):
        pair_files([first, "/nowhere"], ["a"])


def test_mistakes_in_certificates(certs: Certificates) -> None:
    """Each names the file."""
    first, nameless = pair(certs, "first"), pair(certs, "nameless")
    with pytest.raises(ValueError, match=re.escape(f"{nameless[0]} has no host name in it (subjectAltName)")):
        RelayServer(0, 0, tls="service", service_cert=[first[0], nameless[0]], service_key=[first[1], nameless[1]])
    RelayServer(0, 0, tls="service", service_cert=[nameless[0], first[0]], service_key=[nameless[1], first[1]])
    with pytest.raises(ValueError, match="--service-key names 2 files, and --service-cert 1"):
        RelayServer(0, 0, tls="service", service_cert=first[0], service_key=[first[1], first[1]])
    with pytest.raises(ValueError, match=re.escape(f"{certs.path('second.pem')} holds a certificate without")):
        RelayServer(0, 0, tls="service", service_cert=[certs.path("second-whole.pem"), certs.path("second.pem")])


class Archive:
    """Certificates as certbot keeps them: ``live`` has symbolic links to the newest ones in ``archive``."""

    def __init__(self, live: Path, certs: Certificates) -> None:
        self.live, self._archive, self._certs, self._number = live, live.parent / "archive", certs, 0
        self.live.mkdir()
        self._archive.mkdir()
        self.files = str(self.live / "fullchain.pem"), str(self.live / "privkey.pem")

    def renew(self, cert: str, key: str) -> None:
        """Have the links lead to copies of these."""
        self._number += 1
        for link, name in zip(self.files, (cert, key), strict=True):
            kept = self._archive / f"{Path(link).stem}{self._number}.pem"
            shutil.copy(self._certs.path(name), kept)
            new = self.live / "new"
            new.symlink_to(kept)
            new.rename(link)


def test_a_certificate_is_renewed_by_its_link(peers: Peers, certs: Certificates, tmp_path: Path, workers: str) -> None:
    """SIGHUP has all processes follow it anew, and says so; a broken file leaves all as it was, and is named."""
    archive = Archive(tmp_path / "live", certs)
    archive.renew("second.pem", "second.key")
    server = peers.server(
        *given(certs, "first"), "--service-cert", archive.files[0], "--service-key", archive.files[1]
    )  # fmt: skip
    peers.client(server.relay_port, peers.service(read_all).port)

    def shown() -> set[str]:
        names = "second.example", "www.wild.example", ""
        words = [("-servername", name) if name else ("-noservername",) for name in names]
        return {subject(s_client(server.service_port, *one)) for one in words for _ in range(2)}

    assert shown() == {"first", "second"}
    archive.renew("exact.pem", "exact.key")
    assert shown() == {"first", "second"}
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded; changed: certificates of the service ports")
    assert shown() == {"first", "exact"}
    archive.renew("first.csr", "exact.key")
    server.expected_error = "cannot reload"
    server.signal(signal.SIGHUP)
    server.wait_message(f"cannot reload, all stays as it was: {archive.files[0]} holds a certificate request (CSR)")
    assert shown() == {"first", "exact"}


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can look into."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.mark.parametrize("hidden", ["key", "directory"])
def test_what_root_alone_may_read(certs: Certificates, open_directory: Path, hidden: str) -> None:
    """Another user is told which file it is, and what to do; of certbot's directory as of a key."""
    if os.geteuid():
        pytest.skip("root alone can be somebody else")
    live = open_directory / "live"
    live.mkdir(mode=0o700 if hidden == "directory" else 0o755)
    for name, kept, mode in (("first.pem", "fullchain.pem", 0o644), ("first.key", "privkey.pem", 0o600)):
        shutil.copy(certs.path(name), live / kept)
        (live / kept).chmod(mode)
    cert, key = str(live / "fullchain.pem"), str(live / "privkey.pem")
    RelayServer(0, 0, tls="service", service_cert=cert, service_key=key)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            RelayServer(0, 0, tls="service", service_cert=cert, service_key=key)
    finally:
        os.seteuid(0)
    assert caught.value.filename == (key if hidden == "key" else cert)
    assert "deploy hook" in str(caught.value)
    assert "LoadCredential=" in str(caught.value)


@pytest.mark.peer("openssl")
def test_the_deploy_hook_of_the_guide(peers: Peers, certs: Certificates, tmp_path: Path) -> None:
    """certbot runs it with the directory of what it has renewed; the relay server shows that, once it is reloaded."""
    page = (ROOT / "docs/guide.md").read_text()
    hook = next(text for text in re.findall(r"```sh not-run\n(.*?)```", page, re.DOTALL) if "RENEWED_LINEAGE" in text)
    kept, programs, script = tmp_path / "kept", tmp_path / "programs", tmp_path / "hook"
    kept.mkdir()
    programs.mkdir()
    script.write_text(hook.replace("/var/lib/tcprelay", str(kept)))
    archive = Archive(tmp_path / "relay.example.net", certs)

    def renew(name: str, reload: str) -> None:
        """Have certbot's files be these, and run the hook, which is to reload the server by this command."""
        archive.renew(f"{name}.pem", f"{name}.key")
        (programs / "systemctl").write_text(f'#!/bin/sh\n[ "$*" = "try-reload-or-restart tcprelays" ] && {reload}\n')
        (programs / "systemctl").chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "RENEWED_LINEAGE": str(archive.live)}
        subprocess.run(["sh", str(script)], check=True, env=environment, timeout=60)

    renew("first", "true")
    copy = kept / "relay.example.net.pem"
    assert (copy.stat().st_mode & 0o777, copy.stat().st_uid) == (0o600, kept.stat().st_uid)
    server = peers.server("--tls", "service", "--service-cert", str(copy))
    peers.client(server.relay_port, peers.service(read_all).port)
    assert subject(s_client(server.service_port)) == "first"
    renew("second", f"kill -HUP {server.process.pid}")
    server.wait_message("the configuration is reloaded; changed: certificates of the service ports")
    assert subject(s_client(server.service_port)) == "second"
    assert [path.name for path in kept.iterdir()] == [copy.name]


# --- Protocols on service ports -------------------------------------------------------------------------------


@pytest.mark.peer("openssl")
@VERSIONS
def test_openssl_agrees_on_a_protocol(peers: Peers, certs: Certificates, workers: str, version: str) -> None:
    """The server's order counts; who says nothing of protocols is served without; who has none in common is refused
    with no_application_protocol (RFC 7301, 3.2), whichever certificate it asks for, and the log says why."""
    server = peers.server(*given(certs, "first", "second"), "--service-alpn", BOTH)
    peers.client(server.relay_port, peers.service(read_all).port)
    tls = f"-tls{version.replace('.', '_')}"
    for offered, agreed in (("http/1.1,h2", "h2"), ("http/1.1", "http/1.1"), ("x,http/1.1", "http/1.1"), ("", "")):
        for name in ("first", "second"):
            alpn = ("-alpn", offered) if offered else ()
            done = s_client(server.service_port, tls, "-servername", f"{name}.example", *alpn)
            said = f"ALPN protocol: {agreed}" if agreed else "No ALPN negotiated"
            assert said in done.stdout.decode(), (offered, name)
            assert subject(done) == name
    for name in ("first", "second"):
        done = s_client(server.service_port, tls, "-servername", f"{name}.example", "-alpn", "spdy/1,x")
        assert done.returncode != 0
        assert b"alert no application protocol" in done.stderr + done.stdout
    failed = server.wait_event("ConnectionFailed")
    assert failed["reason"] == "no TLS handshake: it would speak spdy/1, x, and --service-alpn has h2, http/1.1"
    assert failed["code"] == "tls"


@pytest.mark.peer("openssl")
def test_each_service_has_its_own_protocols(peers: Peers, certs: Certificates) -> None:
    """And a port that is given out those of all services."""
    words = "--service", "web=0", "--client-ports", "20000-32000", "--service-alpn", "other,web=h2,web=http/1.1"
    server = peers.server(*given(certs, "first"), *words)
    port = peers.service(read_all).port
    client = peers.client(
        server.relay_port, port, "--publish", f"web={HOST}:{port}", "--publish", f"web2={HOST}:{port}@0"
    )
    asked = int(client.wait_event("Published", service="web2")["address"].rpartition(":")[2])
    for place, agreed in ((server.service_port, "other"), (server.port_of("web"), "h2"), (asked, "other")):
        done = s_client(place, "-alpn", "http/1.1,h2,other")
        assert f"ALPN protocol: {agreed}" in done.stdout.decode()


def test_what_strangers_ask_for(bench: Bench, certs: Certificates, capfd: pytest.CaptureFixture[str]) -> None:
    """A name that is no ASCII gets the first certificate, and nothing is written to standard error."""
    pairs = [pair(certs, name) for name in ("first", "second")]
    server = bench.server(
        tls="service", service_cert=[cert for cert, _ in pairs], service_key=[key for _, key in pairs]
    )
    bench.client(server, bench.service().port)
    sock = bench.connect(server)
    sock.sendall(hello_of("second.example", []).replace(b"second.", b"secon\xff."))
    assert sock.recv(1) == b"\x16"  # ServerHello
    sock.close()
    with bench.connect(server) as silent:
        silent.sendall(hello_of("second.example", [])[:50])
    for bad in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x04\x02\0\0\0"):
        with bench.connect(server) as sock:
            sock.sendall(bad)
            with pytest.raises((ConnectionResetError, AssertionError)):
                assert not read_all(sock)
    reasons = [event.reason for event in bench.server_events.wait(ConnectionFailed, 4)]
    assert any("does not speak TLS" in reason for reason in reasons)
    assert any("closed during the TLS handshake" in reason for reason in reasons)
    assert capfd.readouterr().err == ""


# --- From one end to the other --------------------------------------------------------------------------------


def ask_nginx(certs: Certificates, port: int, *words: str) -> subprocess.CompletedProcess[bytes]:
    """What curl speaks, and what nginx has been spoken to in."""
    trust = "--cacert", certs.path("ca.pem"), "--resolve", f"localhost:{port}:{HOST}"
    return run(*curl(*trust, "--write-out", "\n%{http_version}", *words, f"https://localhost:{port}/protocol"))


@pytest.fixture
def http2() -> None:
    """curl can speak HTTP/2."""
    if b"HTTP2" not in run(find("curl"), "--version").stdout:
        no_peer("curl speaks no HTTP/2 here")


@pytest.mark.peer("curl", "nginx")
@pytest.mark.usefixtures("http2")
def test_curl_and_nginx_speak_the_same(peers: Peers, files: Path, certs: Certificates, workers: str) -> None:
    """TLS ends at both relays, and what curl has agreed on with the one the other offers to nginx: HTTP/2, HTTP/1.1, or
    nothing, which is HTTP/1.1."""
    nginx = peers.nginx(files, *pair(certs, "server"), http2=True)
    cert, key = pair(certs, "server")
    server = peers.server("--tls", "service", "--cert", cert, "--key", key, "--service-alpn", BOTH)
    peers.client(server.relay_port, nginx, "--tls", "service", "--service-ca-file", certs.path("ca.pem"))
    for words, spoken in (
        ((), (b"HTTP/2.0", b"2")), (("--http1.1",), (b"HTTP/1.1", b"1.1")), (("--no-alpn",), (b"HTTP/1.1", b"1.1")),
    ):  # fmt: skip
        done = ask_nginx(certs, server.service_port, *words)
        assert tuple(done.stdout.splitlines()) == spoken, done.stderr


@pytest.mark.peer("curl", "nginx")
@pytest.mark.usefixtures("http2")
def test_curl_speaks_http2_to_a_plain_nginx(peers: Peers, files: Path, certs: Certificates) -> None:
    """TLS ends at the relay server, whose port agrees on what that service speaks."""
    nginx = peers.nginx(files, http2=True)
    cert, key = pair(certs, "server")
    server = peers.server("--tls", "service", "--cert", cert, "--key", key, "--service-alpn", "h2")
    peers.client(server.relay_port, nginx)
    assert ask_nginx(certs, server.service_port).stdout == b"HTTP/2.0\n2"
    assert ask_nginx(certs, server.service_port, "--http1.1").returncode == 35  # what curl has for no handshake


def secure_service(certs: Certificates, protocols: list[str], name: str = "server") -> Callable[[socket.socket], None]:
    """What says which name and which protocol it has been asked for, over TLS, and ends."""
    context, asked = tls_context(True, *pair(certs, name)), dict[int, str | None]()
    if protocols:
        context.set_alpn_protocols(protocols)

    def note(sock: Any, name: str | None, context: Any) -> None:
        asked[id(sock)] = name

    context.sni_callback = note

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            secure.sendall(f"{asked.pop(id(secure))} {secure.selected_alpn_protocol()}".encode())
            secure.unwrap()

    return serve


def ask(bench: Bench, server: RelayServer, offered: list[str], service: str = "default") -> str:
    """What the service says to a client that offers these protocols."""
    context = tls_context()
    if offered:
        context.set_alpn_protocols(offered)
    with context.wrap_socket(bench.connect(server, service), suppress_ragged_eofs=False) as sock:
        return read_all(sock).decode()


class Ends:
    """Relays with TLS to a service, whose certificate is verified, and (unless it is `plain`) to service clients."""

    def __init__(self, bench: Bench, certs: Certificates) -> None:
        self.bench, self._certs = bench, certs
        cert, key = pair(certs, "server")
        self._server = {"tls": "service", "cert": cert, "key": key}
        self._client = {"tls": "service", "service_ca_file": certs.path("ca.pem")}

    def relay(
        self, spoken: list[str], server: list[str], client: list[str], plain: bool = False, name: str = "server",
        **options: Any,
    ) -> RelayServer:  # fmt: skip
        """One whose service speaks these protocols, with the ``service_alpn`` of both sides."""
        port = self.bench.service(secure_service(self._certs, spoken, name)).port
        relay = self.bench.server(**({} if plain else {**self._server, "service_alpn": server}))
        self.bench.client(relay, port, **self._client, service_alpn=client, **options)
        return relay


@pytest.fixture
def ends(bench: Bench, certs: Certificates) -> Ends:
    return Ends(bench, certs)


H2, H1 = "h2", "http/1.1"


@pytest.mark.parametrize(
    ("spoken", "server", "client", "offered", "spoken_to"),
    [
        ([H2, H1], [H2, H1], [], [H1, H2], H2),
        ([H2, H1], [H2, H1], [], [H1], H1),
        ([H2, H1], [H2, H1], [H2, H1], [H1], H1),
        ([H2, H1], [H2, H1], [H2, H1], [], None),
        ([H2, H1], [], [H2, H1], [H2], None),  # an old relay server, too, says nothing of protocols
        ([], [H2, H1], [], [H1], None),
        (["mqtt"], [], ["mqtt"], [], "mqtt"),
        (["mqtt"], ["mqtt"], ["mqtt"], [], "mqtt"),
        (["x"], ["x"], [], ["y", "x"], "x"),
    ],
)
def test_what_is_agreed_on_is_what_is_offered(
    ends: Ends, spoken: list[str], server: list[str], client: list[str], offered: list[str], spoken_to: str | None
) -> None:
    """The service is offered that, and nothing else; nothing, where that is so and the service speaks several."""
    relay = ends.relay(spoken, server, client)
    assert ask(ends.bench, relay, offered) == f"None {spoken_to}"


@pytest.mark.parametrize(
    ("spoken", "client", "reason"),
    [
        ([], [], "the service does not speak h2: leave that out of --service-alpn, here and on the relay server"),
        ([H1], [], "the service does not speak h2: leave that out of --service-alpn, here and on the relay server"),
        (
            [H2, H1],
            [H1, "x"],
            "its client and the relay server have agreed on h2, and --service-alpn has http/1.1, x here",
        ),
    ],
)
def test_what_one_end_cannot_speak_is_told(ends: Ends, spoken: list[str], client: list[str], reason: str) -> None:
    """Instead of two ends that speak different protocols: the service client is reset, and both logs say why."""
    relay = ends.relay(spoken, [H2, H1], client)
    with pytest.raises(OSError):
        assert ask(ends.bench, relay, [H2]) == "nothing"
    for events in (ends.bench.server_events, ends.bench.client_events):
        assert reason in events.wait(ConnectionFailed)[0].reason
    if H1 in spoken:
        assert ask(ends.bench, relay, [H1]) == "None http/1.1"


@pytest.mark.parametrize(("client", "spoken_to"), [([H2], H2), ([H2, H1], None), ([], None)])
def test_a_plain_service_port(ends: Ends, client: list[str], spoken_to: str | None) -> None:
    """The service is offered the one protocol that is named here; of several its client could not know which."""
    relay = ends.relay([H2, H1], [], client, plain=True)
    assert read_all(ends.bench.connect(relay)).decode() == f"None {spoken_to}"


@pytest.mark.peer("curl", "nginx")
@pytest.mark.usefixtures("http2")
def test_nginx_without_http2(peers: Peers, files: Path, certs: Certificates) -> None:
    """It refuses the handshake by an alert, and the log says what to do."""
    cert, key = pair(certs, "server")
    server = peers.server("--tls", "service", "--cert", cert, "--key", key, "--service-alpn", BOTH)
    client = peers.client(server.relay_port, peers.nginx(files, cert, key), "--tls", "service",
                          "--service-ca-file", certs.path("ca.pem"))  # fmt: skip
    assert ask_nginx(certs, server.service_port).returncode != 0
    assert "the service does not speak h2" in client.wait_event("ConnectionFailed")["reason"]
    assert ask_nginx(certs, server.service_port, "--http1.1").stdout == b"HTTP/1.1\n1.1"


@pytest.mark.parametrize("agreed", ["a b", "a,b", "x" * 256, "\xff"])
def test_a_relay_server_that_names_what_is_no_protocol(agreed: str) -> None:
    options = ClientOptions(relay_host="r", relay_port=1, port=1, tls="service", service_insecure=True)
    runtime = Runtime("tcprelay.client", options, 1)
    runtime.credentials = Credentials(services=Offers(tls_context))
    service: Any = stock_of(RelayClient(port=1, relay_host="r", relay_port=1)).services[0]
    with pytest.raises(ConnectionError, match="a protocol as ALPN calls it"):
        choose_offer(runtime, service, agreed)


def test_contexts_are_kept_up_to_a_number() -> None:
    """Whatever a relay server names, there are not more of them."""
    made = list[ssl.SSLContext]()

    def make() -> ssl.SSLContext:
        made.append(tls_context())
        return made[-1]

    offers = Offers(make)
    assert offers.of("") is made[0]
    assert offers.of("h2") is offers.of("h2") is made[1]
    for number in range(2 * offers.MOST):
        offers.of(f"x{number}")
    assert offers.of("h2") is made[1]
    count = len(made)
    assert offers.of(f"x{2 * offers.MOST - 1}") is not made[-2]
    assert len(made) == count + 1


# --- The name in a service's certificate ----------------------------------------------------------------------


def test_a_service_whose_certificate_has_another_name(ends: Ends) -> None:
    """It is asked for that name, and has to have it in its certificate; each service may have its own."""
    name = {"service_server_name": "elsewhere.example"}
    relay = ends.relay([], [], [], plain=True, name="elsewhere")
    with pytest.raises(ConnectionResetError):
        ends.bench.connect(relay).recv(1)
    reason = ends.bench.client_events.wait(ConnectionFailed)[0].reason
    assert reason.endswith("; give --service-server-name, with a name that stands in it")
    assert read_all(ends.bench.connect(ends.relay([], [], [], plain=True, name="elsewhere", **name))) == (
        b"elsewhere.example None"
    )
    own = ends.relay(
        [], [], [], plain=True, name="elsewhere", service_server_name=["x.example", "default=elsewhere.example"]
    )
    assert read_all(ends.bench.connect(own)) == b"elsewhere.example None"
    wrong = ends.relay([], [], [], plain=True, service_server_name="elsewhere.example")
    with pytest.raises(ConnectionResetError):
        ends.bench.connect(wrong).recv(1)


def test_a_service_at_a_unix_socket(peers: Peers, certs: Certificates, open_directory: Path) -> None:
    """It has no host name: one has to be given."""
    path = str(open_directory / "service")
    peers.service(secure_service(certs, []), path)
    server = peers.server()
    words = "--relay-host", HOST, "--relay-port", str(server.relay_port), "--host", f"unix:{path}"
    trust = "--tls", "service", "--service-ca-file", certs.path("ca.pem")
    client = peers.relay_process("client", *words, *trust)
    client.wait_event("Published")
    with pytest.raises(ConnectionResetError):
        peers.connect(server.service_port).recv(1)
    assert "give --service-server-name" in client.wait_event("ConnectionFailed")["reason"]
    client.signal(signal.SIGTERM)
    server.wait_event("ClientDown")
    client = peers.relay_process("client", *words, *trust, "--service-server-name", "localhost")
    client.wait_event("Published")
    assert read_all(peers.connect(server.service_port)) == b"localhost None"


# --- gRPC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["at the server", "to the service", "both"])
def test_grpc(peers: Peers, certs: Certificates, workers: str, where: str) -> None:
    """Its own client calls its own server, once and with a stream both ways; TLS ends at the relay server, at the
    relay client, or at both."""
    if importlib.util.find_spec("grpc") is None:
        no_peer("grpcio is not installed in this environment")
    script, (cert, key) = str(ROOT / "tests/aids/grpc_end.py"), pair(certs, "server")
    secure = [cert, key] if where != "at the server" else []
    service = peers.program(sys.executable, script, "serve", *secure, stdin=subprocess.PIPE)
    port = int(service.wait_for(lambda line: line))
    on_port = ["--tls", "service", "--cert", cert, "--key", key, "--service-alpn", "h2"]
    to_service = ["--tls", "service", "--service-ca-file", certs.path("ca.pem"), "--service-alpn", "h2"]
    server = peers.server(*(on_port if where != "to the service" else []))
    client = peers.client(server.relay_port, port, *(to_service if secure else []))
    trust = [certs.path("ca.pem"), "localhost"] if where != "to the service" else []
    done = run(sys.executable, script, "ask", f"{HOST}:{server.service_port}", *trust)
    assert (done.returncode, done.stdout) == (0, b"stink\n50 True\n"), done.stderr
    for relay in (server, client):
        assert relay.wait_event("ConnectionClosed")["bytes_in"] > 1_000_000
    assert service.process.stdin
    service.process.stdin.close()
    assert service.wait() == 0


# --- Options --------------------------------------------------------------------------------------------------

SERVER = ["--relay-port", "1", "--service-port", "2", "--service", "web=3", "--tls", "service"]


def protocols(options: Any) -> list[str]:
    return [str(one) for one in options.service_alpn]


@pytest.mark.parametrize("source", ["command line", "environment", "file", "lines of a file"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("h2,http/1.1", ["h2", "http/1.1"]), ("x, web=h2, web=http/1.1", ["x", "web=h2", "web=http/1.1"])],
)
def test_the_spelling_of_protocols(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, text: str, expected: list[str]
) -> None:
    """The same from everywhere, commas and all."""
    words, file = list(SERVER), tmp_path / "server.conf"
    if source == "command line":
        words += ["--service-alpn", text]
    elif source == "environment":
        monkeypatch.setenv("TCPRELAY_SERVICE_ALPN", text)
    else:
        lines = text.split(",") if source == "lines of a file" else [text]
        file.write_text("".join(f"service-alpn = {line}\n" for line in lines))
        words += ["--config", str(file)]
    assert protocols(parse_options("test", "", ServerOptions, words).options) == expected


@pytest.mark.parametrize(
    ("role", "given", "said"),
    [
        (
            "server",
            {"service_alpn": ["web=h2", "http/1.1"]},
            "write the service before each, as in web=h2,web=http/1.1",
        ),
        ("server", {"service_alpn": ["wbe=h2"]}, "--service-alpn: no service is named wbe"),
        ("server", {"service_alpn": ["h2", "h2"]}, "--service-alpn h2 stands there twice"),
        ("server", {"service_alpn": ["h2,http/1.1"]}, "expected a protocol as ALPN calls it, as in h2 or http/1.1"),
        ("server", {"service_alpn": "h2", "tls": "relay"}, "--service-alpn is of no use without --tls both"),
        (
            "client",
            {"service_alpn": ["web=h2", "http/1.1"]},
            "write the service before each, as in web=h2,web=http/1.1",
        ),
        ("client", {"service_alpn": "h2", "tls": ""}, "--service-alpn is of no use without --tls both"),
        ("client", {"service_server_name": "x.example", "tls": "relay"}, "--service-server-name is of no use without"),
        ("client", {"service_server_name": ["a.example", "b.example"]}, "stands there twice for all services"),
        ("client", {"service_server_name": ["web=a.example", "web=b.example"]}, "stands there twice for web"),
        ("client", {"service_server_name": "wbe=a.example"}, "--service-server-name: no service is named wbe"),
        ("client", {"service_server_name": "web=https://x"}, "expected "),
    ],
)
def test_mistakes_in_options(role: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        if role == "server":
            ServerOptions(**{"relay_port": 1, "service": ["web=2"], "tls": "service", **given})
        else:
            ClientOptions(**{"relay_host": "r", "relay_port": 1, "publish": ["web=2"], "tls": "service", **given})


def test_protocols_change_by_a_reload(bench: Bench, certs: Certificates) -> None:
    """For those who connect from then on."""
    cert, key = pair(certs, "server")
    server = bench.server(tls="service", cert=cert, key=key)
    bench.client(server, bench.service(lambda sock: sock.sendall(b"x")).port)

    def agreed() -> str | None:
        context = tls_context()
        context.set_alpn_protocols(["http/1.1", "h2"])
        with context.wrap_socket(bench.connect(server)) as sock:
            assert sock.recv(1) == b"x"
            return sock.selected_alpn_protocol()

    assert agreed() is None
    assert server.reload(service_alpn=["h2"])
    assert agreed() == "h2"
    assert server.reload(service_alpn=["http/1.1"])
    assert agreed() == "http/1.1"


def test_names_in_certificates_have_any_case() -> None:
    contexts = [tls_context(True) for _ in range(3)]
    faces = Faces(zip(contexts, [["first.example"], ["Second.Example"], ["*.Wild.example"]], strict=True))
    assert faces.choose(Hello("second.example")) is contexts[1]
    assert faces.choose(Hello("any.wild.example")) is contexts[2]
