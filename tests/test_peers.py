"""The relays as real processes, between real programs: what users run over them, and what kills them."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import PATIENCE, read_all, read_exactly, wait_until
from .peers import HOST, Peers, RelayProcess, curl, digest_file, digest_output, find, make_file, no_peer, run

pytestmark = pytest.mark.usefixtures("workers")

MEBIBYTE = 1 << 20


def closing_records(server: RelayProcess, client: RelayProcess) -> tuple[dict[str, object], dict[str, object]]:
    """What either relay says of a connection that is over."""
    at_server = server.wait_event("ConnectionClosed")
    return at_server, client.wait_event("ConnectionClosed", id=at_server["id"])


# --- HTTP -----------------------------------------------------------------------------------------------------


@pytest.mark.peer("curl", "nginx")
def test_curl_downloads_a_gibibyte_from_nginx(peers: Peers, files: Path) -> None:
    """Every byte of it arrives, and both relays have counted them."""
    digest = make_file(files / "large", 1024)
    server, client = peers.relay(peers.nginx(files))
    assert digest_output(*curl(f"http://{HOST}:{server.service_port}/large")) == digest
    for record in closing_records(server, client):
        assert record["reason"] == ""
        assert isinstance(record["bytes_out"], int)
        assert 0 < record["bytes_out"] - 1024 * MEBIBYTE < 1000, "the answer's head and body"


@pytest.mark.peer("curl", "nginx")
def test_curl_uploads_to_nginx(peers: Peers, files: Path) -> None:
    """A large PUT arrives whole, and its answer comes back."""
    digest = make_file(files / "large", 256)
    server, client = peers.relay(peers.nginx(files))
    url = f"http://{HOST}:{server.service_port}/uploaded"
    put = run(*curl("--upload-file", str(files / "large"), "--write-out", "%{http_code}", url))
    assert (put.returncode, put.stdout) == (0, b"201"), put.stderr
    assert digest_file(files / "uploaded") == digest
    for record in closing_records(server, client):
        assert record["reason"] == ""
        assert isinstance(record["bytes_in"], int)
        assert 0 < record["bytes_in"] - 256 * MEBIBYTE < 1000, "the request's head and body"


@pytest.mark.peer("curl", "nginx")
def test_curl_keeps_its_connection_for_several_requests(peers: Peers, files: Path) -> None:
    """Five requests of one curl pass over one connection, each with its own answer."""
    names = [f"page-{number}" for number in range(5)]
    for name in names:
        (files / name).write_text(f"{name}\n" * 1000)
    server, client = peers.relay(peers.nginx(files))
    words = ["--write-out", "%{num_connects} %{http_code}\n"]
    for name in names:
        words += ["--output", str(peers.path / name), f"http://{HOST}:{server.service_port}/{name}"]
    done = run(*curl(*words))
    assert (done.returncode, done.stdout.decode().split("\n")) == (0, ["1 200", *["0 200"] * 4, ""]), done.stderr
    for name in names:
        assert (peers.path / name).read_text() == f"{name}\n" * 1000
    closing_records(server, client)
    assert len(server.events("ConnectionOpened")) == len(client.events("ConnectionOpened")) == 1


@pytest.mark.peer("curl", "nginx")
def test_relays_that_are_configured_by_the_environment_alone(peers: Peers, files: Path) -> None:
    """Both roles start without an option, prove the token of a file to each other, and a page passes."""
    (files / "page").write_text("a page\n")
    token = peers.path / "token"
    token.write_text("a token\n")
    trust = {"TCPRELAY_TOKEN_FILE": str(token)}
    listening = {"TCPRELAY_RELAY_PORT": "0", "TCPRELAY_SERVICE_PORT": "0", "TCPRELAY_HOSTNAME": HOST}
    server = peers.relay_process("server", env=listening | trust)
    dialling = {"TCPRELAY_RELAY_HOST": HOST, "TCPRELAY_RELAY_PORT": str(server.relay_port)}
    dialling |= {"TCPRELAY_HOST": HOST, "TCPRELAY_PORT": str(peers.nginx(files)), "TCPRELAY_NUM_CONN": "1"}
    stranger = peers.relay_process("client", env=dialling)
    assert "asks for a token" in stranger.wait_event("Unpublished")["reason"]
    assert not server.events("ClientUp")
    peers.relay_process("client", env=dialling | trust | {"TCPRELAY_NAME": "friend"})
    server.wait_event("ClientUp", name="friend")
    page = run(*curl(f"http://{HOST}:{server.service_port}/page"))
    assert (page.returncode, page.stdout) == (0, b"a page\n"), page.stderr


@pytest.mark.peer("curl", "nginx")
@pytest.mark.parametrize("killed", ["server", "client"])
def test_a_page_can_be_fetched_again_after_a_relay_was_killed(peers: Peers, files: Path, killed: str) -> None:
    """A relay that is started anew takes the place of the one that was killed, on the same ports."""
    (files / "page").write_text("a page\n")
    nginx = peers.nginx(files)
    server, client = peers.relay(nginx)
    relay_port, service_port = server.relay_port, server.service_port
    fetch = curl(f"http://{HOST}:{service_port}/page")
    assert run(*fetch).stdout == b"a page\n"
    if killed == "server":
        server.kill()
        ports = "--relay-port", str(relay_port), "--service-port", str(service_port), "--hostname", HOST
        peers.relay_process("server", *ports).wait_event("ClientUp")
    else:
        client.kill()
        server.wait_event("ClientDown")
        peers.client(relay_port, nginx)
    assert run(*fetch).stdout == b"a page\n"


# --- Other protocols ------------------------------------------------------------------------------------------


def ssh_behind_relay(peers: Peers) -> tuple[list[str], list[str]]:
    """The commands, ready for further words, for ssh and scp to an sshd behind a relay."""
    sshd_port, options = peers.sshd()
    server, _ = peers.relay(sshd_port)
    port = str(server.service_port)
    return [find("ssh"), *options, "-p", port, HOST], [find("scp"), "-q", *options, "-P", port]


@pytest.mark.peer("ssh", "sshd", "ssh-keygen")
def test_ssh_runs_a_command(peers: Peers) -> None:
    """Its output and its exit status come back; the host key is the one behind the relay."""
    ssh, _ = ssh_behind_relay(peers)
    done = run(*ssh, "echo ok; exit 7")
    assert (done.returncode, done.stdout) == (7, b"ok\n"), done.stderr


@pytest.mark.peer("ssh", "sshd", "ssh-keygen")
def test_ssh_pipes_both_ways_at_once(peers: Peers, files: Path) -> None:
    """What goes to a remote cat comes back unchanged, to the last byte after the end of its input."""
    digest = make_file(files / "large", 64)
    ssh, _ = ssh_behind_relay(peers)
    assert digest_output(*ssh, "cat", stdin=files / "large") == digest


@pytest.mark.peer("ssh", "scp", "sshd", "ssh-keygen")
def test_scp_copies_both_ways(peers: Peers, files: Path) -> None:
    """A file that was copied there and back is the same in both places."""
    digest = make_file(files / "large", 64)
    _, scp = ssh_behind_relay(peers)
    there = run(*scp, str(files / "large"), f"{HOST}:{files}/there")
    assert there.returncode == 0, there.stderr
    assert digest_file(files / "there") == digest
    back = run(*scp, f"{HOST}:{files}/there", str(files / "back"))
    assert back.returncode == 0, back.stderr
    assert digest_file(files / "back") == digest


@pytest.mark.peer("redis-server", "redis-cli")
def test_redis(peers: Peers, files: Path) -> None:
    """Short commands, a value of many mebibytes, and tens of thousands of commands in a pipeline."""
    server, _ = peers.relay(peers.redis())
    redis = [find("redis-cli"), "-h", HOST, "-p", str(server.service_port)]
    assert run(*redis, "ping").stdout == b"PONG\n"

    make_file(files / "value", 16)
    assert run(*redis, "-x", "set", "value", stdin=files / "value").stdout == b"OK\n"
    assert run(*redis, "--raw", "get", "value").stdout == (files / "value").read_bytes() + b"\n"

    count = 50_000
    pairs = ((b"key:%d" % n, b"value of %d" % n) for n in range(count))
    commands = b"".join(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(k), k, len(v), v) for k, v in pairs)
    (files / "commands").write_bytes(commands)
    assert f"errors: 0, replies: {count}" in run(*redis, "--pipe", stdin=files / "commands").stdout.decode()
    assert run(*redis, "--raw", "dbsize").stdout == b"%d\n" % (count + 1)
    assert run(*redis, "--raw", "get", f"key:{count - 1}").stdout == b"value of %d\n" % (count - 1)


def test_a_service_that_speaks_first(peers: Peers) -> None:
    """The banner arrives before the service client has sent a byte, and the dialogue goes on."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 ready\r\n")
        assert read_exactly(sock, 6) == b"QUIT\r\n"
        sock.sendall(b"221 bye\r\n")

    server, _ = peers.relay(peers.service(serve).port)
    sock = peers.connect(server.service_port)
    assert read_exactly(sock, 11) == b"220 ready\r\n"
    sock.sendall(b"QUIT\r\n")
    assert read_all(sock) == b"221 bye\r\n"


