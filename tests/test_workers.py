"""Relays that spread over worker processes: the commands themselves, and what happens to them from outside.

What the workers have in common with a relay in one process the other tests show, which run with both.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from _tcprelay.link import Link
from _tcprelay.messages import MESSAGE_SIZE, encode_message, receive_message, send_message
from _tcprelay.processes import WorkerProcess
from _tcprelay.protocol import CLIENT, FAIL, HELLO, START, WELCOME
from _tcprelay.server.account import HANDED
from _tcprelay.server.workers import ServerWorkers
from _tcprelay.streams import Stream
from _tcprelay.waiting import Deadline
from tcprelay import ClientDown, ClientUp, ConnectionFailed, RelayServer

from .certificates import Certificates, tls_context
from .conftest import PATIENCE, Recorder, echo, read_all, read_exactly, wait_until
from .ends import TLSEnd
from .peers import HOST, Peers, RelayProcess, is_listening, workers_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TWO = ("--workers", "2")
DEBUG = ("--log-level", "debug")


# --- Looking at processes and connections ---------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    """Whether a process has ended; who is responsible for orphans may not have reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def holder(relay: RelayProcess, local: tuple[str, int], remote: tuple[str, int]) -> int:
    """Which worker of a relay has the connection between these addresses, seen from the relay; 0 is none."""
    ends = [f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}" for host, port in (local, remote)]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    inodes = {f"socket:[{line[9]}]" for line in lines if line[1:3] == ends}
    for pid in workers_of(relay):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}") in inodes:
                    return pid
    return 0


class Witness:
    """A service that echoes, and notes how its connections ended, by the eight bytes that each begins with."""

    def __init__(self, peers: Peers) -> None:
        self.saw: dict[bytes, str] = {}
        self.peers: dict[bytes, tuple[str, int]] = {}
        self.names: list[bytes] = []
        self.port = peers.service(self._serve).port

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(3 * PATIENCE)
        name = read_exactly(sock, 8)
        self.peers[name] = sock.getpeername()
        self.names.append(name)
        sock.sendall(name)
        saw = "a clean end"
        try:
            echo(sock)
        except OSError as error:
            saw = type(error).__name__
        self.saw[name] = saw


class Connection:
    """A service client's connection to a `Witness`, which has answered."""

    def __init__(self, peers: Peers, server: RelayProcess, witness: Witness, number: int) -> None:
        self.name = b"%08d" % number
        self.witness = witness
        self.sock = peers.connect(server.service_port)
        self.sock.sendall(self.name)
        assert read_exactly(self.sock, 8) == self.name

    def worker_of(self, server: RelayProcess) -> int:
        return holder(server, self.sock.getpeername(), self.sock.getsockname())

    def client_worker_of(self, client: RelayProcess) -> int:
        return holder(client, self.witness.peers[self.name], (HOST, self.witness.port))

    def goes_on(self) -> None:
        """It carries bytes as it should."""
        data = random.Random(self.name).randbytes(100_000)
        sender = threading.Thread(target=self.sock.sendall, args=(data,))
        sender.start()
        assert read_exactly(self.sock, len(data)) == data
        sender.join(PATIENCE)

    def is_broken(self) -> None:
        """Both ends see an error."""
        with pytest.raises(ConnectionResetError):
            self.sock.recv(1)
        assert wait_until(lambda: self.witness.saw.get(self.name)) == "ConnectionResetError"

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)
        assert read_all(self.sock) == b""
        self.sock.close()


def wait_events(relay: RelayProcess, kind: str, count: int) -> list[dict[str, object]]:
    wait_until(lambda: len(relay.events(kind)) >= count)
    return relay.events(kind)


def wait_workers(relay: RelayProcess, without: set[int], count: int = 2) -> list[int]:
    """The workers, once there are so many and none of `without` is among them."""
    return list(wait_until(lambda: len(now := workers_of(relay)) == count and not without & set(now) and now))


def wait_up(relay: RelayProcess) -> None:
    """Wait until both workers have told their parent that they serve, and started the thread that comes after that."""
    wait_until(lambda: sum(len(os.listdir(f"/proc/{pid}/task")) >= 5 for pid in workers_of(relay)) == 2)


def is_refused(server: RelayProcess) -> bool:
    """Whether a service client is turned away."""
    try:
        with socket.create_connection((HOST, server.service_port), PATIENCE) as sock:
            sock.sendall(b"refused?")
            return not sock.recv(8)
    except ConnectionResetError:
        return True


def is_told(relay: RelayProcess, start: str, count: int = 1) -> None:
    """The log says so, so many times."""
    relay.wait_message(start)
    assert relay.output.count(f'"message": "{start}') == count


# --- What there is --------------------------------------------------------------------------------------------


def test_connections_are_spread_over_the_workers_of_both_roles(peers: Peers) -> None:
    """Each worker has some of them, and the log of several reads like that of one."""
    witness = Witness(peers)
    server, client = peers.relay(witness.port, *TWO)
    connections = [Connection(peers, server, witness, number) for number in range(16)]
    assert {one.worker_of(server) for one in connections} == set(workers_of(server))
    assert {one.client_worker_of(client) for one in connections} == set(workers_of(client))
    for one in connections:
        one.goes_on()
        one.end()
    client.signal(signal.SIGTERM)
    assert client.wait() == 0
    server.wait_event("ClientDown")
    wait_events(server, "ConnectionClosed", 16)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    once = ["Listening", "Listening", "ClientUp", "ClientDown"]
    assert [e["event"] for e in map(server._parse, server.lines) if e.get("event") in once] == once
    assert len(client.events("Published")) == 1
    for relay in (server, client):
        assert [record["reason"] for record in relay.events("ConnectionClosed")] == [""] * 16
        assert {record["id"] for record in relay.events("ConnectionOpened")} == {
            record["id"] for record in relay.events("ConnectionClosed")
        }


