"""TLS between real programs: curl, nginx, openssl, ssh, stunnel and node-tcp-relay, over relays as processes."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.system import ignore_oserror

from .certificates import Certificates
from .conftest import PATIENCE, read_all, read_exactly, wait_until
from .peers import (
    HOST, LONG, Peers, Program, RelayProcess, curl, digest_file, digest_output, find, make_file, peak_memory, run,
)  # fmt: skip

MEBIBYTE = 1 << 20
pytestmark = pytest.mark.usefixtures("workers")

TLS = pytest.mark.parametrize("version", ["1.2", "1.3"])


@pytest.fixture
def trust(certificates: Certificates) -> Trust:
    return Trust(certificates)


class Trust:
    """The options that name certificates, for the relays and for others."""

    def __init__(self, certificates: Certificates) -> None:
        self.certificates = certificates
        path = certificates.path
        self.ca = path("ca.pem")
        self.pair = path("server.pem"), path("server.key")
        self.server = "--cert", self.pair[0], "--key", self.pair[1]
        self.client = "--ca-file", self.ca
        self.own = "--cert", path("client.pem"), "--key", path("client.key")

    def pfx(self, name: str) -> str:
        """A PFX file as OpenSSL 3 makes it, which Node.js can read; its passphrase is "phrase"."""
        path = self.certificates.directory / f"{name}-for-node.pfx"
        return str(path) if path.exists() else self.certificates.make_pfx(path.stem, name, "phrase")


def secure_url(port: int, path: str, trust: Trust) -> list[str]:
    """A curl command for https at a port of loopback, whose certificate it verifies."""
    return curl("--cacert", trust.ca, "--resolve", f"localhost:{port}:{HOST}", f"https://localhost:{port}/{path}")


def wait_events(relay: RelayProcess, kind: str, count: int) -> list[dict[str, Any]]:
    """All events of a kind, once there are so many."""
    wait_until(lambda: len(relay.events(kind)) >= count)
    return relay.events(kind)


def wait_line(program: Program, end: str) -> None:
    """Wait for a line that ends so."""
    program.wait_for(lambda line: line.endswith(end))


def wait_closed(*relays: RelayProcess, count: int = 1) -> None:
    """All connections are over, and none of them was broken off."""
    for relay in relays:
        reasons = [record["reason"] for record in wait_events(relay, "ConnectionClosed", count)]
        assert reasons == [""] * count


# --- HTTP -----------------------------------------------------------------------------------------------------


@pytest.mark.peer("curl", "nginx")
@pytest.mark.parametrize("service", ["plain", "tls"])
def test_curl_downloads_over_a_tls_service_port(peers: Peers, files: Path, trust: Trust, service: str) -> None:
    """A large file arrives whole from nginx, over TLS up to the server and, where it speaks it, up to nginx."""
    digest = make_file(files / "large", 64)
    nginx = peers.nginx(files, *(trust.pair if service == "tls" else ()))
    server = peers.server("--tls", "both", *trust.server)
    more = ("both", "--service-ca-file", trust.ca) if service == "tls" else ()
    client = peers.client(server.relay_port, nginx, *trust.client, "--tls", *more)
    assert digest_output(*secure_url(server.service_port, "large", trust)) == digest
    if service == "plain":  # nginx answers close_notify on a kept connection with FIN alone
        wait_closed(server, client)


@pytest.mark.peer("curl", "nginx")
def test_curl_uploads_over_tls_on_every_leg(peers: Peers, files: Path, trust: Trust) -> None:
    """A large PUT arrives whole, and its answer comes back."""
    digest = make_file(files / "large", 64)
    server = peers.server("--tls", "both", *trust.server)
    both = "--tls", "both", "--service-ca-file", trust.ca
    peers.client(server.relay_port, peers.nginx(files, *trust.pair), *trust.client, *both)
    words = "--upload-file", str(files / "large"), "--write-out", "%{http_code}"
    put = run(*secure_url(server.service_port, "uploaded", trust), *words)
    assert (put.returncode, put.stdout) == (0, b"201"), put.stderr
    assert digest_file(files / "uploaded") == digest
    assert server.wait_event("ConnectionClosed")["bytes_in"] > 64 * MEBIBYTE


@pytest.mark.peer("curl", "nginx")
def test_a_service_whose_certificate_is_not_accepted(peers: Peers, files: Path, trust: Trust) -> None:
    """curl gets an error instead of a page, and the client's log says why."""
    (files / "page").write_text("a page\n")
    path = trust.certificates.path
    server = peers.server("--tls", "both", *trust.server)
    both = "--tls", "both", "--service-ca-file", trust.ca
    nginx = peers.nginx(files, path("foreign.pem"), path("foreign.key"))
    client = peers.client(server.relay_port, nginx, *trust.client, *both)
    page = run(*secure_url(server.service_port, "page", trust))
    assert page.returncode != 0
    assert page.stdout == b""
    assert "the certificate is not accepted" in client.wait_event("ConnectionFailed")["reason"]


