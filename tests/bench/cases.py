"""What is measured: questions to put to a port."""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import socket
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from statistics import median

from .places import (
    CubicPath, LongPath, LossyPath, NarrowCubicPath, NarrowPath, Place, SatellitePath, without_long_path,
)  # fmt: skip
from .processes import Failure, Processes, find_family, times, usage
from .programs import absent, find_program
from .services import BODY, BULK, MESSAGE
from .subjects import OURS, Pool, Relay, Subject

SPARE_TIME = 20.0  # seconds beyond its own duration that a load generator may take
BURST_TIMEOUT = 30.0
HELD_TIMEOUT = 60.0
SETTLED = 0.3
"""Seconds in which processes do as good as nothing: longer than what tcprelay puts off (`tcprelay.OPENING_TIME`)."""
HELD = (100, 1000, 2500, 5000)
"""Held connections at which memory and threads are looked at, and what a further connection costs."""


class Case(ABC):
    """One question, with the service behind the relay that it needs."""

    name: str
    metrics: dict[str, str]  # and their units
    missing = ""  # what it needs and this machine does not have, in one line
    pool = Pool()
    place: type[Place] = Place
    around = 0.4  # seconds that starting and ending takes, about

    def times(self, subject: Subject, repeat: int) -> int:
        """How often it is measured when all is to be repeated: never where the question makes no sense."""
        return repeat

    def lasts(self, seconds: int) -> float:
        """How many seconds a measurement takes, about, with a load of so many."""
        return self.around + seconds

    def start_service(self, processes: Processes, port: int) -> None:
        """Start the service at the far end, to listen on that port: where no case says otherwise, an echo."""
        start_python_service(processes, "echo", port)

    @abstractmethod
    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        """The figures by metric; one may be left out where there is none.  Raises `Failure`."""


def start_python_service(processes: Processes, name: str, port: int) -> None:
    here = sys.executable, "-m", "tests.bench.services"
    processes.start(f"{name} service", *here, name, processes.place.far, port, far=True)


# --- Load -----------------------------------------------------------------------------------------------------


class Stream(Case):
    """One stream or some.  iperf3 has a control connection besides; all go through the relay."""

    metrics = {"speed": "Gbit/s", "processor": "s/GiB"}

    def __init__(self, name: str, streams: int, back: bool, place: type[Place] = Place) -> None:
        self.name, self.place, self.pool = name, place, Pool(stock=streams + 1)
        self.around *= 1 if place is Place else 2
        self._arguments = ["-P", streams] + ["-R"] * back
        self.missing = absent("iperf3") or ("" if place is Place else without_long_path())

    def lasts(self, seconds: int) -> float:
        return self.around + self._length(seconds)

    def _length(self, seconds: int) -> int:
        """Where a round trip takes that long, TCP has hardly begun after a few seconds."""
        return 5 * seconds if self.place is SatellitePath else seconds

    def start_service(self, processes: Processes, port: int) -> None:
        processes.start("iperf3 server", find_program("iperf3"), "-s", "-B", processes.place.far, "-p", port, far=True)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        length = self._length(seconds)
        arguments = ("-c", relay.host, "-p", relay.port, "-t", length, "-J", *self._arguments)
        before, *_ = usage(relay.server, relay.client)
        speed, received = parse_iperf3(processes.run(length + SPARE_TIME, "iperf3", *arguments))
        after, *_ = usage(relay.server, relay.client)
        return {"speed": speed} | ({"processor": (after - before) / received * 2**30} if relay.server else {})


def parse_iperf3(output: str) -> tuple[float, int]:
    """Gbit/s and bytes that arrived, of all streams together."""
    received = json.loads(output)["end"]["sum_received"]
    if not received["bytes"]:
        raise Failure("iperf3: nothing arrived")
    return received["bits_per_second"] / 1e9, received["bytes"]


