"""Real paths: uplinks whose queue is full, NATs that forget, and episodes of loss."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..conftest import echo, read_all, read_exactly
from ..wire import Way
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
            relays.client.close()
            relays.server.close()


def stay(sock: Any) -> None:
    """Echoes, however long it has to wait."""
    sock.settimeout(None)
    echo(sock)


def answers(sock: Any) -> bool:
    """Whether a keystroke comes back."""
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