# --- openssl --------------------------------------------------------------------------------------------------


def s_client(port: int, trust: Trust, version: str, *more: str) -> list[str]:
    """openssl s_client, which verifies certificate and name."""
    verify = "-CAfile", trust.ca, "-verify_return_error", "-verify_hostname", "localhost"
    command = [find("openssl"), "s_client", "-connect", f"{HOST}:{port}", f"-tls{version.replace('.', '_')}"]
    return [*command, *verify, *more]


@pytest.mark.peer("openssl")
@TLS
def test_s_client_sends_and_receives(peers: Peers, files: Path, trust: Trust, version: str) -> None:
    """What it sends comes back unchanged, and the service's end is an end for it."""
    digest = make_file(files / "large", 4)

    def serve(sock: socket.socket) -> None:
        sock.sendall(read_exactly(sock, 4 * MEBIBYTE))

    server = peers.server("--tls", "both", *trust.server)
    client = peers.client(server.relay_port, peers.service(serve).port, "--tls", *trust.client)
    command = s_client(server.service_port, trust, version, "-quiet")
    assert digest_output(*command, stdin=files / "large") == digest
    wait_closed(server, client)


@pytest.mark.peer("openssl")
@TLS
def test_s_client_ends_its_direction(peers: Peers, files: Path, trust: Trust, version: str) -> None:
    """At the end of its input it sends close_notify: the service has got all, then an end, on no leg an error."""
    (files / "input").write_bytes(b"a line\n" * 1000)
    got: Future[bytes] = Future()

    def serve(sock: socket.socket) -> None:
        got.set_result(read_all(sock))

    server = peers.server("--tls", "both", *trust.server)
    client = peers.client(server.relay_port, peers.service(serve).port, "--tls", *trust.client)
    done = run(*s_client(server.service_port, trust, version), stdin=files / "input")
    assert done.returncode == 0, done.stderr
    assert got.result(PATIENCE) == b"a line\n" * 1000
    wait_closed(server, client)


@pytest.mark.peer("openssl", "curl")
@TLS
def test_s_server_as_the_service(peers: Peers, trust: Trust, version: str) -> None:
    """Its page, which ends with the connection, arrives as a whole and says which TLS the relay client speaks."""
    server = peers.server("--tls", "both", *trust.server)
    port = s_server(peers, trust, version, "-www")
    client = peers.client(
        server.relay_port, port, "--tls", "both", *trust.client, "--service-ca-file", trust.ca, "--num-conn", "1"
    )
    for _ in range(3):
        page = run(*secure_url(server.service_port, "", trust))
        assert page.returncode == 0, page.stderr
        assert f"Protocol  : TLSv{version}".encode() in page.stdout
        assert page.stdout.rstrip().endswith(b"</HTML>")
    wait_closed(server, client, count=3)


@pytest.mark.peer("openssl")
@TLS
def test_a_dialogue_of_s_client_with_s_server(peers: Peers, trust: Trust, version: str) -> None:
    """Line by line, over TLS on all three legs."""
    server = peers.server("--tls", "both", *trust.server)
    port = s_server(peers, trust, version, "-rev")
    client = peers.client(server.relay_port, port, "--tls", "both", *trust.client, "--service-ca-file", trust.ca)
    with keyboard() as (keys, stdin):
        command = s_client(server.service_port, trust, version, "-quiet", "-no_ign_eof")
        talking = peers.program(*command, stdin=stdin.fileno())
        stdin.close()
        for number in range(100):
            line = f"line {number:03}"
            keys.send(f"{line}\n".encode())
            wait_line(talking, line[::-1])
    assert talking.wait() == 0
    wait_closed(server, client)


