"""The wire on which other tests rely: two hosts, and what the path between them does to packets."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from .bench.processes import read_stat
from .conftest import PATIENCE, read_all, read_exactly, wait_until
from .peers import ROOT
from .wire import CLIENT, CLIENT_6, SERVER, SERVER_6, Host, Way, Wire

LayWire = Callable[..., Wire]


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextmanager
def connected(wire: Wire, address: str = SERVER) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from the client host to the server host: both its ends."""
    with listening(wire.server, address) as listener, dial(wire.client, listener) as near:
        far, _ = listener.accept()
        with far:
            far.settimeout(PATIENCE)
            yield near, far


def listening(host: Host, address: str) -> socket.socket:
    with host.inside():
        listener = socket.create_server((address, 0), family=family_of(address))
    listener.settimeout(PATIENCE)
    return listener


def dial(host: Host, listener: socket.socket, timeout: float = PATIENCE) -> socket.socket:
    with host.inside():
        return socket.create_connection(listener.getsockname()[:2], timeout)


@contextmanager
def datagrams(wire: Wire) -> Iterator[tuple[Callable[[bytes], object], Callable[[], list[bytes]]]]:
    """What sends a datagram from the client host to the server host, and what takes all that have come."""
    with wire.server.inside():
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with wire.client.inside():
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, far:
        far.bind((SERVER, 0))
        far.setblocking(False)
        came: list[bytes] = []

        def take() -> list[bytes]:
            try:
                while True:
                    came.append(far.recv(2000))
            except BlockingIOError:
                return came

        yield lambda data: near.sendto(data, far.getsockname()), take


def has_come(*ends: socket.socket) -> list[socket.socket]:
    """Those to which something has come."""
    return select.select(ends, (), (), 0)[0]


def pass_through(near: socket.socket, far: socket.socket, data: bytes) -> bytes:
    """Send all that from one end and end; returns what comes out at the other."""

    def send() -> None:
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return read_all(far)
    finally:
        thread.join()


@pytest.mark.parametrize("address", [SERVER, SERVER_6])
@pytest.mark.parametrize("offload", [False, True])
def test_a_round_trip_takes_what_was_asked(lay_wire: LayWire, address: str, offload: bool) -> None:
    """No connection comes about earlier, some not much later; and so it is when another delay is set."""
    if ":" in address and not os.path.exists("/proc/sys/net/ipv6"):
        pytest.skip("no IPv6 in this kernel")
    wire = lay_wire(Way(delay=0.02), Way(delay=0.04), offload=offload)

    def connect() -> float:
        with listening(wire.server, address) as listener:
            began = time.monotonic()
            with dial(wire.client, listener) as sock:
                assert sock.getsockname()[0] in (CLIENT, CLIENT_6)
                return time.monotonic() - began

    for round_trip in (0.06, 0.01):
        times: list[float] = []
        while not any(one < round_trip + 0.02 for one in times):
            times.append(connect())
            assert len(times) < 30, times
        assert min(times) >= round_trip
        wire.change(both=Way(delay=0.005))


def test_jitter_keeps_the_order_unless_told_otherwise(lay_wire: LayWire) -> None:
    wire = lay_wire(Way(jitter=0.02))
    sent = [b"%d" % number for number in range(50)]
    for reorder in (False, True):
        wire.change(both=Way(jitter=0.02, reorder=reorder))
        with datagrams(wire) as (send, take):
            for data in sent:
                send(data)
            wait_until(lambda: len(take()) == len(sent))
            assert (take() != sent) == reorder
            assert sorted(take()) == sorted(sent)


def test_what_is_lost_is_sent_again(lay_wire: LayWire) -> None:
    """Single packets are lost, and TCP brings all bytes through."""
    wire = lay_wire(Way(loss=0.1), Way())
    data = os.urandom(300_000)
    with connected(wire) as (near, far):
        assert pass_through(near, far, data) == data
    counts = wire.counts()
    assert counts["up"]["loss"] >= 3
    assert counts["up"]["passed"] >= 200
    assert counts["down"]["loss"] == 0


