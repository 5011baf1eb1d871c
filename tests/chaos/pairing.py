"""Pairing: no request is delivered twice, no service client is lost to a link that is given up; and no secret
leaves a relay."""

from __future__ import annotations

import heapq
import itertools
import random
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from _tcprelay.link import Link
from _tcprelay.protocol import BYE, CLIENT, HEADER, PING, PONG, READY, START, WELCOME, encode_frame
from _tcprelay.streams import Stream
from _tcprelay.tcp import RESET_ON_CLOSE
from _tcprelay.waiting import Deadline, Stop, Stopping, wait_for
from tcprelay import ConnectionFailed, RelayClient

from ..bench.processes import free_port
from ..conftest import PATIENCE, Recorder, echo, wait_until
from ..peers import HOST, ROOT
from ..peers_v1 import FakeClient
from ..watch import WATCH
from .relays import TOKEN, Legs, Relays, serving
from .suite import Run, case

ID = 16
"""Bytes of the id that a service client sends first, and no other does."""
HUNG = 40.0
"""Seconds after which a service client counts as hung: `--pair-timeout` is 20."""

Connect = Callable[[float], Any]


# --- Service clients and services -----------------------------------------------------------------------------


def ask(connect: Connect, request: bytes, wanted: bytes, rest: bytes = b"", pause: float = 0.0) -> str:
    """One service client: it sends `request` at once, and `rest` after a pause, and should hear what is `wanted`.

    What came of it: ``answered``, ``wrong`` (another answer), ``cut`` (an end before the answer), ``error``, ``hung``.
    """
    answer = b""
    try:
        with connect(HUNG) as sock:
            sock.sendall(request)
            if rest:
                threading.Event().wait(pause)
                sock.sendall(rest)
            while len(answer) < len(wanted) and (piece := sock.recv(4096)):
                answer += piece
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(4096):
                answer += piece
    except TimeoutError as error:
        WATCH.tell(f"a service client: {error}")
        return "hung"
    except OSError:
        return "error"
    if answer == wanted:
        return "answered"
    return "cut" if wanted.startswith(answer) else "wrong"