@pytest.fixture
def lax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every Python take a cut for an end unless it is told otherwise, as Debian 12's does by itself."""
    (tmp_path / "sitecustomize.py").write_text("""
import ssl
real = ssl.SSLContext.__new__
def new(*words, **more):
    context = real(*words, **more)
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    return context
ssl.SSLContext.__new__ = new
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("lax")
@pytest.mark.peer("openssl")
@TLS
def test_an_s_server_that_is_killed_has_not_ended(peers: Peers, trust: Trust, version: str) -> None:
    """Its system ends the TCP connection in good order, without close_notify: what came arrives, then an error."""
    with keyboard() as (keys, stdin):
        service, port = start_s_server(peers, trust, version, stdin=stdin.fileno())
        server = peers.server()
        peers.client(server.relay_port, port, "--tls", "service", "--service-ca-file", trust.ca)
        sock = peers.connect(server.service_port)
        keys.send(b"half a file\n")
        assert read_exactly(sock, 12) == b"half a file\n"
        service.process.kill()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert "cut off without TLS close_notify" in wait_events(server, "ConnectionClosed", 1)[0]["reason"]


@pytest.mark.usefixtures("lax")
@pytest.mark.peer("openssl")
@TLS
def test_an_s_client_that_is_killed_has_not_ended(peers: Peers, trust: Trust, version: str) -> None:
    """Likewise towards the service."""
    got: Future[bytes] = Future()

    def serve(sock: socket.socket) -> None:
        got.set_result(read_exactly(sock, 12))
        ended.set_result(until_error(sock))

    def until_error(sock: socket.socket) -> str:
        try:
            return f"the end, after {len(read_all(sock))} more bytes"
        except ConnectionResetError:
            return "reset"

    ended: Future[str] = Future()
    server = peers.server("--tls", "service", *trust.server)
    peers.client(server.relay_port, peers.service(serve).port)
    with keyboard() as (keys, stdin):
        command = s_client(server.service_port, trust, version, "-quiet", "-no_ign_eof")
        talking = peers.program(*command, stdin=stdin.fileno())
        keys.send(b"half a file\n")
        assert got.result(PATIENCE) == b"half a file\n"
        talking.process.kill()
        assert ended.result(PATIENCE) == "reset"
    # Where it had not read the server's session tickets yet, its system resets the connection.
    reason = wait_events(server, "ConnectionClosed", 1)[0]["reason"]
    assert reason.endswith(("cut off without TLS close_notify", "connection reset by peer"))


def s_server(peers: Peers, trust: Trust, version: str, *more: str) -> int:
    """openssl s_server; returns its port."""
    return start_s_server(peers, trust, version, *more)[1]


def start_s_server(
    peers: Peers, trust: Trust, version: str, *more: str, stdin: int = subprocess.DEVNULL
) -> tuple[Program, int]:
    """openssl s_server and its port."""
    command = [find("openssl"), "s_server", "-cert", trust.pair[0], "-key", trust.pair[1], *more]
    program = peers.program(*command, f"-tls{version.replace('.', '_')}", "-accept", f"{HOST}:0", stdin=stdin)
    # ACCEPT 127.0.0.1:12345
    return program, int(program.wait_for(lambda line: line.startswith("ACCEPT ") and line.rpartition(":")[2]))


# --- ssh ------------------------------------------------------------------------------------------------------


@pytest.mark.peer("ssh", "scp", "sshd", "ssh-keygen")
@pytest.mark.parametrize("trusted_by", ["token", "certificate", "both"])
def test_ssh_and_scp_over_tls_links(peers: Peers, files: Path, trust: Trust, trusted_by: str) -> None:
    """A command's output and status come back, and a file is copied there and back."""
    digest = make_file(files / "large", 16)
    token = peers.path / "token"
    token.write_text("a token\n")
    common = [] if trusted_by == "certificate" else ["--token-file", str(token)]
    auth = [] if trusted_by == "token" else ["--auth", "--ca-file", trust.ca]
    sshd_port, options = peers.sshd()
    server = peers.server("--tls", *trust.server, *common, *auth)
    peers.client(server.relay_port, sshd_port, "--tls", *trust.client, *common, *(trust.own if auth else ()))
    if auth:
        assert "(certificate client)" in server.wait_event("ClientUp")["name"]
    port = str(server.service_port)
    done = run(find("ssh"), *options, "-p", port, HOST, "echo ok; exit 7")
    assert (done.returncode, done.stdout) == (7, b"ok\n"), done.stderr
    scp = [find("scp"), "-q", *options, "-P", port]
    there = run(*scp, str(files / "large"), f"{HOST}:{files}/there")
    assert there.returncode == 0, there.stderr
    assert digest_file(files / "there") == digest
    back = run(*scp, f"{HOST}:{files}/there", str(files / "back"))
    assert back.returncode == 0, back.stderr
    assert digest_file(files / "back") == digest


# --- One paste ------------------------------------------------------------------------------------------------


@pytest.mark.peer("curl", "nginx", "openssl")
@pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "terminal"])
def test_the_line_that_a_server_prints_starts_a_client(peers: Peers, files: Path, terminal: bool) -> None:
    """It has all that a client needs; without a terminal the token stays in its file, and out of the output."""
    (files / "page").write_text("a page\n")
    state = peers.path / "state"
    ports = "--relay-port", "0", "--service-port", "0", "--hostname", HOST
    command = sys.executable, "-m", "tcprelay", "server", *ports, "--tls", "--state-dir", str(state)
    server = peers.program(*command, terminal=terminal)
    service_port = server.wait_for(lambda line: re.search(r"clients of default on .*:(\d+)$", line))[1]
    line = server.wait_for(lambda line: line.strip().startswith("tcprelayc ") and line.split())
    token = (state / "token").read_text().strip()
    assert len(token) >= 32
    assert (token in server.output) == terminal
    if not terminal:
        assert f"(FILE: a copy of {state}/token)" in server.output
        shutil.copy(state / "token", peers.path / "copy")
    put_in = {"PORT": str(peers.nginx(files)), "FILE": str(peers.path / "copy")}
    words = [put_in.get(word, word) for word in line[1:]]
    client = peers.relay_process("client", *words, "--host", HOST)
    client.wait_event("Published")
    page = run(*curl(f"http://{HOST}:{service_port}/page"))
    assert (page.returncode, page.stdout) == (0, b"a page\n"), page.stderr
    client.signal(signal.SIGTERM)
    assert client.wait() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert (token in server.output) == terminal
    assert "rror" not in server.output
    assert "Traceback" not in server.output


