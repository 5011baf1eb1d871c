"""Load: thousands of connections that are held, broken off or stalled, and what they cost the relays."""

from __future__ import annotations

import random
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from itertools import pairwise
from operator import le, sub
from typing import Any, TypeVar

from _tcprelay.server.links import SURPLUS_TIME
from _tcprelay.tcp import RESET_ON_CLOSE
from _tcprelay.threads import Threads

from ..bench.processes import free_port
from ..conftest import echo, read_all, read_exactly, wait_until
from ..peers import HOST
from .relays import Legs, Relays, descriptors, links_of, memory, serving, threads, wait_for_pool
from .suite import Run, case

AT_ONCE = 32
"""Connections that are opened at once: these bars are about holding and ending them, not about bursts."""
T = TypeVar("T")
PATIENT = 120.0
"""Seconds for what thousands of connections do at the same moment."""
LONG = 600.0
"""Seconds that a stalled transfer may take, all in all."""


# --- Held -----------------------------------------------------------------------------------------------------


@case(4, "held", 600)
def held(run: Run) -> None:
    """3,000 connections are held for two minutes, and then all of them echo."""
    hold(run, Legs(), most=250)
    hold(run, Legs("tls"), most=500)


def hold(run: Run, legs: Legs, most: float) -> None:
    count, seconds = run.scaled(3000, least=AT_ONCE), run.scaled(120)
    relays = Relays(run, legs, start_echo(run))
    with ExitStack() as stack:
        connections: list[socket.socket] = []
        while len(connections) < count:
            batch = [stack.enter_context(relays.connect()) for _ in range(min(AT_ONCE, count - len(connections)))]
            for sock in batch:
                sock.settimeout(PATIENT)
            assert echoing(run, batch) == len(batch), f"a connection after {len(connections)} does not echo"
            connections += batch
        used = [(memory(relays.server), memory(relays.client))]
        poller = select.poll()
        for sock in connections:
            poller.register(sock, select.POLLIN)
        if poller.poll(seconds * 1000):  # nobody has anything to say
            run.say(f"{legs}: connections end while they are held")
        used.append((memory(relays.server), memory(relays.client)))
        began = time.monotonic()
        run.tell(f"{legs}: of {count:,} held for {seconds} s, echo", echoing(run, connections), least=count, most=count)
        run.tell(f"{legs}: all of them at once, within", time.monotonic() - began, unit="s")
        used.append((memory(relays.server), memory(relays.client)))
        holding = descriptors(relays.server)
    left = seconds_until(lambda: descriptors(relays.server) <= holding - count, PATIENT)  # their links stay
    run.tell(f"{legs}: all of them closed at once, have left after", left, unit="s")
    server, client = (max(column) for column in zip(*used, strict=True))
    run.tell(f"{legs}: relay server's memory", server, most=most if run.scale >= 1 else None, unit="MiB")
    run.tell(f"{legs}: relay client's memory", client, unit="MiB")
    end(relays)


def start_echo(run: Run) -> int:
    """An echo service that serves all connections in the one thread of its own process; returns its port."""
    port = free_port()
    run.peers.program(sys.executable, "-m", "tests.bench.services", "echo", HOST, str(port)).wait_until_listening(port)
    return port


def echoing(run: Run, connections: list[socket.socket]) -> int:
    """Send something else on each connection; on how many it comes back."""
    messages = [run.random.randbytes(64) for _ in connections]
    count = 0
    for sock, message in zip(connections, messages, strict=True):
        with suppress(OSError):
            sock.sendall(message)
    for sock, message in zip(connections, messages, strict=True):
        with suppress(OSError, AssertionError):
            count += read_exactly(sock, len(message)) == message
    return count


def end(relays: Relays) -> None:
    """End both, so that they do not disturb what is measured next."""
    relays.client.close()
    relays.server.close()


# --- A burst --------------------------------------------------------------------------------------------------


