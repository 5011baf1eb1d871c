"""Streams: nothing lost, nothing added, and no end that was not one.

Both ends of the connections are in this process: it is the service client, and it is the service.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from queue import Empty, Queue
from socket import (
    AF_UNIX, IPPROTO_TCP, SHUT_RDWR, SHUT_WR, SOCK_SEQPACKET, TCP_NODELAY, create_connection, socket, socketpair,
)  # fmt: skip
from typing import Any, ClassVar

from _tcprelay.link import Link
from _tcprelay.protocol import CLIENT, DATA, READY, START, WELCOME, encode_header
from _tcprelay.streams import Stream
from _tcprelay.system import ignore_oserror

from ..bench.processes import find_family, free_port
from ..conftest import PATIENCE, echo, read_all, read_exactly, wait_until
from ..ends import TLSEnd
from ..peers import HOST, LONG, RelayProcess, find, is_listening
from ..peers_v1 import FakeClient
from ..watch import WATCH
from .relays import LEGS, TOKEN, Legs, Relays, serving
from .suite import Run, case

LANES = 4
"""Connections under way at a time through one relay, where a case makes many."""
UNIX_LEGS = [Legs(unix=True), Legs("tls", unix=True)]
OLD_LEGS = [replace(legs, version="1.2") for legs in LEGS if legs.has_tls]
"""The combinations of legs with TLS 1.2."""


# --- Connections held at both ends ----------------------------------------------------------------------------


class Arrivals:
    """A service that hands over its ends of connections, in the order in which they come."""

    def __init__(self) -> None:
        self._queue: Queue[tuple[Any, threading.Event]] = Queue()

    def serve(self, end: Any) -> None:
        done = threading.Event()
        self._queue.put((end, done))
        done.wait(10 * LONG)

    def take(self, stack: ExitStack, timeout: float = PATIENCE) -> Any:
        """The next one, which is closed when `stack` unwinds."""
        try:
            end, done = self._queue.get(timeout=timeout)
        except Empty:
            WATCH.tell(f"no connection reached the service within {timeout:g} s")
            raise
        stack.callback(done.set)
        return stack.enter_context(end)

    def let_go(self) -> None:
        """Close those that nobody takes."""
        while not self._queue.empty():
            self._queue.get()[1].set()


class Connections:
    """A relay whose connections this process holds at both ends."""

    def __init__(self, run: Run, legs: Legs, server: tuple[str, ...] = ()) -> None:
        self._run, self._legs = run, legs
        self._arrivals = Arrivals()
        self._opening = threading.Lock()  # one at a time: so it is known which two ends belong together
        self.relays = Relays(run, legs, serving(run, legs, self._arrivals.serve), server)

    @contextmanager
    def open(self, timeout: float = PATIENCE) -> Iterator[tuple[Any, Any]]:
        """A connection: the service client's end, and the service's."""
        with ExitStack() as stack:
            with self._opening:
                near = stack.enter_context(self.relays.connect())
                far = self._arrivals.take(stack, timeout)
            yield near, far

    def close(self) -> int:
        """End the relays, which would go on to use the machine.  Returns how many connections they told of that
        failed or were broken off."""
        both = self.relays.client, self.relays.server
        for relay in both:
            relay.close()
        self._arrivals.let_go()
        kinds = "ConnectionClosed", "ConnectionFailed"
        bad = [event for relay in both for kind in kinds for event in relay.events(kind) if event["reason"]]
        for event in bad[:6]:
            self._run.say(f"{self._legs}: {event['message']}")
        return len(bad)


@dataclass(frozen=True)
class Passed:
    """What was put in at one end of a direction, or came out at the other."""

    count: int
    digest: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of a connection: each direction as it was put in and as it came out."""

    directions: tuple[tuple[Passed, Passed], ...]
    seconds: float = 0.0
    """Until an end was seen."""

    @property
    def carried(self) -> int:
        return sum(out.count for _, out in self.directions)

    @property
    def lost(self) -> int:
        return sum(max(0, put_in.count - out.count) for put_in, out in self.directions)

    @property
    def wrong(self) -> int:
        """Directions that did not come out as they were put in."""
        return sum(put_in != out for put_in, out in self.directions)