def keep_asking(connect: Connect, going: Callable[[], bool], askers: int = 8) -> Counter[str]:
    """Service clients of an echo service, some at a time and one after another, as long as it is `going`."""

    def keep_on(asker: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for number in itertools.count():
            if not going():
                break
            request = b"%04d%012d" % (asker, number)
            outcomes[ask(connect, request, request)] += 1
        return outcomes

    with ThreadPoolExecutor(askers) as pool:
        return sum(pool.map(keep_on, range(askers)), Counter())


class CountingService:
    """Notes the id at the head of each request that reaches it, and answers with it."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def serve(self, sock: socket.socket) -> None:
        head = b""
        while len(head) < ID:
            if not (piece := sock.recv(ID - len(head))):
                return
            head += piece
        self.seen.append(head)
        sock.sendall(head)
        while sock.recv(65536):
            pass


BANNER = b"220 the service speaks first\r\n"


def greet(sock: socket.socket) -> None:
    """A service that speaks first."""
    sock.sendall(BANNER)
    while sock.recv(4096):
        pass


# --- Bar 16: once ---------------------------------------------------------------------------------------------


@case(16, "once", 400, over_wire=True)
def once(run: Run) -> None:
    """Links are killed between START and READY: whoever had sent something is not offered again, and everybody
    else is."""
    deliver_once(run)
    offer_again(run)


def deliver_once(run: Run) -> None:
    """Clients that send at once, or in two parts of which the second may meet the link between START and READY."""
    service = CountingService()
    passing, relays = killing_relays(run, serving(run, Legs(), service.serve))
    chances = random.Random(run.random.random())

    def draw(number: int) -> tuple[bytes, bytes, bytes, float]:
        request = b"%0*d" % (ID, number) + bytes(chances.randrange(6000))
        part = chances.choice((len(request), ID, 1, 0))
        return request[:part], request[:ID], request[part:], chances.uniform(0.0, 0.005 + run.round_trip)

    requests = [draw(number) for number in range(run.scaled(10_000))]
    with ThreadPoolExecutor(run.at_a_time(24)) as pool:
        outcomes = Counter(pool.map(lambda request: ask(relays.connect, *request), requests))
    repeated = sum(count - 1 for count in Counter(service.seen).values())
    run.tell("requests delivered twice", repeated, most=0, least=0)
    run.tell("requests whose client heard another's id", outcomes["wrong"], most=0, least=0)
    run.tell("requests cut off without an error", outcomes["cut"], most=0, least=0)
    run.tell(f"requests with neither answer nor error in {HUNG:g} s", outcomes["hung"], most=0, least=0)
    run.tell("requests answered", outcomes["answered"], least=len(requests) * 0.4)
    run.tell("requests ended with an error", outcomes["error"])
    run.tell("links killed between START and READY", passing.killed.total(), least=run.scaled(3000))
    for moment, count in sorted(passing.killed.items()):
        run.tell(f"of these {moment}", count, least=1)


def offer_again(run: Run) -> None:
    """Clients that say nothing are offered the next link, until one lives: READY never comes from a killed one."""
    passing, relays = killing_relays(run, serving(run, Legs(), greet))
    count = run.scaled(4_000)
    with ThreadPoolExecutor(run.at_a_time(24)) as pool:
        outcomes = Counter(pool.map(lambda _: ask(relays.connect, b"", BANNER), range(count)))
    run.tell("silent clients with a part of the banner or another one", outcomes["cut"] + outcomes["wrong"], most=0)
    run.tell(f"silent clients with neither banner nor error in {HUNG:g} s", outcomes["hung"], most=0)
    run.tell("silent clients with the banner", 100 * outcomes["answered"] / count, least=99, unit="%")
    run.tell("links killed under silent clients", passing.killed.total(), least=run.scaled(1000))


def killing_relays(run: Run, service: int | str) -> tuple[Passing, Relays]:
    """Relays whose links pass through a `Passing` that kills many."""
    relay_port = free_port()
    passing = Passing(run, relay_port, share=0.4)
    server, client = ("--relay-port", str(relay_port)), ("--relay-port", str(passing.port), "--num-conn", "16")
    return passing, Relays(run, Legs(), service, server, client)


BEFORE, WITHIN, AFTER, AT_READY = "before START", "some bytes after it", "some milliseconds after it", "at READY"


class Passage:
    """A link on its way through a `Passing`: both ends, and what has come from each that is no whole frame yet."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.held = {client: bytearray(), server: bytearray()}
        self.doom = ""
        """When it is to be killed: one of the four moments."""
        self.allowed = 0
        """Bytes that still pass to the client of a link that is killed `WITHIN`."""
        self.killed = False
        """At least towards one side; what the other still sends is dropped until that is closed, too."""

    def other(self, end: socket.socket) -> socket.socket:
        return self.server if end is self.client else self.client

    def take_frames(self, source: socket.socket) -> Iterator[bytes]:
        """The whole frames that have come from one end."""
        held = self.held[source]
        while len(held) >= HEADER:
            length = HEADER + int.from_bytes(held[1:HEADER], "big")
            if len(held) < length:
                return
            frame = bytes(held[:length])
            del held[:length]
            yield frame


class Passing:
    """Passes plain links on to the relay port, frame by frame, at once or after a delay, at the server's host.

    It can kill a share of them between START and READY: it resets or closes the link towards one side or both, at one
    of four moments: when START comes (the relay client does not get it), so many bytes later, so many milliseconds
    later, or when READY comes.  READY never passes on such a link.  One thread does it all.
    """

    def __init__(self, run: Run, target: int, share: float = 0.0, delay: float = 0.0) -> None:
        self._target, self._share, self._delay = target, share, delay
        self._random = random.Random(run.random.random())
        self.killed: Counter[str] = Counter()
        """How many links, by the moment."""
        self._address = run.server.address
        with run.server.inside():
            self._listener = socket.create_server((self._address, 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._stop = Stop()
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, partial[object]]] = []
        self._numbers = itertools.count()  # keeps what is due at the same moment in order
        self._thread = threading.Thread(target=self._run, name="passing")
        with run.server.inside():
            self._thread.start()
        run.stack.callback(self._end)

    def _end(self) -> None:
        self._stop.request()
        self._thread.join(PATIENCE)
        self._stop.close()

    def _run(self) -> None:
        with self._selector as selector, self._listener:
            selector.register(self._stop.fileno(), selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.requested:
                timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
                for key, _ in selector.select(timeout):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() >= 0:
                        self._receive(key.data, key.fileobj)
                while self._timers and self._timers[0][0] <= time.monotonic():
                    heapq.heappop(self._timers)[-1]()
            for passage in {key.data for key in selector.get_map().values() if key.data}:
                self._close(passage)

    def _later(self, seconds: float, act: Callable[..., object], *args: object) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), partial(act, *args)))

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection((self._address, self._target), PATIENCE)
        except OSError:
            client.close()
            return
        passage = Passage(client, server)
        for end in (client, server):
            end.settimeout(PATIENCE)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(end, selectors.EVENT_READ, passage)

    def _receive(self, passage: Passage, source: socket.socket) -> None:
        """Take what has come from one end; an error is an end like any other."""
        try:
            data = source.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)
        if self._delay:
            self._later(self._delay, self._pass_on, passage, source, data)
        else:
            self._pass_on(passage, source, data)

    def _pass_on(self, passage: Passage, source: socket.socket, data: bytes) -> None:
        """Send it to the other end; the end of one is the end of both."""
        if not data:
            self._close(passage)
            return
        passage.held[source] += data
        for frame in passage.take_frames(source):
            if passage.killed or passage.other(source).fileno() < 0:
                return
            try:
                self._forward(passage, source, frame)
            except OSError:
                self._close(passage)

    def _forward(self, passage: Passage, source: socket.socket, frame: bytes) -> None:
        """Send a frame on, or kill the link instead, or after a part of it."""
        to_client = source is passage.server
        if to_client and frame[0] == START and self._random.random() < self._share:
            passage.doom = self._random.choice((BEFORE, WITHIN, AFTER, AT_READY))
            passage.allowed = self._random.randrange(1, 4 * len(frame))
            if passage.doom == AFTER:
                self._later(self._random.uniform(0.0, 0.01), self._kill, passage)
        if passage.doom == BEFORE or (passage.doom and frame[0] == READY and not to_client):
            self._kill(passage)
            return
        if passage.doom == WITHIN and to_client:
            frame = frame[: passage.allowed]
            passage.allowed -= len(frame)
        passage.other(source).sendall(frame)
        if passage.doom == WITHIN and not passage.allowed:
            self._kill(passage)

    def _kill(self, passage: Passage) -> None:
        """Reset or close the link towards one side or both; a side that is left loses it a little later."""
        if passage.killed or passage.client.fileno() < 0:
            return
        passage.killed = True
        self.killed[passage.doom] += 1
        victims = self._random.choice(((passage.client,), (passage.server,), (passage.client, passage.server)))
        reset = self._random.random() < 0.5
        for end in victims:
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self._close_end(end)
        self._later(self._random.uniform(0.0, 0.05), self._close, passage)

    def _close(self, passage: Passage) -> None:
        for end in (passage.client, passage.server):
            self._close_end(end)

    def _close_end(self, end: socket.socket) -> None:
        if end.fileno() >= 0:
            with suppress(KeyError):  # it has ended
                self._selector.unregister(end)
            end.close()


