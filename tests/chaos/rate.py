"""--limit-rate: whether connections are as fast as was asked, and whether the others notice them."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from ..conftest import read_exactly
from ..peers import HOST
from .load import end, start_echo
from .relays import Legs, Relays, serving
from .suite import Run, case

RATES = {"64Ki/s": 1 << 16, "1Mi/s": 1 << 20, "125M/s": 125_000_000}
"""Bytes a second; the last is 1 Gbit/s."""
SECONDS = 3.0
"""How long each of them is measured."""
PIECE = bytes(1 << 18)
TOLERANCE = 5
"""By how many percent a connection may miss its rate."""
OTHERS = 8
"""Connections without a rate, on which one request follows another."""
LIMITED = 16
"""Downloads beside them, of 1 MiB/s each."""
REQUEST = b"a small request".ljust(64)


@case(27, "rate", 300)
def rate(run: Run) -> None:
    """Each way at 64 KiB/s, 1 MiB/s and 1 Gbit/s; and requests on other connections beside 16 limited downloads."""
    for legs, words in ((Legs(), list(RATES)), (Legs("tls", port=True, service=True), list(RATES)[:2])):
        for word in words:
            for way in ("down", "up"):
                figure = 100 * measure(run, legs, word, way, run.scaled(SECONDS, least=2)) / RATES[word]
                run.tell(f"{legs}, {word}, {way}", figure, least=100 - TOLERANCE, most=100 + TOLERANCE, unit="% of it")
    harm(run)


def measure(run: Run, legs: Legs, word: str, way: str, seconds: float) -> float:
    """Bytes a second that come out of a connection with this rate, from a second after its first ones on."""
    received: Future[float] = Future()

    def receive(sock: Any) -> None:
        try:
            received.set_result(count_for(sock, seconds))
        except BaseException as error:
            received.set_exception(error)
            raise

    def serve(sock: Any) -> None:
        (send if sock.recv(1) == b"d" else receive)(sock)

    relays = Relays(run, legs, serving(run, legs, serve), server=("--limit-rate", word))
    with relays.connect() as sock:
        sock.sendall(way[:1].encode())
        (receive if way == "down" else send)(sock)
    figure = received.result()
    end(relays)
    return figure


def send(sock: Any) -> None:
    """Send until the other side has had enough."""
    with suppress(OSError):
        while True:
            sock.sendall(PIECE)


def count_for(sock: Any, seconds: float) -> float:
    """Bytes a second of what comes, without the first second: what passes at once is in that."""
    began: float | None = None
    count, now = 0, 0.0
    while began is None or now - began < seconds:
        piece = len(sock.recv(1 << 18))
        assert piece, "the end"
        now = time.monotonic()
        if began is not None:
            count += piece if now > began else 0
        else:
            began = now + 1.0
    return count / (now - began)


# --- The others -----------------------------------------------------------------------------------------------


def harm(run: Run) -> None:
    """Requests on connections without a rate, alone and beside those that have one."""
    legs, samples = Legs(), run.scaled(20_000, least=1000)
    flood = run.peers.service(lambda sock: send(sock) if sock.recv(1) else None)
    relays = Relays(
        run, legs, start_echo(run), ("--service", "slow=0", "--limit-rate", "slow=1Mi"),
        ("--publish", f"slow={HOST}:{flood.port}", "--num-conn", str(LIMITED + OTHERS)),
    )  # fmt: skip
    port = relays.server.port_of("slow")
    before = time_requests(relays.connect, samples)
    over = threading.Event()
    with ThreadPoolExecutor(LIMITED) as pool, ExitStack() as stack:
        stack.callback(over.set)
        downloads = [pool.submit(download, port, over) for _ in range(LIMITED)]
        during = time_requests(relays.connect, samples)
        over.set()
        rates = [download.result() for download in downloads]
    for name, then, now in zip(("the middle one", "p99"), before, during, strict=True):
        what = f"{name} of {samples:,} requests on {OTHERS} connections, {1000 * then:.2f} ms alone, becomes"
        run.tell(what, now / then, most=2 if run.scale >= 1 else None, unit="times that")
    run.tell(f"the slowest of {LIMITED} downloads beside them", 100 * min(rates) / (1 << 20), unit="% of its rate")
    end(relays)


def download(port: int, over: threading.Event) -> float:
    """Take what a limited connection gives; returns how many bytes a second that was."""
    with socket.create_connection((HOST, port), 10.0) as sock:
        sock.sendall(b"d")
        count, began = 0, time.monotonic()
        while not over.is_set():
            count += len(sock.recv(1 << 18))
        return count / (time.monotonic() - began)


def time_requests(connect: Callable[[], Any], samples: int) -> tuple[float, float]:
    """Seconds that a small request takes on each of some connections, of which none waits for another: of the middle
    one, and of all but one in a hundred."""
    times: list[float] = []
    with ExitStack() as stack:
        connections = {sock.fileno(): sock for sock in (stack.enter_context(connect()) for _ in range(OTHERS))}
        poller, sent = select.poll(), dict[int, float]()
        for number, sock in connections.items():
            poller.register(number, select.POLLIN)
            sock.sendall(REQUEST)
            sent[number] = time.monotonic()
        while len(times) < samples:
            for number, _ in poller.poll(10_000):
                assert read_exactly(connections[number], len(REQUEST)) == REQUEST
                now = time.monotonic()
                times.append(now - sent[number])
                connections[number].sendall(REQUEST)
                sent[number] = now
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]