# --- Reloading ------------------------------------------------------------------------------------------------


class Installed:
    """A certificate and its key on the disk, which are replaced while a relay runs."""

    def __init__(self, trust: Trust, directory: Path) -> None:
        self._certificates = trust.certificates
        self.cert, self.key = directory / "installed.pem", directory / "installed.key"
        self.install("server")

    @property
    def options(self) -> tuple[str, ...]:
        return "--cert", str(self.cert), "--key", str(self.key)

    def install(self, name: str) -> None:
        shutil.copy(self._certificates.path(f"{name}.pem"), self.cert)
        shutil.copy(self._certificates.path(f"{name}.key"), self.key)


def name_shown(port: int, trust: Trust) -> str:
    """The name in the certificate that a TLS port shows."""
    done = run(*s_client(port, trust, "1.3"))
    found = re.search(rb"^subject=CN ?= ?(\S+)", done.stdout, re.MULTILINE)
    assert found, done
    return found[1].decode()


class Interrupted:
    """A download over TLS of which the second half is sent when the test says so."""

    HALF = 4 * MEBIBYTE

    def __init__(self, peers: Peers, files: Path) -> None:
        self.digest = make_file(files / "whole", 2 * self.HALF // MEBIBYTE)
        self._data = (files / "whole").read_bytes()
        self._peers, self._there, self._go_on = peers, files / "downloaded", threading.Event()
        self.port = peers.service(self._serve).port

    def _serve(self, sock: socket.socket) -> None:
        if not sock.recv(65536):
            return  # no request: it only looked at the certificate
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + self._data[: self.HALF])
        assert self._go_on.wait(2 * PATIENCE)
        sock.sendall(self._data[self.HALF :])
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)

    def begin(self, service_port: int, trust: Trust) -> None:
        command = secure_url(service_port, "", trust)
        self._curl = self._peers.program(*command, "--no-buffer", "--output", str(self._there))
        wait_until(lambda: self._there.exists() and self._there.stat().st_size == self.HALF)

    def finish(self) -> None:
        self._go_on.set()
        assert self._curl.wait() == 0, self._curl.output
        assert digest_file(self._there) == self.digest


