"""Several relay servers, one client, and a proxy on its way out.

fleet  two relay servers are killed, stopped, drained and started again, one at a time, and the proxy through which the
       relay client reaches both is killed and stopped in between, while service clients come all the time
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections import Counter

from ..conftest import PATIENCE, unused_port, wait_until
from ..peers import HOST, RelayProcess, workers_of
from ..test_via_peers import RealProxy
from .relays import TOKEN
from .suite import Run, case

SECONDS = 600.0
"""How long faults go on."""
AT_A_TIME = 6
MOST = 256 << 10
"""Bytes of the longest answer."""
PROBE = 0.5
"""Seconds that a service client waits for a relay server before it tries the other one."""
BAR = 3.0
"""Seconds after any single fault within which new connections succeed."""
BREAK = 3.0
"""Seconds for which a relay server, or the proxy, is stopped or away, at most."""


def answer_of(name: bytes, size: int) -> bytes:
    """What a request gets: another sequence of bytes for each."""
    return hashlib.shake_128(name).digest(size)


class Ledger:
    """A service that answers each request once, and knows which it has had."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # over the next
        self.asked: Counter[bytes] = Counter()

    def serve(self, sock: socket.socket) -> None:
        head = b""
        while len(head) < 20:
            piece = sock.recv(20 - len(head))
            if not piece:
                return
            head += piece
        name, size = head[:16], int.from_bytes(head[16:], "big")
        with self._lock:
            self.asked[name] += 1
        sock.sendall(answer_of(name, size))
        while sock.recv(1):  # the service client ends first
            pass


class Clients:
    """Service clients on several threads, each of which takes the relay server that answers first."""

    def __init__(self, run: Run, ports: list[int]) -> None:
        self._random, self._ports = run.random, ports
        self._lock = threading.Lock()  # over all that follows
        self.whole = self.broken = self.truncated = self.wrong = 0
        self.succeeded: list[float] = []
        """When each that was whole had begun."""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._come) for _ in range(AT_A_TIME)]
        for thread in self._threads:
            thread.start()

    def _come(self) -> None:
        while not self._over.is_set():
            began, size = time.monotonic(), self._random.choice((100, 5000, MOST))
            name = os.urandom(16)
            for port in self._random.sample(self._ports, len(self._ports)):
                outcome = self._ask(port, name, size)
                with self._lock:
                    setattr(self, outcome, getattr(self, outcome) + 1)
                    if outcome == "whole":
                        self.succeeded.append(began)
                if outcome == "whole":
                    break
                began, name = time.monotonic(), os.urandom(16)  # another request: the first one may have been heard
            self._over.wait(0.02)

    def _ask(self, port: int, name: bytes, size: int) -> str:
        """What became of one request: whole, broken off with an error, truncated without one, or wrong."""
        expected, got = answer_of(name, size), bytearray()
        try:
            with socket.create_connection((HOST, port), PROBE) as sock:
                sock.settimeout(PROBE)
                sock.sendall(name + size.to_bytes(4, "big"))
                while len(got) < size:
                    piece = sock.recv(65536)
                    if not piece:
                        return "truncated" if expected.startswith(got) else "wrong"
                    got += piece
        except OSError:
            return "broken" if expected.startswith(got) else "wrong"
        return "whole" if got == expected else "wrong"

    def first_success(self, since: float) -> float:
        """Seconds from that moment until one has begun that was whole; waited for."""

        def look() -> float:
            with self._lock:
                return min((at - since for at in self.succeeded[-2000:] if at >= since), default=0.0)

        return float(wait_until(look, 10 * BAR))

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


class Fleet:
    """The relay servers, each of which is always started on its own ports again, the proxy, and the relay client."""

    def __init__(self, run: Run, service: int) -> None:
        self._run = run
        self.places = [(unused_port(), unused_port()) for _ in range(2)]
        self.servers = [self.start(number) for number in range(2)]
        self.proxy = RealProxy(run.peers, "microsocks")
        run.stack.callback(self.proxy.kill)
        words = [word for relay, _ in self.places for word in ("--relay", f"{HOST}:{relay}")]
        self.client = run.peers.relay_process(
            "client", *words, "--via", self.proxy.via, "--port", str(service), "--token", TOKEN
        )
        for server in self.servers:
            server.wait_event("ClientUp")

    def start(self, number: int) -> RelayProcess:
        relay, service = self.places[number]
        words = "--hostname", HOST, "--relay-port", str(relay), "--service-port", str(service), "--token", TOKEN
        return self._run.peers.relay_process("server", *words, "--drain-timeout", "5")

    def is_served(self, number: int) -> None:
        """Wait until the relay client has links to a relay server that has been started anew."""
        self.servers[number].wait_event("ClientUp", 10 * BAR)

    def kill(self, number: int) -> float:
        self.servers[number].kill()
        return time.monotonic()

    def drain(self, number: int) -> float:
        began = time.monotonic()
        self.servers[number].signal(signal.SIGTERM)
        assert self.servers[number].wait(2 * PATIENCE) == 0
        return began

    def stop(self, number: int, on: bool) -> float:
        server = self.servers[number]
        for pid in (server.process.pid, *workers_of(server)):
            os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)
        return time.monotonic()


@case(32, "fleet", 1200)
def fleet(run: Run) -> None:
    ledger = Ledger()
    ships = Fleet(run, run.peers.service(ledger.serve).port)
    clients = Clients(run, [service for _, service in ships.places])
    until = time.monotonic() + max(20.0, run.scale * SECONDS)
    slowest: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    pause = threading.Event()
    try:
        while time.monotonic() < until:
            number = run.random.randrange(2)
            fault = run.random.choice(("killed", "stopped", "drained", "proxy killed", "proxy stopped"))
            length = BREAK * run.random.random()
            if fault in ("killed", "drained"):
                since = (ships.kill if fault == "killed" else ships.drain)(number)
                seconds = clients.first_success(since)
                pause.wait(length)
                ships.servers[number] = ships.start(number)
                ships.is_served(number)
            elif fault == "stopped":
                since = ships.stop(number, True)
                seconds = clients.first_success(since)
                pause.wait(length)
                ships.stop(number, False)
            else:  # without it there is no way to either: what counts is its return
                if fault == "proxy killed":
                    ships.proxy.kill()
                    pause.wait(length)
                    ships.proxy.start()
                else:
                    ships.proxy.stop(True)
                    pause.wait(length)
                    ships.proxy.stop(False)
                seconds = clients.first_success(time.monotonic())
            faults[fault] += 1
            slowest[fault] = max(slowest[fault], seconds)  # type: ignore[assignment]
            pause.wait(1.0 + run.random.random())  # one fault at a time: both are there again
    finally:
        clients.end()
    run.tell("faults", sum(faults.values()))
    run.tell("answers that came whole", clients.whole)
    run.tell("broken off with an error", clients.broken)
    run.tell("truncated without one", clients.truncated, most=0)
    run.tell("wrong", clients.wrong, most=0)
    run.tell("requests that the service had twice", sum(count > 1 for count in ledger.asked.values()), most=0)
    for fault in sorted(faults):
        run.tell(f"slowest new connection after: {fault} ({faults[fault]})", slowest[fault], most=BAR, unit="s")
