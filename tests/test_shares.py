"""What one address may take: handshakes, links and service connections."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from _tcprelay.addresses import address_group
from _tcprelay.link import Link
from _tcprelay.server.limits import Handshakes, Shares, bounds_of_handshakes
from _tcprelay.streams import Stream
from _tcprelay.tcp import Probing
from _tcprelay.values import parse_network
from tcprelay import ConnectionFailed, LinkRefused, LinkUp, RelayClient, RelayServer, Unpublished

from .certificates import Certificates, tls_context
from .conftest import Bench, connect_from, read_all, read_exactly, replace, wait_until


@pytest.mark.parametrize(
    ("address", "group"),
    [
        (("192.0.2.7", 50312), "192.0.2.7"),
        (("::ffff:192.0.2.7", 50312, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::9", 1, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        ("", "unix"),
    ],
)
def test_what_counts_as_one_address(address: Any, group: str) -> None:
    """An IPv4 address, however it is written; of IPv6 the network that one customer has."""
    assert address_group(address) == group


def test_shares_are_given_back() -> None:
    """An address gets so many, others are not concerned, and nothing is kept of who has left."""
    shares = Shares(2)
    one, other = ("192.0.2.1", 1), ("192.0.2.2", 1)
    assert [shares.enter(one), shares.enter(one), shares.enter(one)] == [True, True, False]
    assert shares.enter(other)
    shares.leave(one)
    assert shares.enter(one)
    for address in (one, one, other):
        shares.leave(address)
    assert not shares._counts


def test_no_limit_unless_one_is_set() -> None:
    shares = Shares(0)
    assert all(shares.enter(("192.0.2.1", 1)) for _ in range(1000))


def test_service_clients_of_one_address(bench: Bench) -> None:
    """Beyond its share an address is reset at once, with a record; others are served; who leaves makes room."""
    server = bench.server(max_per_address=2)
    bench.client(server, bench.service().port)
    port = server.service_addresses["default"][1]
    held = [connect_from(bench, "127.0.0.2", port) for _ in range(2)]
    for sock in held:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    with pytest.raises(ConnectionResetError):
        read_all(connect_from(bench, "127.0.0.2", port))
    [event] = bench.server_events.wait(ConnectionFailed)
    assert event.reason == "too many connections from its address at once (--max-per-address)"
    assert event.peer.startswith("127.0.0.2:")
    other = connect_from(bench, "127.0.0.3", port)
    other.sendall(b"y")
    assert read_exactly(other, 1) == b"y"
    held[0].close()
    wait_until(lambda: server._listeners.of_clients._counts["127.0.0.2"] == 1)
    again = connect_from(bench, "127.0.0.2", port)
    again.sendall(b"z")
    assert read_exactly(again, 1) == b"z"


def test_links_of_one_address(bench: Bench) -> None:
    """A relay client beyond its share is told so, and gets in when there is room; nothing is counted twice."""
    server = bench.server(max_links_per_address=3)
    first = bench.client(server, bench.service().port, num_conn=2)
    second = bench.enter(
        RelayClient("127.0.0.1", 1, "127.0.0.1", server.relay_address[1], 2, on_event=bench.client_events)
    )
    refused = bench.server_events.wait(LinkRefused)
    assert (refused[0].code, refused[0].peer[:10]) == ("limit", "127.0.0.1:")
    assert "--max-links-per-address" in refused[0].reason
    wait_until(lambda: second.counters["links_idle"] == 1)
    first.end(0)
    wait_until(lambda: second.counters["links_idle"] == 2)
    second.end(0)
    wait_until(lambda: not server._listeners.of_links._counts)


def test_a_relay_client_without_a_link_says_why(bench: Bench) -> None:
    """The limit of the server's side stands in the client's log."""
    server = bench.server(max_links_per_address=1)
    holder = Link(Stream(bench.enter(socket.create_connection(("127.0.0.1", server.relay_address[1]))), "x"), "client")
    wait_until(lambda: server._listeners.of_links._counts)
    bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", server.relay_address[1], 2, on_event=bench.client_events))
    [event] = bench.client_events.wait(Unpublished)
    assert event.reason.startswith("refused by the relay: there are too many links from its address")
    holder.close()
    bench.client_events.wait(LinkUp)


def test_silent_connections_of_one_address_are_cut_at_its_share(bench: Bench) -> None:
    """They are turned away in the acceptor, and another address gets its link."""
    server = bench.server(max_links_per_address=4)
    port = server.relay_address[1]
    silent = [connect_from(bench, "127.0.0.2", port) for _ in range(20)]
    bench.server_events.wait(LinkRefused, 16)
    client = bench.client(server, bench.service().port)
    assert client.counters["links_idle"] == 2
    wait_until(lambda: sum(not is_closed(sock) for sock in silent) == 4)


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed it; what it said before does not matter."""
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        assert error.errno in (errno.ECONNRESET, errno.EPIPE)
        return True


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), MemoryError("no")])
@pytest.mark.parametrize(("kind", "where"), [("client", "make_stream"), ("link", "make_stream"), ("link", "spread")])
def test_a_connection_that_cannot_be_taken_is_counted_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, where: str, error: Exception
) -> None:
    """Whatever is wrong between accept and its thread's first step: it is closed, and the next one is served."""
    server = bench.server(max_per_address=1, max_links_per_address=1)
    port = server.relay_address[1] if kind == "link" else server.service_addresses["default"][1]
    shares = server._listeners.of_links if kind == "link" else server._listeners.of_clients
    fail = Mock(side_effect=error)
    if where == "spread":
        monkeypatch.setattr(Probing, where, fail)
    else:
        replace(monkeypatch, where, fail)
    with pytest.raises(ConnectionResetError):
        read_all(connect_from(bench, "127.0.0.2", port))
    wait_until(lambda: not shares._counts)
    monkeypatch.undo()
    connect_from(bench, "127.0.0.2", port)
    wait_until(lambda: shares._counts)


