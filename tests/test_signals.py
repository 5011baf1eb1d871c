"""What signals, terminals and children say to a command, and how long it then takes."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from _tcprelay.signals import Signals
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline, wait_for

from .conftest import PATIENCE, replace, wait_until
from .watch import catches
from .peers import HOST, ROOT, Peers, find, free_port, is_listening

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="makes terminals and reads /proc as on Linux")


# --- Terminals ------------------------------------------------------------------------------------------------

RELOADED = "the configuration is reloaded"
SESSION = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A terminal with a shell, and a relay server that the shell has started there in the foreground.

    The server's log goes to a file, so that it can be read when the terminal is gone.
    """

    def __init__(self, stack: ExitStack, path: Path, workers: str, prefix: str = "") -> None:
        self.port, self.log = free_port(), path / "log"
        self._master, slave = os.openpty()
        command = f"{sys.executable} -m tcprelay server --relay-port {self.port} --service-port 0 --hostname {HOST}"
        script = f"echo $$ > {path}/pid; exec {command} --workers {workers} 2> {self.log}"
        shell = [find("bash"), "--norc", "-i", "-c", f"set -m; {prefix} sh -c '{script}' > /dev/null & fg; exit"]
        self._shell = subprocess.Popen([sys.executable, "-c", SESSION, *shell], cwd=ROOT, stdin=slave, stdout=slave,
                                       stderr=slave)  # fmt: skip
        os.close(slave)
        stack.callback(self._close)
        wait_until(lambda: is_listening(self.port) and "listening for clients of" in self.log.read_text())
        self.pid = int((path / "pid").read_text())

    def hang_up(self) -> None:
        """Close the terminal's window."""
        os.close(self._master)
        self._master = -1
        self._shell.wait(PATIENCE)

    def is_running(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def say(self, number: int) -> None:
        os.kill(self.pid, number)

    def reload(self) -> None:
        """Ask for it once it is heard: before serving begins SIGHUP is ignored."""
        before = self.log.read_text().count(RELOADED)
        wait_until(lambda: catches(self.pid, signal.SIGHUP))
        self.say(signal.SIGHUP)
        wait_until(lambda: self.log.read_text().count(RELOADED) > before)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def _close(self) -> None:
        if self._master >= 0:
            self.hang_up()
        if self.is_running():
            os.kill(self.pid, signal.SIGTERM)
            wait_until(lambda: not self.is_running())


@pytest.mark.peer("bash")
def test_a_terminal_that_closes_ends_what_runs_in_it(workers: str, tmp_path: Path) -> None:
    """Before that, SIGHUP from ``kill`` is a reload; its ports are free afterwards."""
    with ExitStack() as stack:
        terminal = Terminal(stack, tmp_path, workers)
        terminal.reload()
        terminal.hang_up()
        wait_until(lambda: not terminal.is_running())
        assert not is_listening(terminal.port)


@pytest.mark.peer("bash", "nohup", "setsid")
@pytest.mark.parametrize("prefix", ["nohup", "setsid"])
def test_what_was_told_to_outlive_its_terminal_does(workers: str, tmp_path: Path, prefix: str) -> None:
    """With nohup, or in a session of its own; SIGHUP is a reload, also afterwards."""
    with ExitStack() as stack:
        terminal = Terminal(stack, tmp_path, workers, prefix)
        terminal.hang_up()
        terminal.reload()
        assert terminal.is_running() and is_listening(terminal.port)


def test_a_terminal_that_closes_is_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and a shell may both tell of it: the second time does not cut the drain short."""
    gone = threading.Event()
    replace(monkeypatch, "is_terminal_gone", gone.is_set)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Signals() as signals:
            signals.begin()
            assert signals.wait() == signal.SIGCHLD
            said = []
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
                said.append(signals.wait())
                gone.set()
            assert said == [signal.SIGHUP, signal.SIGTERM, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


# --- Children of others ---------------------------------------------------------------------------------------

ORPHANS = """
import os, socket, subprocess, sys, time
port = sys.argv[1]
relay = [sys.executable, "-m", "tcprelay", "server", "--relay-port", port, "--service-port", "0", "--hostname",
         "127.0.0.1", "--workers", sys.argv[2], "--drain-timeout", "0"]
if not os.fork():
    for _ in range(5):  # each leaves a child of its own behind
        subprocess.run(["sh", "-c", "sleep 0.2 &"], check=True)
    while True:
        try:
            socket.create_connection(("127.0.0.1", int(port))).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    subprocess.run(["sh", "-c", "sleep 0.7 &"], check=True)
    time.sleep(0.5)
    os._exit(0)  # while the relay serves, as the last one that it has left
os.execv(sys.executable, relay)
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def states_of_children(pid: int) -> str:
    states = ""
    for child in children_of(pid):
        with suppress(OSError):
            states += Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    return states


@pytest.mark.peer("unshare")
def test_process_1_collects_orphans(workers: str) -> None:
    """Zombies that others leave behind go, its own workers stay, and SIGTERM ends it with status 0."""
    if os.geteuid():
        pytest.skip("needs to be root")
    port = free_port()
    command = ["unshare", "-pf", "--mount-proc", "--kill-child", sys.executable, "-c", ORPHANS, str(port), workers]
    outer = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port), 3 * PATIENCE)
        [first] = children_of(outer.pid)
        wait_until(lambda: len(children_of(first)) == int(workers))  # the orphans have come and gone
        assert "Z" not in states_of_children(first)
        os.kill(first, signal.SIGTERM)
        assert outer.wait(2 * PATIENCE) == 0
    finally:
        outer.kill()
        outer.wait(PATIENCE)


