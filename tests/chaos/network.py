"""The network between the relays goes away, or the server does: links are given up, and come back in good order."""

from __future__ import annotations

import itertools
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..conftest import read_all, read_exactly, wait_until
from ..peers import HOST, RelayProcess, find
from ..wire import SERVER, Wire
from .relays import TOKEN, Legs
from .suite import Run, case

# --- Relays on two hosts --------------------------------------------------------------------------------------


class DistantRelays:
    """A relay server and a relay client with a wire between them, and the service behind the client."""

    HEARTBEAT = 1.0
    LINKS = 8
    """``--num-conn``, by default."""

    def __init__(
        self,
        run: Run,
        network: Wire,
        legs: Legs,
        service: int,
        server: Sequence[str] = (),
        wrappers: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        """`server` are further options of the server; `wrappers` are the server's and the client's."""
        self.network = network
        self._run, self.legs, self._service, self._server_options = run, legs, service, server
        self._server_wrapper, self._client_wrapper = wrappers
        self.relay_port = self.service_port = 0
        self.server = self.start_server()
        self.relay_port, self.service_port = self.server.relay_port, self.server.service_port
        self.client = self.start_client()
        self.client.wait_event("Published")

    def start_server(self) -> RelayProcess:
        """Start the server, again on the same ports if it was started before."""
        options = ["--relay-port", str(self.relay_port), "--service-port", str(self.service_port)]
        options += ["--hostname", SERVER, "--heartbeat", str(self.HEARTBEAT), "--log-level", "debug"]
        options += [*self.legs.server_options(self._run.certificates), *self._server_options]
        with self.network.server.inside():
            self.server = self._run.peers.relay_process("server", *options, wrapper=self._server_wrapper)
        self.server.wait_event("Listening", service="default")
        return self.server

    def start_client(self) -> RelayProcess:
        """Start the client; it may not have a link yet."""
        options = ["--relay-host", SERVER, "--relay-port", str(self.relay_port)]
        options += ["--host", HOST, "--port", str(self._service), "--log-level", "debug"]
        options += self.legs.client_options(self._run.certificates)
        with self.network.client.inside():
            self.client = self._run.peers.relay_process("client", *options, wrapper=self._client_wrapper)
        return self.client

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """A service client's connection, from the server's own host.  Raises `OSError`."""
        with self.network.server.inside():
            return socket.create_connection((SERVER, self.service_port), timeout)

    def silences(self) -> list[int]:
        """For how many milliseconds nothing has come in on each of the server's links, as its kernel tells."""
        words = ["-O", "-H", "-tin", "state", "established", "sport", "=", f":{self.relay_port}"]
        with self.network.server.inside():
            done = subprocess.run([find("ss"), *words], capture_output=True, text=True, timeout=30, check=True)
        found = (re.search(r"lastrcv:(\d+)", line) for line in done.stdout.splitlines())
        return [int(match[1]) if match else 0 for match in found]  # ss leaves a 0 out

    def count_links(self) -> tuple[int, int]:
        """The links on which the server hears the client, as an idle one answers every PING; and the others."""
        heard = [silence <= 1300 * self.HEARTBEAT for silence in self.silences()]
        return sum(heard), len(heard) - sum(heard)


def moment(event: dict[str, Any]) -> float:
    """When an event of a relay's log happened, in seconds since the epoch."""
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()


# --- Bar 7: a black hole --------------------------------------------------------------------------------------

PAIR_TIMEOUT = 3.0
BANNER = b"here I am\n"
PIECE = 1 << 15
"""Bytes that go round at a time: few enough that nobody can be waiting for the other."""
STALL = 3 << 20
"""More than the relay client can pass on to a service that does not read, and little enough for all buffers."""
GIVEN_UP = 40.0
"""Seconds after a hole at which a pool that is not full yet counts as lost."""
SURVIVED = 90.0
"""Seconds that a connection may take to go on: the kernel's next retransmission can be another hole away."""
RESTED = 10.5
"""Seconds after which a relay client takes the loss of a link for its first."""


@dataclass(frozen=True)
class Hole:
    """One black hole, and what was on the links when it began."""

    seconds: float
    before: str
    """What the idle links have just carried: nothing, small or large connections, or some that are settling."""
    rested: bool
    """Nothing was opened for so long that a loss is not an early one."""
    legs: Legs

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.legs}, {'old' if self.rested else 'young'} links, {self.before} before"


