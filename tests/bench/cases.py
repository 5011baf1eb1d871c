"""What is measured: questions to put to a port."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress

from .processes import Failure, Processes, absent, find_program, usage
from .subjects import Pool, Relay

SPARE_TIME = 20.0  # seconds beyond its own duration that a load generator may take
BURST_TIMEOUT = 30.0
HELD = 1000


class Case(ABC):
    """One question, with the service behind the relay that it needs."""

    name: str
    metrics: dict[str, str]  # and their units
    missing = ""  # what it needs and this machine does not have, in one line
    pool = Pool()

    def start_service(self, processes: Processes, port: int) -> None:
        """Start the service, to listen on that loopback port: where no case says otherwise, an echo."""
        processes.start("echo service", sys.executable, "-m", "tests.bench.services", "echo", port)

    @abstractmethod
    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        """The figures by metric; one may be left out where there is none.  Raises `Failure`."""


class Stream(Case):
    """One stream.  iperf3 has a control and a data connection; both go through the relay."""

    missing = absent("iperf3")
    metrics = {"speed": "Gbit/s", "processor": "s/GiB"}

    def __init__(self, name: str, *arguments: str) -> None:
        self.name, self._arguments = name, arguments

    def start_service(self, processes: Processes, port: int) -> None:
        processes.start("iperf3 server", find_program("iperf3"), "-s", "-B", "127.0.0.1", "-p", port)

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        arguments = ("-c", "127.0.0.1", "-p", relay.port, "-t", seconds, "-J", *self._arguments)
        before, *_ = usage(relay.server, relay.client)
        received = json.loads(processes.run(seconds + SPARE_TIME, "iperf3", *arguments))["end"]["sum_received"]
        after, *_ = usage(relay.server, relay.client)
        speed = {"speed": received["bits_per_second"] / 1e9}
        return speed | ({"processor": (after - before) / received["bytes"] * 2**30} if relay.server else {})


class Requests(Case):
    """Small HTTP requests, with wrk."""

    missing = absent("wrk")
    pool = Pool(stock=64)

    def __init__(self, name: str, *arguments: str) -> None:
        self.name, self._arguments = name, arguments
        self.metrics = {"rate": f"{name.partition('-')[0]}/s", "p50": "ms", "p99": "ms", "errors": "count"}

    def start_service(self, processes: Processes, port: int) -> None:
        here, nginx = processes.directory, find_program("nginx")
        paths = "".join(f"{kind}_temp_path {here};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (here / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {here}/nginx.pid; events {{ worker_connections 8192; }}\n"
            f"http {{ access_log off; keepalive_requests 1000000000; {paths}\n"
            f'server {{ listen 127.0.0.1:{port} backlog=4096; return 200 "ok"; }} }}\n'
        )
        command = (nginx, "-e", "stderr", "-c", here / "nginx.conf")
        fallback = (sys.executable, "-m", "tests.bench.services", "http", port)
        processes.start("http service", *(command if nginx else fallback))

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        arguments = (*self._arguments, "-d", seconds, "--timeout", 5, "--latency", f"http://127.0.0.1:{relay.port}/")
        output = processes.run(seconds + SPARE_TIME, "wrk", *arguments)
        rate = float((re.findall(r"Requests/sec:\s*([\d.]+)", output) or [0])[0])
        latencies = re.findall(r"\s(50|99)%\s+([\d.]+)(us|ms|s|m)\b", output)
        if not rate or len(latencies) != 2:
            raise Failure("wrk: no request was answered")
        scale = {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}
        figures = {f"p{percent}": float(number) * scale[unit] for percent, number, unit in latencies}
        errors = re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", output)
        return figures | {"rate": rate, "errors": sum(map(int, errors))}


class Held(Case):
    """Memory and threads, with no connection and with many that are open and idle; each was proven by an echo."""

    name = "held"
    metrics = {f"{role} {what} at {n}": unit for role in ("server", "client")
               for what, unit in (("memory", "MiB"), ("threads", "count")) for n in (0, HELD)}  # fmt: skip
    metrics["to open them"] = "s"

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        def look(count: int) -> dict[str, float]:
            used = {"server": usage(relay.server), "client": usage(relay.client)}
            memory = {f"{role} memory at {count}": resident / 2**20 for role, (_, resident, _) in used.items()}
            return memory | {f"{role} threads at {count}": threads for role, (_, _, threads) in used.items()}

        if not relay.server:
            return {}
        figures, began = look(0), time.monotonic()
        with ExitStack() as connections:
            for number in range(1, HELD + 1):
                try:
                    sock = connections.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=10))
                    sock.sendall(b"x")
                    if sock.recv(1) != b"x" or time.monotonic() - began > 60:
                        raise OSError("it ended without an echo, or a minute is over")
                except OSError as error:
                    raise Failure(f"connection {number}: {error}") from error
            return figures | {"to open them": time.monotonic() - began} | look(HELD)


class Burst(Case):
    """So many service clients at once, on a pool of one link; each gets one byte echoed."""

    pool = Pool(size=1)
    metrics = {"served": "count", "to the last": "ms"}

    def __init__(self, count: int) -> None:
        self.name, self._count = f"burst-{count}", count

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        began, served = time.monotonic(), 0
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(self._count)]
            for sock in clients:
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", relay.port))
            for sending in (True, False):  # the order among them does not matter for the last one's time
                for sock in clients:
                    sock.settimeout(max(0.001, began + BURST_TIMEOUT - time.monotonic()))
                    with suppress(OSError):  # refused, reset or late: not served
                        if sending:
                            sock.send(b"x")
                        else:
                            served += sock.recv(1) == b"x"
            milliseconds = 1000 * (time.monotonic() - began)
        return {"served": served} | ({"to the last": milliseconds} if served == self._count else {})


CASES: tuple[Case, ...] = (
    Stream("stream-in"), Stream("stream-out", "-R"),
    Requests("requests-1", "-t1", "-c1"), Requests("requests-64", "-t2", "-c64"),
    Requests("requests-512", "-t2", "-c512"),
    Requests("connections", "-t2", "-c8", "-H", "Connection: close"),
    Held(), Burst(1), Burst(10), Burst(100),
)  # fmt: skip
