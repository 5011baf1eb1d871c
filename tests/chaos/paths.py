"""Real paths: uplinks whose queue is full, NATs that forget, episodes of loss, long ways, outages, and what waits for
a slow one."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..bench.processes import find_family
from ..conftest import echo, read_all, read_exactly
from ..peers import RelayProcess
from ..wire import CLIENT, SERVER, SERVER_6, Way
from .relays import Legs, Relays, serving
from .suite import Run, case

PATIENT = 120.0
"""Seconds that somebody waits who is on a path with round trips of seconds."""


def pause(seconds: float) -> None:
    """For what is a length of time by itself: a silence, or the pace at which somebody comes."""
    threading.Event().wait(seconds)


# --- A saturated uplink ---------------------------------------------------------------------------------------


@case(20, "saturated", 900)
def saturated(run: Run) -> None:
    """Round trips of seconds, from the first packet on, as of a home's uplink whose queue is full."""
    wire = run.lay_wire(Way())
    for legs, round_trip, half in ((Legs("tls"), 2.8, True), (Legs(), 4.0, True), (Legs(), 6.0, False)):
        wire.change(both=Way(delay=round_trip / 2, jitter=0.05))
        look_at_slow_path(run, legs, round_trip, half)


def look_at_slow_path(run: Run, legs: Legs, round_trip: float, half: bool) -> None:
    """Service clients come every two seconds for one and a half minutes, or for so much of that as the scale says."""
    name, minute, served = f"{legs}, {round_trip:g} s", max(20.0, 60.0 * run.scale), {}
    relays = Relays(run, legs, serving(run, legs, echo), publish=False)

    def ask(since: float) -> None:
        with suppress(OSError, AssertionError), relays.connect(PATIENT) as sock:
            sock.settimeout(PATIENT)
            sock.sendall(b"question")
            served[since] = read_exactly(sock, 8) == b"question"

    began, asked = time.monotonic(), []
    with ThreadPoolExecutor(100) as pool:
        while (since := time.monotonic() - began) < 1.5 * minute:
            asked.append(since)
            pool.submit(ask, since)
            pause(2.0)
    early = [served.get(since, False) for since in asked if since < minute]
    late = [served.get(since, False) for since in asked if since >= minute]
    share = sum(early) / len(early)
    run.tell(
        f"{name}: share of the first minute's that are served", share, least=0.5 if half and run.scale >= 1 else None
    )
    run.tell(f"{name}: share of those that come later", sum(late) / len(late), least=1.0 if half else None)
    gone = len(relays.server.events("ClientDown"))
    run.tell(f"{name}: times that the relay client was gone", gone, most=1)
    run.tell(f"{name}: links came up", len(relays.client.events("Published")), least=1)
    relays.client.close()
    relays.server.close()


# --- A NAT that forgets ---------------------------------------------------------------------------------------


@case(21, "nat", 900)
def nat(run: Run) -> None:
    """Sessions that are silent behind a NAT that forgets: with the defaults one of 30 s, and one of 12 s when asked."""
    wire = run.lay_wire(Way(delay=0.02), nat=30.0)
    for seconds, quiet, options in (
        (30.0, max(75.0, 600.0 * run.scale), ()), (12.0, max(30.0, 100.0 * run.scale), ("--keepalive", "6")),
    ):  # fmt: skip
        wire.change(nat=seconds)
        every = [Relays(run, legs, serving(run, legs, stay), server=options, client=options)
                 for legs in (Legs(), Legs("tls"))]  # fmt: skip
        sessions = [(relays, run.stack.enter_context(relays.connect())) for relays in every for _ in range(4)]
        for _, sock in sessions:
            assert answers(sock)
        pause(quiet)
        for relays in every:
            began, name = time.monotonic(), f"NAT of {seconds:g} s, {relays.legs}"
            alive = sum(answers(sock) for owner, sock in sessions if owner is relays)
            run.tell(f"{name}: of 4 silent sessions live", alive, least=4, most=4)
            run.tell(f"{name}: all of them answered within", time.monotonic() - began, most=1.0, unit="s")
            began = time.monotonic()
            with relays.connect() as sock:
                assert answers(sock)
            run.tell(f"{name}: a new one answers within", time.monotonic() - began, most=0.5, unit="s")
            relays.client.close()
            relays.server.close()