def outcomes_of(run: Run, futures: Iterable[Future[Outcome]]) -> tuple[list[Outcome], int]:
    """The outcomes of all connections, and the number of those that ended in an error instead."""
    futures = list(futures)
    problems = [error for future in futures if (error := future.exception())]
    for error in problems[:3]:
        run.say("".join(traceback.format_exception(error)[-2:]).strip())
    return [future.result() for future in futures if not future.exception()], len(problems)


def carry_out(
    run: Run, work: Sequence[tuple[Legs, Sequence[Callable[[Connections, Executor], Outcome]]]]
) -> tuple[list[Outcome], int]:
    """Carry out all of the work, through relays with those legs, some at a time; returns as `outcomes_of` does.

    Connections through one relay are opened one by one, each of which takes a round trip: so over a wire there are
    more relays at a time.
    """
    assert run.certificates  # made before there are threads
    with ThreadPoolExecutor(run.at_a_time(1)) as relays:
        done = list(relays.map(lambda one: carry_out_one(run, *one), work))
    return [outcome for outcomes, _ in done for outcome in outcomes], sum(errors for _, errors in done)


def carry_out_one(
    run: Run, legs: Legs, acts: Sequence[Callable[[Connections, Executor], Outcome]]
) -> tuple[list[Outcome], int]:
    connections = Connections(run, legs)
    with ThreadPoolExecutor(LANES) as lanes, ThreadPoolExecutor(4 * LANES) as threads:
        outcomes, errors = outcomes_of(run, [lanes.submit(act, connections, threads) for act in acts])
    return outcomes, errors + connections.close()


def join(*futures: Future[Any]) -> list[Any]:
    """The results of threads that share a connection, when none of them uses it any more."""
    wait(futures)
    return [future.result() for future in futures]


# --- Transfers ------------------------------------------------------------------------------------------------

SIZES = sorted({0} | {(1 << bits) + more for bits in range(27) for more in (-1, 0, 1)})
"""Sizes around each power of two up to 64 MiB, where buffers and frames begin and end."""
TRANSFER_LEGS = [*LEGS, *(legs for legs in OLD_LEGS if legs.port + legs.service + (legs.link == "tls") != 2),
                 *UNIX_LEGS]  # fmt: skip


@case(1, "transfers", 600, over_wire=True)
def transfers(run: Run) -> None:
    """Both directions at once, each of a size of its own, in random pieces: the same bytes come out."""
    source = Source(run.random)
    count = run.scaled(2000)
    sizes = list(zip(deal_sizes(run.random, count), deal_sizes(run.random, count), strict=True))
    acts = [partial(transfer, source=source, up=up, down=down, chance=fork(run.random)) for up, down in sizes]
    began = time.monotonic()
    shares = [acts[number :: len(TRANSFER_LEGS)] for number in range(len(TRANSFER_LEGS))]
    outcomes, errors = carry_out(run, list(zip(TRANSFER_LEGS, shares, strict=True)))
    run.tell("transfers", len(outcomes), least=count)
    run.tell("directions in which something else arrived", sum(one.wrong for one in outcomes), most=0, least=0)
    run.tell("errors, of the ends and of the relays", errors, most=0, least=0)
    carried = sum(one.carried for one in outcomes) / (1 << 20)
    run.tell("carried", carried, unit="MiB")
    run.tell("carried a second", carried / (time.monotonic() - began), unit="MiB")


class Source:
    """Random bytes, of which each transfer takes a random part: cheap, and no two alike."""

    def __init__(self, chance: random.Random) -> None:
        self._block = memoryview(chance.randbytes(SIZES[-1] + (1 << 20)))

    def take(self, size: int, chance: random.Random) -> memoryview:
        start = chance.randint(0, len(self._block) - size)
        return self._block[start : start + size]


