"""Services that go down and come back, while service clients come all the time.

flaps  two relay clients publish one service, and the service of one of them goes down and comes back in a while; then
       both are down
"""

from __future__ import annotations

import threading
import time
from functools import partial

from ..conftest import PATIENCE, Service, connect, echo, read_exactly, wait_until
from ..peers import HOST, RelayProcess
from .relays import links_of
from .suite import Run, case

REQUESTS = 10_000
AT_A_TIME = 8
UP, DOWN = 0.6, 1.2
"""Seconds at most for which the service stays up, and down, each time."""


class Flapping:
    """A service that can be stopped and started again, on the same port."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._service = run.peers.service(echo)
        self.port = self._service.port

    def stop(self) -> None:
        self._service.refuse()

    def start(self) -> None:
        self._service = Service(echo, port=self.port)
        self._run.stack.callback(self._service.close)

    def has_served(self) -> bool:
        """Whether service clients have come since it was started; the first connection is a check."""
        return self._service.connections > 1 + AT_A_TIME


class Load:
    """Requests one after another, each over a connection of its own, on several threads."""

    def __init__(self, port: int, count: int) -> None:
        self._port, self._left = port, count
        self._lock = threading.Lock()  # over the counts
        self.done = 0
        self._threads = [threading.Thread(target=self._ask_all) for _ in range(AT_A_TIME)]
        for thread in self._threads:
            thread.start()

    def _ask_all(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
            try:
                with connect((HOST, self._port)) as sock:
                    sock.sendall(b"ping")
                    read_exactly(sock, 4)
            except (OSError, AssertionError):
                continue  # what was refused the server's log says; a service that dies takes connections with it
            with self._lock:
                self.done += 1

    @property
    def is_over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)


@case(31, "flaps", 240)
def flaps(run: Run) -> None:
    server = run.peers.server()
    words = "--check-service", "1"
    flapping, steady = Flapping(run), Flapping(run)
    clients = [
        run.peers.client(server.relay_port, service.port, *words, "--name", name)
        for service, name in ((flapping, "flaps"), (steady, "stays"))
    ]
    port, backs, downs = server.service_port, list[float](), 0
    load = Load(port, run.scaled(REQUESTS, least=500))
    while not load.is_over:
        time.sleep(UP * run.random.random())
        flapping.stop()
        time.sleep(DOWN * run.random.random())
        if len(clients[0].events("ServiceDown")) > downs:
            downs = len(clients[0].events("ServiceDown"))
            began = time.monotonic()
            flapping.start()
            wait_until(lambda: flapping.has_served() or load.is_over)
            if not load.is_over:
                backs.append(time.monotonic() - began)
        else:
            flapping.start()
    load.join()
    refused = [event for event in server.events("ConnectionFailed") if event["code"] != "left"]
    run.tell("service clients refused while another relay client was there", len(refused), most=0)
    run.tell("requests answered", load.done)
    run.tell("times that the service was withdrawn", downs)
    run.tell("slowest return to service", max(backs, default=0.0), most=1, unit="s")
    flapping.stop()
    steady.stop()
    for client in clients:
        wait_until(partial(is_down, client))
    wait_until(lambda: links_of(server.relay_port) == 0)
    times = sorted(refused_after(port) for _ in range(run.scaled(1000, least=50)))
    run.tell("slowest refusal while both are down", times[-1], most=1, unit="s")


def is_down(client: RelayProcess) -> bool:
    return len(client.events("ServiceDown")) > len(client.events("ServiceBack"))


def refused_after(port: int) -> float:
    """Seconds until a service client is reset."""
    began = time.monotonic()
    with connect((HOST, port)) as sock:
        try:
            while sock.recv(1):
                pass
        except ConnectionResetError:
            return time.monotonic() - began
    return PATIENCE