def stay(sock: Any) -> None:
    """Echoes, however long it has to wait."""
    sock.settimeout(None)
    echo(sock)


def answers(sock: Any) -> bool:
    """Whether a keystroke comes back, as the next that comes."""
    with suppress(OSError, AssertionError):
        sock.sendall(b"key")
        return read_exactly(sock, 3) == b"key"
    return False


# --- Links that have seen bad times ---------------------------------------------------------------------------

DEBUG = ("--log-level", "debug")
BLOB = 2_000_000
"""Bytes of a download: less than a second's on this path."""


@case(22, "losses", 600)
def losses(run: Run) -> None:
    """Downloads over links that lived through an episode of loss, when it is over: as fast as before."""
    path = Way(delay=0.02, rate=100e6, queue=0.1)
    wire, legs = run.lay_wire(path), Legs()
    for host in (wire.server, wire.client):
        host.sysctl("net.ipv4.tcp_congestion_control", "reno")  # which remembers losses as cubic does
    relays = Relays(run, legs, serving(run, legs, give), server=DEBUG, client=DEBUG)
    before = statistics.median(download(relays, BLOB) for _ in range(5))
    for share in (0.03, 0.001):
        retired = count_retired(relays)
        wire.change(both=replace(path, loss=share))
        with ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(download, relays, BLOB // 4) for _ in range(24)]:
                job.result()
        retired = count_retired(relays) - retired
        wire.change(both=path)
        pause(3.0)
        after = [download(relays, BLOB) for _ in range(12)]
        what = f"{100 * share:g} % of loss"
        run.tell(f"{what}: links given up, of 24 downloads", retired, most=24 if share > 0.01 else 8)
        run.tell(f"{what}: downloads afterwards, median", statistics.median(after) / before, most=2, unit="of before")
        run.tell(f"{what}: the slowest of them", max(after) / before, unit="of before")


def give(sock: Any) -> None:
    """Sends as many bytes as it is asked for, in ten digits."""
    sock.sendall(bytes(int(read_exactly(sock, 10))))


def download(relays: Relays, count: int) -> float:
    """The seconds that a download takes."""
    began = time.monotonic()
    with relays.connect(PATIENT) as sock:
        sock.sendall(b"%010d" % count)
        sock.settimeout(PATIENT)
        assert len(read_all(sock)) == count
    return time.monotonic() - began


def count_retired(relays: Relays) -> int:
    """The links that the client gave up because they had lost packets."""
    return sum("lost packets" in line for line in list(relays.server.lines) + list(relays.client.lines))


# --- What waits for a slow path, and for a slow reader --------------------------------------------------------


@case(23, "queue", 600)
def queue(run: Run) -> None:
    """How much still comes after a service client has said stop, and how long a keystroke takes beside bulk traffic:
    through the relay, and directly."""
    wire = run.lay_wire(Way(delay=0.025, rate=10e6, queue=0.2))
    for host in (wire.server, wire.client):
        host.sysctl("net.ipv4.tcp_congestion_control", "reno")  # which fills the queue as cubic does
    port = serving(run, Legs(), converse, "")
    assert isinstance(port, int)

    def connect_directly() -> socket.socket:
        with wire.server.inside():
            return socket.create_connection((CLIENT, port), PATIENT)

    ways = {"directly": connect_directly}
    for legs in (Legs(), Legs("tls")):
        ways[str(legs)] = partial(Relays(run, legs, port).connect, PATIENT)
    # A link that has carried a fast download keeps its window, and so some megabytes for a slow reader after that.
    for reader, pace, most in (("a slow reader", 200_000, 3.0), ("a fast one", None, None)):
        came = {
            name: statistics.median(still_comes(way, pace) for _ in range(run.scaled(3))) for name, way in ways.items()
        }
        run.tell(f"{reader}, directly: comes after the stop", came["directly"] / 1e6, unit="MB")
        for name in list(ways)[1:]:
            run.tell(f"{reader}, {name}: comes after the stop", came[name] / 1e6, most=1.5, unit="MB")
            run.tell(f"{reader}, {name}: of what comes directly", came[name] / came["directly"], most=most)
    taken = {name: keystrokes_beside_bulk(run, way) for name, way in ways.items()}
    run.tell("a keystroke beside bulk both ways, directly", 1000 * taken["directly"], unit="ms")
    for name in list(ways)[1:]:
        run.tell(
            f"a keystroke beside bulk both ways, {name}", taken[name] / taken["directly"], most=1.5, unit="of that"
        )


def converse(sock: Any) -> None:
    """Sends until it hears something where the first byte is F, takes all where it is S, and otherwise echoes."""
    sock.settimeout(None)
    kind = sock.recv(1)
    if kind == b"F":
        told = threading.Event()

        def hear() -> None:
            with suppress(OSError):
                sock.recv(1)
            told.set()

        threading.Thread(target=hear, daemon=True).start()
        while not told.is_set():
            sock.sendall(bytes(16384))
    elif kind == b"S":
        while sock.recv(1 << 16):
            pass
    else:
        sock.sendall(kind)
        echo(sock)


def still_comes(connect: Callable[[], Any], pace: int | None) -> int:
    """The bytes that still come after a service client has said stop, which read so many a second for six seconds."""
    with connect() as sock:
        sock.settimeout(PATIENT)
        sock.sendall(b"F")
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            piece = sock.recv(16384)
            if pace:
                pause(len(piece) / pace)
        sock.sendall(b"!")
        return len(read_all(sock))


def keystrokes_beside_bulk(run: Run, connect: Callable[[], Any]) -> float:
    """The median seconds that a keystroke takes to come back while there is one stream of bulk traffic each way."""
    over = threading.Event()
    with connect() as typing, connect() as down, connect() as up, ThreadPoolExecutor(2) as pool:
        assert answers(typing)

        def flood() -> None:
            up.sendall(b"S")
            while not over.is_set():
                up.sendall(bytes(16384))
            up.shutdown(socket.SHUT_WR)

        def drain() -> None:
            down.sendall(b"F")
            while not over.is_set():
                down.recv(65536)
            down.sendall(b"!")
            read_all(down)

        jobs = [pool.submit(job) for job in (flood, drain)]
        try:
            pause(3.0)  # until the queues are full
            times = []
            for _ in range(run.scaled(60, 10)):
                began = time.monotonic()
                assert answers(typing)
                times.append(time.monotonic() - began)
                pause(0.05)
        finally:
            over.set()
        for job in jobs:
            job.result()
    return statistics.median(times)


# --- Long ways, with and without loss -------------------------------------------------------------------------


@case(24, "far", 900)
def far(run: Run) -> None:
    """From 20 to 600 ms away: one round trip to the first byte, bursts, and 600 ms with losses and no flapping."""
    wire = run.lay_wire(Way())
    for address in (SERVER, SERVER_6) if Path("/proc/sys/net/ipv6").exists() else (SERVER,):
        wire.server.address = address
        for legs in (Legs(), Legs("tls")):
            relays = Relays(run, legs, serving(run, legs, stay))
            name = f"{legs}{', IPv6' if ':' in address else ''}"
            for round_trip in (0.02, 0.1, 0.6):
                wire.change(both=Way(delay=round_trip / 2))
                look_far(run, relays, round_trip, f"{name}, {1000 * round_trip:g} ms")
            relays.client.close()
            relays.server.close()
    wire.server.address = SERVER
    for legs in (Legs(), Legs("tls")):
        relays = Relays(run, legs, serving(run, legs, stay))
        for loss in (0.03, 0.05):
            wire.change(both=Way(delay=0.3, loss=loss))
            look_at_losses(run, relays, f"{legs}, 600 ms, {100 * loss:g} % of loss")


def look_far(run: Run, relays: Relays, round_trip: float, name: str) -> None:
    assert first_byte(relays) > round_trip / 2  # and its links are used to the path
    times = [first_byte(relays) for _ in range(run.scaled(10, 3))]
    beyond = 1000 * (statistics.median(times) - round_trip)
    run.tell(f"{name}: to the first byte, beyond one round trip", beyond, most=25, unit="ms")
    began = time.monotonic()
    with ThreadPoolExecutor(30) as pool:
        jobs = [pool.submit(first_byte, relays) for _ in range(30)]
        for job in jobs:
            job.result()
    took = time.monotonic() - began
    run.tell(f"{name}: a burst of 30 is served within", took, most=1.0 + 10 * round_trip, unit="s")


def first_byte(relays: Relays) -> float:
    """The seconds from the beginning of a connection to the service's first byte."""
    began = time.monotonic()
    with relays.connect(PATIENT) as sock:
        sock.settimeout(PATIENT)
        assert answers(sock)
        return time.monotonic() - began


def look_at_losses(run: Run, relays: Relays, name: str) -> None:
    """Connections of a few kilobytes, eight at a time, for a minute; what they carry arrives, and the relays do not
    lose each other."""
    data, until = run.random.randbytes(20_000), time.monotonic() + max(20.0, 60.0 * run.scale)
    gone = len(relays.server.events("ClientDown"))

    def go() -> int:
        count = 0
        while time.monotonic() < until:
            with relays.connect(PATIENT) as sock:
                sock.settimeout(PATIENT)
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                count += read_all(sock) == data
        return count

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(go) for _ in range(8)]
        carried = sum(job.result() for job in jobs)
    run.tell(f"{name}: connections that carried all", carried, least=8)
    run.tell(f"{name}: times that the relay client was gone", len(relays.server.events("ClientDown")) - gone, most=0)


