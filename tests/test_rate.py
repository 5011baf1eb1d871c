"""--limit-rate: the words, the allowance, and connections that are carried at a rate."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from _tcprelay.link import LINK_BUFFER
from _tcprelay.pace import ATTENTION, BURST_TIME, LEAST_BURST, Pace
from _tcprelay.protocol import ABORT, IDLE
from _tcprelay.splice import Splice
from _tcprelay.streams import BULK
from _tcprelay.values import RateLimit, parse_rate, parse_rate_limit, parse_service
from _tcprelay.watch import Splices
from tcprelay import ConnectionClosed, ServerOptions

from .certificates import Certificates, tls_context
from .conftest import PATIENCE, Bench, echo, read_all, read_exactly, wait_until
from .ends import TLSEnd, send_data, send_end
from .peers import Peers
from .rigs import Rig, bytes_waiting, receive, receive_by, reset, sweep_until_broken

SOON = 1.0
"""Seconds within which a pump that rests has left, on a machine that has other things to do."""


# --- The words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1024", 1024), ("65536/s", 65_536), ("64k", 64_000), ("64K/s", 64_000), ("1M", 10**6), ("125M/S", 125 * 10**6),
     ("2G", 2 * 10**9), ("1Ki", 1024), ("512Ki/s", 1 << 19), ("3Mi", 3 << 20), ("1gi/s", 1 << 30)],
)  # fmt: skip
def test_what_a_rate_may_be(text: str, rate: int) -> None:
    assert parse_rate(text) == rate
    assert parse_rate_limit(text) == RateLimit("", rate)
    assert parse_rate_limit(f"web.1={text}") == RateLimit("web.1", rate)


@pytest.mark.parametrize(
    "text",
    ["", "0", "1023", "1023/s", "1k", "0M", "-1M", "+1M", "1.5M", "M", "1Mbit", "1MB", "1T", "1M/h", "1 M", "1/sM",
     "1" * 13, "\u0663\u0663\u0663\u0663", "web=1M"],
)  # fmt: skip
def test_what_no_rate_is(text: str) -> None:
    """It says what is accepted."""
    with pytest.raises(ValueError, match="bytes a second, 1024 or more, as in 65536, 512Ki or 10M/s"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["=1M", "a b=1M", "a=b=1M", "web=", "web", "web=1"])
def test_what_no_limit_of_a_service_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"a name of 1 to 64|bytes a second"):
        parse_rate_limit(text)


@pytest.mark.parametrize("text", ["1024", "web=524288"])
def test_a_limit_is_said_as_it_can_be_given(text: str) -> None:
    """As `--check` does."""
    assert str(parse_rate_limit(text)) == text


def make_options(*limits: str) -> ServerOptions:
    rates = tuple(map(parse_rate_limit, limits))
    services = parse_service("web=3"), parse_service("db=4")
    return ServerOptions(relay_port=1, service_port=2, service=services, limit_rate=rates)


def test_a_service_s_own_limit_counts_before_that_of_all() -> None:
    """Whichever is larger."""
    options = make_options("web=1M", "2M", "db=3M")
    assert [options.rate_of(name) for name in ("default", "web", "db")] == [2_000_000, 1_000_000, 3_000_000]
    options = make_options("default=1M")
    assert [options.rate_of(name) for name in ("default", "web")] == [1_000_000, 0]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (("wbe=1M",), "--limit-rate wbe=… names no service here: correct the name, or add --service wbe=PORT"),
        (("web=1M", "web=2M"), "--limit-rate is given twice for the service web: leave one of them out"),
        (("1M", "web=2M", "1M"), "--limit-rate is given twice for all services: leave one of them out"),
    ],
)
def test_limits_that_do_not_fit(limits: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_options(*limits)


# --- The allowance --------------------------------------------------------------------------------------------


class Carried:
    """What a pace knows of a flow."""

    def __init__(self) -> None:
        self.carried = 0
        self.halted = False


class Clock:
    """A time that passes only where somebody sleeps, and as much `late` as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.late = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.late


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


