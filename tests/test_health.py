"""Health for whoever restarts things: a service manager's watchdog, and relays one of whose threads hangs."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from _tcprelay.signals import watchdog_seconds
from _tcprelay.status.survey import AWAY
from _tcprelay.watch import Pulse
from tcprelay import RelayServer

from .conftest import PATIENCE, connect, echo, read_exactly, wait_until
from .peers import HOST, ROOT, Peers, RelayProcess, workers_of
from .test_desk import ask, body_of, port_of

HANGING = """
import os, time
from _tcprelay import watch
watch.Pulse.LATE, watch.Pulse.EVERY = 3.0, 0.2  # the keepers look once a second
sweep = watch.Splices.sweep
def hang(self):
    while os.path.exists({path!r} + "-all") or os.path.exists({path!r} + "-" + str(os.getpid())):
        time.sleep(0.02)
    sweep(self)
watch.Splices.sweep = hang
"""


class Manager:
    """A service manager's end of NOTIFY_SOCKET, with a watchdog: it hears who lives, and when it has heard it last."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path / "notify"))
        self.environment = {"NOTIFY_SOCKET": str(path / "notify"), "WATCHDOG_USEC": "6000000"}
        hanging = path / "hanging"
        hanging.mkdir()
        (hanging / "sitecustomize.py").write_text(HANGING.format(path=str(path / "hang")))
        self.environment["PYTHONPATH"] = f"{hanging}{os.pathsep}{ROOT}"
        self._hang = path / "hang"

    def hang(self, pid: int = 0) -> Path:
        """Have the keeper of a process hang, or that of all: while this file is there."""
        path = self._hang.with_name(f"hang-{pid or 'all'}")
        path.touch()
        return path

    def hears(self, word: str, seconds: float = PATIENCE) -> bool:
        """Whether it hears this within so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.sock.settimeout(left)
            try:
                if self.sock.recv(1000).decode().startswith(word):
                    return True
            except TimeoutError:
                break
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    found = Manager(tmp_path)
    yield found
    found.sock.close()


def start_server(peers: Peers, manager: Manager, *options: str) -> RelayProcess:
    words = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, "--status", "0"
    return peers.relay_process("server", *words, *options, env=manager.environment)


def test_the_watchdog_hears_from_who_lives(peers: Peers, manager: Manager, workers: str) -> None:
    """Again and again, of both roles; and once the end has begun, too, for connections may take their time."""
    server = start_server(peers, manager)
    assert manager.hears("READY=1")
    for _ in range(2):
        assert manager.hears("WATCHDOG=1")
    target = peers.service(lambda sock: sock.recv(1))
    peers.client(server.relay_port, target.port)
    sock = peers.connect(server.service_port)
    server.wait_event("ConnectionOpened")
    server.signal(signal.SIGTERM)
    assert manager.hears("STOPPING=1")
    assert manager.hears("WATCHDOG=1")
    sock.close()
    assert server.wait() == 0


def test_a_client_tells_it_too(peers: Peers, manager: Manager, workers: str) -> None:
    words = "--relay-host", HOST, "--relay-port", "1", "--port", "1"
    peers.relay_process("client", *words, env=manager.environment)
    for _ in range(2):
        assert manager.hears("WATCHDOG=1")


def test_a_relay_whose_keeper_hangs_is_restarted(peers: Peers, manager: Manager) -> None:
    """The watchdog hears nothing any more, and does what systemd does: SIGABRT, and another process.  /healthz has said
    why in between."""
    server = start_server(peers, manager, "--workers", "0")
    address = port_of(server)
    assert manager.hears("WATCHDOG=1")
    hangs = manager.hang()
    wait_until(lambda: ask(address, "/healthz").status == 503)
    assert b"the keeper has not moved for" in ask(address, "/healthz").body  # type: ignore[attr-defined]
    while manager.hears("WATCHDOG=1", 4.0):
        pass
    server.end_by(signal.SIGABRT)
    hangs.unlink()
    again = start_server(peers, manager, "--workers", "0")
    assert manager.hears("WATCHDOG=1")
    wait_until(lambda: ask(port_of(again), "/healthz").status == 200)


def test_of_workers_only_the_one_that_hangs_is_ended(peers: Peers, manager: Manager) -> None:
    """Connections of the other live on, systemd hears that all is well, and another worker takes its place."""
    server = start_server(peers, manager, "--workers", "2")
    server.expected_error = "worker "
    target = peers.service(echo)
    peers.client(server.relay_port, target.port, "--num-conn", "8", "--workers", "0")
    socks = [peers.connect(server.service_port) for _ in range(8)]
    for sock in socks:
        sock.sendall(b"x")
        read_exactly(sock, 1)
    one, other = workers_of(server)
    manager.hang(one)
    server.wait_message("worker 0 has not moved for 6 s, and is killed")
    wait_until(lambda: len(now := workers_of(server)) == 2 and other in now and one not in now)
    alive = 0
    for sock in socks:
        try:
            sock.sendall(b"y")
            alive += sock.recv(1) == b"y"
        except ConnectionError:
            pass
    assert 0 < alive < 8
    assert manager.hears("WATCHDOG=1")
    wait_until(lambda: ask(port_of(server), "/healthz").status == 200)


def test_a_relay_client_that_died_while_a_slow_reader_still_gets_its_bytes(peers: Peers, workers: str) -> None:
    """Its last bytes, and the end behind them, wait for that one; all others are to hear that it is not there."""
    is_full = threading.Event()

    def serve(sock: socket.socket) -> None:
        while select.select([], [sock], [], 3.0)[1]:
            sock.send(bytes(65536))
        is_full.set()
        sock.recv(1)

    server = peers.relay_process(
        "server", "--relay-port", "0", "--service-port", "0", "--hostname", HOST, "--status", "0"
    )
    words = [
        *("--host", HOST, "--port", str(peers.service(serve).port), "--num-conn", "1"),
        *("--relay-host", HOST, "--relay-port", str(server.relay_port)),
    ]
    client = peers.relay_process("client", *words)
    slow = connect((HOST, server.service_port))
    with slow:
        assert is_full.wait(PATIENCE)
        before = health(server)
        client.end_by(signal.SIGKILL)
        answer = wait_until(lambda: (found := health(server))[0] == 503 and found)
        assert (before, answer) == ((200, b"well\n"), (503, f"service default: {AWAY}\n".encode()))
        assert len(slow.recv(1)) == 1
        peers.relay_process("client", *words)
        wait_until(lambda: health(server) == (200, b"well\n"))


def health(server: RelayProcess) -> tuple[int, bytes]:
    answer = ask(port_of(server), "/healthz?service=default")
    return answer.status, body_of(answer)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "no"}, 0.0),
    ],
)
def test_who_has_a_watchdog(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seconds: float) -> None:
    """Whose process systemd means (WATCHDOG_PID): a shell between them hands the variables on."""
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("NOTIFY_SOCKET", "/somewhere")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert watchdog_seconds() == seconds


def test_a_program_that_embeds_a_relay_tells_no_watchdog(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one of its own."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.setenv(name, manager.environment[name])
    with RelayServer(0, 0):
        assert not manager.hears("WATCHDOG", 1.0)


def test_a_thread_that_hangs_is_not_covered_by_the_one_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper tells that all live: not where the acceptor does not, and again once it does."""
    now, signs = [1000.0], list[float]()
    monkeypatch.setattr("_tcprelay.watch.time.monotonic", lambda: now[0])
    pulse = Pulse()
    pulse.have_signed(lambda: signs.append(now[0]), 5.0)
    pulse.beat("acceptor")
    pulse.keep("keeper")
    now[0] += Pulse.LATE + 1
    pulse.keep("keeper")
    assert signs == [1000.0]
    assert pulse.complaints() == [f"the acceptor has not moved for {Pulse.LATE + 1:.0f} s"]
    pulse.beat("acceptor")
    pulse.keep("keeper")
    now[0] += 1
    pulse.keep("keeper")  # not more often than every five seconds
    assert signs == [1000.0, 1000.0 + Pulse.LATE + 1]