@case(19, "burst", 300)
def burst(run: Run) -> None:
    """3,000 connections are opened as fast as possible, on the default pool, and all of them echo."""
    for legs in (Legs(), Legs("tls")):
        count, relays = run.scaled(3000, least=AT_ONCE), Relays(run, legs, start_echo(run))
        with ExitStack() as stack:
            connections = [stack.enter_context(relays.connect(PATIENT)) for _ in range(count)]
            began = time.monotonic()
            echoed = echoing(run, connections)
            seconds = time.monotonic() - began
            used = links_of(relays.relay_port)
        run.tell(f"{legs}: of {count:,} opened at once, echo", echoed, least=count, most=count)
        run.tell(f"{legs}: all of them, within", seconds, unit="s")
        run.tell(f"{legs}: links then", used)
        end(relays)


# --- Leaks ----------------------------------------------------------------------------------------------------

LATE = 30.0
"""Seconds by which surplus links may be retired late."""
POOL = 8
"""Idle links of the relay client."""


@case(5, "leaks", 1800)
def leaks(run: Run) -> None:
    """10,000 connections, of which a third is broken off, leave nothing behind; nor do three times 10,000 more."""
    for legs in (Legs(), Legs("tls", port=True, service=True)):
        look_for_leaks(run, legs)


def look_for_leaks(run: Run, legs: Legs) -> None:
    relays = Relays(run, legs, serving(run, legs, serve_or_reset), client=("--num-conn", str(POOL)))
    wait_for_pool(relays, POOL)
    baseline = beyond_links(settle(relays), POOL)
    count, used = run.scaled(10_000, least=100), []
    for which in ("first", "second", "third", "fourth"):
        name = f"{legs}: {which} {count:,}"
        run.tell(f"{name}: wrong answers on whole connections", sum(rush(run, relays, count)), least=0, most=0)
        seconds = seconds_until(lambda: not left_over(relays, baseline))
        run.tell(f"{name}: back at the baseline after", seconds, most=5, unit="s")
        if left := left_over(relays, baseline):
            run.say(f"{name}: left over: {left}")
        if run.scale >= 1:  # how many links there are beyond the pool is chance, and each takes memory
            wait_until(lambda: links_of(relays.relay_port) <= POOL, SURPLUS_TIME + LATE)
        settle(relays)
        used.append((memory(relays.server), memory(relays.client)))
    for name, *after in zip(("server", "client"), *used, strict=True):
        # More of them at the same time, by chance, take more memory for good, in each process that carries some; but
        # what leaks does so every time.
        bar = 2 * max(1, run.workers) if run.scale >= 1 else None
        least = min(more - less for less, more in pairwise(after))
        run.tell(f"{legs}: what a further {count:,} add to relay {name}'s memory", least, most=bar, unit="MiB")
    end(relays)


def settle(relays: Relays) -> list[int]:
    """What is in use once it has not changed for longer than parked threads wait."""
    return settled(lambda: in_use(relays), Threads.PARKED + 1.0)


def in_use(relays: Relays) -> list[int]:
    """Descriptors and threads of the server, then of the client."""
    return [count(process) for process in (relays.server, relays.client) for count in (descriptors, threads)]


def beyond_links(used: list[int], links: int) -> list[int]:
    """What is in use beside the links: each is a descriptor on both sides and a thread on the client's."""
    return [count - links * share for count, share in zip(used, (1, 0, 1, 1), strict=True)]


def left_over(relays: Relays, baseline: list[int]) -> list[int]:
    """What is in use beyond the baseline; none where it is nothing.

    Links that a load has brought about beyond the pool are not counted: they are kept for a minute on purpose.
    """
    now = beyond_links(in_use(relays), links_of(relays.relay_port))
    return [] if all(map(le, now, baseline)) else list(map(sub, now, baseline))


def settled(look: Callable[[], T], quiet: float, timeout: float = 120.0) -> T:
    """What `look` gives once that has been the same for `quiet` seconds."""
    pause, value, since = threading.Event(), look(), time.monotonic()
    deadline = since + timeout
    while (now := time.monotonic()) - since < quiet:
        assert now < deadline, f"not calm within {timeout} s: {value}"
        pause.wait(0.1)
        if (fresh := look()) != value:
            value, since = fresh, time.monotonic()
    return value