RATES = [1024, 65_536, 1 << 20, 125_000_000]


@pytest.mark.parametrize("late", [0.0, 0.02])
@pytest.mark.parametrize("rate", RATES)
def test_the_rate_holds_in_the_long_run(clock: Clock, rate: int, late: float) -> None:
    """Although each rest is too long; one bucket goes beyond it, and no piece is tiny."""
    pace, flow, began, pieces = Pace(rate), Carried(), clock.now, []
    clock.late = late
    while clock.now < began + 20:
        pieces.append(pace.wait(flow))
        flow.carried += pieces[-1]
        assert flow.carried <= pace.burst + rate * (clock.now - began) + 1
    assert flow.carried >= 0.99 * rate * (clock.now - began)
    assert min(pieces) >= pace.burst // 4
    assert max(pieces) <= pace.burst == max(LEAST_BURST, int(rate * BURST_TIME))


def test_a_pause_saves_no_more_than_the_bucket(clock: Clock) -> None:
    pace, flow = Pace(1 << 20), Carried()
    flow.carried += pace.wait(flow)
    assert pace.wait(flow) <= pace.burst
    clock.now += 3600
    assert pace.wait(flow) == pace.burst == flow.carried


def test_few_bytes_now_and_then_never_rest(clock: Clock) -> None:
    """Keystrokes pass at once."""
    pace, flow = Pace(1024), Carried()
    for _ in range(100):
        assert pace.wait(flow)
        flow.carried += 10
        clock.now += 0.01
    assert clock.slept == []


def test_what_has_passed_before_is_waited_for(clock: Clock) -> None:
    """The bytes of the opening exchange, and those that came before the service answered."""
    pace, flow, began = Pace(1024), Carried(), clock.now
    flow.carried = 65_536
    room = pace.wait(flow)
    assert 65_536 + room <= pace.burst + 1024 * (clock.now - began) + 1
    assert max(clock.slept) <= ATTENTION


