"""Dialling: which addresses are tried, for how long, and when a name is looked up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from _tcprelay.addresses import Endpoint
from _tcprelay.names import Addresses
from _tcprelay.sockets import EPHEMERAL_PORTS, Dialer, Race, connected_to_itself, in_turns
from _tcprelay.tcp import NEAR_BUFFER, NEAR_SEGMENT, UNSENT
from _tcprelay.text import say_error
from _tcprelay.waiting import Stop, Stopping

from .conftest import PATIENCE, Bench, replace, unused_port, wait_until


class Names:
    """Stands in for the system's resolver, counts what it is asked, and can be silent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: Addresses = []
        self.asked = 0
        self.answering = threading.Event()
        self.answering.set()
        replace(monkeypatch, "resolve", self._resolve)

    def _resolve(self, host: str, port: int) -> Addresses:
        answering = self.answering
        self.asked += 1
        assert answering.wait(2 * PATIENCE)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, f"cannot look up {host}: the name server does not answer")
        return self.addresses


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    names = Names(monkeypatch)
    yield names
    names.answering.set()


def at(port: int, host: str = "127.0.0.1") -> Addresses:
    return [(socket.AF_INET, (host, port))]


def make_old(dialer: Dialer) -> None:
    """Have what the dialer knows be old, so that it asks again."""
    wait_until(lambda: not dialer._name._asking)
    dialer._name._due = 0.0


def test_a_name_is_looked_up_once(bench: Bench, names: Names) -> None:
    """And again, beside, when what is known is old."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(bench.service().port)
    for _ in range(3):
        dialer.dial().close()
    assert names.asked == 1
    make_old(dialer)
    dialer.dial().close()
    wait_until(lambda: names.asked == 2)


def test_what_has_moved_is_looked_up_again(bench: Bench, names: Names) -> None:
    """A service at a new address is reached by the very call that finds the old one dead."""
    dialer = Dialer(Endpoint("service.example", 1))
    first = bench.service()
    names.addresses = at(first.port)
    dialer.dial().close()
    first.close()
    names.addresses = at(bench.service().port)
    dialer.dial().close()
    assert names.asked == 2


def test_what_is_down_fails_with_its_own_error(names: Names) -> None:
    """A service that is down is refused, not looked up for ever."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(unused_port())
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            dialer.dial()
    assert names.asked == 2