@dataclass(frozen=True)
class Seen:
    """What one hole did.  Times in seconds, but `evicted` in heartbeats."""

    evicted: float
    misled: int
    waited: float
    full: float
    resumed: float
    broken: int
    survivors: int


class Service:
    """Greets, and then echoes, or (where the first byte is S) ends its direction and does not read for a while."""

    def __init__(self, run: Run, network: Wire) -> None:
        self.read_on = threading.Event()
        self.received: list[bytes] = []
        """What those have sent for whom it did not read."""
        run.stack.callback(self.read_on.set)
        network.client.sysctl("net.ipv4.tcp_wmem", "4096 16384 131072")  # so that STALL is too much
        with network.client.inside():
            self.port = run.peers.service(self.serve).port

    def serve(self, sock: socket.socket) -> None:
        sock.settimeout(SURVIVED)
        sock.sendall(BANNER)
        if sock.recv(1) == b"S":
            sock.shutdown(socket.SHUT_WR)
            self.read_on.wait(SURVIVED)
            self.received.append(read_all(sock))
        else:
            while piece := sock.recv(PIECE):
                sock.sendall(piece)


class Talk:
    """A service client's connection to the echo, and whether all that came back was what it had sent."""

    def __init__(self, run: Run, relays: DistantRelays, first: bytes = b"E") -> None:
        self._random = random.Random(run.random.random())
        self.sock = run.stack.enter_context(relays.connect())
        assert read_exactly(self.sock, len(BANNER)) == BANNER
        self.sock.sendall(first)
        self.sock.settimeout(SURVIVED)

    def say(self, count: int = PIECE) -> bool:
        """Send so many bytes, and have them back."""
        said = self._random.randbytes(count)
        self.sock.sendall(said)
        return read_exactly(self.sock, count) == said

    def end(self) -> bool:
        """End it from this side, and see the other end it, too."""
        self.sock.shutdown(socket.SHUT_WR)
        with self.sock:
            return not read_all(self.sock)

    def go_on(self, over: threading.Event, began: threading.Event) -> float:
        """Talk until it is over, and end; returns when the last bytes came back, infinite where some were wrong."""
        right = True
        while right and not (over.is_set() and began.is_set()):
            right = self.say()
            began.set()
        last = time.monotonic()
        return last if self.end() and right else float("inf")


@case(7, "black-hole", 1200, over_wire=True)
def black_hole(run: Run) -> None:
    """Holes of several lengths between the relays, under idle, silent, busy and settling links."""
    lengths = (1.0, 5.0, 12.0, 25.0) if run.scale >= 0.5 else (1.0, 5.0)
    kinds = list(itertools.product(lengths, ("nothing", "small", "large", "settling")))
    run.random.shuffle(kinds)
    holes = [Hole(*kind, run.random.random() < 0.5, Legs(("plain", "tls")[number % 2]))
             for number, kind in enumerate(kinds[: run.scaled(len(kinds), 4)])]  # fmt: skip
    network, relays, seen = run.lay_wire(), None, {}
    service = Service(run, network)
    for hole in sorted(holes, key=lambda one: one.legs.link):
        if relays is None or relays.legs != hole.legs:
            relays = DistantRelays(run, network, hole.legs, service.port, ("--pair-timeout", str(PAIR_TIMEOUT)))
        seen[hole] = look_into(hole, run, relays, service)
        run.say(f"{hole}: {seen[hole]}")
        if seen[hole].full >= GIVEN_UP:
            relays = None  # the next one is to find a full pool
    for seconds in sorted({hole.seconds for hole in holes}):
        worst = max(seen[hole].full for hole in holes if hole.seconds == seconds)
        run.tell(f"pool full after a hole of {seconds:g} s", worst, most=5, unit="s")
    evicted = max((seen[hole].evicted for hole in holes if hole.seconds >= 5), default=0.0)
    run.tell("dead links evicted", evicted, most=2.5 + run.slack / DistantRelays.HEARTBEAT, unit="heartbeats")
    every = seen.values()
    run.tell("service clients given a dead link after that", sum(one.misled for one in every), most=0, least=0)
    run.tell("longest wait of a service client", max(one.waited for one in every), most=PAIR_TIMEOUT + 0.5, unit="s")
    run.tell("connections that did not go on bit-exact", sum(one.broken for one in every), most=0, least=0)
    run.tell("connections that lived through a hole", sum(one.survivors for one in every))
    run.tell("the slowest transfer went on after", max(one.resumed for one in every), unit="s")