def test_packets_are_single_unless_offloaded(lay_wire: LayWire) -> None:
    """None has more than 1,500 bytes; with offload some have."""
    data = bytes(1_000_000)
    wire = lay_wire(Way(delay=0.005, mtu=1500))
    with connected(wire) as (near, far):
        assert pass_through(near, far, data) == data
    assert wire.counts()["up"]["mtu"] == 0
    assert wire.counts()["up"]["passed"] >= len(data) / 1500
    wire = lay_wire(Way(delay=0.005, mtu=1500), offload=True)
    with connected(wire) as (near, _):
        near.sendall(bytes(100_000))
        wait_until(lambda: wire.counts()["up"]["mtu"] > 0)


def test_a_hole_swallows_and_heals(lay_wire: LayWire) -> None:
    """In either direction; what was sent in it arrives later."""
    wire = lay_wire(Way(delay=0.005))
    with connected(wire) as (near, far):
        with wire.hole():
            near.sendall(b"up")
            far.sendall(b"down")
            wait_until(lambda: wire.counts()["up"]["hole"] and wire.counts()["down"]["hole"])
            assert not has_come(near, far)
        assert read_exactly(far, 2) == b"up"
        assert read_exactly(near, 4) == b"down"


def test_a_nat_forgets_silent_connections(lay_wire: LayWire) -> None:
    """What comes on them is dropped without a word on either side; those that begin inside work, others do not."""
    wire = lay_wire(Way(), nat=60)
    with connected(wire) as (near, far):
        far.sendall(b"known")
        assert read_exactly(near, 5) == b"known"
        silent = time.monotonic()
        wire.change(nat=0.05)
        wait_until(lambda: time.monotonic() > silent + 0.1)
        before = wire.counts()
        near.sendall(b"?")
        far.sendall(b"?")
        wait_until(lambda: all(wire.counts()[way]["nat"] > before[way]["nat"] + 1 for way in ("up", "down")))
        assert not has_come(near, far)
    wire.change(nat=60)
    with connected(wire) as (near, far):
        far.sendall(b"new")
        assert read_exactly(near, 3) == b"new"
        wire.forget()
        dropped = wire.counts()["down"]["nat"]
        far.sendall(b"?")
        wait_until(lambda: wire.counts()["down"]["nat"] > dropped)
    with listening(wire.client, CLIENT) as listener, pytest.raises(TimeoutError):
        dial(wire.server, listener, 0.1)


def test_a_rate_and_a_queue_that_is_full(lay_wire: LayWire) -> None:
    """What comes in a burst leaves at the rate; what would have to wait too long is dropped."""
    wire = lay_wire(Way(rate=1e6, queue=0.1), Way())
    began = time.monotonic()
    with datagrams(wire) as (send, take):
        for _ in range(100):
            send(bytes(1000))
        counts = wait_until(lambda: sum((now := wire.counts()["up"]).values()) >= 100 and now)
        wait_until(lambda: len(take()) >= 12)
        took = time.monotonic() - began
    assert 12 <= counts["passed"] <= 20  # of 1,028 bytes each; more where the sender was held up
    assert counts["queue"] >= 80
    assert took >= 12 * 8 * 1028 / 1e6


def test_a_small_mtu_swallows_larger_packets(lay_wire: LayWire) -> None:
    """Nobody is told, as behind a router whose messages are filtered."""
    wire = lay_wire(Way(mtu=1000), Way())
    with datagrams(wire) as (send, take):
        send(bytes(1200))
        send(bytes(500))
        wait_until(lambda: take() == [bytes(500)])
    assert wire.counts()["up"]["mtu"] == 1


def test_the_forwarder_ends_with_its_owner(lay_wire: LayWire) -> None:
    """Also where that is killed."""
    script = """if True:
        import sys
        from contextlib import ExitStack
        from tests.wire import Way, Wire
        with ExitStack() as stack:
            print(Wire(stack, Way(delay=1.0))._forwarder.pid, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout
        forwarder = int(owner.stdout.readline())
        assert read_stat(forwarder)[0] in "RSD"
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not (stat := read_stat(forwarder)) or stat[0] == "Z")