class Requests(Case):
    """Small HTTP requests, with wrk: over connections that stay, or each over one of its own."""

    missing = absent("wrk")

    def __init__(self, kind: str, connections: int, *arguments: str) -> None:
        self.name, self.pool = f"{kind}-{connections}", Pool(stock=max(64, connections))
        self._connections = connections
        self._arguments = (f"-t{min(2, connections)}", f"-c{connections}", *arguments)
        self.metrics = {"rate": f"{kind}/s", "p50": "ms", "p99": "ms", "errors": "count"}
        self.metrics |= {f"{role} {what}": "µs each" for role in ("server", "client") for what in ("user", "system")}

    def lasts(self, seconds: int) -> float:
        return self.around + self._length(seconds)

    def _length(self, seconds: int) -> int:
        """Twice as long with so many that opening them takes a part of it."""
        return 2 * seconds if self._connections > 100 else seconds

    def start_service(self, processes: Processes, port: int) -> None:
        here, nginx = processes.directory, find_program("nginx")
        if not nginx:
            start_python_service(processes, "http", port)
            return
        paths = "".join(f"{kind}_temp_path {here};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (here / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {here}/nginx.pid; events {{ worker_connections 8192; }}\n"
            f"http {{ access_log off; keepalive_requests 1000000000; {paths}\n"
            f"server {{ listen {processes.place.far}:{port} backlog=4096; return 200 '{BODY}'; }} }}\n"
        )
        processes.start("http service", nginx, "-e", "stderr", "-c", here / "nginx.conf", far=True)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        length, url = self._length(seconds), f"http://{relay.host}:{relay.port}/"
        arguments = (*self._arguments, "-d", length, "--timeout", 5, "--latency", url)
        roles = {"server": relay.server, "client": relay.client} if relay.server else {}
        before = {role: times(pid) for role, pid in roles.items()}
        figures = parse_wrk(processes.run(length + SPARE_TIME, "wrk", *arguments))
        count = figures.pop("requests")
        for role, pid in roles.items():
            for what, now, then in zip(("user", "system"), times(pid), before[role], strict=True):
                figures[f"{role} {what}"] = 1e6 * (now - then) / count
        return figures


def parse_wrk(output: str) -> dict[str, float]:
    """The figures of `Requests` that it tells.  Raises `Failure` where there are none."""
    rate = float((re.findall(r"Requests/sec:\s*([\d.]+)", output) or [0])[0])
    [requests] = re.findall(r"(\d+) requests in", output) or [0]
    latencies = re.findall(r"\s(50|99)%\s+([\d.]+)(us|ms|s|m)\b", output)
    if not rate or len(latencies) != 2:
        raise Failure("wrk: no request was answered")
    scale = {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}
    figures = {f"p{percent}": float(number) * scale[unit] for percent, number, unit in latencies}
    errors = re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", output)
    return figures | {"rate": rate, "errors": sum(map(int, errors)), "requests": int(requests)}


class LockCalls(Requests):
    """Futex calls of both roles for a small request, which is four messages: what it costs that threads wait for each
    other.  perf(1) counts them, and disturbs."""

    missing = absent("wrk", "perf") or ("perf has to be run by root" if os.geteuid() else "")

    def __init__(self, connections: int) -> None:
        super().__init__("locks", connections)
        self.metrics = {"futex calls": "a request", "rate": "requests/s"}

    def times(self, subject: Subject, repeat: int) -> int:
        return 0 if subject.name == "direct" else repeat

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        length, counts = self._length(seconds), processes.directory / "perf.txt"
        pids = ",".join(str(pid) for role in (relay.server, relay.client) for pid in find_family(role))
        arguments = ("stat", "-x,", "-o", counts, "-e", "syscalls:sys_enter_futex", "-p", pids, "--", "wrk",
                     *self._arguments, "-d", length, "--latency", f"http://{relay.host}:{relay.port}/")  # fmt: skip
        figures = parse_wrk(processes.run(length + SPARE_TIME, "perf", *arguments))
        calls = int(counts.read_text().splitlines()[-1].partition(",")[0])
        return {"futex calls": calls / figures["requests"], "rate": figures["rate"]}