# --- Bar 16: bye ----------------------------------------------------------------------------------------------


@case(16, "bye", 400, over_wire=True)
def bye(run: Run) -> None:
    """Links are given up in three ways under load, and every service client gets its echo."""
    cross_bye(run)
    drain_clients(run)
    retire_surplus(run)


def tell_lost(run: Run, how: str, outcomes: Counter[str]) -> None:
    asked = outcomes.total()
    run.tell(f"{how}: service clients", asked)
    run.tell(f"{how}: of these lost", asked - outcomes["answered"], most=0, least=0)


CROSSING, BLINDLY, OPENING, BEHIND_END = "as START arrives", "at any moment", "behind START", "behind END"


class Leaver(FakeClient):
    """A relay client's link that serves one connection, and says BYE at a moment of its own choice."""

    def __init__(self, run: Run, relay_port: int) -> None:
        with run.client.inside():
            sock = socket.create_connection((run.server.address, relay_port), PATIENCE)
        sock.settimeout(None)
        Link.__init__(self, Stream(sock, "the server"), CLIENT)
        assert self.hello(token=TOKEN.encode()).kind == WELCOME

    def live(self, moment: str, patience: float, stop: Stop) -> bool:
        """Whether it had said BYE before it saw START.  Raises `Stopping`, and `OSError` where the link is lost."""
        if moment in (CROSSING, BLINDLY):
            with suppress(TimeoutError):  # what arrives is left unread: START, in all likelihood
                if not self.unread():  # it may have come with WELCOME
                    wait_for(self.fd, select.POLLIN, Deadline(patience if moment == BLINDLY else HUNG), stop)
            self.send(BYE)
        try:
            while self.receive(Deadline(HUNG), stop).kind == PING:
                if not self.machine.leaving:
                    self.send(PONG)
        except EOFError:
            if not self.machine.leaving:
                raise
            return False
        crossed = self.machine.leaving
        if moment == OPENING:
            self.send(BYE)
        self.send(READY)
        self.write(self.read(ID))
        self.read_end()
        self.stream.send(self.pack_end() + (encode_frame(BYE) if moment == BEHIND_END else b""))
        return crossed