# --- How long the end takes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "stuffed"])
def test_the_end_comes_a_second_after_the_drain_at_most(peers: Peers, workers: str, role: str, silent: bool) -> None:
    """With a connection on which nobody says a word, or whose service does not read."""
    done = threading.Event()
    service = peers.service(lambda sock: done.wait(3 * PATIENCE))
    peers._stack.callback(done.set)
    server, client = peers.relay(service.port, "--drain-timeout", "1")
    sock = peers.connect(server.service_port)
    client.wait_event("ConnectionOpened")
    if not silent:
        sock.settimeout(0.3)
        with suppress(TimeoutError):
            while True:
                sock.sendall(bytes(65536))
    relay = {"server": server, "client": client}[role]
    began = time.monotonic()
    relay.signal(signal.SIGTERM)
    assert relay.wait() == 0
    assert 1.0 <= time.monotonic() - began < 2.5
    wait_until(lambda: relay.events("ConnectionClosed"))


def test_what_is_flushed_does_not_hold_up_the_end(peers: Peers, workers: str) -> None:
    """A service has broken off, and its last bytes are on their way to a service client that does not read: it has
    the drain time-out for that, and not another five seconds."""
    go = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(bytes(200_000))
        go.wait(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    service = peers.service(serve)
    peers._stack.callback(go.set)
    server, client = peers.relay(service.port, "--drain-timeout", "0.2")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect((HOST, server.service_port))
        server.wait_event("ConnectionOpened")
        wait_until(lambda: unread(sock))
        go.set()
        client.wait_event("ConnectionClosed")
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 2.5


def unread(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def test_a_thread_that_cannot_be_woken_does_not_hold_up_the_end() -> None:
    """Looking up a name, say.  As long as others leave, they are waited for."""
    threads, stuck = Threads(), threading.Event()
    threads.start(stuck.wait)
    for number in range(8):
        threads.start(time.sleep, 0.3 * number)
    began = time.monotonic()
    assert threads.end(Deadline(60)) == ["wait"]
    assert 2.1 <= time.monotonic() - began < PATIENCE
    stuck.set()
    assert threads.end(Deadline(PATIENCE)) == []


def test_sighup_before_serving_is_no_end() -> None:
    """There is nothing to reload yet, and whoever waits for a name server goes on; SIGTERM ends it."""
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(TimeoutError):
            wait_for(signals.fileno(), select.POLLIN, Deadline(0.05))
        signals.begin()
        assert signals.wait() == signal.SIGCHLD
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.wait() == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wait() == signal.SIGTERM