@pytest.mark.peer("curl", "openssl")
def test_sighup_renews_the_certificate_of_a_server(peers: Peers, files: Path, trust: Trust) -> None:
    """Who connects afterwards is shown the new one, on both ports, and a transfer under way stays whole."""
    installed, transfer = Installed(trust, peers.path), Interrupted(peers, files)
    server = peers.server("--tls", "both", *installed.options)
    client = peers.client(server.relay_port, transfer.port, "--tls", *trust.client)
    ports = server.relay_port, server.service_port
    transfer.begin(server.service_port, trust)
    assert [name_shown(port, trust) for port in ports] == ["server", "server"]
    installed.install("rsa")
    assert [name_shown(port, trust) for port in ports] == ["server", "server"], "not yet"
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    # Workers hear of it from the parent, who says so first.
    wait_until(lambda: [name_shown(port, trust) for port in ports] == ["rsa", "rsa"])
    transfer.finish()
    assert {record["reason"] for record in client.events("ConnectionClosed")} <= {""}


@pytest.mark.peer("curl", "openssl")
@pytest.mark.parametrize("fault", ["broken", "another key", "missing"])
def test_sighup_with_a_certificate_that_does_not_load(peers: Peers, files: Path, trust: Trust, fault: str) -> None:
    """The old one stays, the log says why, the transfer goes on, and once the files are right they are taken."""
    installed, transfer = Installed(trust, peers.path), Interrupted(peers, files)
    server = peers.server("--tls", "both", *installed.options)
    server.expected_error = "cannot reload"
    peers.client(server.relay_port, transfer.port, "--tls", *trust.client)
    transfer.begin(server.service_port, trust)
    if fault == "broken":
        installed.cert.write_bytes(installed.cert.read_bytes()[:300])
    elif fault == "another key":
        shutil.copy(trust.certificates.path("client.key"), installed.key)
    else:
        installed.cert.unlink()
    server.signal(signal.SIGHUP)
    server.wait_message("cannot reload, all stays as it was")
    assert str(installed.cert) in server.lines[-1]
    assert name_shown(server.service_port, trust) == "server"
    transfer.finish()
    installed.install("rsa")
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    wait_until(lambda: name_shown(server.service_port, trust) == "rsa")  # workers have it a moment later


def test_sighup_gives_a_client_a_new_token(peers: Peers, trust: Trust) -> None:
    """After the server's token was changed a client gets no further links until it has been told the new one."""
    tokens = {role: peers.path / f"{role}-token" for role in ("server", "client")}
    for path in tokens.values():
        path.write_text("old token\n")

    def serve(sock: socket.socket) -> None:
        while data := sock.recv(1024):
            sock.sendall(data)

    server = peers.server("--tls", *trust.server, "--token-file", str(tokens["server"]))
    token = "--token-file", str(tokens["client"])
    client = peers.client(
        server.relay_port, peers.service(serve).port, "--tls", *trust.client, *token, "--num-conn", "1"
    )
    tokens["server"].write_text("new token\n")
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    first = peers.connect(server.service_port)  # it takes the only link, which is from before
    first.sendall(b"one")
    assert read_exactly(first, 3) == b"one"
    server.wait_event("LinkRefused", code="token")  # of the one that is to replace it
    tokens["client"].write_text("new token\n")
    client.signal(signal.SIGHUP)
    client.wait_message("the configuration is reloaded")
    second = peers.connect(server.service_port)
    second.sendall(b"two")
    assert read_exactly(second, 3) == b"two"
    first.sendall(b"three")
    assert read_exactly(first, 5) == b"three"
    for sock in (first, second):
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    wait_closed(server, client, count=2)