# Handshakes


class Shaking:
    """Stands in for the stream of a handshake: what `Handshakes` knows of one."""

    def __init__(self, host: str) -> None:
        self.peer = (host, 1)
        self.woken = False

    def wake(self) -> None:
        self.woken = True


def handshakes_of(most: int, fractions: Iterator[float]) -> Any:
    """With chances that the test chooses; as `Any`, since it takes no real streams."""
    return Handshakes(most, lambda: next(fractions))


@pytest.mark.parametrize(
    ("chances", "unlucky"), [((0, 0), 0), ((0, 0.5), 2), ((0.5, 0.49), 3), ((0.99, 0.5), 4), ((1, 1), 4)]
)
def test_any_of_the_greediest_gives_way(chances: tuple[float, float], unlucky: int) -> None:
    """Chance takes one of the addresses that have the most, and one of its handshakes, old or new; no other's."""
    handshakes = handshakes_of(5, iter(chances))
    streams = [Shaking(host) for host in ("1.1.1.1", "3.3.3.3", "1.1.1.1", "2.2.2.2", "2.2.2.2")]
    for stream in streams:
        handshakes.enter(stream)
    assert not any(stream.woken for stream in streams)
    handshakes.enter(Shaking("4.4.4.4"))
    assert [number for number, stream in enumerate(streams) if stream.woken] == [unlucky]


def test_who_has_given_way_is_told_when_it_leaves(bench: Bench) -> None:
    """That is one step, so that nobody goes on as if nothing had been; leaving twice does no harm."""
    handshakes = handshakes_of(1, iter([0.0, 0.0]))
    first, second = Shaking("1.1.1.1"), Shaking("2.2.2.2")
    handshakes.enter(first)
    handshakes.enter(second)
    assert (handshakes.was_evicted(first), handshakes.was_evicted(second)) == (True, False)
    assert [handshakes.leave(first), handshakes.leave(second), handshakes.leave(second)] == [False, True, True]
    handshakes.enter(third := Shaking("3.3.3.3"))
    assert not third.woken, "both places are free"


def test_handshakes_are_fair_and_forgotten() -> None:
    """Through thousands of steps: never more than there may be, only the greediest lose, and nothing is kept."""
    chance = random.Random(11)
    handshakes = handshakes_of(50, iter(chance.random, None))
    present: list[Shaking] = []
    for _ in range(5000):
        if present and chance.random() < 0.4:
            assert handshakes.leave(present.pop(chance.randrange(len(present))))
        else:
            present.append(Shaking(f"10.0.0.{min(int(chance.expovariate(0.2)), 250)}"))
            handshakes.enter(present[-1])
        counts = Counter(stream.peer for stream in present)
        lost = [stream for stream in present if stream.woken]
        assert len(lost) == max(0, len(present) - 50)
        for stream in lost:
            assert counts[stream.peer] == max(counts.values())
            present.remove(stream)
            assert not handshakes.leave(stream)
    for stream in present:
        assert handshakes.leave(stream)
    assert not (handshakes._count or handshakes._streams or handshakes._addresses or handshakes._evicted)