def test_links_are_spread_although_their_handshakes_take_long(peers: Peers) -> None:
    """Links that are still in their handshakes count, or over a long path all would go to one worker."""
    server = peers.server(*TWO)
    for _ in range(8):
        peers.connect(server.relay_port)
    wait_until(lambda: sum(count_links(server, pid) for pid in workers_of(server)) == 8)
    assert [count_links(server, pid) for pid in workers_of(server)] == [4, 4]


def count_links(server: RelayProcess, pid: int) -> int:
    """How many connections of the relay port a process has."""
    end = f":{server.relay_port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    inodes = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(end) and line[3] == "01"}
    found = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/{pid}/fd/{number}") in inodes
    return found


def test_what_a_burst_leaves_behind_goes(peers: Peers) -> None:
    """A worker keeps its main thread, the log's, the one that ends it, the keeper, and one that waits for the next."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO)
    burst = [Connection(peers, server, witness, number) for number in range(24)]
    assert all(count_threads(pid) > 5 for pid in workers_of(server))
    for connection in burst:
        connection.end()
    wait_until(lambda: [count_threads(pid) for pid in workers_of(server)] == [5, 5])


def count_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_no_workers_is_one_process(peers: Peers) -> None:
    """With --workers 0, and in a client whose only link cannot be shared."""
    witness = Witness(peers)
    server = peers.server("--workers", "0")
    client = peers.client(server.relay_port, witness.port, "--workers", "2", "--num-conn", "1")
    Connection(peers, server, witness, 1).goes_on()
    assert workers_of(server) == workers_of(client) == []


# --- Workers die ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_worker_that_is_killed_takes_its_own_connections_alone(peers: Peers, role: str) -> None:
    """Both ends of those see an error, the others go on, and another worker takes its place and is used."""
    witness = Witness(peers)
    server, client = peers.relay(witness.port, *TWO)
    relay = {"server": server, "client": client}[role]
    relay.expected_error = "worker "

    def where(one: Connection) -> int:
        return one.worker_of(server) if role == "server" else one.client_worker_of(client)

    connections = [Connection(peers, server, witness, number) for number in range(12)]
    by_worker: dict[int, list[Connection]] = {}
    for one in connections:
        by_worker.setdefault(where(one), []).append(one)
    victim, survivor = workers_of(relay)
    assert set(by_worker) == {victim, survivor}
    os.kill(victim, signal.SIGKILL)
    for one in by_worker[victim]:
        one.is_broken()
    for one in by_worker[survivor]:
        one.goes_on()
    [fresh] = set(wait_workers(relay, {victim})) - {survivor}
    numbers = iter(range(12, 10_000))
    wait_until(lambda: where(Connection(peers, server, witness, next(numbers))) == fresh)
    for one in by_worker[survivor]:
        one.goes_on()
        one.end()
    is_told(relay, "worker ")
    assert len(server.events("ClientUp")) == 1 and not server.events("ClientDown")
    assert len(client.events("Published")) == 1 and not client.events("Unpublished")


@pytest.mark.parametrize("limit", ["--max-connections", "--max-per-address"])
def test_a_dead_worker_s_share_of_a_limit_is_free_again(peers: Peers, limit: str) -> None:
    """As many as died with it are let in again, and not one more."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO)
    server.close()
    limited = peers.server(*TWO, limit, "8")
    limited.expected_error = "worker "
    peers.client(limited.relay_port, witness.port, *TWO)
    # Else one gets them all.
    wait_until(lambda: min(count_links(limited, pid) for pid in workers_of(limited)) >= 2)
    connections = [Connection(peers, limited, witness, number) for number in range(8)]
    assert is_refused(limited)
    victim, _ = workers_of(limited)
    died = [one for one in connections if one.worker_of(limited) == victim]
    assert 0 < len(died) < 8
    os.kill(victim, signal.SIGKILL)
    for one in died:
        one.is_broken()
    limited.wait_message("worker ")
    for number in range(len(died)):
        Connection(peers, limited, witness, 100 + number)
    assert is_refused(limited)


def test_links_of_a_dead_worker_no_longer_count(peers: Peers) -> None:
    """--max-links-per-address is held over all workers, and a dead one's links leave it."""
    server = peers.server(*TWO, "--max-links-per-address", "4")
    server.expected_error = "worker "
    links = [peers.connect(server.relay_port) for _ in range(4)]
    wait_until(lambda: sum(count_links(server, pid) for pid in workers_of(server)) == 4)

    def answer() -> bytes:
        with socket.create_connection((HOST, server.relay_port), PATIENCE) as sock:
            sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                return sock.recv(4096)
            return b""

    assert b"--max-links-per-address" in answer()
    os.kill(workers_of(server)[0], signal.SIGKILL)
    server.wait_message("worker ")
    links += [peers.connect(server.relay_port) for _ in range(2)]
    assert b"--max-links-per-address" in answer()
    for link in links[-2:]:
        link.setblocking(False)
        with pytest.raises(BlockingIOError):
            link.recv(1)


def has_descriptors(relay: RelayProcess, count: int) -> bool:
    return count_descriptors(relay.process.pid) == count


def test_deaths_leave_nothing_behind_in_the_parent(peers: Peers) -> None:
    """Neither descriptors nor children, nor does the log say more than one line for each."""
    witness = Witness(peers)
    server, client = peers.relay(witness.port, *TWO, *DEBUG)
    wait_events(server, "LinkUp", 8)  # none is on its way through the parent
    server.expected_error = client.expected_error = "worker "
    before = {relay: count_descriptors(relay.process.pid) for relay in (server, client)}
    for _ in range(2):
        Connection(peers, server, witness, 1).sock.close()
        killed = {relay: set(workers_of(relay)) for relay in before}
        for pid in set.union(*killed.values()):
            os.kill(pid, signal.SIGKILL)
        for relay in before:
            wait_workers(relay, killed[relay])
    Connection(peers, server, witness, 2).goes_on()
    for relay, count in before.items():
        wait_until(functools.partial(has_descriptors, relay, count))
        is_told(relay, "worker ", 4)


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_parent_that_is_killed_takes_all_with_it(peers: Peers, role: str) -> None:
    """Its workers are gone at once, its ports free, and both ends of every connection see an error."""
    witness = Witness(peers)
    server, client = peers.relay(witness.port, *TWO)
    connections = [Connection(peers, server, witness, number) for number in range(8)]
    relay = {"server": server, "client": client}[role]
    ports, pids = [server.relay_port, server.service_port], workers_of(relay)
    relay.kill()
    wait_until(lambda: all(map(is_gone, pids)))
    for one in connections:
        one.is_broken()
    assert role == "client" or not any(map(is_listening, ports))


