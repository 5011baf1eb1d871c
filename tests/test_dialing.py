"""Dialling: which addresses are tried, for how long, and when a name is looked up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import tcprelay
from tcprelay import Dialer, Endpoint, Stop, Stopping

from .conftest import PATIENCE, Bench

Addresses = list[tuple[int, Any]]


class Names:
    """Stands in for the system's resolver, and counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: Addresses = []
        self.asked = 0
        monkeypatch.setattr(tcprelay, "resolve", self._resolve)

    def _resolve(self, host: str, port: int) -> Addresses:
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self.addresses


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def at(port: int) -> Addresses:
    return [(socket.AF_INET, ("127.0.0.1", port))]


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_name_is_looked_up_once(bench: Bench, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when what is known is old."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(bench.service().port)
    for _ in range(3):
        dialer.dial().close()
    assert names.asked == 1
    dialer._known = dialer._known[0], 0.0
    dialer.dial().close()
    assert names.asked == 2


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


def test_a_resolver_that_fails_is_asked_again(bench: Bench, names: Names) -> None:
    dialer = Dialer(Endpoint("service.example", 1))
    with pytest.raises(socket.gaierror):
        dialer.dial()
    names.addresses = at(bench.service().port)
    dialer.dial().close()


def test_without_a_resolver_the_old_address_does(bench: Bench, names: Names) -> None:
    """The way to the name server may be down, and that to the service not."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(bench.service().port)
    dialer.dial().close()
    dialer._known = dialer._known[0], 0.0
    names.addresses = []
    dialer.dial().close()
    assert names.asked == 2


def test_all_addresses_are_tried(bench: Bench, names: Names) -> None:
    """In turn: where nobody listens the next one is taken."""
    dialer = Dialer(Endpoint("service.example", 1))
    names.addresses = at(unused_port()) + at(bench.service().port)
    dialer.dial().close()


def test_each_address_has_its_share_of_the_time(bench: Bench, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that swallows packets leaves time for the others."""
    shares: list[float] = []
    real = tcprelay._connect

    def connect(family: int, address: Any, deadline: tcprelay.Deadline, stop: Any) -> socket.socket:
        shares.append(deadline.remaining() or 0.0)
        if len(shares) < 3:
            raise TimeoutError("timed out")
        return real(family, address, deadline, stop)

    monkeypatch.setattr(tcprelay, "_connect", connect)
    names.addresses = at(1) + at(2) + at(bench.service().port)
    Dialer(Endpoint("service.example", 1), timeout=9.0).dial().close()
    assert shares == [pytest.approx(3.0, abs=0.2), pytest.approx(4.5, abs=0.2), pytest.approx(9.0, abs=0.2)]


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
        time.sleep(0.5)  # the first SYN was dropped; it is sent again after a second
        for _ in range(2):
            busy.accept()[0].close()

    thread = threading.Thread(target=accept)
    thread.start()
    with dialer_of(busy, PATIENCE).dial() as sock:
        assert sock.gettimeout() is None
        assert sock.getpeername() == busy.getsockname()
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
        assert sock.getsockname()[1] in tcprelay.EPHEMERAL_PORTS
        assert tcprelay.connected_to_itself(sock)
    with socket.create_connection(("127.0.0.1", bench.service().port)) as sock:
        assert not tcprelay.connected_to_itself(sock)
