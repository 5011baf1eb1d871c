"""A storm of honest handshakes: thousands of relay clients come back at once to a server that was killed.

Each has an address of its own on loopback and one link, and they are played by one thread: a selector and a queue of
timers.  The wire has a round trip: what the server says is heard one round trip later, and only then answered.  When
to try again the product itself decides (`RelayClient._back_off`): these clients cannot be kinder than real ones.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import json
import selectors
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress

from _tcprelay.addresses import Endpoint
from _tcprelay.client.greeting import LINK_TIMEOUT, RELAY_DIAL_TIMEOUT
from _tcprelay.client.stock import STABLE_TIME, RefusedByServer, Service, Unreachable, longest_backoff
from _tcprelay.protocol import (
    AUTH, CHALLENGE, CLIENT, HELLO, PING, PONG, REFUSED, SERVER, WELCOME, encode_frame, new_nonce, prove,
)  # fmt: skip
from tcprelay import Publication, RelayClient

from ..conftest import stock_of
from ..peers import HOST, RelayProcess
from .relays import TOKEN, Legs
from .suite import Run, case

DISTANT = 3_000
"""Relay clients."""
ROUND_TRIP = 0.12
BACK = 60.0
"""Seconds after the restart within which all links must be back."""
ARRIVALS = 250
"""Relay clients a second that begin when the server has all the time that there is."""
BIND_ADDRESS_NO_PORT = 24
"""Linux's IP_BIND_ADDRESS_NO_PORT, which the module socket knows since Python 3.11: the port is chosen when it is
connected, from those that are free towards that server."""

Context = ssl.SSLContext | None


@case(18, "storm", 400)
def storm(run: Run) -> None:
    come_back(run, "plain", Legs())
    come_back(run, "TLS", Legs("tls"))


def come_back(run: Run, name: str, legs: Legs) -> None:
    """Kill the server under all its relay clients, start it again, and wait for them.

    What is judged is the server and the product's rules; what it takes to bring the links up before is not.
    """
    count = run.scaled(DISTANT, 200)
    server = start_server(run, legs, 0, 0)
    server.wait_event("Listening", service="default")
    ports = server.relay_port, server.service_port
    crowd = Crowd(ports[0], count, legs.context(run.certificates, False) if legs.has_tls else None)
    try:
        crowd.arrive()
        run.tell(f"{name}: links before", crowd.up, least=count)
        crowd.forget()
        server.kill()
        server = start_server(run, legs, *ports)
        crowd.play(lambda: bool(server.lines), BACK)  # it listens; until then they are refused
        began = time.monotonic()
        crowd.play(lambda: crowd.up == count, BACK)
        run.tell(f"{name}: links back", crowd.up, least=count)
        run.tell(f"{name}: the last one after", time.monotonic() - began, most=BACK, unit="s")
        run.tell(f"{name}: handshakes begun for each", crowd.begun / count)
        run.tell(f"{name}: most begun in a second", max(crowd.rates.values(), default=0))
        run.tell(f"{name}: handshakes lost", crowd.lost)
    finally:
        crowd.close()
        server.signal(signal.SIGTERM)
        server.wait(60.0)


def start_server(run: Run, legs: Legs, relay_port: int, service_port: int) -> RelayProcess:
    words = ["--relay-port", str(relay_port), "--service-port", str(service_port), "--hostname", HOST]
    return run.peers.relay_process("server", *words, *legs.server_options(run.certificates))


class Crowd:
    """All the relay clients, and the thread that plays them: the one that calls `play`."""

    def __init__(self, port: int, count: int, context: Context) -> None:
        self.address = (HOST, port)
        self.context = context
        self.rules = RelayClient(HOST, 1, HOST, port, 1)
        """Never started: it says when to try again."""
        self.selector = selectors.DefaultSelector()
        self.up = 0
        """Links that are in the server's pool."""
        self.begun = self.lost = 0
        """Handshakes: connections that the server's host has taken, and those of them that came to nothing."""
        self.rates: dict[int, int] = {}
        """How many of them began in each second."""
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._clients = [DistantClient(self, number) for number in range(count)]

    def arrive(self) -> None:
        """Bring all links up, at a pace that burdens nobody."""
        for number, client in enumerate(self._clients):
            self.at(time.monotonic() + number / ARRIVALS, client.dial)
        self.play(lambda: self.up == len(self._clients), len(self._clients) / ARRIVALS + BACK)

    def forget(self) -> None:
        """Count from now on, and let the links that are up have been so for long."""
        self.begun = self.lost = 0
        self.rates.clear()
        for client in self._clients:
            client.since = -STABLE_TIME

    def at(self, moment: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (moment, next(self._order), act))

    def play(self, done: Callable[[], bool], limit: float) -> None:
        """Let time pass until `done`, so many seconds at most."""
        end = time.monotonic() + limit
        while not done() and time.monotonic() < end:
            wait = min(self._timers[0][0], end) - time.monotonic() if self._timers else 1.0
            for key, _ in self.selector.select(max(0.0, min(wait, 1.0))):
                key.data()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()

    def note_begun(self) -> None:
        self.begun += 1
        second = int(time.monotonic())
        self.rates[second] = self.rates.get(second, 0) + 1

    def close(self) -> None:
        for client in self._clients:
            client.hang_up()
        self.selector.close()