# --- stunnel --------------------------------------------------------------------------------------------------


def exchange(peers: Peers, service_port: int, data: bytes, answer: bytes) -> None:
    """A request that ends with its direction, then an answer that ends with its own."""
    sock = peers.connect(service_port)
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    sender.join(PATIENCE)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == answer


class Answering:
    """A service that answers when it has got everything."""

    DATA, ANSWER = bytes(range(256)) * 8192, bytes(range(255, -1, -1)) * 8192

    def __init__(self, peers: Peers) -> None:
        self.port = peers.service(self._serve).port

    def _serve(self, sock: socket.socket) -> None:
        assert read_all(sock) == self.DATA
        sock.sendall(self.ANSWER)
        sock.shutdown(socket.SHUT_WR)


@pytest.mark.peer("stunnel")
@TLS
def test_stunnel_as_the_client_s_tls(peers: Peers, trust: Trust, version: str) -> None:
    """A plain raw client behind it works with our TLS server: data and ends pass, connection after connection."""
    service = Answering(peers)
    server = peers.server("--wire", "raw", "--tls", *trust.server)
    verify = f"CAfile = {trust.ca}", "verifyChain = yes", f"checkIP = {HOST}"
    port = peers.stunnel(server.relay_port, "client = yes", *verify, *stunnel_version(version))
    client = peers.client(port, service.port, "--wire", "raw", "--num-conn", "2")
    server.wait_event("ClientUp")
    for _ in range(4):
        exchange(peers, server.service_port, service.DATA, service.ANSWER)
    wait_closed(server, client, count=4)


@pytest.mark.peer("stunnel")
@TLS
def test_stunnel_as_the_server_s_tls(peers: Peers, trust: Trust, version: str) -> None:
    """Our TLS client works with a plain raw server behind it: data and ends pass, connection after connection."""
    service = Answering(peers)
    server = peers.server("--wire", "raw")
    own = f"cert = {trust.pair[0]}", f"key = {trust.pair[1]}"
    port = peers.stunnel(server.relay_port, *own, *stunnel_version(version))
    client = peers.client(port, service.port, "--wire", "raw", "--num-conn", "2", "--tls", *trust.client)
    server.wait_event("ClientUp")
    for _ in range(4):
        exchange(peers, server.service_port, service.DATA, service.ANSWER)
    wait_closed(server, client, count=4)


def stunnel_version(version: str) -> tuple[str, str]:
    return f"sslVersionMin = TLSv{version}", f"sslVersionMax = TLSv{version}"


# --- node-tcp-relay -------------------------------------------------------------------------------------------


def exchange_with_curl(command: list[str], digest: str) -> None:
    """Several connections one after another, each with a large answer, whose end is told by Content-Length."""
    for _ in range(4):
        assert digest_output(*command) == digest


def wait_cut_off(relay: RelayProcess, size: int) -> None:
    """All connections are over, and all bytes have passed.

    node-tcp-relay never says close_notify: it destroys the link, which cannot be told from somebody's cutting it.
    """
    wait_until(lambda: len(relay.events("ConnectionClosed")) == 4)
    for record in relay.events("ConnectionClosed"):
        assert record["bytes_out"] > size
        assert "cut off without TLS close_notify" in record["reason"]


@pytest.mark.peer("node", "curl", "nginx")
@pytest.mark.parametrize("auth", [False, True], ids=["server", "mutual"])
@pytest.mark.parametrize("port", ["plain", "tls"])
def test_our_client_with_the_tls_server_of_node_tcp_relay(
    peers: Peers, files: Path, trust: Trust, auth: bool, port: str
) -> None:
    """HTTP passes, connection after connection, over links and service ports of TLS 1.2."""
    digest = make_file(files / "large", 8)
    settings = {"pfx": trust.pfx("server"), "passphrase": "phrase", "tls": "both" if port == "tls" else ""}
    settings |= {"auth": "", "caFile": trust.ca} if auth else {}
    relay_port, service_port = peers.node_server("0.0.18", **settings)
    own = trust.own if auth else ()
    raw = "--wire", "raw", "--num-conn", "2"
    client = peers.client(relay_port, peers.nginx(files), *raw, "--tls", *trust.client, *own)
    plain = curl(f"http://{HOST}:{service_port}/large")
    exchange_with_curl(secure_url(service_port, "large", trust) if port == "tls" else plain, digest)
    wait_cut_off(client, size=8 * MEBIBYTE)


