"""Several relay servers, one name: what stands before their service ports, and what service clients notice when one of
them is killed, stopped, drained or started again.  The recipes are those of docs/reliability.md."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from .conftest import PATIENCE, echo, read_exactly, wait_until
from .peers import HOST, ROOT, Peers, RelayProcess, curl, find, free_port, run

TOKEN = "a long and random secret"
PROXY = "127.0.0.3"
"""HAProxy's own address."""
OTHER = "127.0.0.9"
"""Where the service client with the real address comes from."""
BAR = 2.0
"""Seconds after which new connections are fine, after any single fault."""
SLOW = 1.0
"""Seconds that a connection may take before it counts as an error: they take milliseconds."""


def recipe() -> str:
    """The HAProxy configuration in docs/reliability.md."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = re.search(r"^```haproxy[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


class Front:
    """Two relay servers with one relay client of both, and HAProxy before them as the recipe says."""

    def __init__(self, peers: Peers, workers: str) -> None:
        self.peers, self.port = peers, free_port()
        self.target = peers.service(echo)
        self.ports = [{name: free_port() for name in ("relay", "service", "status")} for _ in range(2)]
        self.servers = [self.start(number) for number in range(2)]
        relays = [f"{HOST}:{ports['relay']}" for ports in self.ports]
        self.client = peers.relay_process(
            "client", "--relay", relays[0], "--relay", relays[1], "--port", str(self.target.port), "--token", TOKEN,
            "--num-conn", "8",
        )  # fmt: skip
        for relay in relays:
            self.client.wait_event("Published", relay=relay)
        self.admin = peers.path / "haproxy.sock"
        config = peers.path / "haproxy.cfg"
        text = recipe()
        for place, to in (
            (":2222", f"{HOST}:{self.port}"),
            ("192.0.2.11:2222", f"{HOST}:{self.ports[0]['service']}"),
            ("192.0.2.12:2222", f"{HOST}:{self.ports[1]['service']}"),
            ("/run/haproxy/admin.sock", str(self.admin)),
        ):
            assert place in text
            text = text.replace(place, to, 1)
        assert "send-proxy-v2" in text  # from an address of its own: relay clients come from this host, too
        text = text.replace("send-proxy-v2", f"send-proxy-v2 source {PROXY}")
        for ports in self.ports:
            assert "port 9090" in text
            text = text.replace("port 9090", f"addr {HOST} port {ports['status']}", 1)
        config.write_text(text)
        peers.program(find("haproxy"), "-f", str(config), "-db").wait_until_listening(self.port)
        wait_until(self.admin.exists)  # it has several listeners, and makes one after another
        wait_until(lambda: self.ask("show servers state").count(" 2 0 ") >= 2)

    def start(self, number: int) -> RelayProcess:
        ports = self.ports[number]
        return self.peers.relay_process(
            "server", "--hostname", HOST, "--relay-port", str(ports["relay"]), "--service-port", str(ports["service"]),
            "--status", str(ports["status"]), "--token", TOKEN, "--accept-proxy-protocol", PROXY,
        )  # fmt: skip

    def ask(self, words: str) -> str:
        """What HAProxy says on its admin socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.admin))
            sock.sendall(f"{words}\n".encode())
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()