def test_a_parent_without_descriptors_goes_on(peers: Peers) -> None:
    """It cannot accept, nor replace a worker that dies; both come back when there are descriptors."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO)
    server.expected_error = ("cannot start worker", "worker ")
    connections = [Connection(peers, server, witness, number) for number in range(4)]
    victim, survivor = workers_of(server)
    living = [one for one in connections if one.worker_of(server) == survivor]
    pid, limits = server.process.pid, resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    with socket.create_connection((HOST, server.service_port), PATIENCE) as waiting:
        server.wait_event("AcceptPaused")
        os.kill(victim, signal.SIGKILL)
        server.wait_message("cannot start worker")
        assert workers_of(server) == [survivor]
        for one in living:
            one.goes_on()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        waiting.sendall(b"waiting.")
        assert read_exactly(waiting, 8) == b"waiting."
    wait_workers(server, {victim})
    wait_until(lambda: max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1 <= used)


@pytest.mark.parametrize("port", ["relay", "service"])
def test_a_worker_without_descriptors_goes_on(peers: Peers, port: str) -> None:
    """What it cannot take is reset and told; its connections go on, and then it takes others again."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO, *DEBUG)
    wait_events(server, "LinkUp", 8)
    connections = [Connection(peers, server, witness, number) for number in range(4)]
    wait_events(server, "LinkUp", 12)
    pids = workers_of(server)
    limits = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids]
    for pid, (_, hard) in zip(pids, limits, strict=True):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    number = server.relay_port if port == "relay" else server.service_port
    for _ in range(4):
        with pytest.raises(ConnectionResetError), socket.create_connection((HOST, number), PATIENCE) as sock:
            sock.recv(1)
    server.wait_message("cannot take a connection")
    for pid, before in zip(pids, limits, strict=True):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    for one in connections:
        one.goes_on()
    for number in range(10, 14):
        Connection(peers, server, witness, number).end()
    assert workers_of(server) == pids


def test_a_parent_that_was_told_to_ignore_the_death_of_children(peers: Peers) -> None:
    """Some shells and service managers hand that down; a worker is replaced all the same."""
    patch = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    server, victim = kill_worker_of(peers, patch)
    is_told(server, f"worker 0 (process {victim}) has ended by signal 9")


def test_a_worker_that_somebody_else_has_collected_is_replaced(peers: Peers) -> None:
    """A parent that goes on counting it as alive would send SIGKILL to whoever has its number by then."""
    patch = (
        "import os\nreal = os.waitpid\n"
        "def waitpid(pid, options):\n    real(pid, options)\n    raise ChildProcessError\n"
        "os.waitpid = waitpid\n"
    )
    server, victim = kill_worker_of(peers, patch)
    is_told(server, f"worker 0 (process {victim}) has ended with status 0")


def kill_worker_of(peers: Peers, patch: str) -> tuple[RelayProcess, int]:
    """Kill a worker of a server that has carried out `patch` first; returns when it is replaced."""
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, *TWO
    start = f"{patch}import sys, tcprelay\nsys.exit(tcprelay.main(sys.argv[4:]))"
    server = peers.relay_process("server", *command, wrapper=[sys.executable, "-c", start])
    server.expected_error = "worker "
    wait_up(server)
    victim, _ = workers_of(server)
    os.kill(victim, signal.SIGKILL)
    wait_workers(server, {victim})
    return server, victim


# --- Signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_connections_of_all_workers_finish_while_a_relay_drains(peers: Peers, role: str, how: str) -> None:
    """Ctrl-C reaches the workers as well, and only their parent counts."""
    witness = Witness(peers)
    group = "--drain-timeout", "60", *TWO
    server = peers.relay_process("server", "--relay-port", "0", "--service-port", "0", "--hostname", HOST, *group,
                                 wrapper=["setsid"])  # fmt: skip
    command = "--relay-host", HOST, "--relay-port", str(server.relay_port), "--host", HOST, "--port", str(witness.port)
    client = peers.relay_process("client", *command, *group, wrapper=["setsid"])
    client.wait_event("Published")
    connections = [Connection(peers, server, witness, number) for number in range(8)]
    ending = {"server": server, "client": client}[role]
    pids = workers_of(ending)
    if how == "SIGTERM":
        ending.signal(signal.SIGTERM)
    else:
        assert os.getpgid(pids[0]) == ending.process.pid
        os.killpg(ending.process.pid, signal.SIGINT)
    wait_until(lambda: sum(event["connections"] for event in ending.events("Draining")) == 8)
    for one in connections:
        one.goes_on()
        assert ending.process.poll() is None
        one.end()
    assert ending.wait() == 0
    assert all(map(is_gone, pids))
    assert {witness.saw[one.name] for one in connections} == {"a clean end"}