def seconds_until(condition: Callable[[], bool], timeout: float = 30.0) -> float:
    """After how many seconds it is true; the time-out where it never is."""
    pause, began = threading.Event(), time.monotonic()
    while not condition() and time.monotonic() - began < timeout:
        pause.wait(0.05)
    return min(timeout, time.monotonic() - began)


def rush(run: Run, relays: Relays, count: int) -> list[int]:
    """Make so many connections, some dozens at once; returns how many answers were wrong, by each thread."""
    seeds = [run.random.randrange(1 << 32) for _ in range(AT_ONCE)]
    shares = [len(range(number, count, AT_ONCE)) for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda seed, share: make_connections(relays, random.Random(seed), share), seeds, shares))


def make_connections(relays: Relays, chance: random.Random, count: int) -> int:
    """Make connections one after another, every third one to be broken off; returns how many answers were wrong."""
    wrong, abandoned = 0, deque[Any]()
    for number in range(count):
        if number % 3 == 2:
            break_off(relays, chance, abandoned)
        else:
            wrong += not is_echoed(relays, b"e" + chance.randbytes(chance.randrange(20_000)))
        while len(abandoned) > 3:
            abandoned.popleft().close()
    while abandoned:
        abandoned.popleft().close()
    return wrong


def is_echoed(relays: Relays, message: bytes) -> bool:
    try:
        with relays.connect() as sock:
            sock.sendall(message)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock) == message
    except (OSError, EOFError):
        return False


def break_off(relays: Relays, chance: random.Random, abandoned: deque[Any]) -> None:
    """Go some of the way, and then reset it, close it with an answer unread, or leave it alone for a while."""
    if relays.legs.port and chance.random() < 0.2:  # without as much as a handshake
        sock: Any = socket.create_connection(("127.0.0.1", relays.service_port), 10.0)
        way = 0
    else:
        sock, way = relays.connect(), chance.randrange(5)
    with suppress(OSError):
        if way >= 1:
            sock.sendall((b"r" if way == 4 else b"e") + chance.randbytes(chance.randrange(20_000)))
        if way >= 2:
            sock.recv(1000)
        if way >= 3:
            sock.shutdown(socket.SHUT_WR)
    fate = chance.choice(("reset", "close", "abandon"))
    if fate == "abandon":
        abandoned.append(sock)
        return
    if fate == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


def serve_or_reset(sock: Any) -> None:
    """A service that echoes, or breaks off in the middle of its answer where the first byte asks for that."""
    first = sock.recv(1)
    if first:
        sock.sendall(first)
    if first == b"r":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        sock.close()
        return
    echo(sock)
    sock.shutdown(socket.SHUT_WR)


# --- Stalled --------------------------------------------------------------------------------------------------

STALLED = 50
PIECE = 1 << 18
PLACE = struct.Struct("!IQ")
"""What each piece of a stream begins with: the stream's number, and the piece's."""
REQUEST = b"a small request".ljust(64)


@case(6, "stalled", 900)
def stalled(run: Run) -> None:
    """50 readers stall while a GiB is offered to each; that costs no memory, and nobody else notices."""
    stall(run, Legs(), run.scaled(1024, least=64) << 20)
    stall(run, Legs("tls"), run.scaled(256, least=64) << 20)