# --- Outages --------------------------------------------------------------------------------------------------


@case(25, "outages", 900)
def outages(run: Run) -> None:
    """Holes in the path, and either relay stopped for a minute: every open connection goes on afterwards."""
    wire = run.lay_wire(Way(delay=0.02))
    every = [Relays(run, legs, serving(run, legs, stay)) for legs in (Legs(), Legs("tls"))]
    sessions = [run.stack.enter_context(relays.connect()) for relays in every for _ in range(4)]
    for sock in sessions:
        sock.settimeout(2 * PATIENT)
        assert answers(sock)
    for seconds in (2.0, 10.0, 30.0, 70.0):
        with wire.hole():
            speak(sessions[::2])
            pause(max(2.0, seconds * run.scale))
        look_for_survivors(run, sessions, f"a hole of {seconds:g} s")
    servers, clients = [relays.server for relays in every], [relays.client for relays in every]
    for name, stopped in (("server", servers), ("client", clients)):
        speak(sessions[::2])
        signal_all(stopped, signal.SIGSTOP)
        speak(sessions[::2])
        pause(max(2.0, 60.0 * run.scale))
        signal_all(stopped, signal.SIGCONT)
        look_for_survivors(run, sessions, f"the relay {name} stopped for a minute", 2)
    for relays in every:
        run.tell(f"{relays.legs}: a new connection is served within", first_byte(relays), most=1.0, unit="s")


def speak(sessions: list[Any]) -> None:
    for sock in sessions:
        sock.sendall(b"said meanwhile")


def look_for_survivors(run: Run, sessions: list[Any], name: str, said: int = 1) -> None:
    """Every other session has spoken so many times meanwhile."""
    began = time.monotonic()
    whole = [read_exactly(sock, 14 * said) == said * b"said meanwhile" for sock in sessions[::2]]
    run.tell(f"{name}: what was said meanwhile comes", sum(whole), least=len(whole))
    run.tell(f"{name}: of {len(sessions)} connections go on", sum(map(answers, sessions)), least=len(sessions))
    run.tell(f"{name}: all answer again within", time.monotonic() - began, unit="s")


def signal_all(relays: list[RelayProcess], number: int) -> None:
    """Signal the relays with all their processes, as a virtual machine that is suspended stops them all."""
    for relay in relays:
        for pid in find_family(relay.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