def cross_bye(run: Run) -> None:
    """BYE crosses START on the links of a relay client that the test plays."""
    with run.server.inside():
        server = run.peers.server("--hostname", run.server.address, "--token", TOKEN)
    relay_port, service_port = server.relay_port, server.service_port
    crossed: list[str] = []  # the moments of BYE that a START crossed
    broken: list[str] = []  # how links ended that should not have
    stop = Stop()
    run.stack.callback(stop.close)

    def connect(timeout: float) -> socket.socket:
        with run.server.inside():
            return socket.create_connection((run.server.address, service_port), timeout)

    def keep_leaving(seed: float) -> None:
        chances = random.Random(seed)
        while not stop.requested:
            moment = chances.choices((CROSSING, BLINDLY, OPENING, BEHIND_END), (7, 1, 1, 1))[0]
            link = Leaver(run, relay_port)
            try:
                with link:
                    if link.live(moment, chances.expovariate(200), stop):
                        crossed.append(moment)
            except Stopping:
                return
            except (OSError, EOFError) as error:
                broken.append(f"BYE {moment}: {error}")

    wanted = run.scaled(10_000)
    with ThreadPoolExecutor(count := run.at_a_time(12)) as pool:
        leavers = [pool.submit(keep_leaving, run.random.random()) for _ in range(count)]
        try:
            outcomes = keep_asking(
                connect,
                lambda: len(crossed) + len(broken) < wanted and not any(leaver.done() for leaver in leavers),
                run.at_a_time(8),
            )
        finally:
            stop.request()
    for leaver in leavers:
        leaver.result()
    run.tell("BYE crossed START", len(crossed), least=wanted)
    run.tell("of these by chance", crossed.count(BLINDLY))
    for problem in broken[:3]:
        run.say(problem)
    run.tell("links that the server broke off", len(broken), most=0, least=0)
    tell_lost(run, "BYE and START", outcomes)