def test_a_second_signal_ends_all_workers_at_once(peers: Peers) -> None:
    """What is open is reset."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO, "--drain-timeout", "60")
    connections = [Connection(peers, server, witness, number) for number in range(4)]
    server.signal(signal.SIGTERM)
    wait_until(lambda: sum(event["connections"] for event in server.events("Draining")) == 4)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    for one in connections:
        one.is_broken()


def test_a_worker_that_is_stopped_does_not_keep_a_relay_from_ending(peers: Peers) -> None:
    """A second signal does not wait for it longer than for what else does not end."""
    patch = "import sys, tcprelay; from _tcprelay import processes; processes.JOIN_TIMEOUT = 0.3;"
    patch += "sys.exit(tcprelay.main(sys.argv[4:]))"
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, *TWO, "--drain-timeout", "60"
    server = peers.relay_process("server", *command, wrapper=[sys.executable, "-c", patch])
    server.expected_error = "worker "
    wait_up(server)
    os.kill(workers_of(server)[1], signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    wait_until(lambda: len(workers_of(server)) == 1)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    is_told(server, "worker 1 does not end, and is killed")


def test_orders_reach_a_worker_whose_channel_is_full(peers: Peers) -> None:
    """SIGTERM comes behind connections that a worker has not taken yet, and is not lost."""
    server = peers.server(*TWO, "--drain-timeout", "0")
    wait_up(server)
    pids = workers_of(server)
    for pid in pids:
        stop(pid)
    with ExitStack() as stack:
        with contextlib.suppress(ConnectionResetError):
            while not server.events("AcceptPaused"):  # no worker takes it
                stack.enter_context(socket.create_connection((HOST, server.relay_port), PATIENCE))
        port = server.relay_port
        server.signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(port))
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert server.wait(2 * PATIENCE) == 0
    assert "does not end" not in server.output


def test_who_comes_back_from_a_worker_that_ends_has_a_closing_record(peers: Peers) -> None:
    """Service clients that SIGTERM finds between parent and workers are reset, and each one is told."""
    server = peers.server(*TWO, *DEBUG)
    client = peers.client(server.relay_port, peers.service(echo).port, "--workers", "0")
    wait_events(server, "LinkUp", 8)
    pids = workers_of(server)
    for pid in pids:
        stop(pid)
    socks = [peers.connect(server.service_port) for _ in range(8)]
    wait_until(lambda: not unaccepted(server.service_port))
    client.kill()  # so that the links are gone when their workers look at them
    server.signal(signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert server.wait() == 0
    for sock in socks:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert [event["reason"] for event in server.events("ConnectionFailed")] == ["the relay server is ending"] * 8


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self._sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._sock.bind(str(path))
        self._sock.settimeout(PATIENCE)

    def hear(self) -> str:
        return self._sock.recv(1000).decode().partition("\n")[0]

    def hears_nothing(self) -> None:
        self._sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            self._sock.recv(1000)


def test_the_service_manager_hears_of_all_workers_together(peers: Peers, tmp_path: Path) -> None:
    """READY once when all are up, not when one is replaced; RELOADING and STOPPING once, too."""
    with ExitStack() as stack:
        manager = Manager(stack, tmp_path / "notify")
        command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST
        server = peers.relay_process("server", *command, *TWO, env=manager.environment)
        server.expected_error = "worker "
        assert manager.hear() == "READY=1"
        victim, _ = workers_of(server)
        os.kill(victim, signal.SIGKILL)
        wait_workers(server, {victim})
        server.signal(signal.SIGHUP)
        assert manager.hear() == "RELOADING=1"
        assert manager.hear() == "READY=1"
        server.signal(signal.SIGTERM)
        assert manager.hear() == "STOPPING=1"
        assert server.wait() == 0
        manager.hears_nothing()


@pytest.mark.parametrize("role", ["server", "client"])
def test_sigterm_while_it_starts(peers: Peers, tmp_path: Path, role: str) -> None:
    """It ends with status 0, whatever has begun, and does not say READY when it has said STOPPING."""
    with ExitStack() as stack:
        manager = Manager(stack, tmp_path / "notify")
        command = {
            "server": ("--relay-port", "0", "--service-port", "0", "--hostname", HOST),
            "client": ("--relay-host", HOST, "--relay-port", "1", "--port", "1"),
        }[role]
        relay = peers.relay_process(role, *command, *TWO, env=manager.environment)  # type: ignore[arg-type]
        wait_until(lambda: workers_of(relay))
        relay.signal(signal.SIGTERM)
        assert relay.wait() == 0
        heard = [manager.hear()]
        while heard[-1] != "STOPPING=1":
            heard.append(manager.hear())
        manager.hears_nothing()


def test_sighup_reaches_workers_of_today_and_tomorrow(peers: Peers, tmp_path: Path, certificates: Certificates) -> None:
    """A new token and a new certificate hold in all of them, and the log says so once."""
    token, cert, key = tmp_path / "token", tmp_path / "cert.pem", tmp_path / "key.pem"
    token.write_text("old\n")

    def install(name: str) -> bytes:
        cert.write_text(Path(certificates.path(f"{name}.pem")).read_text())
        key.write_text(Path(certificates.path(f"{name}.key")).read_text())
        return ssl.PEM_cert_to_DER_cert(cert.read_text())

    install("server")
    words = "--tls", "both", "--cert", str(cert), "--key", str(key), "--token-file", str(token)
    server = peers.server(*TWO, *words)
    server.expected_error = "worker "
    wait_up(server)
    fresh = install("rsa")
    token.write_text("new\n")
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    links = "--tls", "--ca-file", certificates.path("ca.pem"), *TWO
    witness = Witness(peers)

    def shown() -> dict[int, bytes]:
        """The certificate that each worker shows on the relay port."""
        found: dict[int, bytes] = {}
        context = tls_context()
        with ExitStack() as stack:
            while len(found) < 2:
                sock = stack.enter_context(socket.create_connection((HOST, server.relay_port), PATIENCE))
                secure = stack.enter_context(context.wrap_socket(sock))
                pid = holder(server, sock_address(secure, peer=True), sock_address(secure))
                found[pid] = secure.getpeercert(binary_form=True) or b""
        return found

    wait_until(lambda: set(shown().values()) == {fresh})
    client = peers.client(server.relay_port, witness.port, *links, "--token", "new")
    stranger = peers.relay_process("client", "--relay-host", HOST, "--relay-port", str(server.relay_port), "--port",
                                   "1", *links, "--token", "old")  # fmt: skip
    stranger.wait_event("Unpublished")
    victim, _ = workers_of(server)
    os.kill(victim, signal.SIGKILL)
    wait_workers(server, {victim})
    wait_until(lambda: set(shown().values()) == {fresh})
    assert not client.events("Unpublished")
    is_told(server, "the configuration is reloaded")


def sock_address(sock: socket.socket, peer: bool = False) -> tuple[str, int]:
    host, port = sock.getpeername() if peer else sock.getsockname()
    return host, port


# --- One queue ------------------------------------------------------------------------------------------------

ONE_LINK = ("--num-conn", "1", "--max-conn", "1")


def test_service_clients_are_served_in_the_order_in_which_they_came(peers: Peers) -> None:
    """With a single link, which each of them has in turn."""
    witness = Witness(peers)
    server, _ = peers.relay(witness.port, *TWO)
    server.close()
    server = peers.server(*TWO)
    peers.client(server.relay_port, witness.port, *ONE_LINK)
    first = Connection(peers, server, witness, 0)
    waiting = [peers.connect(server.service_port) for _ in range(20)]
    names = [b"%08d" % number for number in range(1, 21)]
    for sock, name in reversed(list(zip(waiting, names, strict=True))):
        sock.sendall(name)
        sock.shutdown(socket.SHUT_WR)
    first.end()
    for sock, name in zip(waiting, names, strict=True):
        assert read_all(sock) == name
    assert witness.names == [first.name, *names]


def test_service_clients_that_come_back_from_a_worker_keep_their_places(peers: Peers) -> None:
    """A worker whose links were lost when they arrived sends them back, in any order."""
    witness = Witness(peers)
    server = peers.server(*TWO, *DEBUG)
    gone = peers.client(server.relay_port, witness.port, "--num-conn", "8", "--workers", "0")
    wait_events(server, "LinkUp", 8)
    pids = workers_of(server)
    for pid in pids:
        stop(pid)
    waiting = [peers.connect(server.service_port) for _ in range(12)]
    wait_until(lambda: not unaccepted(server.service_port))
    gone.kill()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait_events(server, "LinkDown", 8)
    peers.client(server.relay_port, witness.port, *ONE_LINK)
    names = [b"%08d" % number for number in range(12)]
    for sock, name in reversed(list(zip(waiting, names, strict=True))):
        sock.sendall(name)
        sock.shutdown(socket.SHUT_WR)
    for sock, name in zip(waiting, names, strict=True):
        assert read_all(sock) == name
    assert witness.names == names


def stop(pid: int) -> None:
    """SIGSTOP, and wait until it has reached all threads."""
    os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    wait_until(lambda: all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads))


def unaccepted(port: int) -> int:
    """How many connections wait to be accepted at a port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(int(line[4].split(":")[1], 16) for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A")


@pytest.mark.parametrize("tls", [False, True])
def test_so_many_may_wait_and_so_long(peers: Peers, certificates: Certificates, tls: bool) -> None:
    """--max-pending and --pair-timeout count over all workers; who has left before is dropped."""
    witness = Witness(peers)
    words = "--tls", "service", "--cert", certificates.path("server.pem"), "--key", certificates.path("server.key")
    server = peers.server(*TWO, "--max-pending", "6", "--pair-timeout", "3", *(words if tls else ()))
    waiting = [peers.connect(server.service_port) for _ in range(6)]
    assert is_refused(server)
    assert "--max-pending" in str(server.wait_event("ConnectionFailed")["reason"])
    for sock in waiting:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    reasons = [str(event["reason"]) for event in wait_events(server, "ConnectionFailed", 7)]
    seconds = [float(str(event["seconds"])) for event in server.events("ConnectionFailed")]
    assert sum("--pair-timeout" in reason for reason in reasons) == 6
    assert all(3 <= one < 5 for one in sorted(seconds)[1:])
    left = peers.connect(server.service_port)
    left.close()
    peers.client(server.relay_port, witness.port, *ONE_LINK)
    wait_until(lambda: "went away" in server.output or "handshake" in server.output)
    assert not witness.names


def test_a_burst_on_one_idle_link_is_served(peers: Peers) -> None:
    """Who waits is told to the relay client, whichever worker it waits for."""
    witness = Witness(peers)
    server = peers.server(*TWO)
    peers.client(server.relay_port, witness.port, *TWO, "--num-conn", "1")
    socks = [peers.connect(server.service_port) for _ in range(50)]
    for number, sock in enumerate(socks):
        sock.sendall(b"%08d" % number)
    for number, sock in enumerate(socks):
        assert read_exactly(sock, 8) == b"%08d" % number
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    wait_events(server, "ConnectionClosed", 50)
    assert not server.events("ConnectionFailed")


@pytest.mark.parametrize("options", [("--workers", "0"), TWO])
def test_a_burst_beyond_max_pending_waits_in_the_kernel(peers: Peers, options: tuple[str, ...]) -> None:
    """While others are served nobody is refused: each of 120 that come at once and stay is served in its turn."""
    witness = Witness(peers)
    server = peers.server(*options, "--max-pending", "5")
    peers.client(server.relay_port, witness.port, *options, "--num-conn", "2")
    socks = [peers.connect(server.service_port) for _ in range(120)]
    for number, sock in enumerate(socks):
        sock.sendall(b"%08d" % number)
    for number, sock in enumerate(socks):
        assert read_exactly(sock, 8) == b"%08d" % number
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    wait_events(server, "ConnectionClosed", 120)
    assert not server.events("ConnectionFailed")


# --- Failover -------------------------------------------------------------------------------------------------


def dead_client(peers: Peers, server: RelayProcess, *options: str) -> RelayProcess:
    """A relay client with a single link, whose service refuses connections."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    return peers.client(server.relay_port, port, "--num-conn", "1", "--name", "dead", *options)


@pytest.mark.parametrize("size", [8, 60_000])
def test_a_service_client_finds_the_worker_whose_service_answers(peers: Peers, size: int) -> None:
    """Two relay clients, each with its link in another worker, one of them without a service: with the bytes that
    it has sent, a service client gets to the other; where both are dead it is reset at once, and the log says why."""
    server = peers.server(*TWO, *DEBUG)
    dead_client(peers, server)
    live = peers.client(server.relay_port, peers.service(echo).port, "--num-conn", "1", *DEBUG)
    data = random.Random(size).randbytes(size)
    for _ in range(8):
        sock = peers.connect(server.service_port)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == data
        wait_until(lambda: len(server.events("ConnectionClosed")) == len(server.events("ConnectionOpened")))
    live.signal(signal.SIGTERM)
    assert live.wait() == 0
    server.wait_event("ClientDown")
    dead_client(peers, server)
    for _ in range(4):
        sock = peers.connect(server.service_port)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    for event in wait_events(server, "ConnectionFailed", 4):
        assert "the service cannot be reached: cannot reach" in str(event["reason"])
        assert float(str(event["seconds"])) < 2


def test_hundreds_of_dead_relay_clients_are_no_message_too_long(peers: Peers) -> None:
    """Relay clients choose their ids; a service client that none of so many could serve is reset, and that is all."""
    server = peers.server(*TWO)
    links = []
    for number in range(240):
        link = Link(Stream(peers.connect(server.relay_port), "played"), CLIENT)
        name = f"{number:04}" + "\N{GRINNING FACE}" * 60
        link.send(HELLO, {"version": 1, "service": "default", "client": name, "nonce": "0", "idle": 1})
        links.append(link)
    for link in links:
        assert link.receive(Deadline(PATIENCE)).kind == WELCOME

    def fail(link: Link) -> None:
        with contextlib.suppress(OSError, EOFError):
            while link.receive(Deadline(PATIENCE)).kind != START:
                pass
            link.send(FAIL, {"reason": "played"})
            link.discard(Deadline(PATIENCE))

    threads = [threading.Thread(target=fail, args=(link,)) for link in links]
    for thread in threads:
        thread.start()
    pids = workers_of(server)
    sock = peers.connect(server.service_port)
    sock.sendall(bytes(60_000))
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert server.wait_event("ConnectionFailed")["reason"] == "the service cannot be reached: played"
    assert workers_of(server) == pids
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    for thread in threads:
        thread.join(PATIENCE)


# --- Limits and trust -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_so_many_connections_and_not_one_more(peers: Peers, certificates: Certificates, tls: bool) -> None:
    """--max-connections is exact, also when they come all at once, and again when they have gone.

    With TLS one comes after the other: of silent ones half as many may be there, and the others would have to go.
    """
    witness = Witness(peers)
    pair = "--tls", "service", "--cert", certificates.path("server.pem"), "--key", certificates.path("server.key")
    server = peers.server(*TWO, "--max-connections", "30", *(pair if tls else ()))
    peers.client(server.relay_port, witness.port, *TWO, "--num-conn", "32")
    context = tls_context()
    for turn in (1, 2):
        ends: list[Any] = []
        for _ in range(60):
            with contextlib.suppress(OSError, EOFError):
                sock = peers.connect(server.service_port)
                ends.append(TLSEnd(sock, context, False) if tls else sock)
        served: list[Any] = []

        def use(end: Any, number: int, served: list[Any] = served) -> None:
            with contextlib.suppress(OSError):
                end.sendall(b"%08d" % number)
                if end.recv(8):
                    served.append(end)

        threads = [threading.Thread(target=use, args=one) for one in zip(ends, range(60), strict=False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        assert len(served) == 30
        for end in ends:
            end.close()
        wait_events(server, "ConnectionClosed", turn * 30)


def test_protected_mode_holds_in_all_workers(peers: Peers) -> None:
    """Links from another host's address are refused without a token, and taken where that is allowed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, and tells which address would be ours
        except OSError:
            assert not os.environ.get("TEST_REQUIRE_PEERS"), "this host has no address but loopback"
            pytest.skip("this host has no address but loopback")
        address = probe.getsockname()[0]
    for more in ((), ("--allow-unauthenticated",)):
        server = peers.relay_process("server", "--relay-port", "0", "--service-port", "0", *TWO, *more)
        command = "--relay-host", str(address), "--relay-port", str(server.relay_port), "--port", "1", *TWO
        client = peers.relay_process("client", *command)
        if more:
            client.wait_event("Published")
        else:
            assert "neither a token" in str(client.wait_event("Unpublished")["reason"])
            wait_events(server, "LinkRefused", 2)
            assert not server.events("ClientUp")


# --- TLS ------------------------------------------------------------------------------------------------------


class Secure:
    """A relay with TLS on the links and the service port, client certificates, and two workers in both roles."""

    def __init__(self, peers: Peers, certificates: Certificates, port: int, *options: str) -> None:
        path, ca = certificates.path, certificates.path("ca.pem")
        own = "--cert", path("server.pem"), "--key", path("server.key"), "--auth", "--ca-file", ca
        self.server = peers.server(*TWO, "--tls", "both", *own, *options)
        self.trust = "--tls", "--ca-file", ca, "--cert", path("client.pem"), "--key", path("client.key")
        self.context = tls_context(ca=ca)
        self._peers, self._port = peers, port

    def client(self, *options: str) -> RelayProcess:
        return self._peers.client(self.server.relay_port, self._port, *self.trust, *options)

    def connect(self) -> ssl.SSLSocket:
        sock = self.context.wrap_socket(self._peers.connect(self.server.service_port))
        self._peers._stack.enter_context(sock)
        return sock

    def greet(self) -> ssl.SSLSocket:
        sock = self.connect()
        sock.sendall(b"greeting")
        assert read_exactly(sock, 8) == b"greeting"
        return sock


def test_tls_on_all_legs(peers: Peers, certificates: Certificates) -> None:
    """Connections in both workers, and a relay client without a certificate is refused by both."""
    witness = Witness(peers)
    relay = Secure(peers, certificates, witness.port)
    relay.client(*TWO)
    socks = [relay.greet() for _ in range(8)]
    assert len({holder(relay.server, sock_address(sock, True), sock_address(sock)) for sock in socks}) == 2
    for sock in socks:
        data = random.Random(1).randbytes(50_000)
        sock.sendall(data)
        assert read_exactly(sock, len(data)) == data
        sock.close()
    command = "--relay-host", HOST, "--relay-port", str(relay.server.relay_port), "--port", "1"
    stranger = peers.relay_process("client", *command, *TWO, "--tls", "--ca-file", certificates.path("ca.pem"))
    stranger.wait_event("Unpublished")
    assert not stranger.events("Published")


def test_a_tls_service_client_gets_a_link_although_it_waits_in_another_worker(
    peers: Peers, certificates: Certificates
) -> None:
    """It cannot be passed on, so that an idle link elsewhere is closed, and its relay client opens another."""
    witness = Witness(peers)
    relay = Secure(peers, certificates, witness.port, *DEBUG)
    relay.client("--num-conn", "2", "--max-conn", "2")
    wait_events(relay.server, "LinkUp", 2)
    # Both see an idle link in each worker; the one that is handed to the first is no longer there for the others.
    socks = [relay.connect() for _ in range(2)]
    for _ in range(10):
        for sock in socks:
            sock.sendall(b"greeting")
        for sock in socks:
            assert read_exactly(sock, 8) == b"greeting"
            sock.close()
        socks = [relay.connect() for _ in range(2)]


def test_silent_tls_handshakes_take_no_links_away(peers: Peers, certificates: Certificates) -> None:
    """Who never finishes a handshake on the service port does not keep others from the idle links."""
    witness = Witness(peers)
    relay = Secure(peers, certificates, witness.port)
    relay.client("--num-conn", "2", "--max-conn", "2")
    for _ in range(100):
        peers.connect(relay.server.service_port)
    for _ in range(10):
        relay.greet().close()


# --- Raw wire -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("releases", [("ours", "ours"), ("ours", "0.0.13"), ("0.0.13", "ours")], ids="-".join)
def test_raw_wire(peers: Peers, releases: tuple[str, str]) -> None:
    """Workers on both sides, and with release 0.0.13 of node-tcp-relay on one."""
    witness = Witness(peers)
    raw = "--wire", "raw", *TWO
    if releases[0] == "ours":
        relay_port = peers.server(*raw)
        ports = relay_port.relay_port, relay_port.service_port
    else:
        ports = peers.node_server("0.0.13")
    if releases[1] == "ours":
        peers.client(ports[0], witness.port, *raw, "--num-conn", "4")
    else:
        peers.node_client("0.0.13", ports[0], witness.port, numConn="4")
    for number in range(20):
        with socket.create_connection((HOST, ports[1]), PATIENCE) as sock:
            sock.sendall(b"%08d" % number)
            assert read_exactly(sock, 8) == b"%08d" % number
    assert sorted(witness.names) == [b"%08d" % number for number in range(20)]


# --- Errors that nobody expected ------------------------------------------------------------------------------

RAISE_ONCE = """
import sys, tcprelay, tcprelay_server

def raise_once(place):
    module, *owner, name = place.split(".")
    holder = sys.modules[module]
    for word in owner:
        holder = getattr(holder, word)
    real, raised = getattr(holder, name), []

    def function(*words, **named):
        if raised:
            return real(*words, **named)
        raised.append(name)
        raise ZeroDivisionError(name)

    setattr(holder, name, function)

raise_once(sys.argv[1])
sys.exit(tcprelay.main(sys.argv[5:]))
"""


def server_that_raises_once(peers: Peers, place: str, *options: str) -> RelayProcess:
    """A relay server with two workers where a function fails once, in each process that calls it."""
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, *TWO
    server = peers.relay_process("server", *command, *options, wrapper=[sys.executable, "-c", RAISE_ONCE, place])
    server.expected_error = ("unexpected error", "worker ", "2 workers could not")
    return server


@pytest.mark.parametrize(
    "place",
    [
        "_tcprelay.processes.Workers._look_at_time",
        "_tcprelay.processes.Workers._fork",
        "_tcprelay.processes.receive_message",
        "_tcprelay.server.intake.adopt_socket",
        "_tcprelay.server.intake.receive_message",
        "_tcprelay.server.listeners.Listeners.accept",
        "_tcprelay.server.workers.ServerWorkers.look_at_time",
        "_tcprelay.server.listeners.Listeners._accept",
        "_tcprelay.server.workers.ServerWorkers._receive_connection",
        "_tcprelay.server.workers.ServerWorkers._send",
        "_tcprelay.server.workers.ServerWorkers._serve_queue",
        "_tcprelay.server.workers.ServerWorkers.tell",
        "_tcprelay.server.workers.ServerWorkers._absent",
        "_tcprelay.server.workers.ServerWorkers.stop_intake",
        "_tcprelay.server.clients.ServiceClient.resume",
    ],
)
def test_an_unexpected_error_ends_no_role_and_skews_no_count(peers: Peers, place: str) -> None:
    """In a callback of the parent, or where a worker takes a connection: it is logged, connections come and go, a dead
    worker is replaced, and there may be as many connections as before, and not one more."""
    witness = Witness(peers)
    server = server_that_raises_once(peers, place, "--max-connections", "8", "--max-per-address", "8")
    peers.client(server.relay_port, witness.port, "--num-conn", "8", "--workers", "0")
    numbers = iter(range(10_000))

    def eight() -> list[Connection]:
        """So many connections at once; none where one of them was refused."""
        made: list[Connection] = []
        with contextlib.suppress(OSError, AssertionError):
            while len(made) < 8:
                made += [Connection(peers, server, witness, next(numbers))]
            return made
        for one in made:
            one.sock.close()
        return []

    for one in wait_until(eight):
        one.end()
    victim = workers_of(server)[0]
    os.kill(victim, signal.SIGKILL)
    wait_workers(server, {victim})
    for _ in range(2):  # it takes its first connections, and others
        for one in wait_until(eight):
            one.end()
    held = wait_until(eight)
    assert is_refused(server)
    for one in held:
        one.end()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "ZeroDivisionError" in server.output


def test_an_unexpected_error_in_a_reload(peers: Peers) -> None:
    """All stays as it was; where only the workers failed it is not called done, and the next reload is one."""
    server = server_that_raises_once(peers, "_tcprelay.role.Relay._apply")
    wait_up(server)
    server.signal(signal.SIGHUP)
    server.wait_message("unexpected error")
    server.signal(signal.SIGHUP)
    server.wait_message("2 workers could not reload, and go on as before: send SIGHUP again")
    assert not [line for line in server.lines if "is reloaded" in line]
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")


def test_an_error_that_stays_does_not_make_the_parent_spin(peers: Peers) -> None:
    """It waits longer each time, up to a second, and does everything else."""
    patch = (
        "import sys, tcprelay, _tcprelay.server.workers;"
        "_tcprelay.server.workers.ServerWorkers.look_at_time = lambda self: 1 / 0;"
        "sys.exit(tcprelay.main(sys.argv[4:]))"
    )
    command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST, *TWO
    server = peers.relay_process("server", *command, wrapper=[sys.executable, "-c", patch])
    server.expected_error = "unexpected error"
    witness = Witness(peers)
    peers.client(server.relay_port, witness.port, "--workers", "0")
    wait_until(lambda: server.output.count("ZeroDivisionError") >= 10, 2 * PATIENCE)
    began, before = time.monotonic(), server.output.count("ZeroDivisionError")
    wait_until(lambda: server.output.count("ZeroDivisionError") >= before + 3)
    assert time.monotonic() - began > 1.0
    Connection(peers, server, witness, 1).end()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_service_client_that_cannot_be_taken_back_is_counted_out() -> None:
    """Its descriptor is closed, its share of the limits is free again, and it has its closing record."""
    events = Recorder()
    server = RelayServer(0, 0, max_per_address=1, on_event=events)
    shares = server._listeners.of_clients
    parent, worker = ServerWorkers(server, 2, server._listeners, lambda account, intake: None), WorkerProcess(0)
    address = "192.0.2.1", 5
    assert shares.enter(address)
    parent._account.hold(0, shares, address, 1)
    parent._account.add(0, "default", HANDED)
    worker.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    state = {"service": "default", "address": address, "since": 0.0}
    with worker.channel, theirs:
        send_message(theirs, encode_message(state), [reader])  # which is no socket
        os.close(reader)
        with pytest.raises(OSError):
            parent._receive(worker)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
    os.close(writer)
    assert shares.enter(address)
    assert parent._account.clients(0) == 0
    assert [event.reason for event in events.of(ConnectionFailed)] == ["unexpected error"]
    parent._account.strike(0)
    assert not shares.enter(address), "what is back is the worker's no longer"
    parent.selector.close()


def test_a_message_that_is_too_long_is_not_sent_and_not_taken() -> None:
    """Half a message would be taken for nonsense; its descriptor does not stay open."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    with ours, theirs:
        with pytest.raises(OSError, match=r"[Mm]essage too long"):
            send_message(theirs, bytes(MESSAGE_SIZE + 1))
        socket.send_fds(theirs, [bytes(MESSAGE_SIZE + 1)], [reader])
        os.close(reader)
        with pytest.raises(ValueError, match="more than"):
            receive_message(ours)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
    os.close(writer)


@pytest.mark.parametrize("taken", [True, False])
def test_who_is_handed_over_is_counted_first(taken: bool) -> None:
    """The worker may be done with it before the parent goes on; and where it takes nobody, nobody is counted."""
    server = RelayServer(0, 0, max_per_address=1)
    parent = ServerWorkers(server, 1, server._listeners, lambda account, intake: None)
    shares, address, seen = server._listeners.of_clients, ("192.0.2.1", 5), []
    near, far = socket.socketpair()
    assert shares.enter(address)

    def hand(message: bytes, descriptor: int) -> bool:
        seen.append((parent._account.under_way(0, "default"), near.fileno() == descriptor))
        return taken

    worker = Mock(number=0, hand=hand)
    with far, near:
        assert parent._hand(worker, {"service": "default", "address": address}, near) is taken
        assert (near.fileno() == -1) is taken
    assert seen == [(1, True)]
    assert parent._account.present(0, "default") == taken
    parent._account.strike(0)
    assert shares.enter(address) is taken
    parent.selector.close()


@pytest.fixture
def parent() -> Iterator[tuple[ServerWorkers, Recorder]]:
    """The parent of two workers that are played, and its events."""
    events = Recorder()
    server = RelayServer(0, 0, max_pending=1, on_event=events)
    made = ServerWorkers(server, 2, server._listeners, lambda account, intake: None)
    made.workers[:] = [Mock(number=number, pid=1) for number in range(2)]
    yield made, events
    made.selector.close()


def test_a_relay_client_is_there_while_a_worker_has_links_of_it(parent: tuple[ServerWorkers, Recorder]) -> None:
    """It goes with the last one that had some, also where that has died."""
    made, events = parent
    fields = {"service": "default", "client": "id", "name": "n", "peer": "p"}
    for worker in made.workers:
        made.tell("ClientUp", fields, worker)
    made.lost(made.workers[0])
    assert events.of(ClientDown) == []
    made.lost(made.workers[1])
    assert [event.reason for event in events.of(ClientDown)] == ["its worker has died"]
    assert len(events.of(ClientUp)) == 1


def test_a_suspicion_is_passed_on_to_the_others(parent: tuple[ServerWorkers, Recorder]) -> None:
    """Who has it needs no message."""
    made, _ = parent
    made.hear(made.workers[0], {"suspect": "id", "why": "sleeps"}, b"", [])
    orders: list[Any] = [worker.order for worker in made.workers]
    orders[0].assert_not_called()
    orders[1].assert_called_once_with(encode_message({"suspect": "id", "why": "sleeps"}))


def test_a_queue_is_full_while_others_are_served(parent: tuple[ServerWorkers, Recorder]) -> None:
    """Then the kernel holds who comes; without a relay client, or at a standstill, it is refused."""
    made, _ = parent
    made._queues["default"].append(Mock(since=time.monotonic()))
    assert not made._is_full("default")
    made.tell("ClientUp", {"service": "default", "client": "id", "name": "n", "peer": "p"}, made.workers[0])
    made._given_at["default"] = time.monotonic()
    assert made._is_full("default")
    made._queues["default"][0].since = made._given_at["default"] = 0.0
    assert not made._is_full("default")