# --- node-tcp-relay -------------------------------------------------------------------------------------------


def exchange_with_curl(port: int, files: Path) -> None:
    """Several connections one after another, each with a large answer or a large request.

    node-tcp-relay cuts both directions at the first end of one, so the ends are told by Content-Length.
    """
    digest = make_file(files / "large", 8)
    for _ in range(4):
        assert digest_output(*curl(f"http://{HOST}:{port}/large")) == digest
    put = run(*curl("--upload-file", str(files / "large"), f"http://{HOST}:{port}/uploaded"))
    assert put.returncode == 0, put.stderr
    assert digest_file(files / "uploaded") == digest


def secret_options(secret: str) -> tuple[list[str], dict[str, str]]:
    """A shared key, as options of ours and of node-tcp-relay."""
    return (["--secret", secret], {"secret": secret}) if secret else ([], {})


# 0.0.18 has no --secret, and its client works with TLS alone: without, it calls a function that was removed.
@pytest.mark.peer("node", "curl", "nginx")
@pytest.mark.parametrize(("version", "secret"), [("0.0.13", ""), ("0.0.13", "a-shared-key"), ("0.0.18", "")])
def test_our_client_with_the_server_of_node_tcp_relay(peers: Peers, files: Path, version: str, secret: str) -> None:
    """HTTP passes in both directions, connection after connection."""
    ours, theirs = secret_options(secret)
    relay_port, service_port = peers.node_server(version, **theirs)
    client = peers.client(relay_port, peers.nginx(files), "--wire", "raw", "--num-conn", "2", *ours)
    exchange_with_curl(service_port, files)
    wait_until(lambda: len(client.events("ConnectionClosed")) == 5)
    assert [record["reason"] for record in client.events("ConnectionClosed")] == [""] * 5