def deal_sizes(chance: random.Random, count: int) -> list[int]:
    """So many sizes in a random order, each as often as the others."""
    sizes = SIZES * (count // len(SIZES)) + chance.sample(SIZES, count % len(SIZES))
    chance.shuffle(sizes)
    return sizes


def fork(chance: random.Random) -> random.Random:
    """Chances of its own for another thread."""
    return random.Random(chance.getrandbits(64))


def transfer(
    connections: Connections, threads: Executor, *, source: Source, up: int, down: int, chance: random.Random
) -> Outcome:
    """One connection: `up` bytes to the service and `down` bytes back; who ends first is left to chance."""
    near_saw, far_saw = threading.Event(), threading.Event()
    near_waits, far_waits = chance.choice([(None, None), (near_saw, None), (None, far_saw)])
    with connections.open() as (near, far):
        up_in, down_out, down_in, up_out = join(
            threads.submit(send, near, source.take(up, chance), fork(chance), near_waits),
            threads.submit(receive, near, down, fork(chance), near_saw),
            threads.submit(send, far, source.take(down, chance), fork(chance), far_waits),
            threads.submit(receive, far, up, fork(chance), far_saw),
        )
    return Outcome(((up_in, up_out), (down_in, down_out)))


@WATCH.at_timeout
def send(end: Any, data: memoryview, chance: random.Random, after: threading.Event | None) -> Passed:
    """Send `data` in random pieces, its last byte and the end only `after` that."""
    body, last, largest = data[:-1], data[-1:], largest_piece(len(data), chance)
    while body:
        size = chance.randint(1, largest)
        end.sendall(body[:size])
        body = body[size:]
    if after and not after.wait(LONG):
        raise TimeoutError("the other side's end was not seen")
    if last:
        end.sendall(last)
    end.shutdown(SHUT_WR)
    return pass_of(data)


@WATCH.at_timeout
def receive(end: Any, size: int, chance: random.Random, ended: threading.Event) -> Passed:
    """Receive in random pieces, to the end; `size` is what is expected."""
    digest, count, largest = hashlib.sha256(), 0, largest_piece(size, chance)
    while data := end.recv(chance.randint(1, largest)):
        digest.update(data)
        count += len(data)
    ended.set()
    return Passed(count, digest.digest())


def largest_piece(size: int, chance: random.Random) -> int:
    """From single bytes to 256 KiB, but not more than some thousand pieces in all."""
    return max(size >> 10, 1 << chance.randrange(19))


# --- Half-close -----------------------------------------------------------------------------------------------


@case(2, "half-close", 900, over_wire=True)
def half_close(run: Run) -> None:
    """Where one direction has ended the other side sees that at once, and the other direction goes on to its own."""
    source = Source(run.random)
    each = run.scaled(200)
    kinds = list(product((False, True), (False, True))) * each
    work = [
        (legs, [partial(end_one_direction, source=source, service_first=first, flowing=flowing, chance=fork(run.random))
                for first, flowing in kinds])
        for legs in [*LEGS, *OLD_LEGS, *UNIX_LEGS]
    ]  # fmt: skip
    outcomes, errors = carry_out(run, work)
    run.tell("connections", len(outcomes), least=len(kinds) * len(work))
    run.tell("bytes lost", sum(one.lost for one in outcomes), most=0, least=0)
    run.tell("directions in which something else arrived", sum(one.wrong for one in outcomes), most=0, least=0)
    run.tell("errors, of the ends and of the relays", errors, most=0, least=0)
    run.tell("longest until an end was seen", max(one.seconds for one in outcomes), most=1.0 + run.slack, unit="s")
    run.tell("carried", sum(one.carried for one in outcomes) / (1 << 20), unit="MiB")


def end_one_direction(
    connections: Connections,
    threads: Executor,
    *,
    source: Source,
    service_first: bool,
    flowing: bool,
    chance: random.Random,
) -> Outcome:
    """One connection of which the `first` end ends its direction, while the `last` one is silent or `flowing`."""
    question = source.take(chance.randint(0, 5000), chance)
    flows, seen = threading.Event(), threading.Event()
    reads_from = chance.choice((flows, seen))  # until the first end reads, what flows fills the buffers on the way
    with connections.open() as ends:
        first, last = reversed(ends) if service_first else ends
        answering = threads.submit(answer, last, source, flowing, fork(chance), flows, seen)
        reading = threads.submit(receive_after, reads_from, first, fork(chance))
        try:
            if not flows.wait(PATIENCE):
                raise TimeoutError("nothing could be sent")
            first.sendall(question)
            began = time.monotonic()
            first.shutdown(SHUT_WR)
            asked = receive(last, len(question), chance, seen)
            seconds = time.monotonic() - began
        finally:
            seen.set()
            wait((answering, reading))
    return Outcome(((pass_of(question), asked), (answering.result(), reading.result())), seconds)


@WATCH.at_timeout
def answer(
    end: Any, source: Source, flowing: bool, chance: random.Random, flows: threading.Event, seen: threading.Event
) -> Passed:
    """Send until the other direction's end was `seen`, or without `flowing` wait for that; then some more, and end."""
    if not flowing:
        flows.set()
        seen.wait(PATIENCE)
    digest, count, more = hashlib.sha256(), 0, 3
    while more:
        more -= seen.is_set()
        piece = source.take(chance.randint(1, 65536), chance)
        end.sendall(piece)
        digest.update(piece)
        count += len(piece)
        flows.set()
    end.shutdown(SHUT_WR)
    return Passed(count, digest.digest())


def receive_after(event: threading.Event, end: Any, chance: random.Random) -> Passed:
    event.wait(PATIENCE)
    return receive(end, 1 << 20, chance, threading.Event())


# --- Unread ---------------------------------------------------------------------------------------------------

SMALL_PIECES = [b"%099d\n" % number for number in range(600)]
"""What a service does not read at once: 60,000 bytes, which in small pieces are more than a Unix socket holds."""
PACE = 0.002
"""Seconds between two of them."""
UNREAD = 4.0
"""Heartbeats, of a second, for which it does not."""


@case(2, "unread", 300, over_wire=True)
def unread(run: Run) -> None:
    """A service ends its direction and does not read for a while: all that is sent to it arrives in the end, and
    meanwhile others are served."""
    count = run.scaled(25, 5)
    outcomes, errors, waits = list[Outcome](), 0, list[float]()
    for legs in [Legs(), Legs("tls"), *UNIX_LEGS]:
        connections = Connections(run, legs, ("--heartbeat", "1"))
        with ExitStack() as stack, ThreadPoolExecutor(count) as threads:
            pairs = [stack.enter_context(connections.open()) for _ in range(count)]
            list(threads.map(send_small_pieces, pairs))
            began = time.monotonic()
            waits.append(serve_others(connections, count))
            threading.Event().wait(began + UNREAD - time.monotonic())
            waits.append(serve_others(connections, count))
            done, failed = outcomes_of(run, [threads.submit(read_small_pieces, far) for _, far in pairs])
        outcomes += done
        errors += failed + connections.close()
    run.tell("connections", len(outcomes), least=4 * count)
    run.tell("bytes lost", sum(one.lost for one in outcomes), most=0, least=0)
    run.tell("directions in which something else arrived", sum(one.wrong for one in outcomes), most=0, least=0)
    run.tell("errors, of the ends and of the relays", errors, most=0, least=0)
    run.tell("longest that another one took", max(waits), most=1.0 + run.slack, unit="s")


def send_small_pieces(pair: tuple[Any, Any]) -> None:
    """The service ends its direction; its client sees that, sends all in small pieces, and ends the other one.

    They follow each other so slowly that the relays pass on each by itself.
    """
    near, far = pair
    near.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    far.shutdown(SHUT_WR)
    assert not read_all(near)
    for piece in SMALL_PIECES:
        near.sendall(piece)
        threading.Event().wait(PACE)
    near.shutdown(SHUT_WR)


def read_small_pieces(far: Any) -> Outcome:
    put_in, came = b"".join(SMALL_PIECES), read_all(far)
    return Outcome(((pass_of(put_in), pass_of(came)),))


def pass_of(data: bytes | memoryview) -> Passed:
    return Passed(len(data), hashlib.sha256(data).digest())


def serve_others(connections: Connections, count: int) -> float:
    """So many connections of others, one after another; returns the seconds that the slowest took, which are many
    where one was not served."""
    longest = 0.0
    with suppress(OSError, Empty):
        for _ in range(count):
            began = time.monotonic()
            with connections.open() as (near, far):
                near.sendall(b"?")
                if far.recv(1) != b"?":
                    raise OSError("not this connection")
            longest = max(longest, time.monotonic() - began)
        return longest
    return PATIENCE


# --- KeyUpdate ------------------------------------------------------------------------------------------------

EVERYWHERE = Legs("tls", port=True, service=True)


@case(3, "key-updates", 600)
def key_updates(run: Run) -> None:
    """Whoever floods a TLS leg with KeyUpdates, reading the answers or not, makes nothing grow and delays nobody."""
    count = run.scaled(50, least=30) * Flooder.TALK  # a relay bears 2,427 without data, or with the answers not taken
    flooded = Flooded(run)
    relays = flooded.relays.server, flooded.relays.client
    flooded.serve_somebody()
    before = [peak_memory(relay) for relay in relays]
    sent, served, seconds, cut, borne = list[int](), list[int](), list[float](), 0, 0
    for place, reads, key in product(PLACES, (True, False), (b"K", b"k")):
        with ExitStack() as stack:
            flooder, told = place(flooded, stack), flooded.count_given_up()
            flooding = stack.enter_context(ThreadPoolExecutor(1)).submit(flooder.flood, key, count, reads)
            times = [flooded.serve_somebody() for _ in iter(flooding.done, True)]
            survived = flooding.result()
            cut += reads and flooder.other is not None and not survived
            if flooder.other is None or (key == b"K" and not reads):
                borne += not flooded.gives_up_another(told)
            sent.append(flooder.openssl.count("KeyUpdate"))
        served.append(len(times))
        seconds += times
    run.tell("floods", len(sent), least=4 * len(PLACES))
    run.tell("fewest KeyUpdates in one", min(sent), least=2000)
    run.tell("floods with data in between, answers read: broken off", cut, most=0, least=0)
    run.tell("floods without data, or answers not read: not broken off", borne, most=0, least=0)
    run.tell("fewest others served during one", min(served), least=1)
    run.tell("longest that one of them took", max(seconds), unit="s")
    for relay, memory in zip(relays, before, strict=True):
        run.tell(f"{relay.name}: more memory", peak_memory(relay) - memory, most=64, unit="MiB")
    run.tell("relays that ended", sum(relay.process.poll() is not None for relay in relays), most=0, least=0)


def peak_memory(relay: RelayProcess) -> float:
    """The most MiB that a relay has had resident so far; of its worker processes each its own."""
    states = [Path(f"/proc/{pid}/status").read_text() for pid in find_family(relay.process.pid)]
    return sum(int(line.split()[1]) for state in states for line in state.splitlines() if "VmHWM" in line) / 1024


class Flooded:
    """A relay with TLS on all legs.  Beside the service for everybody it has others, through which it is flooded."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.arrivals = Arrivals()
        self.before_service = Valve(run, relay_dials=True)
        targets = {"port": serving(run, EVERYWHERE, self.arrivals.serve), "service": self.before_service.port}
        server = [word for name in (*targets, "link") for word in ("--service", f"{name}={HOST}:0")]
        server += ["--log-level", "debug"]  # which tells why an idle link was lost
        client = [word for name, port in targets.items() for word in ("--publish", f"{name}={HOST}:{port}")]
        everybody = serving(run, EVERYWHERE, echo_and_end)
        self.relays = Relays(run, EVERYWHERE, everybody, tuple(server), ("--num-conn", "2", *client))
        self.before_service_port = Valve(run, self.relays.server.port_of("port"))
        self.before_relay_port = Valve(run, self.relays.relay_port)

    def serve_somebody(self) -> float:
        """Be another client, which the relays serve; returns the seconds that it took.  Raises `OSError`."""
        data, began = self.run.random.randbytes(1 << 16), time.monotonic()
        with self.relays.connect() as end:
            end.sendall(data)
            end.shutdown(SHUT_WR)
            if read_all(end) != data:
                raise OSError("something else came back")
        return time.monotonic() - began

    def count_given_up(self) -> int:
        """How often the relays say that they gave up somebody for too many TLS messages."""
        relays = self.relays.server, self.relays.client
        return sum("again and again" in line for relay in relays for line in list(relay.lines))

    def gives_up_another(self, told: int) -> bool:
        """Whether they say so once more than they had `told`, in time."""
        with suppress(AssertionError):
            return bool(wait_until(lambda: self.count_given_up() > told))
        return False

    def connect(self, service: str, stack: ExitStack) -> TLSEnd:
        """A connection to the port of one of the other services."""
        sock = create_connection((HOST, self.relays.server.port_of(service)), PATIENCE)
        return stack.enter_context(TLSEnd(sock, EVERYWHERE.context(self.run.certificates, False), False))

    # Where a flood comes from

    def at_service_port(self, stack: ExitStack) -> Flooder:
        """A service client floods."""
        openssl = self._s_client(self.before_service_port, stack)
        return Flooder(openssl, self.before_service_port, self.arrivals.take(stack))

    def before_hello(self, stack: ExitStack) -> Flooder:
        """Somebody at the relay port floods instead of saying HELLO."""
        return Flooder(self._s_client(self.before_relay_port, stack), self.before_relay_port)

    def on_idle_link(self, stack: ExitStack) -> Flooder:
        """A relay client floods while its link is idle."""
        return Flooder(self._link(stack)[0], self.before_relay_port)

    def on_spliced_link(self, stack: ExitStack) -> Flooder:
        """A relay client floods while its link carries a connection."""
        openssl, link = self._link(stack)
        other = self.connect("link", stack)
        assert link.next().kind == START
        link.send(READY)
        return Flooder(openssl, self.before_relay_port, other, lambda data: encode_header(DATA, len(data)) + data)

    def behind_the_client(self, stack: ExitStack) -> Flooder:
        """A service floods."""
        path = self.run.certificates.path
        valve, port = self.before_service, free_port()
        words = "s_server", "-accept", f"{HOST}:{port}", "-naccept", "1"
        openssl = Openssl(self.run.directory, *words, "-cert", path("server.pem"), "-key", path("server.key"))
        stack.enter_context(openssl)
        wait_until(lambda: is_listening(port))
        valve.open(port)
        other = self.connect("service", stack)
        wait_until(lambda: openssl.count("NewSessionTicket") == 2)  # if typed before that, a line makes it hang
        return Flooder(openssl, valve, other)

    def _link(self, stack: ExitStack) -> tuple[Openssl, FakeClient]:
        """A link of another relay client, which is idle, and the openssl that speaks TLS for it."""
        screen, stdout = socketpair()
        stack.enter_context(screen)
        with stdout:
            openssl = self._s_client(self.before_relay_port, stack, stdout)
        link = TunnelledClient(openssl, screen)
        assert link.hello(token=TOKEN.encode(), service="link").kind == WELCOME
        return openssl, link

    def _s_client(self, valve: Valve, stack: ExitStack, stdout: socket | None = None) -> Openssl:
        valve.open()
        words = "s_client", "-connect", f"{HOST}:{valve.port}", "-quiet", "-no_ign_eof"
        openssl = stack.enter_context(Openssl(self.run.directory, *words, stdout=stdout))
        wait_until(lambda: openssl.count("Finished") == 1)
        return openssl


PLACES = (
    Flooded.at_service_port,
    Flooded.before_hello,
    Flooded.on_idle_link,
    Flooded.on_spliced_link,
    Flooded.behind_the_client,
)


@dataclass(frozen=True)
class Flooder:
    """A peer of a relay that sends KeyUpdates."""

    TALK: ClassVar[int] = 100
    """KeyUpdates between two lines of data."""

    openssl: Openssl
    valve: Valve
    """On its way to the relay; closed, nothing that the relay sends is read."""
    other: TLSEnd | None = None
    """The other end of the connection, where there is one."""
    frame: Callable[[bytes], bytes] = bytes
    """How data is sent to there."""

    def flood(self, key: bytes, count: int, reads: bool) -> bool:
        """Send so many KeyUpdates, and data in between where it has somewhere to go; returns whether the relay has
        put up with all that."""
        try:
            if self.other:
                self._talk(self.other, b"a line before the flood\n", reads)
            with ExitStack() as stack:
                if not reads:
                    self.valve.shut.set()
                    if self.other:
                        stack.enter_context(pushing(self.other))
                for number in range(1, count + 1):
                    self.openssl.keyboard.send(key + b"\n")
                    if self.other and number % self.TALK == 0:
                        self._talk(self.other, b"%d KeyUpdates\n" % number, reads)
        except TimeoutError:
            raise
        except OSError:
            return False
        return True

    def _talk(self, other: Any, line: bytes, reads: bool) -> None:
        """Send a line of data, which must arrive; back, too, unless what comes back is not read."""
        self.openssl.keyboard.send(self.frame(line))
        assert read_exactly(other, len(line)) == line
        if reads:
            other.sendall(line)


class Valve:
    """A way to a port through this process.  Once it is shut, what a relay sends on that way is not read any more."""

    def __init__(self, run: Run, port_behind: int = 0, relay_dials: bool = False) -> None:
        self.port_behind = port_behind
        self.shut = threading.Event()
        self._relay_dials = relay_dials
        self.port = run.peers.service(self._serve).port

    def open(self, port_behind: int = 0) -> None:
        """Let pass what the next connections carry, to another port than before if it is given."""
        self.shut.clear()
        self.port_behind = port_behind or self.port_behind

    def _serve(self, near: socket) -> None:
        near.settimeout(LONG)
        with create_connection((HOST, self.port_behind), LONG) as far:
            relay, peer = (near, far) if self._relay_dials else (far, near)
            from_relay = threading.Thread(target=self._pass_on, args=(relay, peer, self.shut))
            from_relay.start()
            self._pass_on(peer, relay, threading.Event())
            for sock in (relay, peer):
                ignore_oserror(sock.shutdown, SHUT_RDWR)
            from_relay.join()

    def _pass_on(self, source: socket, sink: socket, shut: threading.Event) -> None:
        with suppress(OSError):
            # openssl would wait for the rest of a record that has come in part: once shut, nothing passes.
            while (data := source.recv(65536)) and not shut.is_set():
                sink.sendall(data)
        if not shut.is_set():
            ignore_oserror(sink.shutdown, SHUT_RDWR)


class Openssl:
    """``openssl s_client`` or ``s_server`` with TLS 1.3, whose keyboard is a socket.

    The line "K" sends a KeyUpdate that asks for an answer, "k" one that does not, and other lines are data.
    """

    def __init__(self, directory: Path, *words: str, stdout: socket | None = None) -> None:
        self._messages = Path(tempfile.mkdtemp(dir=directory), "messages")
        # Each line is a packet: of several that it reads at once it would heed the first.
        self.keyboard, stdin = socketpair(AF_UNIX, SOCK_SEQPACKET)
        self.keyboard.settimeout(LONG)
        command = [find("openssl"), *words, "-tls1_3", "-msg", "-msgfile", str(self._messages)]
        screen = stdout.fileno() if stdout else subprocess.DEVNULL
        with stdin:
            self._process = subprocess.Popen(command, stdin=stdin.fileno(), stdout=screen, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Openssl:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.keyboard.close()

    def count(self, message: str) -> int:
        """How many TLS messages of that name it has sent, as it says itself."""
        messages = self._messages.read_text() if self._messages.exists() else ""
        return len(re.findall(f">>> .*{message}", messages))


class TunnelledClient(FakeClient):
    """A relay client's end of a link, for which openssl speaks TLS."""

    def __init__(self, openssl: Openssl, screen: socket) -> None:
        Link.__init__(self, Tunnel(openssl.keyboard, screen), CLIENT)


class Tunnel(Stream):
    """What is sent is typed in, a frame at a time (none begins like a command); what openssl shows is received."""

    def __init__(self, keyboard: socket, screen: socket) -> None:
        super().__init__(screen, "openssl")
        self._keyboard = keyboard

    def send(self, data: bytes | bytearray | memoryview, flags: int = 0) -> int:
        return self._keyboard.send(data)


FULL = 0.5
"""Seconds without a piece of 64 KiB after which a way counts as full."""


@contextmanager
def pushing(end: TLSEnd) -> Iterator[None]:
    """Send all that the way takes, which then is full; afterwards the connection is broken."""
    last = time.monotonic()

    def push() -> None:
        nonlocal last
        with suppress(OSError):
            while True:
                end.sendall(bytes(65536))
                last = time.monotonic()

    end.sock.settimeout(LONG)
    thread = threading.Thread(target=push)
    thread.start()
    try:
        wait_until(lambda: time.monotonic() - last > FULL)
        yield
    finally:
        ignore_oserror(end.sock.shutdown, SHUT_RDWR)
        thread.join()


def echo_and_end(end: Any) -> None:
    echo(end)
    end.shutdown(SHUT_WR)


# --- Kills ----------------------------------------------------------------------------------------------------

UP, DOWN, BOTH = (True, False), (False, True), (True, True)
"""Which end of a transfer sends: the service client, the service, or both."""
CUT = UP, UP, DOWN, DOWN, BOTH, BOTH
"""The transfers that each kill cuts."""
LATE = 10.0
"""Seconds after a kill within which every end must have seen an error."""


@case(17, "kills", 1200, over_wire=True)
def kills(run: Run) -> None:
    """A relay that is killed breaks its transfers off: nobody takes the part that has arrived for the whole."""
    count = run.scaled(200)
    for link in ("plain", "tls"):
        connections = Connections(run, Legs(link))
        with ThreadPoolExecutor(4 * len(CUT)) as threads:
            ends = [end for _ in range(count) for end in kill(connections, run.random, threads)]
        connections.close()
        run.tell(f"{link} links: kills", len(ends) / (2 * len(CUT)), least=count)
        in_the_middle = sum(end.part > 0 for end in ends)
        run.tell(f"{link} links: streams cut in the middle", in_the_middle, least=count * sum(map(sum, CUT)))
        run.tell(f"{link} links: clean ends on a part", sum(end.clean for end in ends), most=0, least=0)
        run.tell(f"{link} links: errors seen late", sum(end.seconds > LATE for end in ends), most=0, least=0)
        run.tell(f"{link} links: longest until an error was seen", max(end.seconds for end in ends), unit="s")


def kill(connections: Connections, chance: random.Random, threads: Executor) -> list[End]:
    """Kill a relay in the middle of transfers, and start it again; returns what the ends of the transfers saw."""
    relays, ends, using, killed = connections.relays, list[End](), list[Future[None]](), threading.Event()
    victim, restart = chance.choice(((relays.server, relays.start_server), (relays.client, relays.start_client)))
    amount = 1 << chance.randrange(23)
    with ExitStack() as stack:
        for sending in CUT:
            pair = stack.enter_context(connections.open(LONG))
            for sock, sends, expects in zip(pair, sending, reversed(sending), strict=True):
                stalls = chance.random() < 0.25
                ends.append(end := End(sock, expects * (1 if stalls else amount)))
                using.append(threads.submit(end.receive, killed if stalls else None))
                if sends:
                    using.append(threads.submit(end.send))
        try:
            wait_until(lambda: all(end.received >= end.awaited for end in ends), LONG)
            for end in ends:
                end.part = end.received
            began = time.monotonic()
            kill_family(victim)
        finally:
            killed.set()
            wait(using)
    for end in ends:
        end.seconds = end.over - began
    victim.close()  # its output, too: there will be hundreds
    restart()
    return ends


class End:
    """One end of a transfer that will be cut.  Who sends does so without end: whatever arrives is a part."""

    PIECE = bytes(65536)

    def __init__(self, sock: Any, awaited: int) -> None:
        sock.settimeout(3 * LATE)
        self._sock = sock
        self._ended = False
        self._errors: list[OSError] = []
        self.awaited = awaited
        """Bytes that are to arrive before the kill; none where the other end does not send."""
        self.received = 0
        self.part = 0
        """Bytes that had arrived when the relay was killed."""
        self.over = 0.0
        """When the last of its threads saw an error or an end."""
        self.seconds = 0.0
        """From the kill to that."""

    @property
    def clean(self) -> bool:
        """Whether it took the part that had arrived for the whole.

        The kernel tells of an RST once: where it told the sender (who gets EPIPE after a FIN), a receiver sees an end.
        """
        return self._ended and not any(isinstance(error, ConnectionResetError) for error in self._errors)

    def receive(self, stalled_until: threading.Event | None) -> None:
        """Receive to the end or an error; if it stalls, nothing after the first bytes before that event."""
        try:
            while data := self._sock.recv(65536):
                self.received += len(data)
                if stalled_until:
                    stalled_until.wait(LONG)
            self._ended = True
        except OSError as error:
            self._errors.append(error)
        self.over = time.monotonic()

    def send(self) -> None:
        try:
            while True:
                self._sock.sendall(self.PIECE)
        except OSError as error:
            self._errors.append(error)
        self.over = time.monotonic()


def kill_family(relay: RelayProcess) -> None:
    """SIGKILL for a relay and its worker processes."""
    for pid in find_family(relay.process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    relay.kill()