@pytest.mark.peer("node", "curl", "nginx")
@pytest.mark.parametrize("auth", [False, True], ids=["server", "mutual"])
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_our_tls_server_with_the_client_of_node_tcp_relay(
    peers: Peers, files: Path, trust: Trust, auth: bool, verify: bool
) -> None:
    """HTTP passes, connection after connection, whether or not either shows or verifies a certificate."""
    digest = make_file(files / "large", 8)
    ours = ["--auth", "--ca-file", trust.ca] if auth else []
    server = peers.server("--wire", "raw", "--tls", "both", *trust.server, *ours)
    theirs = {"tls": "", "numConn": "2", "pfx": trust.pfx("client"), "passphrase": "phrase"}
    theirs |= {"caFile": trust.ca} if verify else {"rejectUnauthorized": "false"}
    peers.node_client("0.0.18", server.relay_port, peers.nginx(files), **theirs)
    up = server.wait_event("ClientUp")
    assert up["name"] == ("client" if auth else "raw")
    exchange_with_curl(secure_url(server.service_port, "large", trust), digest)
    wait_cut_off(server, size=8 * MEBIBYTE)


@pytest.mark.peer("node")
def test_a_client_of_node_tcp_relay_with_a_foreign_certificate(peers: Peers, trust: Trust) -> None:
    """It is refused where certificates are asked for."""
    server = peers.server("--wire", "raw", "--tls", *trust.server, "--auth", "--ca-file", trust.ca)
    theirs = {"tls": "", "pfx": trust.pfx("foreign"), "passphrase": "phrase", "rejectUnauthorized": "false"}
    peers.node_client("0.0.18", server.relay_port, 1, **theirs)
    refused = server.wait_event("LinkRefused")
    assert refused["code"] == "tls"
    assert "the certificate is not accepted" in refused["reason"]
    assert not server.events("ClientUp")


@pytest.mark.peer("node")
def test_a_client_without_a_certificate_at_a_server_of_node_tcp_relay(peers: Peers, trust: Trust) -> None:
    """It gets no link, and says why."""
    settings = {"pfx": trust.pfx("server"), "passphrase": "phrase", "auth": "", "caFile": trust.ca}
    relay_port, _ = peers.node_server("0.0.18", **settings)
    command = "--relay-host", HOST, "--relay-port", str(relay_port), "--port", "1"
    client = peers.relay_process("client", *command, "--wire", "raw", "--tls", *trust.client)
    assert "handshake failure" in client.wait_event("Unpublished")["reason"]


# --- KeyUpdate ------------------------------------------------------------------------------------------------


