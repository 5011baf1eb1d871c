"""Hosts that sleep, and hosts that come to another network: idle links prove that they live, or are replaced."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from _tcprelay.client import wandering
from _tcprelay.client.wandering import PROOF_TIME, Doubts, Whereabouts, address_towards, seconds_asleep
from _tcprelay.protocol import PING, PONG, WELCOME
from _tcprelay.link import RawLink
from _tcprelay.streams import Stream
from tcprelay import LinkDown, LinkUp, RelayClient, RelayServer

from .conftest import Bench, Recorder, Service, echo, wait_until
from .peers import HOST, Peers
from .peers_v1 import FakeClient
from .rigs import tcp_pair
from .test_desk import status_of
from .test_server_links import pooled
from .wire import CLIENT, SERVER, Host, Way, Wire

LayWire = Callable[..., Wire]


class Clock:
    """How long this host has slept, as the relay believes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._slept = 0.0
        monkeypatch.setattr(wandering, "seconds_asleep", lambda: self._slept)

    def sleep(self, seconds: float) -> None:
        self._slept += seconds


# --- What is noticed ------------------------------------------------------------------------------------------


def test_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on while the host sleeps, less what does not; nothing where the system has no such clock."""
    times = {time.CLOCK_MONOTONIC: 100.0}
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    times[7] = 130.0
    monkeypatch.setattr(time, "clock_gettime", lambda clock: times[clock])
    assert seconds_asleep() == 30.0
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert seconds_asleep() == 0.0


def test_whereabouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep, another address, and a network that is back are told once each; nothing else is."""
    clock, address = Clock(monkeypatch), ["192.0.2.1"]
    monkeypatch.setattr(wandering, "address_towards", lambda family, relay: address[0])
    where, relay = Whereabouts(), (2, ("198.51.100.1", 10080))
    assert where.look(None) == where.look(relay) == where.look(relay) == ""
    clock.sleep(0.5)
    assert where.look(relay) == ""
    clock.sleep(3600)
    assert where.look(relay) == "this host has slept for 3600 s"
    assert where.look(relay) == ""
    address[0] = "203.0.113.9"
    assert where.look(relay) == "this host's address has changed from 192.0.2.1 to 203.0.113.9"
    address[0] = ""
    assert where.look(relay) == where.look(relay) == ""
    address[0] = "203.0.113.9"
    assert where.look(relay) == "this host's network was gone, and is back"
    address[0] = ""
    assert where.look(relay) == ""
    address[0] = "192.0.2.1"
    assert where.look(relay) == "this host's address has changed from 203.0.113.9 to 192.0.2.1"
    assert where.look(relay) == ""


def test_the_address_towards_the_relay(lay_wire: LayWire) -> None:
    wire = lay_wire(Way())
    with wire.client.inside():
        assert address_towards(2, (SERVER, 10080)) == CLIENT
        wire.client.ip(f"address del {CLIENT}/16 dev tun0")
        assert address_towards(2, (SERVER, 10080)) == ""


def test_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up is what is idle, has been doubted, and brings nothing in time after a new link is up."""
    now = [100.0]
    monkeypatch.setattr("_tcprelay.client.wandering.time.monotonic", lambda: now[0])
    with ExitStack() as stack:
        links = []
        for name in ("proven", "busy", "dead", "new"):
            near, far = tcp_pair()
            stack.callback(near.close)
            stack.callback(far.close)
            links.append(RawLink(Stream(near, name)))
        proven, busy, dead, new = links
        doubts = Doubts()
        for link in (proven, busy, dead):
            doubts.settle(link)
        assert doubts.doubt_all() == 3
        assert doubts.give_up() == float("inf")
        doubts.settle(new)
        doubts.begin(0.0)
        assert doubts.give_up() == now[0] + PROOF_TIME
        doubts.settle(proven)
        assert not doubts.leave(busy)
        now[0] += PROOF_TIME
        assert doubts.give_up() == float("inf")
        assert [doubts.leave(link) for link in links] == [False, False, True, False]
        assert dead.stream.sock.recv(1) == b""


# --- The relay client -----------------------------------------------------------------------------------------


def test_links_that_are_well_stay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a short sleep: they are asked for, and one more link is all that it costs."""
    clock, server = Clock(monkeypatch), bench.server()
    bench.client(server, bench.service(echo).port, num_conn=4)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    before = len(bench.client_events.wait(LinkUp, 5))  # one is in use
    wait_until(lambda: server.counters["links_idle"] == 4)
    clock.sleep(60)
    wait_until(lambda: len(bench.client_events.of(LinkUp)) == before + 1)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 2 * PROOF_TIME)
    assert len(bench.client_events.of(LinkUp)) == before + 1
    assert not bench.client_events.of(LinkDown)
    sock.sendall(b"y")
    assert sock.recv(1) == b"y"


