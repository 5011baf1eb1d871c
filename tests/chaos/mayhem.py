"""Ten minutes of faults under steady transfers: what arrives is whole, or whoever receives it sees an error.

As a program of its own, ``python -m tests.chaos.mayhem PORT``, this is the service behind the relays.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from _tcprelay.threads import Threads

from ..bench.processes import find_family
from ..peers import HOST, Program, RelayProcess, find
from ..watch import WATCH
from ..wire import Host, Wire
from .network import DistantRelays, time_to
from .relays import Legs, descriptors, descriptors_of_each, threads
from .suite import Run, case

# --- A transfer, at both its ends -----------------------------------------------------------------------------
#
# A service client names the transfer and how long its two streams are, sends the first and ends its direction.
# The service sends the second meanwhile, and at last, when it has the whole first one, that this is so.
# Both have every connection reset when they close it or are killed, until both streams are whole: so a stream's
# clean end before its last byte is always a lie of the relays.

HEADER = struct.Struct(">16sQQ")
DONE = b"I have it all."
LARGEST = 1 << 24
PIECE = 1 << 16
NOISE = random.Random(8).randbytes(2 * PIECE)
HANGS = 60.0
"""Seconds without a byte after which a transfer counts as hung."""
RESET_ON_CLOSE, CLOSE_NORMALLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class Truncated(Exception):
    """A stream came to a clean end before all that belongs to it."""


class Wrong(Exception):
    """What came is not what was sent."""


class Leaving(Exception):
    """This end breaks off, as it was asked to."""


def pieces(name: bytes, size: int) -> Iterator[bytes]:
    """A stream of so many bytes, unlike other streams and at no place like itself elsewhere."""
    shift = int.from_bytes(name[:2], "big")
    for start in range(0, size, PIECE):
        yield (name + start.to_bytes(8, "big") + NOISE[shift : shift + PIECE - 24])[: size - start]


def exchange(sock: socket.socket, outgoing: Iterator[bytes], incoming: Iterator[bytes], end: bool) -> None:
    """Send one stream, and its end where that is to follow, while the other one comes in; compare each byte.

    One thread does both: the error of an RST is told once, and if a send takes it, a receive looks like an end.
    Raises `OSError`, `Truncated`, `Wrong`.
    """
    sock.settimeout(0.0)
    out, due = next(outgoing, b""), next(incoming, b"")
    while out or due:
        poller = select.poll()
        poller.register(sock, (select.POLLOUT if out else 0) | (select.POLLIN if due else 0))
        if not poller.poll(1000 * HANGS):
            raise TimeoutError("no byte went either way")
        with suppress(BlockingIOError):
            if out:
                out = out[sock.send(out) :] or next(outgoing, b"")
                if not out and end:
                    sock.shutdown(socket.SHUT_WR)
        with suppress(BlockingIOError):
            if due:
                due = due[len(receive(sock, due)) :] or next(incoming, b"")
    sock.settimeout(HANGS)


def receive(sock: socket.socket, due: bytes) -> bytes:
    """Some of the bytes that are due.  Raises `OSError`, `Truncated`, `Wrong`."""
    got = sock.recv(len(due))
    if not got:
        raise Truncated(f"an end where at least {len(due)} bytes are due")
    if not due.startswith(got):
        raise Wrong(f"wrong bytes among {len(got)}")
    return got


def receive_end(sock: socket.socket) -> None:
    if sock.recv(1):
        raise Wrong("bytes where the end is due")


def judge(act: Callable[[], None]) -> tuple[str, str]:
    """How an end of a transfer saw it: a word, and why."""
    try:
        act()
    except TimeoutError as error:
        return "hung", str(error)
    except OSError as error:
        return "broken", str(error)
    except (Truncated, Wrong, Leaving) as error:
        return type(error).__name__.lower(), str(error)
    return "complete", ""


def serve(sock: socket.socket) -> None:
    """The service's end of one transfer; tells of it in a line of output."""
    name = b""

    def act() -> None:
        nonlocal name
        header = b""
        while len(header) < HEADER.size:
            if not (got := sock.recv(HEADER.size - len(header))):
                raise Truncated(f"an end after {len(header)} bytes")
            header += got
        name, up, down = HEADER.unpack(header)
        exchange(sock, pieces(name[::-1], down), pieces(name, up), end=False)
        receive_end(sock)
        sock.sendall(DONE)
        sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_NORMALLY)

    with sock:
        sock.settimeout(HANGS)
        verdict, why = judge(act)
    sys.stdout.write(json.dumps({"name": name.hex(), "verdict": verdict, "why": why}) + "\n")
    sys.stdout.flush()