@pytest.mark.peer("node", "curl", "nginx")
@pytest.mark.parametrize("secret", ["", "a-shared-key"])
def test_our_server_with_the_client_of_node_tcp_relay(peers: Peers, files: Path, secret: str) -> None:
    """HTTP passes in both directions, connection after connection."""
    ours, theirs = secret_options(secret)
    server = peers.server("--wire", "raw", *ours)
    peers.node_client("0.0.13", server.relay_port, peers.nginx(files), numConn="2", **theirs)
    server.wait_event("ClientUp")
    exchange_with_curl(server.service_port, files)
    wait_until(lambda: len(server.events("ConnectionClosed")) == 5)
    assert [record["reason"] for record in server.events("ConnectionClosed")] == [""] * 5


@pytest.mark.peer("node")
def test_a_client_of_node_tcp_relay_with_another_key_is_refused(peers: Peers) -> None:
    """The key of node-tcp-relay is compared, not just skipped."""
    server = peers.server("--wire", "raw", "--secret", "a-shared-key")
    peers.node_client("0.0.13", server.relay_port, 1, secret="another-key!")
    assert server.wait_event("LinkRefused")["code"] == "token"
    assert not server.events("ClientUp")


# --- Signals --------------------------------------------------------------------------------------------------

both_roles = pytest.mark.parametrize("role", ["server", "client"])


