"""The way to the relay server through real proxies: squid and tinyproxy over HTTP, dante and microsocks over SOCKS5."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.addresses import Endpoint

from .certificates import Certificates
from .conftest import echo, read_exactly, wait_until
from .peers import HOST, ROOT, Peers, Program, RelayProcess, find, free_port, workers_of
from .test_secrets import CANARY, find_secrets

HTTP_PROXIES = [pytest.param(kind, marks=pytest.mark.peer(kind)) for kind in ("tinyproxy", "squid")]
SOCKS_PROXIES = [pytest.param(kind, marks=pytest.mark.peer(kind)) for kind in ("danted", "microsocks")]
PROXIES = HTTP_PROXIES + SOCKS_PROXIES
WITH_USERS = ("tinyproxy", "microsocks")
"""Those that need nothing but their own configuration to ask for a user."""
TOKEN = "sixteen letters!"


class RealProxy:
    """A real proxy that can be ended and started again on its port.

    Where it has `users` it asks for one; it lets connections pass to these ports alone, where it has rules for that.
    """

    def __init__(
        self, peers: Peers, kind: str, users: bool = False, ports: tuple[int, ...] = (), host: str = HOST,
        hosts: str = "none",
    ) -> None:  # fmt: skip
        self._peers, self._host = peers, host
        self.port = free_port()
        self.scheme = "http" if kind in ("tinyproxy", "squid") else "socks5"
        user = f"ann:{CANARY}@" if users else ""
        place = Endpoint(host, self.port)
        self.via = f"{self.scheme}://{user}{place}"
        config = peers.path / f"{kind}-{self.port}.conf"
        if kind == "tinyproxy":
            rules = [f"ConnectPort {port}" for port in ports] + ([f"BasicAuth ann {CANARY}"] if users else [])
            lines = [f"Port {self.port}", f"Listen {host}", "Timeout 600", "MaxClients 100", *rules]
            self._command = [find("tinyproxy"), "-d", "-c", str(config)]
        elif kind == "squid":
            rule = f"acl relays port {' '.join(map(str, ports))}" if ports else "acl relays src all"
            lines = [
                f"http_port {place}", rule, "http_access allow relays", "http_access deny all", "pid_filename none",
                "cache_log stdio:/dev/stderr", "access_log none", f"hosts_file {hosts}",
                "shutdown_lifetime 0", f"coredump_dir {peers.path}", "pinger_enable off", "cache deny all",
                "netdb_filename none",
            ]  # fmt: skip
            self._command = [find("squid"), "-N", "-d1", "-f", str(config)]
        elif kind == "danted":
            to = "".join(f"socks pass {{ from: 0/0 to: 0/0 port = {port} }}\n" for port in ports)
            to += "socks block { from: 0/0 to: 0/0 }" if ports else "socks pass { from: 0/0 to: 0/0 }"
            users_of_root = ["user.privileged: root", "user.unprivileged: nobody"] if os.geteuid() == 0 else []
            lines = [
                *users_of_root, "logoutput: stderr", f"internal: {host} port = {self.port}", "external: lo",
                "clientmethod: none", "socksmethod: none", "client pass { from: 0/0 to: 0/0 }", to,
            ]  # fmt: skip
            self._command = [find("danted"), "-N", "1", "-f", str(config), "-p", str(peers.path / "danted.pid")]
        else:
            lines = []
            login = ["-u", "ann", "-P", CANARY] if users else []
            self._command = [find("microsocks"), "-i", host, "-p", str(self.port), *login]
        config.write_text("\n".join([*lines, ""]))
        self.start()

    def start(self) -> None:
        # In a process group of its own.
        self.program: Program = self._peers.program(find("setsid"), *self._command)
        wait_until(lambda: self._is_listening() or self.program.process.poll() is not None)
        assert self.program.process.poll() is None, self.program.output

    def _is_listening(self) -> bool:
        """Whether its port is taken, found without connecting."""
        with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((self._host, self.port))
            except OSError:
                return True
        return False

    def kill(self) -> None:
        """End it by SIGKILL, with all its children, which hold connections, and its output."""
        if self.program.process.poll() is None:
            os.killpg(self.program.process.pid, signal.SIGKILL)
            self.program.wait()

    def stop(self, on: bool) -> None:
        """Stop it, or have it go on."""
        os.killpg(self.program.process.pid, signal.SIGSTOP if on else signal.SIGCONT)


@pytest.fixture
def start_proxy(peers: Peers) -> Iterator[Callable[..., RealProxy]]:
    """Starts real proxies, as `RealProxy` takes them; dante's would wait for connections that are open."""
    proxies: list[RealProxy] = []

    def start(kind: str, **settings: Any) -> RealProxy:
        proxies.append(RealProxy(peers, kind, **settings))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.kill()