def drain_clients(run: Run) -> None:
    """Relay clients come and go, in this process and in their own, while one stays."""
    service = int(serving(run, Legs(), echo))
    relays = Relays(run, Legs(), service, client=("--num-conn", "4"))
    far = Passing(run, relays.relay_port, delay=0.01).port  # so what crosses on the way has time to do it
    carried: list[int] = []  # connections of each relay client that has drained

    def drain_here(seed: float) -> None:
        """End a relay client while its first links come up, or after it has carried some connections."""
        chances, events = random.Random(seed), Recorder()
        client = RelayClient(
            HOST, service, run.server.address, far, 4, token=TOKEN, drain_timeout=HUNG, on_event=events
        )
        with run.client.inside(), client:
            if chances.random() < 0.5:
                threading.Event().wait(chances.uniform(0.0, 0.2))
            else:
                enough = chances.randrange(1, 20)
                wait_until(lambda: client.counters["connections"] >= enough)
        carried.append(client.counters["connections"])
        assert not events.of(ConnectionFailed), events.of(ConnectionFailed)

    def drain_process() -> None:
        options = "--token", TOKEN, "--drain-timeout", str(HUNG), "--num-conn", "4"
        with run.client.inside():
            client = run.peers.client(far, service, "--relay-host", run.server.address, *options)
        client.wait_event("ConnectionOpened")
        client.signal(signal.SIGTERM)
        assert client.wait(HUNG) == 0
        carried.append(len(client.events("ConnectionOpened")))

    here = [run.random.random() for _ in range(run.scaled(400, 8))]
    with ThreadPoolExecutor(run.at_a_time(3)) as pool:
        drains = [pool.submit(drain_here, seed) for seed in here]
        drains += [pool.submit(drain_process) for _ in range(run.scaled(40, 2))]
        outcomes = keep_asking(relays.connect, lambda: not all(drain.done() for drain in drains), run.at_a_time(8))
    for drain in drains:
        drain.result()
    run.tell("relay clients drained", len(carried), least=len(drains))
    run.tell("connections that these carried", sum(carried), least=len(drains))
    tell_lost(run, "draining relay clients", outcomes)


SHORT_SURPLUS = """
import sys, tcprelay, _tcprelay.server.links
_tcprelay.server.links.SURPLUS_TIME = 0.1
sys.exit(tcprelay.main(sys.argv[4:]))
"""
"""What runs `python -m tcprelay ROLE …`, behind it in the command line, with another constant."""


def retire_surplus(run: Run) -> None:
    """After bursts, whose links are more than the relay client wants, the server retires some under load."""
    server = ("--heartbeat", str(0.1 + run.round_trip), "--log-level", "debug")
    wrapper = (sys.executable, "-c", SHORT_SURPLUS)
    relays = Relays(run, Legs(), serving(run, Legs(), echo), server, ("--num-conn", "2"), wrapper)
    bursts, size = run.scaled(80, 5), 24
    outcomes: Counter[str] = Counter()

    def hold(number: int) -> str:
        """A service client that stays for a moment, so that all of a burst are there at once."""
        request = b"%0*d" % (ID, number)
        return ask(relays.connect, request[:8], request, request[8:], 0.05)

    with ThreadPoolExecutor(size + 1) as pool:
        others = pool.submit(keep_asking, relays.connect, lambda: outcomes.total() < size * bursts, 2)
        for _ in range(bursts):
            outcomes.update(pool.map(hold, range(size)))
            threading.Event().wait(run.random.uniform(0.0, 0.4))  # the next one meets the retiring at some moment
    retired = sum(event["reason"] == "surplus" for event in relays.server.events("LinkDown"))
    run.tell("surplus links retired", retired, least=bursts * size / 4)
    tell_lost(run, "retiring surplus links", outcomes + others.result())


# --- Bar 15: secrets ------------------------------------------------------------------------------------------


@case(15, "secrets", 240)
def secrets(run: Run) -> None:
    """The checks of tests/test_secrets.py, each of which looks for canaries in all that comes out of the relays."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "tests/test_secrets.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220, check=False)
    hits = re.findall("^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    for hit in hits:
        run.say(hit)
    passed = re.search(r"(\d+) passed", done.stdout)
    run.tell("checks of secrets and of the log", len(hits) + int(passed[1] if passed else 0), least=100)
    run.tell("of these with a hit", len(hits), most=0, least=0)