@contextmanager
def keyboard() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What is sent at one end is read at the other line by line, as s_client expects commands: from a pipe it
    would read several at once, and heed the first."""
    keys, stdin = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keys.settimeout(LONG)
    with keys, stdin:
        yield keys, stdin


class Valve:
    """A way to a port through this process, which can stop to take what comes back: a peer that does not read."""

    def __init__(self, peers: Peers, port: int) -> None:
        self._port = port
        self._shut = threading.Event()
        self.port = peers.service(self._serve).port

    def shut(self) -> None:
        self._shut.set()

    def _serve(self, near: socket.socket) -> None:
        with socket.create_connection((HOST, self._port), PATIENCE) as far:
            back = threading.Thread(target=self._pass_back, args=(far, near))
            back.start()
            try:
                while data := near.recv(65536):
                    far.sendall(data)
            finally:
                self._shut.set()
                ignore_oserror(far.shutdown, socket.SHUT_RDWR)
                back.join(PATIENCE)

    def _pass_back(self, far: socket.socket, near: socket.socket) -> None:
        try:
            # s_client would wait for the rest of a record that has come in part: once shut, nothing more passes.
            while (data := far.recv(65536)) and not self._shut.is_set():
                near.sendall(data)
        except OSError:
            pass


class Flood:
    """openssl s_client that sends thousands of KeyUpdates, "K" for ones that ask for an answer, "k" for others."""

    COUNT = 5000

    def __init__(self, peers: Peers, port: int, trust: Trust, keys: socket.socket, stdin: socket.socket) -> None:
        self._keys = keys
        # -msg has it tell what it sends.
        self.program = peers.program(*s_client(port, trust, "1.3", "-msg"), stdin=stdin.fileno())
        stdin.close()
        self.program.wait_for(lambda line: "Verify return code: 0 (ok)" in line)

    @property
    def sent(self) -> int:
        return sum(">>>" in line and "KeyUpdate" in line for line in list(self.program.lines))

    def say(self, line: str) -> None:
        self._keys.send(line.encode() + b"\n")

    def run(self, key: str, echo: bool) -> None:
        """Send them all, unless the connection is broken off before; now and then a line that is to come back."""
        try:
            for number in range(self.COUNT):
                self.say(key)
                if echo and number % 100 == 0:
                    line = f"line {number}"
                    self.say(line)
                    wait_line(self.program, f"echo of {line}")
        except (BrokenPipeError, ConnectionResetError):
            assert not echo, self.program.output


@pytest.mark.peer("openssl", "curl")
@pytest.mark.parametrize("key", ["K", "k"])
@pytest.mark.parametrize("reading", [True, False], ids=["reading", "not reading"])
@pytest.mark.parametrize("where", ["before HELLO", "raw link", "service port"])
def test_a_flood_of_key_updates(peers: Peers, trust: Trust, where: str, reading: bool, key: str) -> None:
    """The server stays small, serves others meanwhile, and gives up nobody but a peer that is owed too much."""

    def serve(sock: socket.socket) -> None:
        first = sock.recv(65536)
        if first.startswith(b"GET "):
            sock.sendall(b"HTTP/1.0 200 OK\r\n\r\na page\n")
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
            return
        while first and not reading:
            sock.sendall(bytes(65536))
        while first:
            sock.sendall(b"echo of " + first)
            first = sock.recv(65536)

    wire = ("--wire", "raw") if where == "raw link" else ()
    server = peers.server("--tls", "both", *trust.server, *wire, "--log-level", "debug")  # LinkDown is one of those
    service = peers.service(serve)
    if where != "raw link":
        peers.client(server.relay_port, service.port, "--tls", *trust.client)
    port = server.service_port if where == "service port" else server.relay_port
    before = peak_memory(server.process)
    valve = Valve(peers, port)
    with keyboard() as (keys, stdin):
        flood = Flood(peers, port if reading else valve.port, trust, keys, stdin)
        if not reading:
            valve.shut()
        echo = where == "service port" and reading
        if where == "service port" and not reading:
            flood.say("begin to send")
        with ThreadPoolExecutor(1) as threads:
            flooding = threads.submit(flood.run, key, echo)
            if where == "raw link":  # connections may be given to the flooding link: raw links are taken as they come
                peers.client(server.relay_port, service.port, "--tls", *trust.client, *wire)
            else:
                page = run(*secure_url(server.service_port, "", trust))
                assert (page.returncode, page.stdout) == (0, b"a page\n"), page.stderr
            flooding.result(LONG)
        if echo:
            wait_until(lambda: flood.sent == flood.COUNT)
        keys.close()
        flood.program.wait(3 * PATIENCE)
    assert flood.sent >= 2000
    assert peak_memory(server.process) - before < 64 * MEBIBYTE
    if where == "before HELLO":
        server.wait_event("LinkRefused")
    elif where == "raw link":
        server.wait_event("LinkDown")
    elif echo:
        wait_closed(server, count=2)
    else:
        # Before the RST the relay waits a little for the peer to take what was sent to it.
        wait_until(lambda: any(record["reason"] for record in server.events("ConnectionClosed")), 3 * PATIENCE)
