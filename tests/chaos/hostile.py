"""Hostile input, silent peers and hijackers: nothing breaks, nobody else waits, and nobody gets in.

mutations   frames and TLS ClientHellos with something wrong in each, to the relay server from peers that have
            no token and from one that has it, and to a relay client from a relay server that is none
proxy-headers  PROXY protocol headers with something wrong, to the parser alone and to both ports
silent      floods of connections that say nothing, beside somebody who behaves well
access      a flood of connections from an address that may not connect, beside somebody who behaves well
hijack      whoever lacks what the relay server asks for, while service clients wait for a link with a canary
"""

from __future__ import annotations

import json
import queue
import random
import re
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

from _tcprelay.client.greeting import LINK_TIMEOUT
from _tcprelay.protocol import (
    ABORT, AUTH, BYE, CHALLENGE, CLIENT, DATA, END, FAIL, HELLO, MAX_CONTROL, PING, PONG, READY, REFUSED, START,
    WELCOME, encode_frame, encode_header, new_nonce, prove,
)  # fmt: skip
from _tcprelay.proxy_header import HeaderFault, HeaderParser, encode_proxy_header
from _tcprelay.server.greeting import HANDSHAKE_STEP, HANDSHAKE_TIMEOUT
from _tcprelay.server.limits import most_handshakes
from _tcprelay.system import from_descriptor_limit
from _tcprelay.tls import tls_fault

from ..certificates import Certificates, tls_context
from ..conftest import echo, wait_until
from ..peers import HOST, RelayProcess
from .relays import TOKEN, Legs, Relays, descriptors, memory, processor
from .relays import threads as count_threads
from .suite import Run, case

Address = tuple[str, int]
Context = ssl.SSLContext | None
Result = TypeVar("Result")
Job = TypeVar("Job")

CUT_AT, GIVEN_UP_AT = HANDSHAKE_TIMEOUT + 1.0, LINK_TIMEOUT + 1.0
"""Seconds after which a relay server, and a relay client, must have closed what is not a link yet."""
FLAT = 16.0
"""MiB that a relay may grow by in the second half of what is done to it."""
AT_ONCE = 8
"""Hostile conversations at once, beside those that are held open."""


class Peer:
    """Whoever speaks frames to a relay, with no more rules than an attacker keeps; a context manager."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(GIVEN_UP_AT + 1.0)
        self.name = "{}:{}".format(*sock.getsockname())
        """Its address, as the relay writes it."""
        self.heard = bytearray()
        """Everything that ever came."""
        self.said: list[bytes] = []
        """The frames that were said."""
        self.error: OSError | None = None
        """What ended it, where it was no end of the stream."""
        self._taken = 0

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, kind: int, **fields: object) -> None:
        self.said.append(encode_frame(kind, fields))
        self.sock.sendall(self.said[-1])

    def next(self) -> tuple[int, bytes]:
        """The next frame: its type and its body.  Raises `OSError`, `EOFError`."""
        header = self._take(4)
        return header[0], self._take(int.from_bytes(header[1:], "big"))

    def read(self, kind: int) -> dict[str, Any]:
        """The fields of the next frame, which has to be of this kind.  Raises `OSError`, `EOFError`."""
        found, body = self.next()
        if found != kind:
            raise EOFError(f"frame {found} instead of {kind}: {bytes(body)!r}")
        return dict(json.loads(body or b"{}"))

    def greet(self, token: str = "", service: str = "default", **more: object) -> None:
        """HELLO and, where it is asked for, AUTH; in vain if no WELCOME comes.  Raises `OSError`, `EOFError`."""
        nonce, client = new_nonce(), "peer"
        self.say(HELLO, version=1, service=service, client=client, nonce=nonce, token=bool(token), **more)
        if token:
            challenge = self.read(CHALLENGE)["nonce"]
            self.say(AUTH, proof=prove(token.encode(), CLIENT, nonce, challenge, service, client))

    def hear_out(self, until: bytes = b"") -> bool:
        """Hear everything up to the end, or up to these bytes; returns whether it ended as a stream should, not by
        an error.  Raises `TimeoutError`."""
        try:
            while not (until and until in self.heard):
                self._hear()
        except EOFError:
            return True
        except TimeoutError:
            raise
        except OSError as error:
            self.error = error
        return False

    def _take(self, count: int) -> bytes:
        while len(self.heard) < self._taken + count:
            self._hear()
        self._taken += count
        return bytes(self.heard[self._taken - count : self._taken])

    def _hear(self) -> None:
        try:
            piece = self.sock.recv(65536)
        except ssl.SSLError as error:
            if tls_fault(error) is error:
                raise
            piece = b""  # `ssl.SSLSocket` takes a cut for an end, but not in the Pythons where it cannot tell
        if not piece:
            raise EOFError("the end")
        self.heard += piece


def connect(address: Address, source: str = "", context: Context = None) -> Peer:
    """A peer at a relay's port, from a certain loopback address or any.  Raises `OSError`."""
    sock = socket.create_connection(address, CUT_AT, source_address=(source, 0) if source else None)
    try:
        return Peer(context.wrap_socket(sock) if context else sock)
    except BaseException:
        sock.close()
        raise


class Silent:
    """So many connections of one address that say a first word or nothing, held by one thread.

    With `renewing` those that the relay has closed are replaced, a round after the other.  A context manager; on
    the way out the relay has until its deadline to close those that are left.
    """

    ROUND = 64
    """How many are opened before it looks again."""

    def __init__(
        self,
        address: Address,
        count: int,
        source: str = "",
        first: Callable[[], bytes] = bytes,
        renewing: bool = False,
        finish: bool = True,
    ) -> None:
        self._address, self._count, self._source, self._first = address, count, source, first
        self.renewing = renewing
        self._finish = finish
        """Wait in the end until the relay has closed them; otherwise they are closed here."""
        self.opened = self.dropped = 0
        self.lasted: list[float] = []
        """The seconds that each one lasted which the relay has closed."""
        self._open: dict[int, tuple[socket.socket, float]] = {}
        self._epoll = select.epoll()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None]

    @property
    def left(self) -> int:
        return len(self._open)

    def renew(self, most: int) -> int:
        """Once the relay keeps `most` of them, or has had some seconds for that, go on with a round after the other
        as fast as it refuses them; returns how many it has kept."""
        wait_until(lambda: self.opened >= self._count, 60.0)
        with suppress(AssertionError):
            wait_until(lambda: self.left <= most, HANDSHAKE_TIMEOUT / 2)
        kept = self.left
        self._count, self.renewing = kept + 2 * self.ROUND, True  # it may come to keep a few more
        return kept

    def __enter__(self) -> Silent:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        with self._pool:
            self._running.result()
        for sock, _ in self._open.values():
            sock.close()
        self._epoll.close()

    def _run(self) -> None:
        while self.opened < self._count and not self._stop.is_set():
            self._add(self._count - self.opened)
        while not self._stop.is_set():
            self._note_ends()
            if self.renewing and self._count - len(self._open) >= min(self.ROUND, self._count):
                self._add(min(self.ROUND, self._count))
        last = time.monotonic() + CUT_AT
        while self._finish and self._open and time.monotonic() < last:
            self._note_ends()

    def _add(self, count: int) -> None:
        for number in range(count):
            if number % self.ROUND == 0:
                self._note_ends(0.0)
            if self._stop.is_set():
                return
            source = (self._source, 0) if self._source else None
            try:
                sock = socket.create_connection(self._address, 1.0, source_address=source)
            except ConnectionResetError:  # refused as soon as it was there
                self.opened += 1
                continue
            except OSError:  # the queue of the port is full: the next round tries again
                self.dropped += 1
                continue
            self.opened += 1
            self._open[sock.fileno()] = sock, time.monotonic()
            self._epoll.register(sock, select.EPOLLRDHUP)
            with suppress(OSError):
                sock.sendall(self._first())

    def _note_ends(self, timeout: float = 0.1) -> None:
        for number, _ in self._epoll.poll(timeout):
            sock, began = self._open.pop(number)
            self.lasted.append(time.monotonic() - began)
            self._epoll.unregister(sock)  # a process that is just being started may still have it open
            sock.close()