def test_a_halted_flow_does_not_go_on_resting(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others see that it rests meanwhile."""
    pace, flow, seen = Pace(1024), Carried(), list[bool]()
    flow.carried = 65_536

    def sleep(seconds: float) -> None:
        seen.append(pace.resting)
        flow.halted = True
        clock.sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    assert pace.wait(flow) == 0
    assert seen == [True]
    assert not pace.resting


# --- One connection -------------------------------------------------------------------------------------------


def start_limited(rig: Rig, rate: int, carried: int = 0, spliceable: bool = True) -> None:
    """Start a connection with a rate, of which so many bytes have passed each way already."""
    rig.stream.spliceable = rig.link.spliceable = spliceable
    rig.splice.limit_rate(rate)
    rig.splice.to_link.carried = rig.splice.from_link.carried = carried
    rig.start()


def is_resting(splice: Splice) -> bool:
    return all(flow.pace is not None and flow.pace.resting for flow in (splice.to_link, splice.from_link))


@pytest.mark.parametrize("spliceable", [True, False])
@pytest.mark.parametrize("rate", [800_000, 4_000_000])
def test_all_sizes_arrive_whole_and_no_sooner(
    later_rig: Rig, monkeypatch: pytest.MonkeyPatch, rate: int, spliceable: bool
) -> None:
    """Both ways at once, by small and by large pieces, copied and through the kernel's pipe; none is larger than the
    bucket."""
    rig, rng, asked = later_rig, random.Random(rate), list[int]()
    real_splice, real_receive = os.splice, rig.stream.recv_into

    def splice(source: int, sink: int, count: int) -> int:
        asked.append(count)
        return real_splice(source, sink, count)

    def recv_into(view: memoryview) -> int:
        asked.append(len(view))
        return real_receive(view)

    monkeypatch.setattr(os, "splice", splice)
    receive_by(rig.stream, recv_into)
    pieces = [rng.randbytes(rng.choice([1, 7, 1023, 4096, 16384, 65536])) for _ in range(400)]
    whole = b"".join(pieces)[: rate // 2]
    began = time.monotonic()
    start_limited(rig, rate, spliceable=spliceable)

    def write_stream() -> None:
        for piece in cut(whole, pieces):
            rig.far_stream.sendall(piece)
        rig.far_stream.shutdown(socket.SHUT_WR)

    def write_link() -> None:
        for piece in cut(whole, pieces):
            send_data(rig.far, piece)
        send_end(rig.far)

    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write_stream), pool.submit(write_link)]
        reading = pool.submit(receive, rig.far)
        assert read_all(rig.far_stream) == whole
        assert reading.result() == whole
        for future in writing:
            future.result()
    took = time.monotonic() - began
    assert BULK < max(asked) <= rate * BURST_TIME
    assert took >= (len(whole) - rate * BURST_TIME) / rate
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.to_link.carried, rig.splice.from_link.carried, rig.splice.reason) == (len(whole), len(whole), "")
    assert rig.link.machine.state == IDLE


def cut(whole: bytes, pieces: list[bytes]) -> Iterator[bytes]:
    """The whole again in these pieces, as far as it goes."""
    place = 0
    for piece in pieces:
        if place < len(whole):
            yield whole[place : place + len(piece)]
        place += len(piece)


def test_a_limited_connection_takes_nothing_ahead(later_rig: Rig) -> None:
    """What may not pass yet is left to the kernel, and so to the sender."""
    rig = later_rig
    rig.far_stream.sendall(bytes(20_000))
    send_data(rig.far, bytes(20_000))
    start_limited(rig, 1024)
    wait_until(lambda: is_resting(rig.splice))
    assert rig.stream.received == rig.splice.to_link.carried < 4 * LEAST_BURST
    assert bytes_waiting(rig.stream.sock) + rig.stream.received == 20_000
    assert bytes_waiting(rig.link.sock) >= 20_000 - 4 * LEAST_BURST - LINK_BUFFER


@pytest.mark.parametrize("hurry", [True, False])
def test_a_connection_that_is_broken_off_does_not_go_on_resting(later_rig: Rig, hurry: bool) -> None:
    """Both pumps leave, and the link says ABORT; without haste also what had passed before is delivered."""
    rig = later_rig
    start_limited(rig, 1024, carried=60_000)
    rig.far_stream.sendall(bytes(1000))
    wait_until(lambda: is_resting(rig.splice))
    began = time.monotonic()
    rig.splice.break_off("enough", hurry=hurry)
    with pytest.raises(ConnectionAbortedError, match="enough"):
        receive(rig.far)
    send_end(rig.far)
    assert rig.done.wait(SOON)
    assert time.monotonic() - began < SOON
    assert (rig.splice.reason, rig.link.machine.state) == ("enough", IDLE)
    with pytest.raises(ConnectionResetError):
        read_all(rig.far_stream)


def test_an_abort_of_the_other_side_comes_in_its_place(later_rig: Rig) -> None:
    """Behind the bytes that were sent before it, at their rate."""
    rig = later_rig
    start_limited(rig, 65_536)
    send_data(rig.far, bytes(20_000))
    rig.far.send(ABORT, {"reason": "the service is gone"})
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(receive, rig.far)
        got = read_exactly(rig.far_stream, 20_000)
        assert got == bytes(20_000)
        with pytest.raises(ConnectionResetError):
            read_all(rig.far_stream)
        with pytest.raises(ConnectionAbortedError):
            reading.result()
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: the service is gone"


def test_a_reset_is_seen_while_a_pump_rests(later_rig: Rig) -> None:
    """By the sweep, however long it would go on resting."""
    rig, splices = later_rig, Splices(0.0, 0.0)
    splices.add(rig.splice)
    start_limited(rig, 1024, carried=60_000)
    wait_until(lambda: is_resting(rig.splice))
    reset(rig.far_stream)
    sweep_until_broken(splices)
    with pytest.raises(ConnectionAbortedError):
        receive(rig.far)
    send_end(rig.far)
    assert rig.done.wait(SOON)
    assert rig.splice.reason == "stream: connection lost"


def test_a_resting_connection_is_not_idle(later_rig: Rig) -> None:
    """Although it carries no byte for longer than the time-out; afterwards it is."""
    rig, splices = later_rig, Splices(0.1, 0.0)
    splices.add(rig.splice)
    start_limited(rig, 1024, carried=2 * LEAST_BURST)
    wait_until(lambda: is_resting(rig.splice))
    began, looks = time.monotonic(), 0
    while is_resting(rig.splice):
        splices.sweep()
        looks += 1
        assert not rig.splice.reason
    assert time.monotonic() - began > 0.5
    assert looks > 2
    sweep_until_broken(splices)
    assert rig.splice.reason == "idle for 0.1 s"


# --- A relay server -------------------------------------------------------------------------------------------


def test_each_service_has_its_rate(bench: Bench) -> None:
    """A service without one is not held up."""
    server = bench.server(service=["web=0", "db=0"], limit_rate=["web=64Ki", "db=1M/s"])
    port = bench.service().port
    bench.client(server, port, publish=[f"web={port}", f"db={port}"])
    rates = {}
    for name in ("default", "web", "db"):
        sock = bench.connect(server, name)
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
        [splice] = [splice for splice in server.runtime.splices.snapshot() if splice.service == name]
        rates[name] = [flow.pace and flow.pace.rate for flow in (splice.to_link, splice.from_link)]
    assert rates == {"default": [None, None], "web": [65_536, 65_536], "db": [1_000_000, 1_000_000]}


@pytest.mark.parametrize("wire", ["v1", "raw"])
def test_a_service_client_that_leaves_in_the_midst(bench: Bench, wire: str) -> None:
    """Its service sees that it was no whole connection, and the next one is served."""
    ends: list[BaseException | None] = []

    def serve(sock: socket.socket) -> None:
        try:
            echo(sock)
            ends.append(None)
        except OSError as error:
            ends.append(error)

    server = bench.server(limit_rate="64Ki", wire=wire)
    bench.client(server, bench.service(serve).port, wire=wire)
    sock = bench.connect(server)
    sock.sendall(bytes(60_000))
    read_exactly(sock, 10_000)
    reset(sock)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert "connection reset by peer" in closed.reason
    wait_until(lambda: ends)
    assert isinstance(ends[0], ConnectionResetError)
    other = bench.connect(server)
    other.sendall(b"next")
    assert read_exactly(other, 4) == b"next"


@pytest.mark.parametrize("drain", [0.0, 0.5])
def test_the_end_does_not_wait_for_a_rest(bench: Bench, drain: float) -> None:
    """Beyond its drain time-out; no part is taken for the whole."""
    server = bench.server(limit_rate="1Ki")
    bench.client(server, bench.service().port)
    sock = bench.connect(server)
    sock.sendall(bytes(20_000))
    [splice] = wait_until(lambda: server.runtime.splices.snapshot())
    wait_until(lambda: splice.to_link.pace.resting)
    began = time.monotonic()
    assert server.end(drain) == []
    assert drain <= time.monotonic() - began < drain + SOON
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason == "this relay is ending"
    with pytest.raises(ConnectionResetError):
        read_all(sock)


def test_what_can_finish_while_a_relay_drains(bench: Bench) -> None:
    """It goes on at its rate."""
    server = bench.server(limit_rate="64Ki")
    bench.client(server, bench.service().port)
    sock = bench.connect(server)
    data = random.Random(2).randbytes(50_000)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    got, began = read_exactly(sock, 1000), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(server.end, PATIENCE)
        assert got + read_all(sock) == data
        assert time.monotonic() - began > 0.5
        assert ending.result() == []
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason == ""


# --- The commands ---------------------------------------------------------------------------------------------


class Transfers:
    """Transfers through relays both ways at once, of random bytes, each with its end behind it."""

    def __init__(self, size: int) -> None:
        self.data = random.Random(size).randbytes(size)
        self.digest = hashlib.sha256(self.data).digest()
        self.at_service: Future[tuple[bytes, float]] = Future()

    def serve(self, sock: Any) -> None:
        self.at_service.set_result(self.exchange(sock))

    def exchange(self, sock: Any) -> tuple[bytes, float]:
        """Send all, and receive all; returns the digest of the latter, and the moment of its last byte."""
        writer = threading.Thread(target=self._write, args=(sock,))
        writer.start()
        digest, last = hashlib.sha256(), 0.0
        while piece := sock.recv(1 << 16):
            digest.update(piece)
            last = time.monotonic()
        writer.join(PATIENCE)
        return digest.digest(), last

    def _write(self, sock: Any) -> None:
        sock.sendall(self.data)
        sock.shutdown(socket.SHUT_WR)


def relays_with(
    peers: Peers, certificates: Certificates, tls: bool, wire: str, rate: str, serve: Callable[[Any], object]
) -> Callable[[], Any]:
    """Start a relay with a rate; returns what connects to it.  With TLS all three ways speak it."""
    both, server, client = ["--wire", wire], ["--limit-rate", rate], list[str]()
    if tls:
        path = certificates.path
        context = tls_context(True, path("server.pem"), path("server.key"))
        both += ["--tls", "both"]
        server += ["--cert", path("server.pem"), "--key", path("server.key"), "--allow-unauthenticated"]
        client += ["--ca-file", path("ca.pem"), "--tls-server-name", "localhost", "--service-ca-file", path("ca.pem")]
        service = peers.service(lambda sock: serve(TLSEnd(sock, context, True)))
    else:
        service = peers.service(serve)
    relay = peers.server(*both, *server)
    peers.client(relay.relay_port, service.port, *both, *client)

    def connect() -> Any:
        sock = peers.connect(relay.service_port)
        return TLSEnd(sock, tls_context(ca=certificates.path("ca.pem")), False) if tls else sock

    return connect


@pytest.mark.parametrize("wire", ["v1", "raw"])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("rate", [65_536, 1 << 20])
def test_the_rate_each_way(
    peers: Peers, certificates: Certificates, workers: str, rate: int, tls: bool, wire: str
) -> None:
    """Whole transfers both ways at once: no faster than it, one bucket aside, and hardly slower."""
    transfers = Transfers(int(1.5 * rate))
    connect = relays_with(peers, certificates, tls, wire, f"default={rate}", transfers.serve)
    began = time.monotonic()
    with connect() as sock:
        ends = transfers.exchange(sock), transfers.at_service.result(PATIENCE)
    for digest, last in ends:
        assert digest == transfers.digest
        assert 0.95 * 1.45 <= last - began <= 2 * 1.5 + SOON


def test_sigterm_ends_a_relay_whose_pumps_rest(peers: Peers, workers: str) -> None:
    """At the drain time-out, and a reset for who was being served."""
    server = peers.server("--limit-rate", "1Ki", "--drain-timeout", "0.5")
    peers.client(server.relay_port, peers.service(echo).port)
    sock = peers.connect(server.service_port)
    sock.sendall(bytes(60_000))
    read_exactly(sock, 1)
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert 0.5 <= time.monotonic() - began < 0.5 + 2 * SOON
    with pytest.raises(ConnectionResetError):
        read_all(sock)


def test_the_opening_exchange_is_paced() -> None:
    with ExitStack() as stack:
        rig = Rig(stack, start=False)
        rig.splice.limit_rate(1024)
        flow = rig.splice.to_link
        rig.far_stream.sendall(bytes(20_000))
        flow.take(memoryview(bytearray(65536)))
        taken = flow._taken
        rig.start()
        rig.close()
        assert flow.pace and 0 < taken <= flow.pace.burst