def run_service(port: int) -> None:
    listener = socket.create_server((HOST, port), backlog=1024)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)  # handed down to what it accepts
    print(json.dumps({"listening": port}), flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@dataclass
class Transfer:
    """The service client's end of one transfer."""

    name: bytes
    up: int
    down: int
    leaves_after: int | None = None
    """Bytes after which it breaks off."""
    began: float = 0.0
    ended: float = 0.0
    verdict: str = ""
    """``refused`` where nothing was connected, or what `judge` says."""
    why: str = ""

    def run(self, relays: DistantRelays) -> None:
        self.began = time.monotonic()
        try:
            sock = relays.connect()
        except OSError as error:
            self.verdict, self.why = "refused", str(error)
        else:
            with sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                self.verdict, self.why = judge(lambda: self._act(sock))
            if self.verdict == "hung":
                WATCH.tell(f"a transfer: {self.why}")
        self.ended = time.monotonic()

    def _act(self, sock: socket.socket) -> None:
        exchange(sock, self._outgoing(), pieces(self.name[::-1], self.down), end=True)
        left = DONE
        while left:
            left = left[len(receive(sock, left)) :]
        receive_end(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_NORMALLY)

    def _outgoing(self) -> Iterator[bytes]:
        sent = 0
        for piece in itertools.chain([HEADER.pack(self.name, self.up, self.down)], pieces(self.name, self.up)):
            yield piece
            sent += len(piece)
            if self.leaves_after is not None and sent > self.leaves_after:
                raise Leaving


# --- Bar 8: mayhem --------------------------------------------------------------------------------------------

PORT = 7000
"""The service's; it is alone in its namespace."""
WORKERS = 4
"""Transfers at a time."""
PARKED = Threads.PARKED + 1.0
"""Seconds after which the relays' threads that have nothing to do have left."""
LAX = ("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override")
"""What setpriv leaves of root's capabilities: reading the case's files, and no way round RLIMIT_NPROC."""


@case(8, "mayhem", 1200, over_wire=True)
def mayhem(run: Run) -> None:
    """Faults of all kinds, one at a time, under transfers; half of the time with plain links, half with TLS."""
    network = run.lay_wire()
    halves = [Half(run, network, Legs(link)) for link in ("plain", "tls")]
    for half in halves:
        half.run_for(max(20.0, 600.0 * run.scale) / 2)
    transfers = [one for half in halves for one in half.transfers]
    reports = [report for half in halves for report in half.read_reports()]
    ends: dict[str, list[str]] = {}
    for report in reports:
        ends.setdefault(report["name"], []).append(report["verdict"])
    verdicts, served = Counter(one.verdict for one in transfers), Counter(report["verdict"] for report in reports)
    for what in ("truncated", "wrong", "hung"):
        run.tell(f"transfers {what}, at either end", verdicts[what] + served[what], most=0, least=0)
    believed = [one for one in transfers if one.verdict == "complete" and ends.get(one.name.hex()) not in COMPLETE]
    run.tell("complete for one end, broken for the service", len(believed), most=0, least=0)
    twice = sum(len(verdicts) > 1 for name, verdicts in ends.items() if name)
    run.tell("transfers that reached the service twice", twice, most=0, least=0)
    run.tell("broken with no fault near", sum(half.count_unfounded() for half in halves), most=0, least=0)
    run.tell("slowest transfer", max(one.ended - one.began for one in transfers), most=HANGS, unit="s")
    worst = max(recovery for half in halves for _, recovery in half.recoveries)
    run.tell("pool full again after a fault, at worst", worst, most=10, unit="s")
    for what in halves[0].left_over:
        run.tell(f"left over in the end: {what}", max(half.left_over[what] for half in halves), most=0)
    for verdict, count in sorted(verdicts.items()):
        run.tell(f"transfers {verdict}", count)
    for fault, count in sorted(Counter(fault for half in halves for fault, _ in half.recoveries).items()):
        run.tell(f"fault: {fault}", count)


COMPLETE = (["complete"], None)
"""What the service may tell of a transfer that is complete for its client: nothing if it was killed right then."""


class Half:
    """Relays with one kind of links, the transfers through them, and what is done to them."""

    def __init__(self, run: Run, network: Wire, legs: Legs) -> None:
        self._run, self._network, self._legs = run, network, legs
        self.transfers: list[Transfer] = []
        self.recoveries: list[tuple[str, float]] = []
        """Each fault, and how many seconds after its end the pool was full."""
        self.left_over: dict[str, int] = {}
        self._quiet: list[tuple[float, float]] = []
        """From when to when nothing was wrong."""
        self._under_way = 0
        self._lock = threading.Lock()  # over `transfers` and `_under_way`
        self._over = threading.Event()
        self._services: list[Program] = []
        self._relays: DistantRelays

    def run_for(self, seconds: float) -> None:
        """Do one fault after another under steady transfers, and look at what is left in the end."""
        self._start_service()
        user = 60000 + 2 * (os.getpid() % 1000)  # each has a user, as RLIMIT_NPROC counts by users
        server, client = ([find("setpriv"), f"--reuid={one}", *LAX] for one in (user, user + 1))
        relays = DistantRelays(self._run, self._network, self._legs, PORT, wrappers=(server, client))
        self._relays = relays
        threading.Event().wait(PARKED)
        assert self._time_to_full() < 10
        before = self._measure()
        workers = [threading.Thread(target=self._work, args=(self._seed(),)) for _ in range(WORKERS)]
        self._run.stack.callback(self._over.set)
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + seconds
        faults = self._draw_faults()
        while time.monotonic() < deadline:
            fault = next(faults)
            fault()
            name = fault.__name__.strip("_").replace("_", " ")
            self.recoveries.append((name, self._time_to_full()))
            self._run.say(f"{self._legs.link}: {name}, pool full after {self.recoveries[-1][1]:.1f} s")
            since = time.monotonic()
            time_to(lambda: self._count_since(since) >= 3)  # noqa: B023 - it is waited for here
            self._quiet.append((since, time.monotonic()))
        self._over.set()
        for worker in workers:
            worker.join()
        time_to(lambda: max(self._compare(before).values()) <= 0)
        self.left_over = self._compare(before)
        self._end()

    def _end(self) -> None:
        for program in (self._relays.client, self._relays.server, self._services[-1]):
            program.signal(signal.SIGTERM)
            program.wait(30.0)

    # Transfers

    def _work(self, seed: float) -> None:
        """One transfer after another; the life of a thread."""
        chances = random.Random(seed)
        while not self._over.wait(chances.uniform(0.0, 0.3)):
            self._transfer(Transfer(chances.randbytes(16), draw_size(chances), draw_size(chances)))

    def _transfer(self, transfer: Transfer) -> None:
        with self._lock:
            self._under_way += 1
        transfer.run(self._relays)
        with self._lock:
            self._under_way -= 1
            self.transfers.append(transfer)

    def _count_since(self, since: float) -> int:
        with self._lock:
            return sum(one.began >= since for one in self.transfers)

    def count_unfounded(self) -> int:
        """The transfers that were not complete although nothing was wrong from their begin to their end."""
        unfounded = [one for one in self.transfers if one.verdict != "complete"
                     and any(since <= one.began and one.ended <= until for since, until in self._quiet)]  # fmt: skip
        for one in unfounded:
            self._run.say(f"unfounded: {one}")
        return len(unfounded)

    # The service

    def _start_service(self) -> None:
        with self._network.client.inside():
            service = self._run.peers.program(sys.executable, "-m", "tests.chaos.mayhem", str(PORT))
        service.wait_for(lambda line: "listening" in line)
        self._services.append(service)

    def read_reports(self) -> list[dict[str, str]]:
        """What the services have told of the transfers that reached them."""
        lines = [json.loads(line) for service in self._services for line in service.lines]
        return [line for line in lines if "verdict" in line]

    # What is left over, and when all is well

    def _time_to_full(self) -> float:
        """Seconds until there are all idle links, even if each transfer under way has a lively one."""
        return time_to(lambda: self._relays.count_links()[0] - self._under_way >= self._relays.LINKS)

    def _measure(self) -> dict[str, int]:
        """What the relays use beside their links."""
        links = sum(self._relays.count_links())
        server, client = self._relays.server, self._relays.client
        return {
            "threads of the server": threads(server),
            "descriptors of the server": descriptors(server) - links,
            "threads of the client": threads(client) - links,
            "descriptors of the client": descriptors(client) - links,
            "connections of the service": len(self._list(self._network.client, f"sport = :{PORT}")),
        }

    def _compare(self, before: dict[str, int]) -> dict[str, int]:
        return {what: count - before[what] for what, count in self._measure().items()}

    def _list(self, host: Host, which: str, *more: str) -> list[str]:
        """The connections of a host that ss finds, without those that only wait for their time to pass."""
        command = [find("ss"), "-Htn", *more, "state", "connected", "exclude", "time-wait", *which.split()]
        with host.inside():
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()

    # Faults; each does its work and undoes it, and returns when it has ended

    def _draw_faults(self) -> Iterator[Callable[[], None]]:
        """All faults in a random order, again and again."""
        faults = [
            self._server_killed, self._client_killed, self._service_killed, self._server_restarted,
            self._client_restarted, self._server_stopped, self._client_stopped, self._service_stopped,
            self._links_reset, self._black_hole, self._few_descriptors, self._few_threads, self._clients_leave,
        ]  # fmt: skip
        if self._run.workers:
            faults += [self._server_worker_killed, self._client_worker_killed]
        while True:
            yield from self._run.random.sample(faults, len(faults))

    def _seed(self) -> float:
        return self._run.random.random()

    def _pause(self, least: float, most: float) -> None:
        """Let the fault last."""
        threading.Event().wait(self._run.random.uniform(least, most))

    def _server_killed(self) -> None:
        self._relays.server.kill()
        self._pause(0.0, 2.0)
        self._relays.start_server()

    def _client_killed(self) -> None:
        self._relays.client.kill()
        self._pause(0.0, 2.0)
        self._relays.start_client()

    def _server_worker_killed(self) -> None:
        self._kill_worker(self._relays.server)

    def _client_worker_killed(self) -> None:
        self._kill_worker(self._relays.client)

    def _kill_worker(self, relay: RelayProcess) -> None:
        relay.expected_error = ("worker ", "cannot start worker")
        _, *workers = find_family(relay.process.pid)
        os.kill(self._run.random.choice(workers), signal.SIGKILL)
        self._pause(0.0, 2.0)

    def _service_killed(self) -> None:
        self._services[-1].signal(signal.SIGKILL)
        self._services[-1].wait()
        self._pause(0.0, 4.0)
        self._start_service()

    def _server_restarted(self) -> None:
        self._relays.server.signal(signal.SIGTERM)
        self._relays.server.wait(30.0)
        self._relays.start_server()

    def _client_restarted(self) -> None:
        self._relays.client.signal(signal.SIGTERM)
        self._relays.client.wait(30.0)
        self._relays.start_client()

    def _server_stopped(self) -> None:
        self._stop(self._relays.server)

    def _client_stopped(self) -> None:
        self._stop(self._relays.client)

    def _service_stopped(self) -> None:
        self._stop(self._services[-1])

    def _stop(self, program: Program) -> None:
        family = list(find_family(program.process.pid))
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        try:
            self._pause(1.0, 4.0)
        finally:
            for pid in family:
                os.kill(pid, signal.SIGCONT)

    def _links_reset(self) -> None:
        """Both ends of some links are told that the other one has reset them."""
        at_server = self._network.server, f"sport = :{self._relays.relay_port}"
        ports = [line.split()[-1].rpartition(":")[2] for line in self._list(*at_server)]
        for port in self._run.random.sample(ports, self._run.random.randint(1, len(ports))):
            self._list(at_server[0], f"{at_server[1]} and dport = :{port}", "-K")

    def _black_hole(self) -> None:
        with self._network.hole():
            self._pause(0.5, 5.0)

    def _few_descriptors(self) -> None:
        self._limit("Max open files", lambda process, pid: descriptors_of_each(process)[pid])

    def _few_threads(self) -> None:
        self._limit("Max processes", lambda process, _: threads(process))

    def _limit(self, what: str, count: Callable[[RelayProcess, int], int]) -> None:
        """Leave one of a relay's processes about as many as it has, while many come at once; then again as many as
        it had."""
        process = self._run.random.choice((self._relays.server, self._relays.client))
        pid = self._run.random.choice(list(find_family(process.process.pid)))
        before = set_limit(pid, what, count(process, pid) + self._run.random.randint(-4, 2))
        try:
            crowd = self._start([self._draw(1 << 10) for _ in range(16)])
            self._pause(1.0, 4.0)
        finally:
            set_limit(pid, what, before)
        for thread in crowd:
            thread.join()

    def _clients_leave(self) -> None:
        """Some service clients break off in the middle of what they send."""
        for thread in self._start([self._draw(LARGEST, leaves=True) for _ in range(6)]):
            thread.join()

    def _draw(self, most: int, leaves: bool = False) -> Transfer:
        chances = self._run.random
        after = chances.randrange(most) if leaves else None
        return Transfer(chances.randbytes(16), most if leaves else draw_size(chances, most), most, after)

    def _start(self, transfers: list[Transfer]) -> list[threading.Thread]:
        """Begin some transfers at once."""
        started = [threading.Thread(target=self._transfer, args=(one,)) for one in transfers]
        for thread in started:
            thread.start()
        return started


def draw_size(chances: random.Random, most: int = LARGEST) -> int:
    """Nothing, or as often a few bytes as many."""
    return 0 if chances.random() < 0.1 else round(most ** chances.random())


def set_limit(pid: int, what: str, soft: int) -> int:
    """Set a soft limit of a process, as the user whose it is, which takes no privilege; returns what it was."""
    [line] = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith(what)]
    option = {"Max open files": "nofile", "Max processes": "nproc"}[what]
    command = [find("prlimit"), "--pid", str(pid), f"--{option}={soft}:"]
    subprocess.run(command, user=os.stat(f"/proc/{pid}").st_uid, capture_output=True, timeout=30, check=True)
    return int(line[len(what) :].split()[0])


if __name__ == "__main__":
    run_service(int(sys.argv[1]))