AT_ONCE = 5.0
"""Seconds: who is given a link of before waits the twenty of --pair-timeout."""


class Far:
    """A relay server and a relay client at the ends of a wire, in this process."""

    def __init__(self, wire: Wire, stack: ExitStack) -> None:
        self.wire = wire
        self.events, self.server_events = Recorder(), Recorder()
        common = {"token": "a token for two of them", "drain_timeout": 0.0}
        with wire.server.inside():
            self.server = stack.enter_context(
                RelayServer(0, service_port=0, hostname=SERVER, on_event=self.server_events, pair_timeout=20, **common)
            )
        with wire.client.inside():
            service = Service(echo)
            stack.callback(service.close)
            relay = self.server.relay_address[1]
            self.client = stack.enter_context(
                RelayClient("127.0.0.1", service.port, SERVER, relay, num_conn=4, on_event=self.events,
                            try_service=False, **common)
            )  # fmt: skip
        wait_until(lambda: self.server.counters["links_idle"] == 4)
        wait_until(lambda: not any(link.pongs_due for link in self.server._pool.idle_links()))

    def serve_one(self) -> float:
        """Seconds until a service client at the server's host has its answer."""
        began = time.monotonic()
        with self.wire.server.inside():
            sock = socket.create_connection(self.server.service_addresses["default"], 30)
        with sock:
            sock.settimeout(30)
            sock.sendall(b"ping")
            assert sock.recv(4) == b"ping"
        return time.monotonic() - began

    def wait_until_whole(self) -> None:
        """All of the first links are gone, and others are there."""
        wait_until(lambda: len(self.events.of(LinkDown)) >= 4 and self.server._pool.count_idle() >= 4)

    def recovers(self) -> None:
        """From the first new link on service clients are served at once, and soon all links are new."""
        wait_until(lambda: len(self.server_events.of(LinkUp)) > 4)
        assert self.serve_one() < AT_ONCE
        self.wait_until_whole()


@pytest.fixture
def far(lay_wire: LayWire) -> Iterator[Far]:
    wire = lay_wire(Way(delay=0.01), nat=600)
    with ExitStack() as stack:
        yield Far(wire, stack)