@both_roles
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_relay(peers: Peers, role: str, number: signal.Signals) -> None:
    """With nothing to finish it ends at once, with status 0 and without a word of Python's."""
    server, client = peers.relay(peers.service(read_all).port, "--drain-timeout", "60")
    ending = {"server": server, "client": client}[role]
    ending.signal(number)
    assert ending.wait() == 0


def test_sigterm_ends_a_client_that_has_no_relay_server(peers: Peers) -> None:
    """It ends at once, with status 0, although it goes on trying."""
    command = "--relay-host", HOST, "--relay-port", "1", "--port", "1"
    client = peers.relay_process("client", *command, "--drain-timeout", "60")
    client.wait_event("Unpublished")
    client.signal(signal.SIGTERM)
    assert client.wait() == 0


@pytest.mark.peer("unshare")
def test_sigterm_ends_process_1(peers: Peers) -> None:
    """As the first process of a container, where signals without a handler are ignored, it ends too."""
    if os.geteuid() != 0:
        no_peer("only root may make a PID namespace")
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST
    server = peers.relay_process("server", *command, wrapper=[find("unshare"), "--pid", "--fork", "--kill-child"])
    assert server.service_port
    above = server.process.pid
    [child] = Path(f"/proc/{above}/task/{above}/children").read_text().split()
    [pids] = [line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("NSpid:")]
    assert pids.split()[-1] == "1"
    os.kill(int(child), signal.SIGTERM)
    assert server.wait() == 0


def what_it_saw(use: Callable[[socket.socket], None], sock: socket.socket) -> str:
    """How the use of a socket ended."""
    try:
        use(sock)
    except OSError as error:
        return type(error).__name__
    return "a clean end"


class HalfSent:
    """A connection of which the first half of the answer has arrived; the second follows `go_on`."""

    HALF = b"first or second half\n" * 50_000

    def __init__(self, peers: Peers, *options: str) -> None:
        self._go_on = threading.Event()
        self.service_saw: Future[str] = Future()
        service = peers.service(lambda sock: self.service_saw.set_result(what_it_saw(self._serve, sock)))
        self.server, self.client = peers.relay(service.port, *options)
        self.sock = peers.connect(self.server.service_port)
        assert read_exactly(self.sock, len(self.HALF)) == self.HALF

    def relay(self, role: str) -> RelayProcess:
        return {"server": self.server, "client": self.client}[role]

    def go_on(self) -> None:
        self._go_on.set()

    def _serve(self, sock: socket.socket) -> None:
        sock.sendall(self.HALF)
        assert self._go_on.wait(2 * PATIENCE)
        sock.sendall(self.HALF)


@both_roles
def test_sigterm_lets_a_transfer_finish(peers: Peers, role: str) -> None:
    """A connection that is open at SIGTERM is carried to its end, and then the relay ends."""
    transfer = HalfSent(peers)
    ending = transfer.relay(role)
    ending.signal(signal.SIGTERM)
    ending.wait_event("Draining", connections=1)
    if role == "server":
        with pytest.raises(ConnectionRefusedError):
            peers.connect(transfer.server.service_port)
    transfer.go_on()
    assert read_all(transfer.sock) == transfer.HALF
    transfer.sock.close()
    assert ending.wait() == 0
    [record] = ending.events("ConnectionClosed")
    assert (record["reason"], record["bytes_out"]) == ("", 2 * len(transfer.HALF))