class Load:
    """Service clients that come one after another, some at a time, each with a request; when they had an error."""

    AT_ONCE = 4

    def __init__(self, port: int, patience: float = SLOW) -> None:
        self._port, self._patience = port, patience
        self.errors: list[float] = []
        self.served = 0
        self._lock = threading.Lock()  # over both
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._come) for _ in range(self.AT_ONCE)]

    def _come(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                with socket.create_connection((HOST, self._port), self._patience) as sock:
                    sock.settimeout(self._patience)
                    sock.sendall(b"hello")
                    read_exactly(sock, 5)
                with self._lock:
                    self.served += 1
            except (OSError, AssertionError):
                with self._lock:
                    self.errors.append(began)
            self._over.wait(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def goes_on(self, seconds: float) -> None:
        """That long nothing happens to them, but that they are served."""
        until, before = time.monotonic() + seconds, self.served
        wait_until(lambda: time.monotonic() >= until)
        assert self.served > before

    def last_error(self, since: float) -> float:
        """How long after that moment the last one that had an error has come; 0 where none had."""
        return max((began - since for began in self.errors if began >= since - SLOW), default=0.0)


@pytest.fixture
def front(peers: Peers, workers: str) -> Front:
    return Front(peers, workers)


@pytest.mark.peer("haproxy")
def test_the_service_learns_the_real_address(front: Front) -> None:
    """Through HAProxy, and whichever relay server it takes."""
    seen = set()
    for _ in range(4):
        with socket.create_connection((HOST, front.port), PATIENCE, (OTHER, 0)) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            seen.add("{}:{}".format(*sock.getsockname()))
    wait_until(lambda: seen <= {event["peer"] for one in front.servers for event in one.events("ConnectionClosed")})
    wait_until(lambda: seen <= {event["peer"] for event in front.client.events("ConnectionOpened")})
    assert all(server.events("ConnectionOpened") for server in front.servers)


@pytest.mark.peer("haproxy")
def test_a_relay_server_that_is_killed(front: Front) -> None:
    """Errors are for those in flight on it; when it is back it is used again."""
    with Load(front.port) as load:
        load.goes_on(0.5)
        front.servers[0].kill()
        killed = time.monotonic()
        load.goes_on(BAR + 1.0)
        assert load.last_error(killed) < BAR
        assert len(load.errors) <= Load.AT_ONCE * 2
        count = len(load.errors)
        again = front.start(0)
        again.wait_event("ConnectionOpened")
        load.goes_on(0.5)
    assert len(load.errors) == count
    show("killed", load, killed)


@pytest.mark.peer("haproxy")
def test_a_relay_server_that_is_stopped(front: Front) -> None:
    """As by SIGSTOP, or a host that hangs: what comes to it waits in vain until HAProxy has noticed."""
    with Load(front.port) as load:
        load.goes_on(0.5)
        pid = front.servers[0].process.pid
        pids = [pid, *(int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        for one in pids:
            os.kill(one, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            load.goes_on(BAR + SLOW + 1.0)
            assert load.last_error(stopped) < BAR + 1.0
        finally:
            for one in pids:
                os.kill(one, signal.SIGCONT)
        wait_until(lambda: front.ask("show servers state").count(" 2 0 ") >= 2)
        count = len(load.errors)
        load.goes_on(1.0)
    assert len(load.errors) == count
    show("stopped", load, stopped)


@pytest.mark.peer("haproxy")
def test_a_relay_server_that_is_drained_loses_none(front: Front) -> None:
    """HAProxy is told first; then it ends when its connections have, and is started anew: no service client notices."""
    with ExitStack() as stack, Load(front.port, PATIENCE) as load:
        held = [stack.enter_context(socket.create_connection((HOST, front.port), PATIENCE)) for _ in range(8)]
        for sock in held:
            sock.sendall(b"x")
            read_exactly(sock, 1)
        front.ask("set server relays/one state drain")
        load.goes_on(0.3)
        front.servers[0].signal(signal.SIGTERM)
        front.servers[0].wait_event("Draining")
        load.goes_on(0.5)
        for sock in held:  # those on the server that ends as well
            sock.sendall(b"y")
            assert read_exactly(sock, 1) == b"y"
            sock.close()
        assert front.servers[0].wait() == 0
        again = front.start(0)
        again.wait_event("ClientUp")
        front.ask("set server relays/one state ready")
        again.wait_event("ConnectionOpened")
        load.goes_on(0.5)
    assert load.errors == []
    show("drained", load, 0.0)


@pytest.mark.peer("curl")
def test_a_name_with_two_addresses(peers: Peers, workers: str) -> None:
    """By DNS alone: a service client that tries all addresses of a name, as curl does, is served while one lives."""
    target = peers.service(answer_http)
    port, relay_port = free_port(), free_port()
    words = ["--relay-port", str(relay_port), "--service-port", str(port), "--token", TOKEN]
    hosts = "127.0.0.1", "127.0.0.2"
    first, _ = (peers.relay_process("server", "--hostname", host, *words) for host in hosts)
    relays = [word for host in hosts for word in ("--relay", f"{host}:{relay_port}")]
    client = peers.relay_process("client", *relays, "--port", str(target.port), "--token", TOKEN)
    for host in hosts:
        client.wait_event("Published", relay=f"{host}:{relay_port}")
    command = curl("--resolve", f"relay.example:{port}:127.0.0.1,127.0.0.2", f"http://relay.example:{port}/")
    assert run(*command).stdout == b"served"
    first.kill()
    for _ in range(5):
        done = run(*command)
        assert (done.returncode, done.stdout) == (0, b"served"), done.stderr


def answer_http(sock: socket.socket) -> None:
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nserved")


def show(what: str, load: Load, since: float) -> None:
    """For whoever measures: pytest -s."""
    last = load.last_error(since) if since else 0.0
    print(f"{what}: {load.served} served, {len(load.errors)} errors, the last one {last:.2f} s after the fault")