def stall(run: Run, legs: Legs, size: int) -> None:
    transfers = Transfers(run, size)
    relays = Relays(run, legs, serving(run, legs, transfers.serve))
    samples = run.scaled(2000, least=200)
    before = measure_p99(relays, samples)
    at_first = memory(relays.server), memory(relays.client)
    with ThreadPoolExecutor(STALLED) as pool, ExitStack() as stack:
        stack.callback(transfers.resumed.set)  # also after an error: the pool waits for its threads
        ends = [pool.submit(transfers.connect, relays, number) for number in range(STALLED)]
        settled(lambda: list(transfers.sent), quiet=1.0)
        incomplete = sum(0 < sent < size for sent in transfers.sent)
        run.tell(f"{legs}: of {STALLED} that are offered {size >> 20:,} MiB, stall", incomplete, least=STALLED)
        during = measure_p99(relays, samples)
        used = [(memory(relays.server), memory(relays.client))]
        transfers.resumed.set()
        while wait(ends, timeout=0.5).not_done:
            used.append((memory(relays.server), memory(relays.client)))
        whole = sum(future.result() for future in ends)
    run.tell(f"{legs}: of {STALLED} resumed transfers, bit-exact to the last byte", whole, least=STALLED, most=STALLED)
    for name, then, now in zip(("new", "kept-alive"), before, during, strict=True):
        what = f"{legs}: p99 on {name} connections, {1000 * then:.2f} ms before, becomes"
        run.tell(what, now / then, most=2 if run.scale >= 1 else None, unit="times that")
    for name, then, most in zip(("server", "client"), at_first, map(max, *used), strict=True):
        run.tell(f"{legs}: relay {name}'s memory grows by at most", most - then, most=64, unit="MiB")
    end(relays)


class Transfers:
    """Both ends of the transfers whose readers stall: of the even ones service clients, of the odd ones services."""

    def __init__(self, run: Run, size: int) -> None:
        self._pieces = size // PIECE
        self._filling = run.random.randbytes(PIECE)
        self.sent = [0] * STALLED
        """Bytes of each that have been sent so far."""
        self.resumed = threading.Event()
        """The stalled readers read on."""

    def connect(self, relays: Relays, number: int) -> bool:
        """A service client; whether its transfer is whole."""
        try:
            with relays.connect() as sock:
                sock.settimeout(LONG)
                if number % 2:
                    sock.sendall(b"u" + struct.pack("!I", number))
                    self._send(sock, number)
                    return bool(read_all(sock) == b"whole")
                sock.sendall(b"d" + struct.pack("!I", number))
                self.resumed.wait(LONG)
                return self._is_whole(sock, number)
        except OSError:
            return False

    def serve(self, sock: Any) -> None:
        """The service: it sends, takes, or (to the other clients) echoes, as the first byte says."""
        kind = sock.recv(1)
        if kind == b"e":
            echo(sock)
            return
        sock.settimeout(LONG)
        [number] = struct.unpack("!I", read_exactly(sock, 4))
        if kind == b"d":
            self._send(sock, number)
            return
        self.resumed.wait(LONG)
        if self._is_whole(sock, number):
            sock.sendall(b"whole")

    def _send(self, sock: socket.socket, number: int) -> None:
        piece = bytearray(self._filling)
        for place in range(self._pieces):
            PLACE.pack_into(piece, 0, number, place)
            sock.sendall(piece)
            self.sent[number] += PIECE
        sock.shutdown(socket.SHUT_WR)

    def _is_whole(self, sock: socket.socket, number: int) -> bool:
        expected, piece = bytearray(self._filling), bytearray(PIECE)
        for place in range(self._pieces):
            view = memoryview(piece)
            while view:
                count = sock.recv_into(view)
                if not count:
                    return False
                view = view[count:]
            PLACE.pack_into(expected, 0, number, place)
            if piece != expected:
                return False
        return sock.recv(1) == b""


def measure_p99(relays: Relays, samples: int) -> tuple[float, float]:
    """Seconds that all but one in a hundred small requests take, on new connections and on one that is kept."""
    times: tuple[list[float], list[float]] = [], []
    with relays.connect() as kept:
        kept.sendall(b"e")
        for _ in range(samples):
            began = time.monotonic()
            with relays.connect() as fresh:
                fresh.sendall(b"e" + REQUEST)
                read_exactly(fresh, len(REQUEST))
            times[0].append(time.monotonic() - began)
            began = time.monotonic()
            kept.sendall(REQUEST)
            read_exactly(kept, len(REQUEST))
            times[1].append(time.monotonic() - began)
    new, old = (sorted(one)[samples * 99 // 100] for one in times)
    return new, old