def each_half(
    run: Run, process: RelayProcess, what: str, jobs: list[Job], work: Callable[[Job], Result], at_once: int = AT_ONCE
) -> list[Result]:
    """Do all the jobs, some at once, and tell what the relay process has grown by in the second half of them."""
    middle = len(jobs) // 2
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(work, jobs[:middle]))
        before = memory(process)
        results += pool.map(work, jobs[middle:])
    run.tell(f"{what}: memory grows by", memory(process) - before, most=FLAT, unit="MiB")
    return results


# --- Mutations ------------------------------------------------------------------------------------------------

FRAMES = 1_000_000
HELLOS = 20_000
SHARES = {"without the token": 0.2, "with the token": 0.6, "to the client": 0.2}
"""Of the frames: most go where a conversation survives many of them."""

Spoken = tuple[int, bytes]
"""A frame's type and its body, as the protocol has it."""


@case(9, "mutations", 900)
def mutations(run: Run) -> None:
    sent = {
        "without the token": frames_without_token(run),
        "with the token": frames_with_token(run),
        "to the client": frames_to_client(run),
    }
    for who, count in sent.items():
        run.tell(f"frames {who}", count)
    run.tell("mutated frames", sum(sent.values()), least=run.scaled(FRAMES))
    hellos(run)


class Mutator:
    """Puts something wrong into each frame of a conversation; `harsh` is the share of what is a fault for certain
    or likely, the rest is odd and yet allowed, so that the conversation goes on."""

    STRANGE: tuple[object, ...] = (
        0, -0.0, 1e308, 5e-324, float("inf"), 10**3000, True, None, "", "\0", "\x1b[2J\n", "Ω" * 99, [[[[]]]],
        {"": {"": [{}]}},
    )  # fmt: skip
    """Values for keys that no frame knows."""
    BODIES = (
        b"[]", b"null", b'"', b"{", b"{}{}", b"\0", b"\xff\xfe{}", b'{"nonce":"\xc3\x28"}', b'{"a":NaN}',
        b'{"idle":-1}', b"[" * MAX_CONTROL, b"[" * 33 + b"]" * 33, b'{"a":' * 800, b'{"version":1e999}',
        b'{"version":' + b"9" * 4050 + b"}", b'{"heartbeat":NaN}', b'{"waiting":"1"}', b'{"nonce":{}}',
        b'{"proof":null}', b'{"proof":"\\ud800"}', b"9" * MAX_CONTROL, b"{}" + b" " * MAX_CONTROL,
    )  # fmt: skip
    """Bodies that no control frame should have."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def mutate(self, spoken: list[Spoken], harsh: float) -> list[bytes]:
        """The frames, each with a mutation."""
        frames: list[bytes] = []
        faults = self._flip, self._change_header, self._cut, self._join, self._fill, self._move
        for kind, body in spoken:
            if self._random.random() >= harsh:
                frames.append(self._oddly(kind, body))
                continue
            frames.append(encode_header(kind, len(body)) + body)
            self._random.choice(faults)(frames)
        return frames

    def _oddly(self, kind: int, body: bytes) -> bytes:
        """A frame that means something else, or the same in another way, and is allowed."""
        chance = self._random
        if kind == DATA:
            start = chance.randrange(len(body) + 1)
            body = body[start:] + chance.randbytes(chance.randint(1, 8)) + body[:start]
            return encode_header(kind, len(body)) + body
        items = [*json.loads(body or b"{}").items(), (f"x{chance.random()}", chance.choice(self.STRANGE))]
        chance.shuffle(items)
        text = json.dumps(dict(items), indent=chance.choice((None, 1)), ensure_ascii=chance.random() < 0.5)
        return encode_header(kind, len(text.encode())) + text.encode()

    def _flip(self, frames: list[bytes]) -> None:
        frames[-1] = flip_bits(frames[-1], self._random)

    def _change_header(self, frames: list[bytes]) -> None:
        kind, length, chance = frames[-1][0], len(frames[-1]) - 4, self._random
        if chance.random() < 0.5:
            kind = chance.randrange(256)
        else:
            length = chance.choice([0, max(0, length - 1), length + 1, MAX_CONTROL, MAX_CONTROL + 1, (1 << 24) - 1])
        frames[-1] = encode_header(kind, length) + frames[-1][4:]

    def _cut(self, frames: list[bytes]) -> None:
        frames[-1] = frames[-1][: self._random.randrange(1, len(frames[-1]))]

    def _join(self, frames: list[bytes]) -> None:
        """The front of one frame and the rear of another."""
        other, chance = self._random.choice(frames), self._random
        frames[-1] = frames[-1][: chance.randrange(1, len(frames[-1]))] + other[chance.randrange(len(other) + 1) :]

    def _fill(self, frames: list[bytes]) -> None:
        body = self._random.choice(self.BODIES)
        frames[-1] = encode_header(frames[-1][0], len(body)) + body

    def _move(self, frames: list[bytes]) -> None:
        """Repeat a frame, or let it come too early."""
        if self._random.random() < 0.5:
            frames.append(frames[-1])
        else:
            frames.insert(self._random.randrange(len(frames)), frames.pop())


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def say_in_json(kind: int, **fields: object) -> Spoken:
    return kind, encode_frame(kind, fields)[4:]


def client_speech(chance: random.Random, length: int) -> list[Spoken]:
    """What a relay client says on a link, from HELLO on, in so many frames; its proof is a guess."""
    names = {"service": "default", "client": "x", "name": "x", "nonce": chance.randbytes(16).hex()}
    hello = say_in_json(HELLO, version=1, idle=8, token=True, **names)
    auth = say_in_json(AUTH, proof=chance.randbytes(32).hex())
    pongs = [(PONG, b"")] * chance.randrange(3)
    return [hello, auth, *pongs, *connection_speech(chance, length)][:length]


def connection_speech(chance: random.Random, length: int) -> list[Spoken]:
    """What a relay client says of one connection, in so many frames: a whole answer, one broken off, or none."""
    ends = [(END, b"")] * 8 + [say_in_json(ABORT, reason="reset")]
    if length < 2 or chance.random() < 0.05:
        return [say_in_json(FAIL, reason="connection refused"), *((PONG, b"") for _ in range(length - 1))]
    data = [(DATA, chance.randbytes(chance.choice((1, 10, 100, 1000)))) for _ in range(length - 2)]
    return [(READY, b""), *data, chance.choice(ends)]


def server_speech(chance: random.Random, length: int) -> list[Spoken]:
    """What a relay server says on a link, in so many frames; its proof is a guess."""
    challenge = [say_in_json(CHALLENGE, nonce=chance.randbytes(16).hex())] * (chance.random() < 0.8)
    welcome = say_in_json(WELCOME, proof=chance.randbytes(32).hex(), heartbeat=1, address="[::]:1", waiting=3)
    start = say_in_json(START, id="5f1d02c7", client="192.0.2.7:50312", port="[::]:1", waiting=1)
    connection = [start, (DATA, b"hello"), (END, b"")] * length
    return [*challenge, welcome, (PING, b""), *connection][:length]


def meaning(said: bytes) -> tuple[bytes, bool, int]:
    """What a service client may be given at most of what was said on its link since START, whether it may be told
    that this is all, and after how many frames: another reading of docs/protocol.md than the relay's own."""
    answer, ready, position, count = b"", False, 0, 0
    while position + 4 <= len(said):
        kind, length = said[position], int.from_bytes(said[position + 1 : position + 4], "big")
        body = said[position + 4 : position + 4 + length]
        position += 4 + length
        if ready and kind == DATA:
            answer += body
        elif kind == READY and not ready:
            ready = True
        elif kind not in (PONG, BYE) or ready:
            return answer, ready and kind == END, count
        count += 1
    return answer, False, count


