"""Who may do what, under attack and under load.

identities  whoever has the token of one relay client tries to be another, or to have its service, port or key, while
            service clients wait for a link with a canary
revocation  a relay client loses its right while its connections carry bytes, and another's go on
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..conftest import PATIENCE, wait_until
from ..peers import HOST
from .hostile import (
    Attempt, Speech, Target, attack, claim_welcome, hear_record, replay, say_hello, start_target, steal,
)  # fmt: skip
from .suite import Run, case

NAS, PI = "the token of the nas", "the token of the pi"
ATTEMPTS = 10_000
STREAMS = 24
"""Connections of each of the two relay clients."""
ROUNDS = 20


def write_clients(path: Path, *names: str) -> str:
    """A clients file with these sections; returns its path."""
    sections = {
        "nas": f"[nas]\ntoken = {NAS}\nservices = default\nports = 20001\n",
        "pi": f"[pi]\ntoken = {PI}\nservices = other\n",
    }
    path.write_text("".join(sections[name] for name in names))
    return str(path)


# Attacks


@case(28, "identities", 240)
def identities(run: Run) -> None:
    words = "--clients", write_clients(run.directory / "clients.conf", "nas", "pi"), "--service", "other=0"
    server, members = start_target(run, *words), set[str]()
    relay = HOST, server.relay_port
    record, nonces = hear_record(relay, members, NAS, name="nas")

    def greet(token: str, **more: object) -> Speech:
        return lambda peer: peer.greet(token, **more)  # type: ignore[arg-type]

    ways: dict[str, tuple[Speech, str]] = {
        "the token of pi, the name of nas": (greet(PI, name="nas"), "token"),
        "the token of nas, the name of pi": (greet(NAS, name="pi", service="other"), "token"),
        "the token of pi, no name": (greet(PI), "token"),
        "a name that there is not": (greet(PI, name="who"), "token"),
        "a wrong token": (greet("another-token-than-those", name="nas"), "token"),
        "pi for the service of nas": (greet(PI, name="pi"), "rights"),
        "pi for the port of nas": (greet(PI, name="pi", service_port=20001), "rights"),
        "pi for any port": (greet(PI, name="pi", service_port=0), "rights"),
        "pi for a key": (greet(PI, name="pi", service="default@20001"), "rights"),
        "pi for a service that there is not": (greet(PI, name="pi", service="none"), "rights"),
        "the proof of nas again": (partial(replay, record), "token"),
        "a nonce of nas": (lambda peer: steal(nonces[0], peer), "token"),
        "no proof": (claim_welcome, "protocol"),
    }
    attempts = {name: Attempt(speak, refused) for name, (speak, refused) in ways.items()}
    target = Target(
        "identities", server, HOST, attempts, Attempt(say_hello, "timeout"), Attempt(greet(NAS, name="nas")), members
    )
    attack(run, target, run.scaled(ATTEMPTS, least=4 * len(attempts)))


# Under load


@case(29, "revocation", 300)
def revocation(run: Run) -> None:
    """In each round one of two relay clients is taken out of the file, and what it serves has to be gone when the
    server says so."""
    delivered = harmed = alive = 0
    for number in range(run.scaled(ROUNDS, least=2)):
        late, broken, left = revoke(run, number)
        delivered, harmed, alive = delivered + late, harmed + broken, alive + left
    run.tell("requests that came through after the word", delivered, most=0)
    run.tell("connections that lived on", alive, most=0)
    run.tell("connections of the other relay client that broke", harmed, most=0)


class Load:
    """Connections on which one request follows another, until they break or are to end."""

    def __init__(self, run: Run, port: int, count: int) -> None:
        self.word = b"before"
        self.broken = 0
        self.done = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()  # over the counts
        socks = [socket.create_connection((HOST, port), PATIENCE) for _ in range(count)]
        self._pool = run.stack.enter_context(ThreadPoolExecutor(count))
        self._ends = [self._pool.submit(self._ask, sock) for sock in socks]

    def _ask(self, sock: socket.socket) -> None:
        with sock:
            try:
                while not self._stop.is_set():
                    word = self.word
                    sock.sendall(word)
                    if not sock.recv(64):
                        raise ConnectionResetError
                    with self._lock:
                        self.done += 1
            except OSError:
                with self._lock:
                    self.broken += 1

    def go_on(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        before = self.done
        wait_until(lambda: self.done >= before + count, 3 * PATIENCE)

    def end(self) -> int:
        """Have all end; returns how many had broken before."""
        broken = self.broken
        self._stop.set()
        for end in self._ends:
            end.result(3 * PATIENCE)
        self._pool.shutdown()
        return broken


def counting(late: list[bytes]) -> Callable[[socket.socket], None]:
    """A service that echoes, and keeps what was sent after the word."""

    def serve(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            if b"after" in data:
                late.append(data)
            sock.sendall(data)

    return serve


def revoke(run: Run, number: int) -> tuple[int, int, int]:
    """One round; returns how many requests came through too late, how many of the other's connections broke, and how
    many of those that were revoked lived on."""
    late: list[bytes] = []
    path = run.directory / f"clients-{number}.conf"
    words = "--clients", write_clients(path, "nas", "pi"), "--service", "other=0"
    server = run.peers.server(*words)
    revoked = run.peers.service(counting(late))
    other = run.peers.service(counting([]))
    clients = [
        run.peers.client(server.relay_port, revoked.port, "--token", NAS, "--name", "nas"),
        run.peers.relay_process(
            "client", f"{HOST}:{server.relay_port}", f"other={HOST}:{other.port}", "--token", PI, "--name", "pi"
        ),
    ]
    clients[1].wait_event("Published")
    loads = [Load(run, server.port_of(name), STREAMS) for name in ("default", "other")]
    for load in loads:
        load.go_on(10 * STREAMS)
    write_clients(path, "pi")
    server.signal(signal.SIGHUP)
    server.wait_message("the configuration is reloaded")
    loads[0].word = b"after"
    loads[1].go_on(20 * STREAMS)
    wait_until(lambda: loads[0].broken == STREAMS, PATIENCE)
    alive, harmed = STREAMS - loads[0].end(), loads[1].end()
    for relay in (*clients, server):
        relay.signal(signal.SIGTERM)
        relay.wait()
    return len(late), harmed, alive
