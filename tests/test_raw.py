"""``--wire raw``: node-tcp-relay's wire, without frames.  Its real programs are in test_peers.py."""

from __future__ import annotations

import select
import socket
import threading

import pytest

from _tcprelay.server.clients import ServiceClient
from _tcprelay.waiting import Deadline, wait_for
from tcprelay import ConnectionClosed, ConnectionFailed, LinkDown, LinkRefused, RelayClient, RelayServer, Unpublished

from .conftest import PATIENCE, Bench, connect, read_all, read_exactly, replace, wait_until


def raw_link(bench: Bench, server: RelayServer) -> socket.socket:
    """A raw link of a played client, in the pool."""
    idle = server.counters["links_idle"]
    link: socket.socket = bench.enter(connect(server.relay_address))
    wait_until(lambda: server.counters["links_idle"] == idle + 1)
    return link


def test_bytes_wait_for_a_link_and_then_pass_as_they_are(bench: Bench) -> None:
    """The server keeps what the service client sends early; no frame is on the link."""
    server = bench.server(wire="raw")
    sock = bench.connect(server)
    sock.sendall(b"question")
    sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: server.counters["waiting"] == 1)
    link = bench.enter(connect(server.relay_address))
    assert read_all(link) == b"question"
    link.sendall(b"answer")
    link.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"answer"
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert (closed.bytes_in, closed.bytes_out, closed.reason) == (8, 6, "")


def test_a_raw_link_serves_once(bench: Bench) -> None:
    """It is closed after its connection, and the client has opened another as soon as it was taken."""
    server = bench.relay(wire="raw")
    for number in range(5):
        with bench.connect(server) as sock:
            sock.sendall(b"%d" % number)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"%d" % number
    assert len(bench.server_events.wait(LinkDown, 5)) == 5
    wait_until(lambda: server.counters["links_idle"] == 2)


def test_who_leaves_without_a_byte_costs_no_raw_link(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do that only look whether the port is open: nothing would have reached the service."""
    server = bench.relay(wire="raw")
    real = ServiceClient.look

    def look(client: ServiceClient, waited: bool) -> None:
        wait_for(client.stream.fd, select.POLLIN, Deadline(PATIENCE))  # its end has come
        real(client, waited)

    monkeypatch.setattr(ServiceClient, "look", look)
    for _ in range(5):
        bench.connect(server).close()
    bench.server_events.wait(ConnectionFailed, 5)
    assert not bench.server_events.of(LinkDown)


def test_a_lost_raw_link_leaves_the_pool(bench: Bench) -> None:
    """The end of an idle link is noticed, and so is a peer that speaks before it is asked."""
    server = bench.server(wire="raw")
    raw_link(bench, server).close()
    bench.server_events.wait(LinkDown)
    raw_link(bench, server).sendall(b"GET / HTTP/1.1\r\n\r\n")
    reasons = [event.reason for event in bench.server_events.wait(LinkDown, 2)]
    assert reasons == ["the link was closed", "bytes on an idle link; does the other side speak --wire v1?"]
    assert server.counters["links_idle"] == 0


def test_a_service_that_is_down(bench: Bench) -> None:
    """The client resets the link, so that the service client sees an error."""
    service = bench.service()
    server = bench.server(wire="raw")
    bench.client(server, service.port, wire="raw")
    service.close()
    sock = bench.connect(server)
    sock.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.client_events.wait(ConnectionFailed)
    assert "connection refused" in failed.reason


def test_the_secret_of_node_tcp_relay(bench: Bench) -> None:
    """With --secret on both sides links are taken; bytes after the key belong to the connection."""
    server = bench.relay(wire="raw", secret="the key")
    sock = bench.connect(server)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"


@pytest.mark.parametrize("key", [b"the kez", b"GET / HTTP/1.1\r\n"])
def test_a_wrong_secret_is_refused(bench: Bench, key: bytes) -> None:
    """Nothing gets into the pool."""
    server = bench.server(wire="raw", secret="the key")
    with connect(server.relay_address) as link:
        link.sendall(key)
        with pytest.raises(ConnectionResetError):
            read_all(link)
    bench.server_events.wait(LinkRefused)
    assert server.counters["links_idle"] == 0


def test_protected_mode_holds_on_the_raw_wire(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw link from another host is closed, unless a secret or --allow-unauthenticated lifts it."""
    replace(monkeypatch, "is_loopback", lambda address: False)
    server = bench.server(wire="raw")
    with pytest.raises(ConnectionResetError), connect(server.relay_address) as link:
        link.recv(1)
    assert bench.server_events.wait(LinkRefused)[0].code == "protected"
    raw_link(bench, bench.server(wire="raw", allow_unauthenticated=True))


def test_a_client_that_speaks_frames_to_a_raw_server_is_told(bench: Bench) -> None:
    """The wires differ: the client ends up without a link, and its log asks the right question."""
    server = bench.server(wire="raw")
    bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", server.relay_address[1], 1, on_event=bench.client_events))
    [event] = bench.client_events.wait(Unpublished)
    assert event.reason
    [down, *_] = bench.server_events.wait(LinkDown)
    assert "--wire v1" in down.reason


@pytest.mark.parametrize("first", ["service client", "service"])
def test_a_half_closed_raw_connection_goes_on(bench: Bench, first: str) -> None:
    """The link's end is the end of one direction; the other may take its time."""
    pause = threading.Event()
    got: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        read_exactly(sock, 1)
        if first == "service":
            sock.shutdown(socket.SHUT_WR)
            got.append(read_all(sock))
        else:
            read_all(sock)
            pause.wait(1.5)  # longer than the watch over connections takes to look
            sock.sendall(b"late answer")

    sock = bench.connect(bench.relay(serve, wire="raw"))
    sock.sendall(b"x")
    if first == "service":
        assert read_all(sock) == b""
        pause.wait(1.5)
        sock.sendall(b"late request")
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: got == [b"late request"])
    else:
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"late answer"