def seeds(run: Run, least: int) -> Iterator[tuple[int, int]]:
    """Seeds for conversations and how many frames each has, until these are `least` in all."""
    while least > 0:
        length = run.random.randint(2, 8)
        least -= length
        yield run.random.getrandbits(64), length


def frames_without_token(run: Run) -> int:
    """To a relay server that asks for a token, from peers that have none.  Returns the number of frames."""
    who = "without the token"
    server = run.peers.server("--token", TOKEN)
    address = HOST, server.relay_port

    def converse(job: tuple[int, int]) -> tuple[int, bool]:
        chance = random.Random(job[0])
        frames = Mutator(job[0]).mutate(client_speech(chance, job[1]), chance.choice((0.0, 0.1, 0.5, 1.0)))
        return len(frames), is_closed_after(address, b"".join(frames))

    jobs = list(seeds(run, run.scaled(FRAMES * SHARES[who])))
    half_a_hello = partial(encode_header, HELLO, 100)
    with Silent(address, run.scaled(200), first=half_a_hello, renewing=True) as silent:
        results = each_half(run, server, who, jobs, converse)
    tell_ends(run, who, sum(not closed for _, closed in results) + silent.left, silent.lasted)
    run.tell(f"{who}: links up", len(server.events("ClientUp")), most=0)
    return sum(count for count, _ in results)


def is_closed_after(address: Address, data: bytes) -> bool:
    """Say all this, and no more; whether the relay then closes the connection by its deadline."""
    with connect(address) as peer:
        try:
            peer.sock.sendall(data)
            peer.sock.shutdown(socket.SHUT_WR)
            peer.hear_out()
        except TimeoutError:
            return False
        except OSError:
            pass  # closed while it was still being said
        return True


def tell_ends(run: Run, who: str, left: int, lasted: Iterable[float], most: float = CUT_AT) -> None:
    run.tell(f"{who}: connections left open", left, most=0)
    run.tell(f"{who}: longest one that fell silent", max(lasted, default=0.0), most=most, unit="s")


@dataclass
class Outcome:
    """What one conversation on a link that is in the pool came to."""

    frames: int
    survived: int = 0
    """How many of them the link survived."""
    told: bool = False
    """The service client was told that its answer is whole."""
    promised: bool = False
    """Nothing in the conversation forbids that."""
    stray: int = 0
    """The service client has got other bytes than those said to it, or the end without END."""
    left: int = 0
    """Connections that the relay left open."""


def frames_with_token(run: Run) -> int:
    """To a relay server from a relay client in its pool, while a service client waits for its answer: it must get
    what was said to it, or an RST.  Returns the number of frames."""
    who = "with the token"
    names = [f"s{number}" for number in range(AT_ONCE)]  # one for each conversation, which must meet its own client
    words = [word for name in names for word in ("--service", f"{name}=0")]
    words += ["--pair-timeout", "0.5", "--heartbeat", "1"]
    server = run.peers.server("--token", TOKEN, *words)
    relay = HOST, server.relay_port
    free: queue.SimpleQueue[tuple[str, Address]] = queue.SimpleQueue()
    for name in names:
        free.put((name, (HOST, server.port_of(name))))

    def converse(job: tuple[int, int]) -> Outcome:
        service = free.get()
        try:
            return converse_in_pool(relay, *service, *job)
        finally:
            free.put(service)

    jobs = [(seed, 6 * length) for seed, length in seeds(run, run.scaled(FRAMES * SHARES[who] / 6))]
    outcomes = each_half(run, server, who, jobs, converse)
    run.tell(f"{who}: service clients with bytes or an end that nobody sent", sum(o.stray for o in outcomes), most=0)
    run.tell(f"{who}: connections left open", sum(outcome.left for outcome in outcomes), most=0)
    whole = sum(outcome.told for outcome in outcomes if outcome.promised)
    promised = sum(outcome.promised for outcome in outcomes)
    run.tell(f"{who}: odd but allowed answers that arrived whole, of {promised:,}", whole, least=promised)
    run.tell(f"{who}: conversations", len(outcomes))
    run.tell(f"{who}: frames before a fault", sum(outcome.survived for outcome in outcomes))
    return sum(outcome.frames for outcome in outcomes)