def test_after_sleep_behind_a_nat_that_has_forgotten(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links are dead, and neither side is told; two seconds after the host is awake all are replaced."""
    clock = Clock(monkeypatch)
    far.wire.forget()
    clock.sleep(3600)
    far.recovers()
    assert all("slept or moved" in event.reason for event in far.events.of(LinkDown)[:4])
    assert [far.serve_one() < AT_ONCE for _ in range(4)] == [True] * 4


def test_the_network_takes_a_while_to_be_back(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is awake before its network is: links are tried for again and again."""
    clock = Clock(monkeypatch)
    with far.wire.hole():
        far.wire.forget()
        clock.sleep(3600)
        waited = time.monotonic()
        wait_until(lambda: time.monotonic() > waited + 7)  # the kernel's own next attempt would be seconds away
        assert len(far.server_events.of(LinkUp)) == 4
    far.recovers()


def move(host: Host, old: str, new: str) -> None:
    host.ip(f"address del {old}/16 dev tun0")
    host.ip(f"address add {new}/16 dev tun0")


def test_another_address(far: Far) -> None:
    """No service client is given a link of the old one, once there is one of the new."""
    move(far.wire.client, CLIENT, "198.18.0.9")
    wait_until(lambda: len(far.server_events.of(LinkUp)) > 4)
    took = [far.serve_one() for _ in range(4)]
    assert max(took) < AT_ONCE, took
    far.wait_until_whole()


# --- The relay server -----------------------------------------------------------------------------------------


def greet(bench: Bench, server: RelayServer, source: str = "", **fields: Any) -> FakeClient:
    link: FakeClient = bench.enter(FakeClient(server, source))
    assert link.hello(idle=8, client="me", **fields).kind == WELCOME
    return link


@pytest.mark.parametrize(("source", "fields"), [("127.0.0.9", {}), ("", {"doubtful": True})])
def test_old_links_are_proven_first(bench: Bench, source: str, fields: dict[str, Any]) -> None:
    """Where a relay client comes from another address, or says that they may be dead; and used again when they are."""
    server = bench.server()
    old, other = pooled(bench, server, "me"), pooled(bench, server, "somebody else")
    link = greet(bench, server, source, **fields)
    assert old.next().kind == PING
    wait_until(lambda: len(server._pool._aside) == 1)
    assert not select_now(other)
    old.send(PONG)
    wait_until(lambda: not server._pool._aside)
    assert not select_now(link)


def test_an_address_that_is_known_proves_nothing(bench: Bench) -> None:
    """As behind a NAT that has several: each new link would have all others asked."""
    server = bench.server()
    old = pooled(bench, server, "me")
    greet(bench, server, "127.0.0.9")
    assert old.next().kind == PING
    old.send(PONG)
    wait_until(lambda: not server._pool._aside)
    for source in ("", "127.0.0.9", ""):
        greet(bench, server, source)
    assert not select_now(old)


def select_now(link: FakeClient) -> bool:
    return bool(select.select([link.sock], [], [], 0)[0])


def test_doubts_after_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was passed on last may be under way still: such a link is closed, and not reset."""
    now = [100.0]
    monkeypatch.setattr("_tcprelay.client.wandering.time.monotonic", lambda: now[0])
    pairs = [tcp_pair(), tcp_pair()]
    doubts, links = Doubts(), [RawLink(Stream(near, "link")) for near, _ in pairs]
    for link in links:
        link.stream.close_normally()  # as what is dialled
    doubts.settle(links[0])
    doubts.settle(links[1], False)
    doubts.doubt_all()
    doubts.begin(0.0)
    now[0] += PROOF_TIME
    doubts.give_up()
    for link in links:
        link.stream.sock.close()
    with pytest.raises(ConnectionResetError):
        pairs[0][1].recv(1)
    assert pairs[1][1].recv(1) == b""
    for _, far in pairs:
        far.close()


def test_old_links_are_proven_in_all_workers(peers: Peers, bench: Bench) -> None:
    """Whichever of them the new link has come to."""
    server = peers.server("--workers", "2", "--status", "0")
    place: Any = SimpleNamespace(relay_address=(HOST, server.relay_port))
    old = [bench.enter(FakeClient(place)) for _ in range(4)]
    for number, link in enumerate(old, 1):
        assert link.hello(idle=8, client="me").kind == WELCOME
        wait_until(partial(has_idle, server, number))
    new = bench.enter(FakeClient(place))
    assert new.hello(idle=8, client="me", doubtful=True).kind == WELCOME
    for link in old:
        assert link.next().kind == PING
        link.send(PONG)


def has_idle(server: Any, count: int) -> bool:
    return bool(status_of(server)["services"][0]["links_idle"] == count)


def test_a_link_whose_last_bytes_may_be_under_way_is_not_to_be_reset(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after its connection: to a service that reads slowly, say."""
    server = bench.server()
    client = bench.client(server, bench.service().port)
    [links], settled = client._branches.links(), list[bool]()
    settle = links._doubts.settle

    def note(link: Any, reset: bool = True) -> None:
        settled.append(reset)
        settle(link, reset)

    monkeypatch.setattr(links._doubts, "settle", note)
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    wait_until(lambda: False in settled)


def test_links_are_asked_for_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first link after a sleep asks for a proof of the others, and none after it."""
    from .test_wandering import Clock

    clock, server = Clock(monkeypatch), bench.server()
    client = bench.client(server, bench.service().port)
    [links], before = client._branches.links(), len(bench.client_events.wait(LinkUp, 2))
    clock.sleep(60)
    bench.client_events.wait(LinkUp, before + 1)
    assert not links._greeting.in_doubt