@pytest.mark.parametrize(
    ("connections", "processes", "links", "clients"),
    [(100, 1, 256, 50), (1000, 1, 256, 256), (4000, 1, 1000, 1000), (100_000, 1, 2048, 2048), (4000, 4, 250, 250),
     (100, 32, 16, 1)],
)  # fmt: skip
def test_how_many_handshakes_there_may_be(connections: int, processes: int, links: int, clients: int) -> None:
    """A quarter of the connections, within bounds; of service clients never more than half; each worker its share."""
    assert bounds_of_handshakes(connections, processes) == (links, clients)


def test_each_port_has_its_bound_of_handshakes(bench: Bench) -> None:
    server = bench.server(max_connections=100)
    kept = server._links._handshakes._most, server._intake.serve_client.__self__._handshakes._most  # type: ignore[attr-defined]
    assert kept == bounds_of_handshakes(100, 1) == (256, 50)


def test_a_flood_of_handshakes_hits_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow one of another address stays, and a real relay client gets in."""
    replace(monkeypatch, "bounds_of_handshakes", lambda *_: (4, 4))
    server: RelayServer = bench.server()
    port = server.relay_address[1]
    slow = connect_from(bench, "127.0.0.3", port)
    wait_until(lambda: "127.0.0.3" in server._links._handshakes._streams)
    flood: list[socket.socket] = []
    for _ in range(30):
        with contextlib.suppress(ConnectionResetError):  # it may be refused before connect() returns
            flood.append(connect_from(bench, "127.0.0.2", port))
    refused = bench.server_events.wait(LinkRefused, 27)
    assert {event.peer.partition(":")[0] for event in refused} == {"127.0.0.2"}
    assert {event.reason for event in refused} == {"too many handshakes at once"}
    assert not is_closed(slow)
    wait_until(lambda: sum(not is_closed(sock) for sock in flood) == 3)
    bench.client(server, bench.service().port)
    assert not is_closed(slow)


def test_silent_service_clients_do_not_take_all_connections(bench: Bench, certificates: Certificates) -> None:
    """Where the service port speaks TLS, half of --max-connections is there for who has shaken hands."""
    files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="service", max_connections=8, token="t", **files)
    bench.client(server, bench.service().port, token="t")
    port = server.service_addresses["default"][1]
    silent = [connect_from(bench, "127.0.0.2", port) for _ in range(4)]
    for count in range(1, 17):
        with contextlib.suppress(ConnectionResetError):
            silent.append(connect_from(bench, "127.0.0.2", port))
        failed = bench.server_events.wait(ConnectionFailed, count)  # one has been displaced, and has left
    assert {event.reason for event in failed} == {"no TLS handshake: too many handshakes at once"}
    wait_until(lambda: sum(not is_closed(sock) for sock in silent) == 4)
    context = tls_context(ca=certificates.path("ca.pem"))
    with context.wrap_socket(bench.connect(server)) as end:
        end.sendall(b"x")
        assert end.recv(1) == b"x"


def test_a_limit_that_changes() -> None:
    """From the first one on it is counted, so that a limit that comes back finds what there is."""
    share = Shares(0)
    assert share.enter(ADDRESS)
    share.set(2, ())
    assert [share.enter(ADDRESS) for _ in range(3)] == [True, True, False]
    share.set(0, ())
    assert share.enter(ADDRESS)
    share.leave(ADDRESS)
    share.leave(ADDRESS)
    share.set(2, ())
    assert [share.enter(ADDRESS) for _ in range(2)] == [True, False]
    share.set(2, (parse_network("192.0.2.7"),))
    assert share.enter(ADDRESS)
    for _ in range(4):  # more than were counted
        share.leave(ADDRESS)
    share.set(2, ())
    assert [share.enter(ADDRESS) for _ in range(3)] == [True, True, False]


ADDRESS = ("192.0.2.7", 1)