def converse_in_pool(relay: Address, name: str, port: Address, seed: int, length: int) -> Outcome:
    """One conversation: a link comes into the pool and says something mutated, with a service client or without."""
    chance = random.Random(seed)
    harsh = chance.choice((0.0, 0.01, 0.05, 0.2, 1.0))
    spoken = connection_speech(chance, length)
    frames = Mutator(seed).mutate(spoken, harsh)
    said = b"".join(frames)
    outcome = Outcome(len(frames), promised=harsh == 0.0 and spoken[-1][0] == END)
    with connect(relay) as link:
        link.greet(TOKEN, name, name=chance.choice(("\ud800\0\x1b", "Ω" * 200, "nas")))
        if chance.random() < 0.01:  # behind AUTH, before there is anybody to talk of
            outcome.promised = False
            with suppress(OSError):
                link.sock.sendall(said)
            outcome.left += not is_over(link)
            with connect(port) as client:
                outcome.left += not is_over(client)
                outcome.stray += bool(client.heard)
            return outcome
        link.read(WELCOME)
        with connect(port) as client:
            client.sock.sendall(b"?")
            client.sock.shutdown(socket.SHUT_WR)
            while link.next()[0] != END:  # START and what the service client has sent
                pass
            with suppress(OSError):
                link.sock.sendall(said)
                link.sock.shutdown(socket.SHUT_WR)
            try:
                outcome.told = client.hear_out()
            except TimeoutError:
                outcome.left += 1
            outcome.left += not is_over(link)
            answer, whole, outcome.survived = meaning(said)
            as_said = client.heard == answer and whole if outcome.told else answer.startswith(client.heard)
            outcome.stray += not as_said
            outcome.promised = outcome.promised and whole
    return outcome


def is_over(peer: Peer) -> bool:
    """Whether the relay ends this connection by its deadline."""
    try:
        peer.hear_out()
    except TimeoutError:
        return False
    return True


NO_BACKOFF = (
    "import sys, tcprelay; from _tcprelay.client import stock; assert stock.FIRST_BACKOFF;"
    "stock.FIRST_BACKOFF = 0.0; sys.exit(tcprelay.main(sys.argv[4:]))"
)
"""The relay client's command in a process that does not wait after failures."""


def frames_to_client(run: Run) -> int:
    """To a relay client that knows the token, from a relay server that does not.  Returns the number of frames."""
    who, dialled = "to the client", 4
    service = run.peers.service(echo)
    listener = run.stack.enter_context(socket.create_server((HOST, 0), backlog=64))
    listener.settimeout(GIVEN_UP_AT)
    words = ["--relay-host", HOST, "--relay-port", str(listener.getsockname()[1]), "--token", TOKEN]
    for number in range(dialled):  # each service tries for one link at a time
        words += ["--publish", f"s{number}={HOST}:{service.port}"]
    client = run.peers.relay_process("client", *words, wrapper=(sys.executable, "-c", NO_BACKOFF))

    def converse(job: tuple[int, int]) -> tuple[int, bool]:
        chance = random.Random(job[0])
        frames = Mutator(job[0]).mutate(server_speech(chance, job[1]), chance.choice((0.0, 0.1, 0.5, 1.0)))
        with Peer(listener.accept()[0]) as peer:
            try:
                peer.read(HELLO)
                peer.sock.sendall(b"".join(frames))
                peer.sock.shutdown(socket.SHUT_WR)
                peer.hear_out()
            except TimeoutError:
                return len(frames), False
            except OSError:
                pass  # closed while it was still being said
            return len(frames), True

    def fall_silent(_: int) -> tuple[bool, float]:
        with Peer(listener.accept()[0]) as peer:
            began = time.monotonic()
            peer.sock.sendall(encode_header(CHALLENGE, 100))
            return is_over(peer), time.monotonic() - began

    results = each_half(run, client, who, list(seeds(run, run.scaled(FRAMES * SHARES[who]))), converse, dialled)
    with ThreadPoolExecutor(dialled) as pool:
        silent = list(pool.map(fall_silent, range(dialled)))
    left = sum(not closed for _, closed in results) + sum(not closed for closed, _ in silent)
    tell_ends(run, who, left, (seconds for _, seconds in silent), GIVEN_UP_AT)
    run.tell(f"{who}: connections to its service", service.connections, most=0)
    return sum(count for count, _ in results)