class DistantClient:
    """A relay client that wants one link."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self._crowd = crowd
        self._source = f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        self._id = f"distant-{number}"
        self._service = Service(Publication("default", Endpoint(HOST, 1)), 1)
        self._sock: socket.socket | None = None
        self._tls: ssl.SSLObject | None = None
        self._attempt = 0
        self._connected = self._up = False
        self.since = 0.0
        """When the present attempt began, or since when the link is up."""

    def dial(self) -> None:
        self._attempt += 1
        self._connected, self.since = False, time.monotonic()
        self._sock = sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        sock.bind((self._source, 0))
        code = sock.connect_ex(self._crowd.address)
        if code not in (0, errno.EINPROGRESS):
            self._fail(Unreachable())
            return
        self._crowd.selector.register(sock, selectors.EVENT_WRITE, self._begin)
        self._later(RELAY_DIAL_TIMEOUT, self._judge_dialling)
        self._later(LINK_TIMEOUT, self._judge_handshake)

    def hang_up(self) -> None:
        if self._sock is not None:
            with suppress(KeyError):
                self._crowd.selector.unregister(self._sock)
            self._sock.close()
            self._sock = None

    def _judge_dialling(self) -> None:
        if not self._connected:
            self._fail(Unreachable())

    def _judge_handshake(self) -> None:
        if not self._up:
            self._fail(TimeoutError())

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do that in so many seconds, if it is still the same attempt."""
        attempt = self._attempt

        def do() -> None:
            if attempt == self._attempt:
                act()

        self._crowd.at(time.monotonic() + seconds, do)

    def _begin(self) -> None:
        """The connection is there, or could not be made."""
        assert self._sock is not None
        if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(Unreachable())
            return
        self._connected = True
        self._crowd.note_begun()
        self._crowd.selector.modify(self._sock, selectors.EVENT_READ, self._receive)
        self._nonce, self._heard = new_nonce(), bytearray()
        self._said_hello = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = None
        if self._crowd.context is not None:
            self._tls = self._crowd.context.wrap_bio(self._incoming, self._outgoing)
        self._answer(b"")

    def _receive(self) -> None:
        """Take what has come; it is heard one round trip later."""
        assert self._sock is not None
        try:
            data = self._sock.recv(65536)
        except OSError:
            data = b""
        if data:
            self._later(ROUND_TRIP, lambda: self._answer(data))
        else:
            self._lose()

    def _answer(self, data: bytes) -> None:
        try:
            self._hear(data)
            if self._sock is not None and (pending := self._outgoing.read()):
                self._sock.sendall(pending)
        except (ssl.SSLError, OSError):
            self._lose()

    def _hear(self, data: bytes) -> None:
        """Go on with the handshake, as far as it can go.  Raises `OSError`."""
        if self._tls is None:
            self._heard += data
        else:
            self._incoming.write(data)
            with suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                while piece := self._tls.read(65536):
                    self._heard += piece
            if self._tls.version() is None:
                return
        if not self._said_hello:
            self._said_hello = True
            self._say(HELLO, version=1, service="default", client=self._id, nonce=self._nonce, token=True)
        while len(self._heard) >= 4 and len(self._heard) >= (end := 4 + int.from_bytes(self._heard[1:4], "big")):
            kind, fields = self._heard[0], json.loads(bytes(self._heard[4:end]) or b"{}")
            del self._heard[:end]
            self._take(kind, fields)

    def _take(self, kind: int, fields: dict[str, str]) -> None:
        if kind == CHALLENGE:
            parts = self._nonce, fields["nonce"], "default", self._id
            self._expected = prove(TOKEN.encode(), SERVER, *parts)
            self._say(AUTH, proof=prove(TOKEN.encode(), CLIENT, *parts))
        elif kind == WELCOME:
            assert fields["proof"] == self._expected
            self._up, self.since = True, time.monotonic()
            self._crowd.up += 1
        elif kind == PING:
            self._say(PONG)
        elif kind == REFUSED:
            self._fail(RefusedByServer(fields["reason"], fields["code"]))

    def _say(self, kind: int, **fields: object) -> None:
        frame = encode_frame(kind, fields)
        if self._tls is None:
            self._outgoing.write(frame)
        else:
            self._tls.write(frame)

    def _lose(self) -> None:
        """The server has closed the link, or its handshake."""
        if not self._up:
            self._fail(EOFError())
            return
        self._up = False
        self._crowd.up -= 1
        if time.monotonic() - self.since >= STABLE_TIME:
            self._service.failures, self._service.retry_at = 0, 0.0
            self._again()
        else:
            self._fail(Unreachable())

    def _fail(self, error: Exception) -> None:
        """An attempt has failed: try again when the product's own client would."""
        self._crowd.lost += self._connected and not self._up
        with stock_of(self._crowd.rules)._condition:
            stock_of(self._crowd.rules)._back_off(self._service, self.since, longest_backoff(error))
        self._again()

    def _again(self) -> None:
        self.hang_up()
        self._attempt += 1
        self._crowd.at(self._service.retry_at, self.dial)