class Burst(Case):
    """So many service clients at once; each gets one byte echoed.

    On a pool of one link, where its size can be chosen, and on eight, which is tcprelay's default; relays that leave no
    choice have what they have.
    """

    metrics = {"served": "count", "p50": "ms", "p99": "ms", "to the last": "ms"}

    def __init__(self, count: int, links: int, place: type[Place] = Place) -> None:
        self.name, self._count, self.pool = f"burst-{count}-pool-{links}", count, Pool(size=links)
        if place is not Place:
            self.name, self.place, self.missing = f"far-{self.name}", place, without_long_path()

    def times(self, subject: Subject, repeat: int) -> int:
        return repeat if subject.pooled or self.pool.size == 8 else 0

    def lasts(self, seconds: int) -> float:
        return self.around + 0.5

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        times = [1000 * time for time in first_bytes(relay, self._count, BURST_TIMEOUT)]
        figures: dict[str, float] = {"served": len(times)}
        if len(times) == self._count:
            figures |= {"p50": median(times), "p99": times[math.ceil(0.99 * len(times)) - 1], "to the last": times[-1]}
        return figures


def first_bytes(relay: Relay, count: int, timeout: float) -> list[float]:
    """Connect so many times at once and send a byte each.

    Returns after how many seconds from the beginning each byte was back, the first one first; those that had none in
    time, or an error, are left out.
    """
    served: list[float] = []
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        began = time.monotonic()
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((relay.host, relay.port))
            selector.register(sock, selectors.EVENT_WRITE)
        while selector.get_map() and (left := began + timeout - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock = key.fileobj  # type: ignore[assignment]
                try:
                    if key.events == selectors.EVENT_WRITE:
                        sock.send(b"x")
                        selector.modify(sock, selectors.EVENT_READ)
                        continue
                    if sock.recv(1) == b"x":
                        served.append(time.monotonic() - began)
                except OSError:
                    pass  # refused or reset: not served
                selector.unregister(sock)
    return served


# --- The long path --------------------------------------------------------------------------------------------


class Path(Case):
    """The long path itself: what it takes to connect over it, which is a round trip, and how much it carries."""

    name = "far-path"
    metrics = {"round trip": "ms", "speed of 8 streams": "Gbit/s"}
    place = LongPath
    around = 1.0

    def __init__(self) -> None:
        self._stream = Stream(self.name, 8, False, LongPath)
        self.missing = self._stream.missing

    def start_service(self, processes: Processes, port: int) -> None:
        self._stream.start_service(processes, port)

    def times(self, subject: Subject, repeat: int) -> int:
        return repeat if subject.name == "direct" else 0

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        speed = self._stream.measure(processes, relay, seconds)["speed"]
        began = time.monotonic()
        with socket.create_connection((relay.host, relay.port), SPARE_TIME):
            return {"round trip": 1000 * (time.monotonic() - began), "speed of 8 streams": speed}


class Beside(Case):
    """Requests of 100 bytes on eight connections, while one bulk stream passes the same way as the answers.

    The service sends bulk on the first connection and is an echo on all others.
    """

    CONNECTIONS = 8
    pool = Pool(stock=CONNECTIONS + 1)
    metrics = {"p50": "ms", "p99": "ms", "requests": "count", "bulk": "Mbit/s"}
    around = 2.0
    missing = without_long_path()

    def __init__(self, name: str, place: type[Place]) -> None:
        self.name, self.place = name, place

    def lasts(self, seconds: int) -> float:
        return self.around + 3 * seconds

    def start_service(self, processes: Processes, port: int) -> None:
        start_python_service(processes, "bulk", port)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        times, taken, length = list[float](), 0, 3 * seconds
        with selectors.DefaultSelector() as selector, ExitStack() as stack:
            for number in range(self.CONNECTIONS + 1):
                sock = stack.enter_context(socket.create_connection((relay.host, relay.port), SPARE_TIME))
                sock.sendall(BULK if number == 0 else MESSAGE)
                selector.register(sock, selectors.EVENT_READ, [time.monotonic(), 0, number == 0])
            end = time.monotonic() + length
            while (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
                    if not data:
                        raise Failure("a connection was closed")
                    if key.data[2]:
                        taken += len(data)
                        continue
                    key.data[1] += len(data)
                    if key.data[1] == len(MESSAGE):
                        times.append(1000 * (time.monotonic() - key.data[0]))
                        key.data[:2] = time.monotonic(), 0
                        key.fileobj.sendall(MESSAGE)  # type: ignore[union-attr]
        if not times:
            raise Failure("no request was answered")
        return percentiles(times) | {"requests": len(times), "bulk": 8 * taken / length / 1e6}


def percentiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {"p50": median(times), "p99": times[math.ceil(0.99 * len(times)) - 1]}


class Opening(Case):
    """Connecting and getting the first byte, eight at a time again and again."""

    AT_ONCE, ROUNDS = 8, 12
    PAUSE = 0.2
    """Seconds between them, beyond two round trips: for pools to fill up."""
    pool = Pool(stock=AT_ONCE)
    metrics = {"p50": "ms", "p99": "ms", "served": "count"}
    missing = without_long_path()

    def __init__(self, name: str, place: type[LongPath], rounds: int = ROUNDS) -> None:
        self.name, self.place, self._rounds = name, place, rounds
        self._pause = self.PAUSE + 4 * place.way.delay

    def lasts(self, seconds: int) -> float:
        return self.around + self._rounds * (2 * self._pause)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        times: list[float] = []
        for _ in range(self._rounds):
            time.sleep(self._pause)
            times += [1000 * one for one in first_bytes(relay, self.AT_ONCE, BURST_TIMEOUT)]
        if not times:
            raise Failure("no service client was served")
        return percentiles(times) | {"served": len(times)}


class FirstByte(Case):
    """Time from a service client's connect until its byte has come back, over the long path.

    Warm: it is alone, and the pool is full.  Cold: the last one of ten at once, which are more than any relay has links
    by default.  Eight links for those whose default is less.
    """

    name = "far-first-byte"
    metrics = {"warm": "ms", "cold": "ms"}
    missing = without_long_path()
    pool = Pool(stock=8)
    place = LongPath
    around = 1.0
    TRIES, AT_ONCE = 5, 10
    PAUSE = 0.3
    """Seconds between them, for the pool to fill up again, which nothing shows from outside."""

    def lasts(self, seconds: int) -> float:
        return self.around + (self.TRIES + 1) * (self.PAUSE + 0.1)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        times = []
        for count in (*[1] * self.TRIES, self.AT_ONCE):
            time.sleep(self.PAUSE)
            served = first_bytes(relay, count, BURST_TIMEOUT)
            if len(served) != count:
                raise Failure(f"{len(served)} of {count} service clients were served")
            times.append(1000 * served[-1])
        return {"warm": median(times[:-1]), "cold": times[-1]}


# --- What it takes --------------------------------------------------------------------------------------------


class Start(Case):
    """From exec until the server listens (where it does so before a client has come: on the service port, too), and
    until the client's links are established, as the kernel sees them, or its service is published."""

    name = "start"
    metrics = {"server": "ms", "client": "ms"}

    def times(self, subject: Subject, repeat: int) -> int:
        return 0 if subject.name == "direct" else repeat

    def lasts(self, seconds: int) -> float:
        return self.around

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        return {"server": 1000 * relay.server_start, "client": 1000 * relay.client_start}


def look(relay: Relay, count: int) -> dict[str, float]:
    """Memory and threads of both roles, as figures "at" so many."""
    used = {"server": usage(relay.server), "client": usage(relay.client)}
    memory = {f"{role} memory at {count:,}": resident / 2**20 for role, (_, resident, _) in used.items()}
    return memory | {f"{role} threads at {count:,}": threads for role, (_, _, threads) in used.items()}


def units_at(count: int) -> dict[str, str]:
    return {f"{role} {what} at {count:,}": unit for what, unit in (("memory", "MiB"), ("threads", "count"))
            for role in ("server", "client")}  # fmt: skip


class Held(Case):
    """Memory and threads, with no connection and with many that are open and idle; each was proven by an echo.

    "each" is what one of them takes, over all of them.  The cost is processor time of both roles together for one of
    the connections that come and go beside those that are held, with what these cost meanwhile.
    """

    name = "held"
    pool = Pool(most=HELD[-1] + 1000)
    around = 12.0
    metrics = {"held": "count", "to open them": "s", "server memory each": "KiB", "client memory each": "KiB"}
    metrics |= {f"cost at {count:,}": "ms" for count in HELD}
    metrics |= {metric: unit for count in (0, *HELD) for metric, unit in units_at(count).items()}
    PASSING = 500
    """Connections, one after another, of which the cost of one is taken."""

    def times(self, subject: Subject, repeat: int) -> int:
        """Others once: it takes a while, and what is asked of us does not depend on them."""
        return 0 if subject.name == "direct" else repeat if subject.name in OURS else 1

    def lasts(self, seconds: int) -> float:
        return self.around

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        figures, held, taken = look(relay, 0), 0, 0.0
        with ExitStack() as connections:
            for count in HELD:
                began = time.monotonic()
                while held < count and taken + time.monotonic() - began < HELD_TIMEOUT and open_one(connections, relay):
                    held += 1
                taken += time.monotonic() - began
                if held < count:
                    break
                settle(relay)
                figures |= look(relay, count)
                if (cost := self._cost(relay)) is not None:
                    figures[f"cost at {count:,}"] = cost
        figures |= {"held": held, "to open them": taken}
        if held == HELD[-1]:
            for role in ("server", "client"):
                grown = figures[f"{role} memory at {held:,}"] - figures[f"{role} memory at 0"]
                figures[f"{role} memory each"] = 1024 * grown / held
        return figures

    def _cost(self, relay: Relay) -> float | None:
        before, *_ = usage(relay.server, relay.client)
        for _ in range(self.PASSING):
            with ExitStack() as connection:
                if not open_one(connection, relay):
                    return None
        settle(relay)
        after, *_ = usage(relay.server, relay.client)
        return 1000 * (after - before) / self.PASSING


def settle(relay: Relay) -> None:
    """Wait until both processes do as good as nothing for a while: what follows their last task is over, then."""
    deadline, used, before = time.monotonic() + SPARE_TIME, math.inf, 0.0
    while used - before > 0.05 * SETTLED and time.monotonic() < deadline:
        before, *_ = usage(relay.server, relay.client)
        time.sleep(SETTLED)
        used, *_ = usage(relay.server, relay.client)


def open_one(connections: ExitStack, relay: Relay) -> bool:
    """Open a connection and prove it by an echo; whether it could be done."""
    try:
        sock = connections.enter_context(socket.create_connection((relay.host, relay.port), timeout=10))
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    except OSError:
        return False


class Idle(Case):
    """Memory and threads with many idle links."""

    def __init__(self, links: int) -> None:
        self.name, self.pool, self.metrics = f"idle-{links}", Pool(size=links, most=2 * links), units_at(links)

    def times(self, subject: Subject, repeat: int) -> int:
        return repeat if subject.pooled else 0

    def lasts(self, seconds: int) -> float:
        return 6 * self.around

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        assert self.pool.size
        settle(relay)
        return look(relay, self.pool.size)


CASES: tuple[Case, ...] = (
    Start(),
    Stream("stream-in", 1, False), Stream("stream-out", 1, True),
    Stream("stream-8-in", 8, False), Stream("stream-8-out", 8, True),
    *(Requests("requests", count) for count in (1, 8, 64, 512)),
    *(Requests("connections", count, "-H", "Connection: close") for count in (1, 8, 64)),
    Burst(200, 1), Burst(200, 8),
    LockCalls(64), LockCalls(512),
    Path(), FirstByte(), Stream("far-in", 1, False, LongPath), Stream("far-out", 1, True, LongPath),
    *(Stream(f"{name}-{way}", 1, way == "out", place)
      for name, place in (("cubic", CubicPath), ("narrow", NarrowPath), ("narrow-cubic", NarrowCubicPath))
      for way in ("in", "out")),
    Burst(200, 8, LongPath),
    Stream("lossy-in", 1, False, LossyPath), Stream("lossy-out", 1, True, LossyPath),
    Stream("lossy-8-in", 8, False, LossyPath), Stream("lossy-8-out", 8, True, LossyPath),
    Beside("lossy-beside", LossyPath), Opening("lossy-opening", LossyPath),
    Stream("satellite-in", 1, False, SatellitePath), Stream("satellite-out", 1, True, SatellitePath),
    Beside("satellite-beside", SatellitePath), Opening("satellite-opening", SatellitePath, 5),
    Held(), Idle(1000),
)  # fmt: skip