def hellos(run: Run) -> None:
    """Cut and flipped ClientHellos, to a relay port and a service port; some of the cut ones fall silent.

    A relay client is there: with workers a service client's handshake waits until there is a link for it.
    """
    who, count = "ClientHellos", run.scaled(HELLOS)
    server = Relays(run, Legs("tls", port=True), run.peers.service(echo).port).server
    ports = [(HOST, server.relay_port), (HOST, server.service_port)]
    samples = [client_hello(version) for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3) for _ in range(50)]

    def cut(chance: random.Random) -> bytes:
        hello = chance.choice(samples)
        return hello[: chance.randrange(len(hello))]

    def converse(seed: int) -> bool:
        chance = random.Random(seed)
        hello = flip_bits(chance.choice(samples), chance) if seed % 2 else cut(chance)
        return is_closed_after(ports[seed // 2 % 2], hello)

    jobs = [run.random.getrandbits(64) // 4 * 4 + number % 4 for number in range(count)]
    first, at_once = partial(cut, random.Random(run.random.getrandbits(64))), run.scaled(250)
    with (
        Silent(ports[0], at_once, first=first, renewing=True) as links,
        Silent(ports[1], at_once, first=first, renewing=True) as clients,
    ):
        closed = each_half(run, server, who, jobs, converse)
    tell_ends(run, who, count - sum(closed) + links.left + clients.left, links.lasted + clients.lasted)
    run.tell(f"{who}: cut or flipped", count + links.opened + clients.opened, least=count)
    run.tell(f"{who}: connections", len(server.events("ConnectionOpened")), most=0)
    run.tell(f"{who}: relay clients beside the real one", len(server.events("ClientUp")) - 1, most=0)


def client_hello(version: ssl.TLSVersion) -> bytes:
    """The first message of a TLS handshake."""
    context, outgoing = tls_context(), ssl.MemoryBIO()
    context.maximum_version = version
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="relay.example.net").do_handshake()
    return outgoing.read()


# --- PROXY protocol headers -----------------------------------------------------------------------------------

HEADERS, SENT_HEADERS = 100_000, 2_000
"""Mutations that the parser reads alone, and those that are sent to a relay server."""
PROXY_HOST = "127.0.0.5"
"""The address of the proxy that the relay server believes."""

Verdict = tuple[int, str] | None
"""How many bytes a header has, and which source it names, "" for none; ``None`` where there is no right one."""


@case(9, "proxy-headers", 300)
def proxy_headers(run: Run) -> None:
    counts = Counter[str]()
    for _ in range(run.scaled(HEADERS)):
        data = mutate_header(random.Random(run.random.getrandbits(64)))
        expected, found = judge_header(data), parse_in_pieces(data, run.random)
        counts["right ones among them"] += expected is not None
        counts["accepted, or understood, as they should not be"] += found is not None and found != expected
        counts["refused, though they are right"] += found is None and expected is not None
        if found != expected:
            run.say(f"{data!r}: {found} instead of {expected}")
    run.tell("mutated headers", run.scaled(HEADERS), least=run.scaled(HEADERS))
    run.tell("right ones among them", counts["right ones among them"], least=1)
    for what in ("accepted, or understood, as they should not be", "refused, though they are right"):
        run.tell(what, counts[what], most=0)
    send_headers(run)


def send_headers(run: Run) -> None:
    """To both ports of a relay server, from the proxy that it believes."""
    who = "sent headers"
    server = run.peers.server("--token", TOKEN, "--accept-proxy-protocol", PROXY_HOST)
    run.peers.client(server.relay_port, run.peers.service(echo).port, "--token", TOKEN)
    ports = (HOST, server.service_port), (HOST, server.relay_port)

    def converse(seed: int) -> tuple[bool, bool, bool]:
        """Whether it was closed in time, whether it was served, and whether that is as it should be."""
        chance = random.Random(seed)
        data = mutate_header(chance)
        verdict, port = judge_header(data), ports[seed % 2]
        with connect(port, PROXY_HOST) as peer:
            try:
                for piece in in_pieces(data, chance):
                    peer.sock.sendall(piece)
                peer.sock.shutdown(socket.SHUT_WR)
                peer.hear_out()
            except TimeoutError:
                return False, bool(peer.heard), False
            except OSError:
                pass  # closed while it was still being said
            if port is ports[1]:  # a header alone makes no link
                return True, False, peer.heard[:1] in (b"", bytes([REFUSED]))
            return True, bool(peer.heard), peer.heard == (data[verdict[0] :] if verdict else b"")

    jobs = [run.random.getrandbits(64) // 2 * 2 + number % 2 for number in range(run.scaled(SENT_HEADERS))]
    results = each_half(run, server, who, jobs, converse)
    run.tell(f"{who}: connections left open", sum(not closed for closed, _, _ in results), most=0)
    run.tell(f"{who}: served", sum(served for _, served, _ in results), least=1)
    run.tell(f"{who}: with another answer than they should have", sum(not right for _, _, right in results), most=0)
    run.tell(f"{who}: relay clients beside the real one", len(server.events("ClientUp")) - 1, most=0)
    with connect(ports[0], FLOODER) as peer:
        peer.sock.sendall(b"?")
        peer.sock.shutdown(socket.SHUT_WR)
        run.tell(f"{who}: somebody else is served in the end", peer.hear_out() and peer.heard == b"?", least=1)


def right_header(chance: random.Random) -> bytes:
    """One that a proxy could send, of either version."""
    hosts = [f"{chance.randrange(256)}.0.{chance.randrange(256)}.7", f"[2001:db8::{chance.randrange(1, 65536):x}]", "x"]
    near, far = (f"{chance.choice(hosts)}:{chance.randrange(65536)}" for _ in range(2))
    header = encode_proxy_header(chance.choice((1, 2)), near, far)
    if header[:1] == b"P" or chance.random() < 0.5:
        return header
    rest = header[16:] + b"\x04" + len(tail := chance.randbytes(chance.randrange(300))).to_bytes(2, "big") + tail
    return header[:14] + len(rest).to_bytes(2, "big") + rest


def mutate_header(chance: random.Random) -> bytes:
    """A header with something wrong, or with nothing wrong by chance, and what comes behind it."""
    header = right_header(chance)
    start, end = sorted(chance.randrange(len(header) + 1) for _ in range(2))
    kind = chance.randrange(8)
    if kind == 0:
        header = flip_bits(header, chance)
    elif kind == 1:
        header = header[:start]
    elif kind == 2:
        header = header[:start] + header[end:]
    elif kind == 3:
        header = header[:end] + header[start:]
    elif kind == 4:
        header = header[:start] + right_header(chance)[end:]
    elif kind == 5:
        odd = (b" ", b"\r", b"\n", b"0", b"\0", b":", b"%1", b"/8", b"+", b"-", b"_", b"\xd9\xa1", b"x" * 90)
        header = header[:start] + chance.choice(odd) + header[start:]
    elif kind == 6 and len(header) > 15:
        place = chance.randrange(12, 16)
        header = header[:place] + bytes([chance.randrange(256)]) + header[place + 1 :]
    return header + chance.choice((b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", chance.randbytes(20)))


def in_pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    most = chance.choice((1, 5, 9999))
    while data:
        count = chance.randint(1, most)
        yield data[:count]
        data = data[count:]


def parse_in_pieces(data: bytes, chance: random.Random) -> Verdict:
    """What the relay's own parser says, which gets a piece after the other as it wants more."""
    parser = HeaderParser()
    try:
        for piece in in_pieces(data, chance):
            taken = parser.feed(piece)
            if parser.is_whole:
                return parser.count, parser.source[0] if parser.source else ""
            if taken != len(piece):
                return -1, "it leaves bytes of what is not whole"
    except HeaderFault:
        pass
    return None


def judge_header(data: bytes) -> Verdict:
    """Another reading of HAProxy's specification than the relay's own."""
    if line := re.match(rb"PROXY UNKNOWN(?: [\0-\x09\x0b\x0c\x0e-\x7f]*)?\r\n", data):
        return (line.end(), "") if line.end() <= 107 else None
    port = rb"(?:0|[1-9]\d{0,4})"
    if line := re.match(rb"PROXY TCP([46]) ([\da-fA-F.:]+) ([\da-fA-F.:]+) (%b) (%b)\r\n" % (port, port), data):
        family = socket.AF_INET if line[1] == b"4" else socket.AF_INET6
        try:
            source, _ = (socket.inet_pton(family, line[number].decode()) for number in (2, 3))
        except OSError:
            return None
        right = line.end() <= 107 and max(int(line[4]), int(line[5])) < 65536
        return (line.end(), say_source(source)) if right else None
    if data[:12] != b"\r\n\r\n\0\r\nQUIT\n" or len(data) < 16 or data[12] not in (0x20, 0x21):
        return None
    length = int.from_bytes(data[14:16], "big")
    if length > 4096 or len(data) < 16 + length:
        return None
    needs = {0: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}
    if data[12] == 0x20 or not needs.get(data[13], 1):
        return 16 + length, ""
    if length < needs.get(data[13], 1 << 16):
        return None
    size = {0x11: 4, 0x21: 16}.get(data[13], 0)
    return 16 + length, say_source(data[16 : 16 + size]) if size else ""


def say_source(packed: bytes) -> str:
    """An address as the relay shows it."""
    if packed[:-4] == b"\0" * 10 + b"\xff\xff":
        packed = packed[-4:]
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


# --- Silent peers ---------------------------------------------------------------------------------------------

FLOODER, WELL_BEHAVED, DRIPPER = "127.0.0.2", "127.0.0.3", "127.0.0.4"
SILENT = 2_000
MOST_CLIENTS, MOST_LINKS = 32, 96
"""Of an address.  The relay client's needs links for the flood's connections, too, which are as good as any."""
PACE = 0.02
"""Seconds between two requests of who behaves well: enough for a p99, and no load by itself."""


@case(10, "silent", 240)
def silent(run: Run) -> None:
    hold_still(run, "plain", Legs(), MOST_LINKS)
    hold_still(run, "TLS", Legs("tls", port=True), MOST_LINKS)
    hold_still(run, "no limit to links", Legs(), 0)


def hold_still(run: Run, name: str, legs: Legs, most_links: int) -> None:
    """Flood both ports of a relay, and renew the floods, while others drip and somebody behaves well."""
    limits = ("--max-per-address", str(MOST_CLIENTS), "--max-links-per-address", str(most_links))
    relays = Relays(run, legs, run.peers.service(echo).port, server=("--service", "probe=0", *limits))
    relay, port = (HOST, relays.relay_port), (HOST, relays.service_port)
    context, count = legs.context(run.certificates, False) if legs.has_tls else None, run.scaled(SILENT, least=400)
    calm = run.scaled(500, least=50)
    with (
        steady(partial(request, port, context)) as requests,
        steady(partial(new_link, relay, context)) as links,
        Silent(relay, count, FLOODER, finish=False) as at_relay,
        Silent(port, count, FLOODER, finish=False) as at_port,
        ThreadPoolExecutor(8) as dripping,
    ):
        for where, flood, most in (
            ("relay", at_relay, most_links or most_handshakes(from_descriptor_limit())),
            ("service", at_port, MOST_CLIENTS),
        ):
            run.tell(f"{name}: silent ones that the {where} port keeps", flood.renew(most), most=most)
        word = client_hello(ssl.TLSVersion.TLSv1_3) if legs.has_tls else encode_header(HELLO, 200) + b" " * 200
        cuts = [dripping.submit(drip, address, word) for address in ([relay, port] if legs.has_tls else [relay]) * 4]
        lasted = [one.result() for one in cuts]
        links.until(calm)
        requests.until(calm)
        began = time.monotonic()
        relays.start_client()
        run.tell(f"{name}: a fresh relay client is published after", time.monotonic() - began, most=10.0, unit="s")
    for where, flood in (("relay", at_relay), ("service", at_port)):
        run.tell(f"{name}: silent at the {where} port", flood.opened, least=count)
        run.tell(f"{name}: too many for its queue, which were not accepted in a second", flood.dropped)
    for what, good in (("requests", requests), ("new links", links)):
        run.tell(f"{name}: {what} beside them", good.count, least=calm)
        run.tell(f"{name}: {what} that failed", len(good.failures), most=0)
        run.tell(f"{name}: {what}, p99", good.percentile(0.99), most=1.0, unit="s")
        run.tell(f"{name}: {what}, slowest", good.percentile(1.0), unit="s")
        for failure in good.failures[:3]:
            run.say(f"{what}: {failure!r}")
    run.tell(f"{name}: the first of who drips is cut after", min(lasted), least=HANDSHAKE_STEP - 1.0, unit="s")
    run.tell(f"{name}: the last of who drips is cut after", max(lasted), most=HANDSHAKE_STEP + 1.0, unit="s")


class Steady:
    """Somebody who behaves well: does one thing after another, at a steady pace."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._seconds: list[float] = []
        self.failures: list[Exception] = []
        self._condition = threading.Condition()  # over `count`
        self.count = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(PACE):
            began = time.monotonic()
            try:
                self._act()
            except (OSError, EOFError) as error:
                self.failures.append(error)
            self._seconds.append(time.monotonic() - began)
            with self._condition:
                self.count += 1
                self._condition.notify_all()

    def until(self, count: int) -> None:
        """Wait until it has done so much, a minute at most."""
        with self._condition:
            self._condition.wait_for(lambda: self.count >= count, 60.0)

    def percentile(self, share: float) -> float:
        return sorted(self._seconds)[round(share * (len(self._seconds) - 1))]


@contextmanager
def steady(act: Callable[[], None]) -> Iterator[Steady]:
    somebody = Steady(act)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(somebody.run)
        try:
            yield somebody
        finally:
            somebody.stop.set()
        running.result()


def request(port: Address, context: Context) -> None:
    """Ask the echo behind the relay.  Raises `OSError`, `EOFError` where there is no answer."""
    with connect(port, WELL_BEHAVED, context) as peer:
        peer.sock.sendall(encode_frame(PING))
        peer.next()


def new_link(relay: Address, context: Context) -> None:
    """Bring a link into the pool, and give it up.  Raises `OSError`, `EOFError` where it is not taken."""
    with connect(relay, WELL_BEHAVED, context) as peer:
        peer.greet(TOKEN, "probe")
        peer.read(WELCOME)
        peer.say(BYE)
        peer.hear_out()


def drip(address: Address, word: bytes) -> float:
    """Say a byte a second; returns the seconds until the relay cuts it."""
    began = time.monotonic()
    with connect(address, DRIPPER) as peer:
        peer.sock.settimeout(1.0)  # the pace
        for byte in word[:30]:
            try:
                peer.sock.sendall(bytes([byte]))
                peer.hear_out()
                break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.monotonic() - began


# --- Access lists ---------------------------------------------------------------------------------------------

DENIED, BURST = 20_000, 100
"""Connections of the flood, and how many of them come at once."""
NETWORKS = 1_000
"""Of several lengths, in the deny file."""
SERVED = 2_000


@case(26, "access", 240)
def access(run: Run) -> None:
    """Who is in the deny file floods the service port, alone and beside somebody who behaves well."""
    path, count = run.directory / "denied", run.scaled(DENIED, least=2000)
    networks = [f"10.{number >> 8}.{number & 255}.0/{22 + number % 11}" for number in range(NETWORKS - 1)]
    path.write_text("\n".join([*networks, FLOODER]))
    relays = Relays(run, Legs(), run.peers.service(echo).port, server=("--deny-file", str(path)))
    server, port = relays.server, (HOST, relays.service_port)
    used, served = processor(server), run.scaled(SERVED, least=200)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one in [pool.submit(request, port, None) for _ in range(served)]:
            one.result()
    each_served = (processor(server) - used) / served
    before, used = (count_threads(server), descriptors(server)), processor(server)
    knock(port, count)
    each_refused = (processor(server) - used) / count
    after = count_threads(server), descriptors(server)
    with ThreadPoolExecutor(1) as pool:
        flood = pool.submit(knock, port, count)
        with steady(partial(request, port, None)) as requests:
            flood.result()
            requests.until(run.scaled(200, least=50))
    run.tell("processor time of a served connection", 1e6 * each_served, unit="µs")
    run.tell("processor time of a refused one", 1e6 * each_refused, unit="µs")
    run.tell("the second divided by the first", each_refused / each_served, most=0.1)
    run.tell("threads beside those before", after[0] - before[0], most=0)
    run.tell("descriptors beside those before", after[1] - before[1], most=0)
    run.tell("requests beside them", requests.count, least=50)
    run.tell("requests that failed", len(requests.failures), most=0)
    run.tell("requests, p99", requests.percentile(0.99), most=1.0, unit="s")
    run.tell("log lines of refused connections", len(server.events("ConnectionFailed")), least=10)


def knock(port: Address, count: int) -> None:
    """Connect so many times from the address that may not.  Raises `AssertionError` where a connection lives."""
    for _ in range(count // BURST):
        with ExitStack() as stack:
            burst = [stack.enter_context(socket.socket()) for _ in range(BURST)]
            for sock in burst:
                sock.bind((FLOODER, 0))
                sock.setblocking(False)
            for sock in burst:
                sock.connect_ex(port)
            for sock in burst:
                sock.settimeout(CUT_AT)
                with suppress(ConnectionResetError):
                    sock.recv(1)
                    raise AssertionError("it was not reset")


# --- Hijackers ------------------------------------------------------------------------------------------------

ATTEMPTS = 10_000
SILENT_ATTEMPTS = 50
"""Attempts on each server that wait for what comes until they are cut."""
CANARY = b"a canary for whoever has the link"
CONTROLS = 2
"""Links of who does belong, before and after the attempts: they do get the canary."""

Speech = Callable[[Peer], object]
"""Goes as far as it gets; whoever called it hears the rest."""


@case(11, "hijack", 240)
def hijack(run: Run) -> None:
    targets = [token_target(run), auth_target(run), both_target(run)]
    if outside := outside_address():
        targets.append(protected_target(run, outside))
    else:
        run.say("this host has no address beside loopback: protected mode is not tried")
    for target in targets:
        attack(run, target, run.scaled(ATTEMPTS / len(targets), least=4 * len(target.attempts)))


@dataclass(frozen=True)
class Attempt:
    """One way to become a relay client."""

    speak: Speech
    refused: str = ""
    """The code in REFUSED; ``tls`` also where TLS itself fails; "" where there is no word."""
    context: Context = None
    source: str = ""


@dataclass(frozen=True)
class Target:
    """A relay server, what is tried to become its relay client, and how it is done rightly."""

    name: str
    server: RelayProcess
    host: str
    attempts: dict[str, Attempt]
    silent: Attempt
    """One that ends by the time-out, where the server has one for it."""
    right: Attempt
    members: set[str]
    """The addresses of those who belong there."""


def attack(run: Run, target: Target, count: int) -> None:
    """Make so many attempts while service clients wait for a link; tell what came of them."""
    ways = list(islice(cycle(target.attempts.items()), count))
    with canaries((target.host, target.server.service_port)):
        heard = [join(target) for _ in range(CONTROLS)]
        silent = [begin(target, target.silent) for _ in range(min(SILENT_ATTEMPTS, count // 10))]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ends = list(pool.map(lambda way: attempt(target, way[1]), ways))
        ends += map(hear_end, silent)
        heard += [join(target) for _ in range(CONTROLS)]
    ways += [("silent", target.silent)] * len(silent)
    otherwise = Counter(
        f"{name} ended with {end or 'no word'}"
        for (name, way), (_, end) in zip(ways, ends, strict=True)
        if end != way.refused
    )
    for what, times in otherwise.most_common(5):
        run.say(f"{target.name}: {what}, {times} times")
    strangers = [event for event in target.server.events("LinkUp") if event["peer"] not in target.members]
    run.tell(f"{target.name}: attempts", len(ends), least=count)
    run.tell(f"{target.name}: attackers in the pool", len(strangers), most=0)
    run.tell(f"{target.name}: attackers who heard the canary", sum(CANARY in heard for heard, _ in ends), most=0)
    run.tell(f"{target.name}: refused otherwise than they should be", sum(otherwise.values()), most=0)
    run.tell(f"{target.name}: members who heard it", sum(CANARY in one for one in heard), least=2 * CONTROLS)


def begin(target: Target, way: Attempt) -> Peer:
    """Go as far as this way leads.  Raises `OSError`, `EOFError` where the relay ends it before."""
    peer = connect(address_of(target), way.source, way.context)
    try:
        way.speak(peer)
    except (OSError, EOFError) as error:
        peer.error = error if isinstance(error, OSError) else None
    return peer


def hear_end(peer: Peer) -> tuple[bytes, str]:
    """What somebody hears, and how it ends: the code in REFUSED, ``tls``, or ""."""
    with peer, suppress(TimeoutError):
        if not peer.error:
            peer.hear_out(CANARY)
    return bytes(peer.heard), "tls" if isinstance(peer.error, ssl.SSLError) else code_in(bytes(peer.heard))


def attempt(target: Target, way: Attempt) -> tuple[bytes, str]:
    """What somebody hears who tries it this way, and how it ends."""
    try:
        return hear_end(begin(target, way))
    except ssl.SSLError:  # no handshake
        return b"", "tls"


def join(target: Target) -> bytes:
    """What somebody hears who belongs there."""
    with connect(address_of(target), target.right.source, target.right.context) as peer:
        target.right.speak(peer)
        peer.read(WELCOME)
        target.members.add(peer.name)
        peer.hear_out(CANARY)
    target.server.wait_event("LinkUp", peer=peer.name)
    return bytes(peer.heard)


def code_in(heard: bytes) -> str:
    """The code in the REFUSED among these frames."""
    while len(heard) >= 4:
        kind, length = heard[0], int.from_bytes(heard[1:4], "big")
        if kind == REFUSED:
            return str(json.loads(heard[4 : 4 + length])["code"])
        heard = heard[4 + length :]
    return ""


def address_of(target: Target) -> Address:
    return target.host, target.server.relay_port


@contextmanager
def canaries(port: Address) -> Iterator[None]:
    """Two service clients that send the canary and wait for a link, again and again."""
    stop = threading.Event()

    def sing() -> None:
        while not stop.is_set():
            with suppress(OSError), connect(port) as client:
                client.sock.settimeout(0.5)
                client.sock.sendall(CANARY)
                while not stop.is_set():
                    with suppress(TimeoutError):
                        if not client.sock.recv(1):
                            break

    with ThreadPoolExecutor(2) as pool:
        singing = [pool.submit(sing) for _ in range(2)]
        try:
            yield
        finally:
            stop.set()
        for one in singing:
            one.result()


# What is tried


def claim_welcome(peer: Peer) -> None:
    """Say what only the relay server may say, and then what a link in the pool would say."""
    peer.say(WELCOME, proof="0" * 64, heartbeat=15)
    peer.say(READY)


def say_hello(peer: Peer, nonce: str = "") -> None:
    peer.say(HELLO, version=1, service="default", client="peer", nonce=nonce or new_nonce())


def show_no_proof(peer: Peer) -> None:
    say_hello(peer)
    peer.read(CHALLENGE)
    peer.say(AUTH)


def replay(record: list[bytes], peer: Peer) -> None:
    """HELLO and AUTH of somebody who got in."""
    for frame in record:
        peer.sock.sendall(frame)


def steal(nonce: str, peer: Peer) -> None:
    """HELLO with a nonce that was handed out to a member, and no proof for it; AUTH where that is used already."""
    peer.say(HELLO, version=1, service="default", client="peer", nonce=new_nonce(), server_nonce=nonce, proof="0" * 64)
    peer.say(AUTH, proof="0" * 64)


def reflect(relay: Address, context: Context, peer: Peer) -> None:
    """Let the relay server answer its own challenge, on another link."""
    say_hello(peer)
    challenge = peer.read(CHALLENGE)["nonce"]
    with connect(relay, context=context) as other:
        say_hello(other, challenge)
        second = other.read(CHALLENGE)["nonce"]
        other.say(CHALLENGE, nonce=challenge)
        _, answer = other.next()
    peer.say(AUTH, proof=json.loads(answer).get("proof", second))


def hear_record(
    relay: Address, members: set[str], token: str, context: Context = None, **more: object
) -> tuple[list[bytes], list[str]]:
    """What a member says to get in, and the nonces that it is given."""
    with connect(relay, context=context) as member:
        members.add(member.name)
        member.greet(token, **more)  # type: ignore[arg-type]
        nonces: list[str] = member.read(WELCOME)["nonces"]
        record = list(member.said)
        member.say(BYE)
        member.hear_out()
    return record, nonces


def token_attempts(relay: Address, members: set[str], context: Context = None) -> dict[str, Attempt]:
    """By those who do not know the token; a member's handshake is recorded for them."""
    record, nonces = hear_record(relay, members, TOKEN, context)
    with connect(relay, context=context) as member:
        members.add(member.name)
        own = new_nonce()
        proof = prove(TOKEN.encode(), CLIENT, own, nonces[0], "default", "peer")
        member.say(HELLO, version=1, service="default", client="peer", nonce=own, server_nonce=nonces[0], proof=proof)
        member.read(WELCOME)
        short_record = [*member.said, encode_frame(AUTH, {"proof": proof})]
        member.say(BYE)
        member.hear_out()
    ways: dict[str, tuple[Speech, str]] = {
        "no token": (show_no_proof, "token"),
        "wrong token": (lambda peer: peer.greet("another-token"), "token"),
        "replayed AUTH": (partial(replay, record), "token"),
        "replayed HELLO": (partial(replay, short_record), "token"),
        "a nonce of another's": (lambda peer: steal(nonces[1], peer), "token"),
        "reflected challenge": (partial(reflect, relay, context), "token"),
        "claimed WELCOME": (claim_welcome, "protocol"),
    }
    return {name: Attempt(speak, refused, context) for name, (speak, refused) in ways.items()}


VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def certificate_attempts(certificates: Certificates, token: str) -> dict[str, Attempt]:
    """By those who have no certificate that counts, but the token where there is one."""
    found = {"plain": Attempt(lambda peer: peer.greet(token), "tls")}
    for version in VERSIONS:
        for name in ("", "expired", "foreign"):
            context = member_context(certificates, name, version)
            what = f"{name or 'no'} certificate, TLS {version}"
            found[what] = Attempt(lambda peer: peer.greet(token), "tls", context)
    return found


def member_context(certificates: Certificates, name: str, version: str) -> ssl.SSLContext:
    """Of a relay client with this certificate, or none."""
    own = (certificates.path(f"{name}.pem"), certificates.path(f"{name}.key")) if name else ("", "")
    context = tls_context(False, *own, ca=certificates.path("ca.pem"))
    context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


# Who is attacked


def start_target(run: Run, *options: str, host: str = HOST) -> RelayProcess:
    words = ("--relay-port", "0", "--service-port", "0", "--hostname", host, "--log-level", "debug")
    return run.peers.relay_process("server", *words, *options)


def token_target(run: Run) -> Target:
    server, members = start_target(run, "--token", TOKEN), set[str]()
    attempts = token_attempts((HOST, server.relay_port), members)
    right = Attempt(lambda peer: peer.greet(TOKEN))
    return Target("token", server, HOST, attempts, Attempt(say_hello, "timeout"), right, members)


def auth_words(certificates: Certificates) -> list[str]:
    path = certificates.path
    return ["--auth", "--ca-file", path("ca.pem"), "--cert", path("server.pem"), "--key", path("server.key")]


def auth_target(run: Run) -> Target:
    server = start_target(run, *auth_words(run.certificates))
    attempts = certificate_attempts(run.certificates, "")
    right = Attempt(Peer.greet, context=member_context(run.certificates, "client", "1.3"))
    return Target("--auth", server, HOST, attempts, Attempt(lambda peer: None), right, set())


def both_target(run: Run) -> Target:
    """Each attempt has one of the two right."""
    server, members = start_target(run, "--token", TOKEN, *auth_words(run.certificates)), set[str]()
    attempts = certificate_attempts(run.certificates, TOKEN)
    for version in VERSIONS:
        context = member_context(run.certificates, "client", version)
        found = token_attempts((HOST, server.relay_port), members, context)
        attempts |= {f"{name}, TLS {version}": way for name, way in found.items()}
    right = Attempt(lambda peer: peer.greet(TOKEN), context=context)
    return Target("token and --auth", server, HOST, attempts, Attempt(say_hello, "timeout", context), right, members)


def protected_target(run: Run, host: str) -> Target:
    """Without token and certificates: from an address that is not loopback."""
    server = start_target(run, host=host)
    ways: dict[str, Speech] = {"no token": Peer.greet, "a token": lambda peer: peer.greet(TOKEN)}
    ways["claimed WELCOME"] = claim_welcome
    attempts = {name: Attempt(speak, "protected", source=host) for name, speak in ways.items()}
    silent = Attempt(lambda peer: None, "protected", source=host)
    return Target("protected mode", server, host, attempts, silent, Attempt(Peer.greet, source=HOST), set())


def outside_address() -> str:
    """An address of this host that is not loopback; "" for none.  What is sent to it does not leave the host."""
    done = subprocess.run(["ip", "-j", "-4", "addr", "show", "scope", "global"], capture_output=True, timeout=10)
    found = [one["local"] for card in json.loads(done.stdout or b"[]") for one in card.get("addr_info", ())]
    return found[0] if found else ""