def look_into(hole: Hole, run: Run, relays: DistantRelays, service: Service) -> Seen:
    """Make one hole, with all that is to be on the links, and see what becomes of it."""
    silent = [Talk(run, relays) for _ in range(3)]
    broken = sum(not talk.say() for talk in silent)
    assert time_to(lambda: is_quiet(relays, len(silent))) < GIVEN_UP
    if hole.rested:
        threading.Event().wait(moment(relays.server.events("LinkUp")[-1]) + RESTED - time.time())
    service.read_on.clear()
    service.received.clear()
    over, began = threading.Event(), threading.Event()
    with ThreadPoolExecutor(32) as pool, ExitStack() as stack:
        stack.callback(over.set)  # whatever happens, or the pool would wait for ever
        busy = pool.submit(Talk(run, relays).go_on, over, began)
        stalled = carry(hole.before, run, relays, pool)
        assert began.wait(10.0)
        threading.Event().wait(run.random.uniform(0.0, 0.9 * relays.HEARTBEAT))  # no PING comes after a connection
        moments = sorted(run.random.uniform(0.0, hole.seconds) for _ in range(8))
        with relays.network.hole():
            start, end = time.time(), time.monotonic() + hole.seconds
            visits = [pool.submit(visit, relays, after) for after in moments]
            threading.Event().wait(run.random.uniform(0.0, hole.seconds))
            service.read_on.set()
            threading.Event().wait(end - time.monotonic())
            over.set()
        ended = time.monotonic()
        full = time_to(lambda: relays.count_links()[0] - sum(not one.done() for one in visits) >= relays.LINKS)
        seen = [one.result() for one in visits]
        resumed = busy.result() - ended
    broken += sum(not (talk.say() and talk.end()) for talk in silent) + (resumed == float("inf"))
    wait_until(lambda: len(service.received) == len(stalled), SURVIVED)
    broken += len(set(stalled) ^ set(service.received))
    downs = [event for event in relays.server.events("LinkDown") if event["reason"].startswith("silent")]
    evictions = [after for event in downs if 0 < (after := moment(event) - start) < hole.seconds]
    early = sum(after < 3 * relays.HEARTBEAT for after in moments)  # may have been given one of the links in time
    evicted = max(evictions) if len(evictions) >= max(1, relays.LINKS - early) else hole.seconds
    if evicted == hole.seconds >= 5:
        ends = [(round(moment(event) - start, 2), event["reason"]) for event in relays.server.events("LinkDown")]
        run.say(f"{hole}: {early} early: {[end for end in ends if 0 < end[0] < hole.seconds]}")
    failures = {event["peer"]: event["reason"] for event in relays.server.events("ConnectionFailed")}
    # A link is dead 2.5 heartbeats after it was last heard of, so until then one may be given to a newcomer.
    expected = max(evicted, 2.5 * relays.HEARTBEAT)
    late = [failures.get(peer, "") for since, _, peer in seen if expected < since - start < hole.seconds]
    wrong = [reason for reason in late if reason and not reason.startswith("no link was idle")]
    if wrong:
        run.say(f"{hole}: refused in the hole: {wrong}")
    misled = len(wrong)
    waited = max(seconds for _, seconds, _ in seen)
    return Seen(evicted / relays.HEARTBEAT, misled, waited, full, resumed, broken, len(silent) + 1 + len(stalled))


def is_quiet(relays: DistantRelays, silent: int) -> bool:
    """Whether the pool is full, and besides there are these silent connections alone."""
    alive, others = relays.count_links()
    return alive >= relays.LINKS and others == silent