def test_a_resolver_that_fails_is_asked_again(bench: Bench, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not by each of many connections: the failure is remembered for a while."""
    dialer = Dialer(Endpoint("service.example", 1))
    for _ in range(3):
        with pytest.raises(socket.gaierror, match=r"cannot look up service.example: the name server does not answer"):
            dialer.dial()
    assert names.asked == 1
    names.addresses = at(bench.service().port)
    make_old(dialer)
    dialer.dial().close()
    assert names.asked == 2


def test_a_silent_name_server_takes_nothing_away(bench: Bench, names: Names) -> None:
    """What is known is used at once while the name server is asked, by one look-up for all."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(bench.service().port)
    dialer.dial().close()
    make_old(dialer)
    names.answering.clear()
    began = time.monotonic()
    for _ in range(20):
        dialer.dial().close()
    assert time.monotonic() - began < 2
    wait_until(lambda: names.asked == 2)
    assert dialer._name._asking


def test_a_name_server_that_fails_takes_nothing_away(bench: Bench, names: Names) -> None:
    """What is known stays, whatever it says later, and however often."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(bench.service().port)
    dialer.dial().close()
    names.addresses = []
    for count in (2, 3, 4):
        make_old(dialer)
        dialer.dial().close()
        wait_until(lambda: names.asked == count and not dialer._name._asking)  # noqa: B023
    assert time.monotonic() < dialer._name._due <= time.monotonic() + dialer._name.FAILED_TIME


def test_an_answer_wakes_who_waits_for_it(bench: Bench, names: Names) -> None:
    """Nobody waits to the end of his patience."""
    names.addresses = at(bench.service().port)
    names.answering.clear()
    dialer = Dialer(Endpoint("service.example", 1), 6 * PATIENCE)
    connected: list[socket.socket] = []
    threads = [threading.Thread(target=lambda: connected.append(dialer.dial())) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(dialer._name._waiters) == 3)
    names.answering.set()
    wait_until(lambda: len(connected) == 3)
    for sock in connected:
        sock.close()
    assert names.asked == 1


def test_with_a_silent_name_server_what_is_down_fails_soon(bench: Bench, names: Names) -> None:
    """The first waits a moment, whether it has moved; those after it know that nobody answers that."""
    dialer = Dialer(Endpoint("service.example", 1))
    service = bench.service()
    names.addresses = at(service.port)
    dialer.dial().close()
    service.close()
    names.answering.clear()
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(ConnectionRefusedError):
            dialer.dial()
    assert time.monotonic() - began < 3 * Dialer.MOVING_TIME
    assert names.asked == 2


def test_a_silent_name_server_is_named(names: Names) -> None:
    """Nobody waits for it beyond the deadline, whenever he came; and what it says later is used."""
    dialer = Dialer(Endpoint("service.example", 1), 0.5)
    names.answering.clear()
    for limit in (PATIENCE, 0.4):  # the second one asks a name server that has been silent for that long
        began = time.monotonic()
        with pytest.raises(OSError, match=r"cannot look up service.example: the name server does not answer"):
            dialer.dial()
        assert time.monotonic() - began < limit
    assert names.asked == 1
    names.addresses = at(unused_port())
    names.answering.set()
    wait_until(lambda: dialer._name._known)
    with pytest.raises(ConnectionRefusedError):
        dialer.dial()


def test_an_end_cuts_looking_up_short(names: Names) -> None:
    names.answering.clear()
    stop, began = Stop(), time.monotonic()
    threading.Timer(0.1, stop.request).start()
    with pytest.raises(Stopping):
        Dialer(Endpoint("service.example", 1), 60.0).dial(stop)
    assert time.monotonic() - began < PATIENCE
    stop.close()


def test_a_look_up_ends_whatever_happens(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without memory, or a thread: the next dial asks again, and does not wait for one that is not there."""

    def fail(*_: object) -> None:
        raise MemoryError

    dialer = Dialer(Endpoint("service.example", 1))
    with monkeypatch.context() as patch:
        patch.setattr(names, "answering", None)  # an AttributeError in the thread
        with pytest.raises(OSError, match=r"cannot look up service.example: 'NoneType'"):
            dialer.dial()
    make_old(dialer)
    with monkeypatch.context() as patch:
        replace(patch, "resolve_here", fail)
        with pytest.raises(OSError, match=r"cannot look up service.example: MemoryError"):
            dialer.dial()
    make_old(dialer)
    names.addresses = at(unused_port())
    with pytest.raises(ConnectionRefusedError):
        dialer.dial()


def test_what_can_be_no_name() -> None:
    """Whatever stands in an option, it is an error with the name in it."""
    for host in ("a..b", "x" * 64, "a\0b"):
        with pytest.raises(OSError, match=r"is not a host name|unknown host"):
            Dialer(Endpoint(host, 1)).dial()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "LocalHost."])
