"""Limits: no more descriptors, no more threads, and the end of a container."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

from _tcprelay.server.intake import SPARE_TAKERS
from _tcprelay.tcp import RESET_ON_CLOSE

from ..bench.processes import find_family
from ..conftest import read_exactly, wait_until
from ..peers import RelayProcess
from .load import end, seconds_until, start_echo
from .relays import Legs, Relays, descriptors_of_each, processor, serving
from .relays import threads as count_threads
from .suite import Run, case

Role = Literal["server", "client"]
ROLES: tuple[Role, Role] = ("server", "client")
PLENTY = "100000"
"""More connections than any limit here allows."""


class LimitedRelays(Relays):
    """Relays of which one, the `subject`, runs under a wrapper."""

    def __init__(
        self,
        run: Run,
        legs: Legs,
        service: int | str,
        role: Role,
        around: tuple[str, ...],
        server: tuple[str, ...],
        client: tuple[str, ...],
    ) -> None:
        self._role, self._around = role, around
        super().__init__(run, legs, service, server, client)

    @property
    def subject(self) -> RelayProcess:
        return self.server if self._role == "server" else self.client

    def start_server(self) -> RelayProcess:
        self._wrapper = self._around if self._role == "server" else ()
        return super().start_server()

    def start_client(self, wait: bool = True) -> RelayProcess:
        self._wrapper = self._around if self._role == "client" else ()
        return super().start_client(wait)


# --- Descriptors and threads ----------------------------------------------------------------------------------

STREAMS = 4
BEAT = 0.2
"""Seconds between two bytes of the streams that trickle through all of it."""
LIMIT = 150
"""Descriptors, or threads, that the relay may have."""
QUEUE = 20
"""Connections that are made at once beyond those that the limit allows."""
FILLING = 30.0
"""Seconds within which the limit is reached."""
NEWCOMERS = 2.0
"""Seconds between two further ones, so that the limit goes on to be reached."""


@case(12, "descriptors", 300)
def descriptors(run: Run) -> None:
    """For a minute a relay has no descriptor left."""
    for role in ROLES:
        exhaust(run, role, "descriptors", "too many open files", ("prlimit", f"--nofile={LIMIT}"))


@case(12, "threads", 300)
def threads(run: Run) -> None:
    """For a minute a relay gets no thread any more."""
    for role in ROLES:
        # A user whom nobody else is, for all of a user's threads are counted; who may read what its files are in.
        user = str(run.random.randrange(1 << 21, 1 << 30))
        wrapper = ("setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=+dac_read_search",
                   "--ambient-caps=+dac_read_search", "prlimit", f"--nproc={LIMIT}")  # fmt: skip
        exhaust(run, role, "threads", "cannot start a thread", wrapper)


def exhaust(run: Run, role: Role, what: str, says: str, wrapper: tuple[str, ...]) -> None:
    """Reach a limit of one relay, stay there, and leave; `says` is what its log says of it."""
    name, seconds = f"{role}, {what}", run.scaled(60, least=5)
    relays = LimitedRelays(
        run, Legs(), start_echo(run), role, wrapper, ("--max-connections", PLENTY), ("--max-conn", PLENTY)
    )
    subject = relays.subject

    # Each process has that many descriptors; but threads, which count by users, they have together.
    in_use = {"descriptors": lambda relay: max(descriptors_of_each(relay).values()), "threads": count_threads}[what]

    streams = Trickle(relays)
    with ExitStack() as crowd:
        size, deadline = 0, time.monotonic() + FILLING
        while not any(says in line.lower() for line in list(subject.lines)) and time.monotonic() < deadline:
            size += join(crowd, relays, patience=1.0)
        size += sum(join(crowd, relays) for _ in range(QUEUE))
        streams.go_on(NEWCOMERS)
        run.tell(f"{name}: connections before and after the limit", size)

        lines, used, least, began = len(subject.lines), processor(subject), LIMIT, time.monotonic()
        while (took := time.monotonic() - began) < seconds:
            join(crowd, relays)
            streams.go_on(NEWCOMERS)
            least = min(least, in_use(subject))
        idle = SPARE_TAKERS * run.workers if what == "threads" else 0  # go soon, and come again with a burst
        run.tell(f"{name}: fewest in use meanwhile, of {LIMIT}", least, least=LIMIT - 4 - idle)
        run.tell(f"{name}: processor time", 100 * (processor(subject) - used) / took, most=5, unit="% of a core")
        tell_lines(run, name, [json.loads(line) for line in subject.lines[lines:]], took)

    served = seconds_until(lambda: is_served(relays))
    run.tell(f"{name}: after all those have left, a new connection is served within", served, most=2, unit="s")
    streams.go_on(2 * BEAT)
    run.tell(f"{name}: established streams that stayed intact", streams.intact, least=STREAMS, most=STREAMS)
    streams.close()
    end(relays)


def tell_lines(run: Run, name: str, entries: list[dict[str, Any]], seconds: float) -> None:
    """Tell how much was logged: of each connection that was made or refused its records, and beside that little."""
    records = Counter(entry["id"] for entry in entries if "id" in entry)
    others = len(entries) - records.total()
    run.tell(f"{name}: log lines a second, records of connections aside", max(0, others - 1) / seconds, most=1)
    run.tell(f"{name}: most records of one connection", max(records.values(), default=0), most=2)


def join(crowd: ExitStack, relays: Relays, patience: float = 0.0) -> int:
    """One more connection, which asks for something and waits so many seconds for an answer; returns 1."""
    with suppress(OSError):  # it may well be reset
        sock = crowd.enter_context(relays.connect())
        sock.sendall(b"?")
        sock.settimeout(patience)
        sock.recv(1)
    return 1


def is_served(relays: Relays) -> bool:
    with suppress(OSError), relays.connect() as sock:
        return is_echoed(sock, b"a newcomer")
    return False


class Trickle:
    """Established streams on which a few bytes pass now and then."""

    def __init__(self, relays: Relays) -> None:
        self._streams = [relays.connect() for _ in range(STREAMS)]
        self._pace = threading.Event()
        self._number = 0
        self.go_on(2 * BEAT)

    def go_on(self, seconds: float) -> None:
        """Send and get back something else on each stream with every beat; a stream that fails is left out."""
        for _ in range(round(seconds / BEAT)):
            self._number += 1
            self._streams = [sock for sock in self._streams if is_echoed(sock, struct.pack("!Q", self._number))]
            self._pace.wait(BEAT)

    @property
    def intact(self) -> int:
        return len(self._streams)

    def close(self) -> None:
        for sock in self._streams:
            sock.close()


def is_echoed(sock: socket.socket, message: bytes) -> bool:
    try:
        sock.sendall(message)
        return read_exactly(sock, len(message)) == message
    except (OSError, AssertionError):
        return False


# --- The end of a container -----------------------------------------------------------------------------------

DRAIN = 2.0
CLIENTS = 12
"""Service clients at once, each of which makes one transfer after another."""
SLOWLY = 0.1
"""Seconds between two pieces of a slow transfer."""
SLOW = 4
"""So many of them make slow ones, which are not over at the drain time-out."""
REQUEST = struct.Struct("!cIf")
"""Which way the bytes go (d: down, u: up), how many, and the seconds between two pieces of them."""
PIECE = 16384


@case(13, "sigterm", 900)
def sigterm(run: Run) -> None:
    """SIGTERM to a relay as process 1, under transfers and new connections, 50 times."""
    kinds = [(role, legs) for legs in (Legs(), Legs("tls", port=True, service=True)) for role in ROLES]
    ends = [Ending(run, *kinds[number % len(kinds)]) for number in range(run.scaled(50, least=len(kinds)))]
    for role in ROLES:
        some = [one for one in ends if one.role == role]
        outcomes = sum((one.outcomes for one in some), Counter[str]())
        run.tell(f"{role}: ended by SIGTERM as process 1", len(some), unit="times")
        run.tell(f"{role}: exit statuses other than 0", sum(one.status != 0 for one in some), least=0, most=0)
        run.tell(f"{role}: the longest took", max(one.seconds for one in some), most=DRAIN + 1, unit="s")
        run.tell(f"{role}: lines that are no log lines, or errors", sum(one.odd for one in some), least=0, most=0)
        run.tell(f"{role}: transfers under way at SIGTERM", sum(one.under_way for one in some), least=len(some))
        run.tell(f"{role}: transfers that ended whole", outcomes["whole"], least=len(some))
        run.tell(f"{role}: transfers that ended with an error", outcomes["error"], least=len(some))
        run.tell(f"{role}: transfers that ended in a clean end on a part", outcomes["part"], least=0, most=0)


class Ending:
    """One relay that is ended under load, and what became of it and of the transfers."""

    def __init__(self, run: Run, role: Role, legs: Legs) -> None:
        self.role = role
        self.outcomes = Counter[str]()
        self._lock = threading.Lock()  # over the outcomes and `_open`
        self._open = 0
        self._over = threading.Event()
        relays = LimitedRelays(
            run, legs, serving(run, legs, self._serve), role, ("unshare", "-pf", "--kill-child"),
            ("--drain-timeout", f"{DRAIN:g}", "--pair-timeout", f"{DRAIN:g}"), ("--drain-timeout", f"{DRAIN:g}"),
        )  # fmt: skip
        process = relays.subject.process
        clients: list[Future[None]] = []
        with ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as stack:
            stack.callback(self._over.set)
            for number in range(CLIENTS):
                chance = random.Random(run.random.randrange(1 << 32))
                clients.append(pool.submit(self._go_on, relays, chance, SLOWLY if number < SLOW else 0.0))
            wait_until(lambda: self.outcomes["whole"] and self._open >= SLOW)
            self._over.wait(run.random.uniform(0.0, 0.5))  # at any moment of a transfer
            self.under_way = self._open
            began = time.monotonic()
            os.kill(list(find_family(process.pid))[1], signal.SIGTERM)  # the child of unshare
            with suppress(subprocess.TimeoutExpired):
                process.wait(10 * DRAIN)
            self.seconds, self.status = time.monotonic() - began, process.poll()
        for client in clients:
            client.result()  # raises what was unexpected
        end(relays)
        lines = relays.subject.lines
        self.odd = sum(not line.startswith("{") or '"level": "error"' in line for line in lines)

    def _go_on(self, relays: Relays, chance: random.Random, pause: float) -> None:
        """A service client's transfers, one after another, until the relay is over."""
        while not self._over.is_set():
            self._count(self._transfer(relays, chance, pause))
            self._over.wait(chance.uniform(0.0, 0.05))

    def _transfer(self, relays: Relays, chance: random.Random, pause: float) -> str:
        """A service client's transfer; returns how it ended."""
        way, size = chance.choice((b"d", b"u")), 100 * PIECE if pause else chance.randrange(1 << 20)
        try:
            sock = relays.connect()
        except (OSError, EOFError):
            return "refused"
        with self._opened(), sock:
            try:
                sock.sendall(REQUEST.pack(way, size, pause))
                if way == b"u":
                    self._send(sock, size, pause)
                    size = 1
                return "whole" if count_bytes(sock) == size else "part"
            except OSError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                return "error"

    def _serve(self, sock: Any) -> None:
        request = b""
        while len(request) < REQUEST.size and (piece := sock.recv(REQUEST.size - len(request))):
            request += piece
        if len(request) < REQUEST.size:
            self._count("part")
            return
        way, size, pause = REQUEST.unpack(request)
        if way == b"d":
            self._send(sock, size, pause)
        elif count_bytes(sock) == size:
            sock.sendall(b"!")
        else:
            self._count("part")

    def _send(self, sock: Any, size: int, pause: float) -> None:
        piece = bytes(PIECE)
        while size:
            sock.sendall(piece[:size])
            size -= min(size, PIECE)
            if pause:
                self._over.wait(pause)
        sock.shutdown(socket.SHUT_WR)

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    @contextmanager
    def _opened(self) -> Iterator[None]:
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1


def count_bytes(sock: Any) -> int:
    """How many bytes come in up to the end."""
    count = 0
    while piece := sock.recv(1 << 18):
        count += len(piece)
    return count
