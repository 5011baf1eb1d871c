"""What one address may take: handshakes, links and service connections."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

import tcprelay_server
from tcprelay import ConnectionFailed, Link, LinkUp, RelayClient, RelayServer, Stream, address_group
from tcprelay_client import Unpublished
from tcprelay_server import LinkRefused, Shares

from .conftest import PATIENCE, Bench, read_all, read_exactly, wait_until


def connect_from(bench: Bench, host: str, port: int) -> socket.socket:
    """A connection from another address of loopback."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=(host, 0))
    return bench.enter(sock)  # type: ignore[no-any-return]


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
    wait_until(lambda: server.shares["client"]._counts["127.0.0.2"] == 1)
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
    wait_until(lambda: not server.shares["link"]._counts)


def test_a_relay_client_without_a_link_says_why(bench: Bench) -> None:
    """The limit of the server's side stands in the client's log."""
    server = bench.server(max_links_per_address=1)
    holder = Link(Stream(bench.enter(socket.create_connection(("127.0.0.1", server.relay_address[1]))), "x"), "client")
    wait_until(lambda: server.shares["link"]._counts)
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


def test_the_greediest_address_gives_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many handshakes the oldest of the address with the most ends: a slow one of another address stays."""
    monkeypatch.setattr(tcprelay_server, "MAX_HANDSHAKES", 4)
    server: RelayServer = bench.server()
    port = server.relay_address[1]
    slow = connect_from(bench, "127.0.0.3", port)
    wait_until(lambda: "127.0.0.3" in server._handshakes._streams)
    flood = [connect_from(bench, "127.0.0.2", port) for _ in range(30)]
    refused = bench.server_events.wait(LinkRefused, 27)
    assert {event.peer.partition(":")[0] for event in refused} == {"127.0.0.2"}
    assert not is_closed(slow)
    wait_until(lambda: sum(is_closed(sock) for sock in flood) == 27)