def carry(what: str, run: Run, relays: DistantRelays, pool: ThreadPoolExecutor) -> list[bytes]:
    """Have the idle links carry connections.  Returns what the service does not read before it is told to."""
    if what == "settling":
        talks, sent = [Talk(run, relays, b"S") for _ in range(4)], [run.random.randbytes(STALL) for _ in range(4)]
        list(pool.map(lambda talk, data: talk.sock.sendall(data), talks, sent))
        assert all(list(pool.map(Talk.end, talks)))
        return sent
    if what != "nothing":
        talks = [Talk(run, relays) for _ in range(relays.LINKS)]
        for _ in range(8 if what == "large" else 1):
            assert all(pool.map(lambda talk: talk.say(PIECE if what == "large" else 100), talks))
        assert all(list(pool.map(Talk.end, talks)))
    return []


def visit(relays: DistantRelays, after: float) -> tuple[float, float, str]:
    """Connect some time into the hole and wait for the greeting; returns when, how long, and from which address."""
    threading.Event().wait(after)
    since, began = time.time(), time.monotonic()
    with relays.connect() as sock:
        peer = "{}:{}".format(*sock.getsockname())
        try:
            assert read_exactly(sock, len(BANNER)) == BANNER
        except ConnectionResetError:
            pass  # no link in time: an error, as it should be
        return since, time.monotonic() - began, peer


def time_to(condition: Callable[[], bool]) -> float:
    """Seconds until it holds, `GIVEN_UP` at most; asked seldom, since asking takes a process."""
    began, pause = time.monotonic(), threading.Event()
    while not condition() and time.monotonic() - began < GIVEN_UP:
        pause.wait(0.05)
    return time.monotonic() - began


# --- Bar 14: the server is restarted --------------------------------------------------------------------------

LINKS = 20
"""``--num-conn`` of each of the relay clients."""


@case(14, "restart", 600, over_wire=True)
def restart(run: Run) -> None:
    """The server is ended and started again; all relay clients come back, and not all at once."""
    clients = run.scaled(50, 3)
    wanted = clients * LINKS
    server = start_server(run, 0, 0)
    ports = server.relay_port, server.service_port
    for _ in range(clients):
        words = ["--relay-host", run.server.address, "--relay-port", str(ports[0]), "--host", HOST, "--port", "9"]
        with run.client.inside():
            client = run.peers.relay_process("client", *words, "--num-conn", str(LINKS), "--token", TOKEN)
        client.wait_event("Published", 30.0)
    for how, away in itertools.product((signal.SIGKILL, signal.SIGTERM), (0.0, 3.0)):
        came = wait_for_links(server, wanted)
        threading.Event().wait(came[-1] + RESTED - time.time())
        if how == signal.SIGKILL:
            server.kill()
        else:
            server.signal(how)
            server.wait(30.0)
        threading.Event().wait(away)
        server = start_server(run, *ports)
        since = moment(server.events("Listening")[0])
        came = wait_for_links(server, wanted)
        share = max(sum(first <= other < first + 1.0 for other in came) for first in came) / wanted
        what = f"{how.name}, {away:g} s away"
        run.tell(f"{what}: links back", len(came), least=wanted)
        run.tell(f"{what}: the last one after", came[-1] - since, most=30, unit="s")
        run.tell(f"{what}: most in one second", 100 * share, most=25 if run.scale >= 1 else None, unit="%")


def start_server(run: Run, relay_port: int, service_port: int) -> RelayProcess:
    words = ["--relay-port", str(relay_port), "--service-port", str(service_port)]
    words += ["--hostname", run.server.address]
    words += ["--token", TOKEN, "--max-connections", "4000", "--log-level", "debug"]
    with run.server.inside():
        server = run.peers.relay_process("server", *words)
    server.wait_event("Listening", service="default")
    return server


def wait_for_links(server: RelayProcess, wanted: int) -> list[float]:
    """When each link came up, once there are so many, or it has taken too long."""
    time_to(lambda: sum('"LinkUp"' in line for line in list(server.lines)) >= wanted)
    return sorted(moment(event) for event in server.events("LinkUp"))