@both_roles
@pytest.mark.parametrize(("drain_timeout", "signals"), [("0.5", 1), ("60", 2)])
def test_a_transfer_that_does_not_finish_is_broken_off(
    peers: Peers, role: str, drain_timeout: str, signals: int
) -> None:
    """At the drain time-out, or at a second signal, both ends of the connection see an error, and the relay ends."""
    transfer = HalfSent(peers, "--drain-timeout", drain_timeout)
    ending = transfer.relay(role)
    ending.signal(signal.SIGTERM)
    ending.wait_event("Draining", connections=1)
    if signals == 2:
        ending.signal(signal.SIGTERM)
    with pytest.raises(ConnectionResetError):
        transfer.sock.recv(1)
    assert ending.wait() == 0
    [record] = ending.events("ConnectionClosed")
    assert record["reason"] == "this relay is ending"
    transfer.go_on()
    assert transfer.service_saw.result(PATIENCE) == "ConnectionResetError"


# --- A relay is killed ----------------------------------------------------------------------------------------

BLOCK = bytes(65536)


class Flow:
    """What passes from a sender to a receiver until a relay is killed at a certain moment.

    busy: while bytes pass; stalled: while the receiver does not read, so that the relays are in the middle of
    a send; quiet: while nothing is left to be sent.
    """

    def __init__(self, moment: str) -> None:
        self._moment = moment
        self._killed = threading.Event()
        self._stalled = threading.Event()
        self._received = 0

    def wait_for_moment(self) -> None:
        wait_until(lambda: self._received >= 8 * MEBIBYTE)
        if self._moment == "stalled":
            assert self._stalled.wait(PATIENCE)

    def killed(self) -> None:
        self._killed.set()

    def send(self, sock: socket.socket) -> None:
        for _ in range(8 * MEBIBYTE // len(BLOCK)):
            sock.sendall(BLOCK)
        if self._moment == "quiet":
            assert sock.recv(1) == b""
            return
        while True:
            if not select.select([], [sock], [], 0.3)[1]:
                self._stalled.set()
            sock.sendall(BLOCK)

    def receive(self, sock: socket.socket) -> None:
        while piece := sock.recv(65536):
            self._received += len(piece)
            if self._moment == "stalled" and self._received >= 8 * MEBIBYTE:
                assert self._killed.wait(PATIENCE)


@pytest.mark.parametrize("killed", ["server", "client"])
@pytest.mark.parametrize("receiver", ["service client", "service"])
@pytest.mark.parametrize("moment", ["busy", "stalled", "quiet"])
def test_nobody_takes_a_part_for_the_whole_when_a_relay_is_killed(
    peers: Peers, killed: str, receiver: str, moment: str
) -> None:
    """After SIGKILL of either relay both ends of the connection see an error, whatever the moment."""
    flow = Flow(moment)
    client_use, service_use = (flow.receive, flow.send) if receiver == "service client" else (flow.send, flow.receive)
    service_saw: Future[str] = Future()
    service = peers.service(lambda sock: service_saw.set_result(what_it_saw(service_use, sock)))
    server, client = peers.relay(service.port)
    with ThreadPoolExecutor(1) as threads:
        client_saw = threads.submit(what_it_saw, client_use, peers.connect(server.service_port))
        flow.wait_for_moment()
        (server if killed == "server" else client).kill()
        flow.killed()
        assert client_saw.result(PATIENCE) == "ConnectionResetError"
        assert service_saw.result(PATIENCE) == "ConnectionResetError"