def test_who_needs_no_name_server_does_not_ask(host: str, names: Names) -> None:
    """Numeric addresses, and localhost, which works without a network and a file of hosts."""
    with pytest.raises(OSError, match=r"refused|assign|Address family"):
        Dialer(Endpoint(host, unused_port())).dial()
    assert not names.asked


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("EAI_NONAME", "unknown host db.example"),
        ("EAI_AGAIN", "cannot look up db.example: the name server does not answer"),
        ("EAI_FAIL", "cannot look up db.example: the name server has failed"),
        ("EAI_MEMORY", "cannot look up db.example: memory allocation failure"),
    ],
)
def test_why_a_name_is_not_found(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In words that say whom to ask."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(getattr(socket, code), "Memory allocation failure")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(socket.gaierror) as raised:
        Dialer(Endpoint("db.example", 1)).dial()
    assert say_error(raised.value) == words


def test_all_addresses_are_tried(bench: Bench, names: Names) -> None:
    """In turn: where nobody listens the next one is taken at once."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(unused_port()) + at(bench.service().port)
    dialer.dial().close()


def test_families_take_turns() -> None:
    """RFC 8305: a family that goes nowhere costs one head start, however many addresses it has."""
    six: Addresses = [(socket.AF_INET6, (f"2001:db8::{number}", 1, 0, 0)) for number in (1, 2, 3)]
    four = at(1, "192.0.2.1") + at(1, "192.0.2.2")
    assert in_turns(six + four) == [six[0], four[0], six[1], four[1], six[2]]
    assert in_turns(six + four, four[1]) == [four[1], six[0], four[0], six[1], six[2]]


def test_an_address_that_swallows_packets_costs_little(
    bench: Bench, names: Names, busy: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is begun beside it, and is the first from then on; a loser is closed."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = [*at(busy.getsockname()[1]), *at(bench.service().port)]
    for head_start in (Race.HEAD_START, 1000.0):
        monkeypatch.setattr(Race, "HEAD_START", head_start)
        began = time.monotonic()
        with dialer.dial() as sock:
            assert time.monotonic() - began < 1.0
            assert sock.gettimeout() is None
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) != bytes(16)
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_a_late_first_address_may_still_win(names: Names, busy: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not given up while the next one is tried, and a refusal of that one is not the end."""
    names.addresses = [*at(busy.getsockname()[1]), *at(unused_port())]
    accepted: list[socket.socket] = []
    refused, advance = threading.Event(), Race._advance

    def note(race: Race) -> socket.socket | None:
        try:
            return advance(race)
        except OSError:
            refused.set()
            raise

    monkeypatch.setattr(Race, "_advance", note)

    def accept() -> None:
        assert refused.wait(PATIENCE)
        accepted.extend(busy.accept()[0] for _ in range(2))

    thread = threading.Thread(target=accept)
    thread.start()
    with Dialer(Endpoint("service.example", 1)).dial() as sock:
        assert sock.gettimeout() is None
        assert sock.getpeername() == busy.getsockname()
    thread.join(PATIENCE)
    for end in accepted:
        end.close()


@pytest.fixture
def busy() -> Iterator[socket.socket]:
    """A listener that answers nobody until it accepts: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        while True:
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.1)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                break
        listener.settimeout(PATIENCE)
        yield listener


def dialer_of(listener: socket.socket, timeout: float) -> Dialer:
    return Dialer(Endpoint("127.0.0.1", listener.getsockname()[1]), timeout)


def test_who_does_not_answer_is_given_up(busy: socket.socket) -> None:
    """At the deadline, although the call that connects may take a part of it."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        dialer_of(busy, 0.5).dial()
    assert 0.5 <= time.monotonic() - began < 2


def test_an_end_cuts_dialling_short(busy: socket.socket) -> None:
    """Who is ending does not wait for an answer."""
    stop, began = Stop(), time.monotonic()
    stop.request()
    with pytest.raises(Stopping):
        dialer_of(busy, 60.0).dial(stop)
    assert time.monotonic() - began < PATIENCE
    stop.close()


def test_who_answers_late_is_connected(busy: socket.socket) -> None:
    """Later than the one call that connects waits; then the socket blocks, as all do that are spliced."""

    def accept() -> None:
        time.sleep(0.5)  # how late it is: the first SYN was dropped, and is sent again after a second
        for _ in range(2):
            busy.accept()[0].close()

    thread = threading.Thread(target=accept)
    thread.start()
    with dialer_of(busy, PATIENCE).dial() as sock:
        assert sock.gettimeout() is None
        assert sock.getpeername() == busy.getsockname()
    thread.join(PATIENCE)


def test_who_does_not_answer_is_tried_once_more_beside(busy: socket.socket) -> None:
    """The kernel sends its next SYN a second or more later; a second attempt finds a path that is back before that."""

    def accept() -> None:
        time.sleep(0.3)  # how late it is: later than the second attempt, sooner than the next SYN
        for _ in range(2):
            busy.accept()[0].close()

    thread, began = threading.Thread(target=accept), time.monotonic()
    thread.start()
    endpoint = Endpoint("127.0.0.1", busy.getsockname()[1])
    with Dialer(endpoint, PATIENCE, again=0.2).dial() as sock:
        assert sock.getpeername() == busy.getsockname()
    assert time.monotonic() - began < 0.9
    thread.join(PATIENCE)


def test_a_program_s_default_timeout_does_not_matter(bench: Bench) -> None:
    """Dialled sockets are blocking, whatever `socket.setdefaulttimeout` says."""
    service = bench.service()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(1.0)
    try:
        sock = Dialer(Endpoint("127.0.0.1", service.port)).dial()
    finally:
        socket.setdefaulttimeout(before)
    with sock:
        assert sock.gettimeout() is None
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def test_a_connection_to_itself_is_known(bench: Bench) -> None:
    """A port that the system gives to those that connect may be the caller's own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert sock.getsockname()[1] in EPHEMERAL_PORTS
        assert connected_to_itself(sock)
    with socket.create_connection(("127.0.0.1", bench.service().port)) as sock:
        assert not connected_to_itself(sock)


@pytest.fixture
def full_path(tmp_path: Path) -> Iterator[tuple[Endpoint, socket.socket]]:
    """A Unix socket whose backlog is full."""
    path = str(tmp_path / "service")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        while True:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            if sock.connect_ex(path):
                break
        yield Endpoint("", 0, path), listener


def test_a_full_backlog_of_a_unix_socket_is_waited_for(full_path: tuple[Endpoint, socket.socket]) -> None:
    """Longer than one call that connects does, and until the deadline at most."""
    endpoint, listener = full_path
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its queue of connections is full"):
        Dialer(endpoint, 0.7).dial()
    assert 0.6 < time.monotonic() - began < PATIENCE

    def accept() -> None:
        time.sleep(0.7)  # how late it is: later than one call that connects waits
        listener.accept()[0].close()

    thread = threading.Thread(target=accept)
    thread.start()
    with Dialer(endpoint).dial() as sock:
        assert sock.gettimeout() is None
    thread.join(PATIENCE)


def test_an_end_cuts_waiting_for_a_unix_socket_short(full_path: tuple[Endpoint, socket.socket]) -> None:
    stop, began = Stop(), time.monotonic()
    threading.Timer(0.4, stop.request).start()
    with pytest.raises(Stopping):
        Dialer(full_path[0], 60.0).dial(stop)
    assert time.monotonic() - began < PATIENCE
    stop.close()


@pytest.mark.parametrize("little", [False, True])
def test_a_near_peer_is_asked_to_hold_little(bench: Bench, little: bool) -> None:
    """By small segments, and a small window that stays, where the dialler is told so."""
    service = bench.service()
    with Dialer(Endpoint("127.0.0.1", service.port)).dial(little=little) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT
        assert (sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= NEAR_SEGMENT) == little
        held = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * NEAR_BUFFER
        assert held == (little and has_buffer_lock(sock))
        sock.sendall(b"whole")
        assert sock.recv(5) == b"whole"


def has_buffer_lock(sock: socket.socket) -> bool:
    """Whether this system has SO_BUF_LOCK: Linux from 5.14 on."""
    try:
        sock.getsockopt(socket.SOL_SOCKET, 72)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("near", [False, True])
def test_a_service_holds_little_where_the_link_is_far(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    """Where it is near too, whatever waits is through in no time."""
    asked: list[bool] = []
    real = Dialer.dial

    def dial(dialer: Dialer, stop: Stop | None = None, little: bool = False) -> socket.socket:
        if dialer._target.port == service.port:
            asked.append(little)
        return real(dialer, stop, little)

    monkeypatch.setattr(Dialer, "dial", dial)
    replace(monkeypatch, "is_near", lambda sock: near)
    server, service = bench.server(), bench.service()
    bench.client(server, service.port)
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    assert asked == [not near]
