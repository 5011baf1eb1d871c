"""What is measured: questions to put to a port."""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .processes import Failure, Processes, find_program, free_port, usage
from .subjects import Pool, Relay

SPARE_TIME = 20.0
"""Seconds beyond its own duration that a load generator may take."""
HELD = 1000
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Metric:
    """One figure of a case."""

    key: str
    unit: str
    only_if_any: bool = False
    """Not worth a row where it is 0 everywhere."""


class Case(ABC):
    """One question, with the service behind the relay that it needs."""

    name: str
    metrics: tuple[Metric, ...]
    pool = Pool()
    relays_only = False

    def missing(self) -> str:
        """What it needs and this machine does not have, in one line; "" where it can be measured."""
        return ""

    @abstractmethod
    def start_service(self, processes: Processes) -> int:
        """Start the service, and return its port when it listens.  Raises `Failure`."""

    @abstractmethod
    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        """The figures, by the keys of `metrics`; one may be left out where there is none.  Raises `Failure`."""


class Stream(Case):
    """One stream.  iperf3 has a control and a data connection; both go through the relay."""

    def __init__(self, name: str, reverse: bool) -> None:
        self.name = name
        self._reverse = reverse
        self.metrics = (Metric("speed", "Gbit/s"), Metric("processor", "CPU s/GiB"))

    def missing(self) -> str:
        return "" if find_program("iperf3") else "iperf3 is not installed"

    def start_service(self, processes: Processes) -> int:
        port = free_port()
        processes.start("iperf3 -s", [find_program("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port)])
        processes.wait_listening(port)
        return port

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        command = [find_program("iperf3"), "-c", "127.0.0.1", "-p", str(relay.port), "-t", str(seconds), "-J"]
        before = usage(relay.server) + usage(relay.client)
        output = processes.run([*command, "-R"] if self._reverse else command, seconds + SPARE_TIME)
        after = usage(relay.server) + usage(relay.client)
        received = json.loads(output)["end"]["sum_received"]
        if not received["bytes"]:
            raise Failure("iperf3: nothing was received")
        figures = {"speed": received["bits_per_second"] / 1e9}
        if relay.server:
            spent = after.processor_seconds - before.processor_seconds
            figures["processor"] = spent / (received["bytes"] / GIB)
        return figures


class Requests(Case):
    """Small HTTP requests, with wrk."""

    # A relay that opens a link for each connection must have them ready before wrk's connections come.
    pool = Pool(stock=64)

    def __init__(self, name: str, unit: str, threads: int, connections: int, *headers: str) -> None:
        self.name = name
        self._arguments = [f"-t{threads}", f"-c{connections}"]
        for header in headers:
            self._arguments += ["-H", header]
        self.metrics = (
            Metric("rate", unit), Metric("p50", "ms"), Metric("p99", "ms"), Metric("errors", "count", only_if_any=True),
        )  # fmt: skip

    def missing(self) -> str:
        return "" if find_program("wrk") else "wrk is not installed"

    def start_service(self, processes: Processes) -> int:
        port = free_port()
        nginx = find_program("nginx")
        if nginx:
            config = processes.directory / "nginx.conf"
            paths = "".join(
                f"{name}_temp_path {processes.directory};"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            config.write_text(
                f"daemon off; worker_processes 1; pid {processes.directory / 'nginx.pid'}; error_log stderr error;\n"
                "events { worker_connections 8192; }\n"
                f"http {{ access_log off; keepalive_requests 1000000000; {paths}\n"
                f'server {{ listen 127.0.0.1:{port} backlog=4096; return 200 "ok"; }} }}\n'
            )
            processes.start("nginx", [nginx, "-e", "stderr", "-c", str(config)])
        else:
            processes.start("http service", [sys.executable, "-m", "tests.bench.services", "http", str(port)])
        processes.wait_listening(port)
        return port

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        command = [find_program("wrk"), *self._arguments, f"-d{seconds}s", "--timeout", "5s", "--latency"]
        output = processes.run([*command, f"http://127.0.0.1:{relay.port}/"], seconds + SPARE_TIME)
        figures = {"errors": 0.0}
        if (rate := re.search(r"Requests/sec:\s*([\d.]+)", output)) is None or not float(rate[1]):
            raise Failure("wrk: no request was answered")
        figures["rate"] = float(rate[1])
        for percent in (50, 99):
            if found := re.search(rf"\s{percent}%\s+([\d.]+)(us|ms|s|m)\b", output):
                scale = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0}[found[2]]
                figures[f"p{percent}"] = float(found[1]) * scale
        if errors := re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output):
            figures["errors"] += sum(map(int, errors.groups()))
        if wrong := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
            figures["errors"] += int(wrong[1])
        return figures


class EchoCase(Case):
    """With the echo service."""

    def start_service(self, processes: Processes) -> int:
        port = free_port()
        processes.start("echo service", [sys.executable, "-m", "tests.bench.services", "echo", str(port)])
        processes.wait_listening(port)
        return port


class Held(EchoCase):
    """Memory and threads, with no connection and with many that are open and idle; each was proven by an echo."""

    name = "held"
    relays_only = True
    metrics = (
        *(
            Metric(f"{role} {what}, {count}", unit)
            for role in ("server", "client")
            for what, unit in (("memory", "MiB"), ("threads", "count"))
            for count in (0, HELD)
        ),
        Metric("to open them", "s"),
    )

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        figures = self._look(relay, 0)
        deadline = time.monotonic() + 60
        connections: list[socket.socket] = []
        try:
            began = time.monotonic()
            for number in range(HELD):
                try:
                    sock = socket.create_connection(("127.0.0.1", relay.port), timeout=10)
                    connections.append(sock)
                    sock.sendall(b"x")
                    if sock.recv(1) != b"x":
                        raise Failure(f"connection {number + 1} ended without an echo")
                except OSError as error:
                    raise Failure(f"connection {number + 1}: {error}") from error
                if time.monotonic() > deadline:
                    raise Failure(f"only {number + 1} connections within a minute")
            figures["to open them"] = time.monotonic() - began
            return figures | self._look(relay, HELD)
        finally:
            for sock in connections:
                sock.close()

    @staticmethod
    def _look(relay: Relay, count: int) -> dict[str, float]:
        figures = {}
        for role, pid in (("server", relay.server), ("client", relay.client)):
            used = usage(pid)
            figures[f"{role} memory, {count}"] = used.resident / MIB
            figures[f"{role} threads, {count}"] = used.threads
        return figures


class Burst(EchoCase):
    """So many service clients at once, on a pool of one link; each gets one byte echoed."""

    pool = Pool(size=1)
    TIMEOUT = 30.0

    def __init__(self, count: int) -> None:
        self.name = f"burst-{count}"
        self._count = count
        self.metrics = (Metric("served", "count"), Metric("to the last", "ms"))

    def measure(self, processes: Processes, relay: Relay, seconds: int) -> dict[str, float]:
        served, last = 0, 0.0
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for _ in range(self._count):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", relay.port))
                selector.register(sock, selectors.EVENT_WRITE)
            while selector.get_map() and (left := began + self.TIMEOUT - time.monotonic()) > 0:
                for key, events in selector.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    try:
                        if events & selectors.EVENT_WRITE:
                            key.fileobj.send(b"x")
                            selector.modify(key.fileobj, selectors.EVENT_READ)
                            continue
                        served += key.fileobj.recv(1) == b"x"
                        last = time.monotonic() - began
                    except OSError:
                        pass  # refused or reset: not served
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
        return {"served": served} | ({"to the last": last * 1000} if served == self._count else {})


CASES: tuple[Case, ...] = (
    Stream("stream-in", reverse=False),
    Stream("stream-out", reverse=True),
    Requests("requests-1", "requests/s", 1, 1),
    Requests("requests-64", "requests/s", 2, 64),
    Requests("connections", "connections/s", 2, 8, "Connection: close"),
    Held(),
    Burst(1),
    Burst(10),
    Burst(100),
)