Start = Callable[..., RealProxy]


def start_client(
    peers: Peers, server: RelayProcess, port: int, via: str, *words: str, host: str = HOST
) -> RelayProcess:
    """A relay client that is told of the proxy by its environment, whether it gets through or not."""
    place = "--relay-host", host, "--relay-port", str(server.relay_port), "--host", HOST, "--port", str(port)
    env = {"TCPRELAY_VIA": via, "TCPRELAY_TOKEN": TOKEN}
    return peers.relay_process("client", *place, "--num-conn", "2", *words, env=env)


@pytest.fixture
def server(peers: Peers, certificates: Certificates) -> RelayProcess:
    """A relay server with TLS and a token."""
    own = "--cert", certificates.path("server.pem"), "--key", certificates.path("server.key")
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, "--tls", *own
    return peers.relay_process("server", *command, env={"TCPRELAY_TOKEN": TOKEN})


def send_and_hash(sock: socket.socket, mebibytes: int) -> tuple[str, str]:
    """Send so many random mebibytes to an echo, and return the digests of what was sent and of what came back."""
    sent, piece = hashlib.sha256(), random.Random(7).randbytes(1 << 20)

    def send() -> None:
        for number in range(mebibytes):
            data = number.to_bytes(4, "big") + piece
            sent.update(data)
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    found = hashlib.sha256()
    while data := sock.recv(1 << 20):
        found.update(data)
    thread.join()
    return sent.hexdigest(), found.hexdigest()


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("kind", PROXIES)
def test_a_transfer_through_a_proxy_is_whole(peers: Peers, start_proxy: Start, server: RelayProcess, kind: str) -> None:
    """With TLS inside, half-close and all; the password is nowhere, and all links go through the proxy."""
    proxy = start_proxy(kind, users=kind in WITH_USERS)
    client = start_client(peers, server, peers.service(echo).port, proxy.via, "--tls", "-v")
    client.wait_event("Published")
    sent, found = send_and_hash(peers.connect(server.service_port), 48)
    assert sent == found
    record = client.wait_event("ConnectionClosed")
    assert (record["reason"], record["bytes_in"]) == ("", 48 * ((1 << 20) + 4))
    shown = proxy.via.replace(f"ann:{CANARY}", "***")
    client.wait_message(f"connecting to the relay at {HOST}:{server.relay_port} through the proxy {shown}")
    status = subprocess.run(
        [sys.executable, "-m", "tcprelay_client", "status", str(client.process.pid), "--connections", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert status.returncode == 0, status.stderr
    for pid in [client.process.pid, *workers_of(client)]:
        assert not find_secrets(Path(f"/proc/{pid}/cmdline").read_text())
    for text in (client.output, server.output, status.stdout):
        assert not find_secrets(text)


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("kind", PROXIES)
def test_a_proxy_that_is_killed_and_started_again(
    peers: Peers, start_proxy: Start, server: RelayProcess, kind: str
) -> None:
    """A connection under way breaks, the client says what is wrong, and is back when the proxy is."""
    proxy = start_proxy(kind)
    client = start_client(peers, server, peers.service(echo).port, proxy.via, "--tls")
    client.wait_event("Published")
    sock = peers.connect(server.service_port)
    sock.sendall(b"before")
    assert read_exactly(sock, 6) == b"before"
    proxy.kill()
    with pytest.raises(ConnectionResetError):
        assert sock.recv(1)
    dead = f"cannot reach the proxy {proxy.via}: connection refused; is it running?"
    wait_until(lambda: dead in [event["reason"] for event in client.events("Unpublished")])
    proxy.start()
    wait_until(lambda: len(client.events("Published")) > 1)
    sock = peers.connect(server.service_port)
    sock.sendall(b"after")
    assert read_exactly(sock, 5) == b"after"


@pytest.mark.parametrize("kind", [kind for kind in PROXIES if kind.values[0] in WITH_USERS])
@pytest.mark.parametrize("given", ["none", "wrong"])
def test_a_proxy_that_asks_for_a_user(
    peers: Peers, start_proxy: Start, server: RelayProcess, kind: str, given: str
) -> None:
    """It is said what is missing, or wrong, and that ends a client that is not to try again."""
    proxy = start_proxy(kind, users=True)
    via = proxy.via.replace(f"ann:{CANARY}@", "" if given == "none" else f"ann:{CANARY}-wrong@")
    words = f"{HOST}:{server.relay_port}", "1", "--exit-on-refusal"
    env = {"TCPRELAY_VIA": via, "TCPRELAY_TOKEN": TOKEN}
    client = peers.program(sys.executable, "-m", "tcprelay", "client", *words, env=env)
    assert client.wait() == 3
    says = "asks for a user and a password" if given == "none" else "does not accept the user and the password of --via"
    assert says in client.output
    assert "ending, since no link can be had" in client.output
    assert not find_secrets(client.output)


@pytest.mark.parametrize("kind", [kind for kind in PROXIES if kind.values[0] != "microsocks"])
def test_a_proxy_whose_rules_forbid_it(peers: Peers, start_proxy: Start, server: RelayProcess, kind: str) -> None:
    """Most allow certain ports alone."""
    proxy = start_proxy(kind, ports=(443,))
    client = start_client(peers, server, 1, proxy.via)
    reason = client.wait_event("Unpublished", lasting=True)["reason"]
    assert f"refuses connections to {HOST}:{server.relay_port}" in reason


@pytest.mark.parametrize("kind", PROXIES)
def test_a_relay_server_that_is_not_there(peers: Peers, start_proxy: Start, kind: str) -> None:
    """Then it is the relay server that is missing, as seen from the proxy, and the client goes on trying."""
    proxy, port = start_proxy(kind), free_port()
    place = "--relay-host", HOST, "--relay-port", str(port), "--port", "1"
    client = peers.relay_process("client", *place, "--num-conn", "1", env={"TCPRELAY_VIA": proxy.via})
    reason = client.wait_event("Unpublished", lasting=False)["reason"]
    assert f"cannot reach {HOST}:{port}" in reason, reason


@pytest.mark.peer("squid")
def test_a_name_that_only_the_proxy_knows(peers: Peers, start_proxy: Start, server: RelayProcess) -> None:
    """No name server has it, and this host does not either."""
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:  # where the user whom squid becomes can read it
        hosts.write(f"{HOST} relay.internal\n")
        hosts.flush()
        os.chmod(hosts.name, 0o644)
        proxy = start_proxy("squid", hosts=hosts.name)
        start_client(peers, server, 1, proxy.via, "--tls", host="relay.internal").wait_event("Published")


@pytest.mark.parametrize("kind", [kind for kind in PROXIES if kind.values[0] in ("tinyproxy", "microsocks")])
def test_everything_over_ipv6(peers: Peers, start_proxy: Start, kind: str) -> None:
    """The proxy's address, and the relay server's."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this host")
    proxy = start_proxy(kind, host="::1")
    command = "--relay-port", "0", "--service-port", "0", "--hostname", "::1"
    server = peers.relay_process("server", *command, env={"TCPRELAY_TOKEN": TOKEN})
    start_client(peers, server, 1, proxy.via, host="::1").wait_event("Published")
    assert proxy.via.endswith(f"://[::1]:{proxy.port}")
