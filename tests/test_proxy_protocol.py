"""The PROXY protocol before the relay server's ports, and from the relay client to its services."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tcprelay_client
import tcprelay_server
from _tcprelay.addresses import is_among, show_address
from _tcprelay.link import Link
from _tcprelay.protocol import AUTH, CHALLENGE, CLIENT, HELLO, REFUSED, START, WELCOME, Frame, prove
from _tcprelay.proxy_header import SIGNATURE, HeaderFault, encode_proxy_header
from _tcprelay.server.clients import ServiceClient, WaryStream
from _tcprelay.server.limits import Handshakes
from _tcprelay.server.proxies import glance
from _tcprelay.streams import Stream
from _tcprelay.values import parse_network
from _tcprelay.waiting import Deadline
from tcprelay import (
    ClientUp, ConnectionClosed, ConnectionFailed, ConnectionOpened, LinkDown, LinkRefused, LinkUp, RelayServer,
)  # fmt: skip

from .certificates import Certificates, tls_context
from .conftest import (
    PATIENCE, Bench, Service, connect_from, echo, read_all, read_exactly, replace, unused_port, wait_until,
)  # fmt: skip
from .ends import TLSEnd
from .peers import HOST, Peers, Program, RelayProcess, curl, find, free_port, run
from .peers_v1 import FakeServer
from .rigs import reset, tcp_pair

PROXY_HOST, OTHER_HOST = "127.0.0.2", "127.0.0.3"
"""The address of the proxy that is believed, and of somebody else."""
BELIEVE = {"accept_proxy_protocol": PROXY_HOST}
STRANGER = "192.0.2.7", 50312
LOCAL, UNKNOWN = SIGNATURE + b"\x20\0\0\0", b"PROXY UNKNOWN\r\n"
UNTRUSTED = "it sent a PROXY protocol header, and --accept-proxy-protocol does not name its address"
MISSING = "no PROXY protocol header came; "


def header_of(version: int, host: str = STRANGER[0], port: int = STRANGER[1]) -> bytes:
    return encode_proxy_header(version, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "198.51.100.1:443")


def service_port(server: RelayServer) -> int:
    return server.service_addresses["default"][1]


def through(bench: Bench, port: int, data: bytes, host: str = PROXY_HOST) -> socket.socket:
    """A connection from the proxy, or from another address, that begins so."""
    sock = connect_from(bench, host, port)
    sock.sendall(data)
    return sock


def is_reset(sock: socket.socket) -> bool:
    """Whether the relay resets a connection, of which nothing came."""
    try:
        return sock.recv(1) == b"never"
    except ConnectionResetError:
        return True


class LinkThrough(Link):
    """A played relay client's link that begins with a header."""

    def __init__(self, bench: Bench, server: RelayServer, header: bytes, host: str = PROXY_HOST) -> None:
        sock = through(bench, server.relay_address[1], header, host)
        sock.settimeout(None)
        super().__init__(Stream(sock, "the server"), CLIENT)

    def __enter__(self) -> LinkThrough:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hello(self, **fields: object) -> Frame:
        own = {"version": 1, "service": "default", "client": "played", "name": "played", "nonce": "00"}
        self.send(HELLO, {**own, **fields})
        return self.receive(Deadline(PATIENCE))


# --- In: who is believed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "peer"),
    [
        (header_of(1), "192.0.2.7:50312"),
        (header_of(2), "192.0.2.7:50312"),
        (header_of(1, "2001:db8::7"), "[2001:db8::7]:50312"),
        (header_of(2, "2001:db8::7"), "[2001:db8::7]:50312"),
        (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 50312 443\r\n", "192.0.2.7:50312"),
        (SIGNATURE + b"\x21\x11\0\x14" + bytes([192, 0, 2, 7, 1, 1, 1, 1, 196, 136, 0, 1]) + b"\x04\0\x05hello",
         "192.0.2.7:50312"),
    ],
)  # fmt: skip
def test_the_service_client_s_own_address_stands_in_all_records(bench: Bench, header: bytes, peer: str) -> None:
    """Of both roles; and the service gets what stands behind the header, to the byte."""
    server = bench.server(**BELIEVE)
    client = bench.client(server, bench.service().port)
    sock = through(bench, service_port(server), header + b"hello")
    assert read_exactly(sock, 5) == b"hello"
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""
    for events in (bench.server_events, bench.client_events):
        [opened], [closed] = events.wait(ConnectionOpened), events.wait(ConnectionClosed)
        assert opened.peer == closed.peer == peer
        assert (closed.bytes_in, closed.bytes_out, closed.reason) == (5, 5, "")
    assert client.counters["bytes_in"] == 5


@pytest.mark.parametrize("header", [header_of(1), header_of(2), UNKNOWN, LOCAL, header_of(2, "2001:db8::7")])
def test_a_header_that_comes_byte_by_byte(bench: Bench, header: bytes) -> None:
    """It is waited for, and nothing behind it is taken for a part of it: not a line feed, nor a second header."""
    server = bench.server(**BELIEVE)
    bench.client(server, bench.service().port)
    sock = connect_from(bench, PROXY_HOST, service_port(server))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    behind = b"\n" + header + b"\r\n"
    for number in range(len(header)):
        sock.sendall(header[number : number + 1])
    sock.sendall(behind)
    assert read_exactly(sock, len(behind)) == behind


@pytest.mark.parametrize("header", [UNKNOWN, b"PROXY UNKNOWN ff::1 x 1 2\r\n", LOCAL, SIGNATURE + b"\x21\0\0\2hi"])
def test_a_header_that_names_nobody_leaves_the_address(bench: Bench, header: bytes) -> None:
    """The connection's own stays."""
    server = bench.server(**BELIEVE)
    bench.client(server, bench.service().port)
    sock = through(bench, service_port(server), header + b"x")
    assert read_exactly(sock, 1) == b"x"
    [opened] = bench.server_events.wait(ConnectionOpened)
    assert opened.peer == "{}:{}".format(*sock.getsockname())


@pytest.mark.parametrize("version", [1, 2])
def test_a_relay_client_s_own_address_stands_in_all_events(bench: Bench, version: int) -> None:
    """Of those that get a link, and of those that are refused."""
    server = bench.server(allow_unauthenticated=True, **BELIEVE)
    link = bench.enter(LinkThrough(bench, server, header_of(version)))
    assert link.hello(service="nope").kind == REFUSED
    [refused] = bench.server_events.wait(LinkRefused)
    assert refused.peer == "192.0.2.7:50312"
    link = bench.enter(LinkThrough(bench, server, header_of(version)))
    assert link.hello().kind == WELCOME
    [up], [client] = bench.server_events.wait(LinkUp), bench.server_events.wait(ClientUp)
    assert (up.peer, client.peer) == ("192.0.2.7:50312", "192.0.2.7")


def test_nonces_are_for_the_address_in_the_header(bench: Bench) -> None:
    """One proxy has the relay clients of many: what was handed out to one of them is worth nothing to another."""
    server = bench.server(token="secret-token", **BELIEVE)

    def prove_with(nonce: str, host: str) -> Frame:
        link: LinkThrough = bench.enter(LinkThrough(bench, server, header_of(2, host)))
        return link.hello(server_nonce=nonce, proof=proof(nonce))

    def proof(nonce: str) -> str:
        return prove(b"secret-token", CLIENT, "00", nonce, "default", "played")

    link = bench.enter(LinkThrough(bench, server, header_of(2)))
    link.send(AUTH, {"proof": proof(link.hello().text("nonce"))})
    welcome = link.receive(Deadline(PATIENCE))
    mine, other = welcome.texts("nonces", 2)
    assert prove_with(other, "192.0.2.8").kind == CHALLENGE
    assert prove_with(mine, STRANGER[0]).kind == WELCOME


@pytest.mark.parametrize(
    ("header", "is_local"),
    [(header_of(1), False), (header_of(2), False), (header_of(2, "2001:db8::7"), False),
     (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n", False), (header_of(1, "127.0.0.9"), True),
     (header_of(2, "::1"), True), (LOCAL, True)],
)  # fmt: skip
def test_protected_mode_judges_the_address_in_the_header(bench: Bench, header: bytes, is_local: bool) -> None:
    """A proxy on this machine does not make strangers local."""
    server = bench.server(**BELIEVE)
    link = bench.enter(LinkThrough(bench, server, header))
    if is_local:
        assert link.hello().kind == WELCOME
    else:
        refused = link.receive(Deadline(PATIENCE))
        assert (refused.kind, refused.fields["code"]) == (REFUSED, "protected")


def test_a_proxy_has_more_connections_than_an_address_may_have(bench: Bench) -> None:
    """Its own limits count; and another address is counted as ever."""
    server = bench.server(max_per_address=1, max_links_per_address=1, allow_unauthenticated=True, **BELIEVE)
    bench.client(server, bench.service().port, num_conn=1)
    for _ in range(3):
        link = bench.enter(LinkThrough(bench, server, header_of(1)))
        assert link.hello(service="nope").kind == REFUSED
    held = [through(bench, service_port(server), header_of(1)) for _ in range(3)]
    wait_until(lambda: server.counters["open"] + server.counters["waiting"] >= 3)
    for sock in held:
        sock.close()
    first = connect_from(bench, OTHER_HOST, service_port(server))
    assert is_reset(connect_from(bench, OTHER_HOST, service_port(server)))
    first.close()
    wait_until(lambda: not server._listeners.of_clients._counts)
    assert {event.peer for event in bench.server_events.of(ConnectionFailed) if "--max-per-address" in event.reason}


# --- In: faults -----------------------------------------------------------------------------------------------

NO_HEADERS = [
    (b"GET / HTTP/1.1\r\n\r\n", "it began with something else"),
    (b"\x16\x03\x01", "it began with something else"),
    (b"PROXY TCP4 192.0.2.7 192.0.2.1 1 65536\r\n", "its line is malformed"),
    (b"PROXY UNKNOWN " + b"x" * 200, "its line has more than 107 bytes"),
    (SIGNATURE + b"\x21\x11\xff\xff", "it has more than 4112 bytes"),
    (SIGNATURE + b"\x21\x11\0\2hi", "it is too short for its addresses"),
]


@pytest.mark.parametrize("port", ["service", "relay"])
@pytest.mark.parametrize(("data", "why"), NO_HEADERS)
def test_a_proxy_that_sends_no_header_is_reset(bench: Bench, port: str, data: bytes, why: str) -> None:
    """With one record that says so, and under the proxy's own address; others are served meanwhile."""
    server = bench.server(**BELIEVE)
    bench.client(server, bench.service().port)
    number = service_port(server) if port == "service" else server.relay_address[1]
    sock = through(bench, number, data)
    assert is_reset(sock)
    [event] = bench.server_events.wait(ConnectionFailed if port == "service" else LinkRefused)
    assert event.reason == f"{MISSING}{why} (--accept-proxy-protocol names its address)"
    assert event.peer.startswith(f"{PROXY_HOST}:")
    assert not bench.server_events.of(ConnectionOpened)
    end = bench.connect(server)
    end.sendall(b"x")
    assert read_exactly(end, 1) == b"x"


@pytest.mark.parametrize("port", ["service", "relay"])
@pytest.mark.parametrize("data", [b"", b"PROXY TCP4 192.0.2.7", SIGNATURE])
def test_a_proxy_that_falls_silent_is_reset(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, port: str, data: bytes
) -> None:
    """At the deadline of a handshake's step."""
    replace(monkeypatch, "HANDSHAKE_STEP", 0.2)
    server = bench.server(**BELIEVE)
    number = service_port(server) if port == "service" else server.relay_address[1]
    assert is_reset(through(bench, number, data))
    [event] = bench.server_events.wait(ConnectionFailed if port == "service" else LinkRefused)
    assert event.reason.startswith(f"{MISSING}nothing, or a part of one, within 0.2 s")


@pytest.mark.parametrize("port", ["service", "relay"])
@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("tls", [False, True])
def test_a_health_check_makes_no_noise(
    bench: Bench, certificates: Certificates, caplog: pytest.LogCaptureFixture, port: str, how: str, tls: bool
) -> None:
    """One that connects and closes without a byte; and to the relay port one behind LOCAL or UNKNOWN, too."""
    caplog.set_level(logging.DEBUG, "tcprelay.server")
    server = bench.server(**BELIEVE, **(secure(certificates) if tls else {}))
    number = service_port(server) if port == "service" else server.relay_address[1]
    datas = [b""] if port == "service" else [b"", LOCAL, UNKNOWN]
    for data in datas:
        sock = through(bench, number, data)
        (reset if how == "reset" else socket.socket.close)(sock)
    wait_until(lambda: len([r for r in caplog.records if "from 127.0.0.2:" in r.getMessage()]) == len(datas))
    assert {r.levelname for r in caplog.records if "from 127.0.0.2:" in r.getMessage()} == {"DEBUG"}
    assert not bench.server_events.of(ConnectionFailed)
    assert not bench.server_events.of(LinkRefused)
    wait_until(lambda: not server.counters["waiting"])


def secure(certificates: Certificates) -> dict[str, object]:
    """TLS on both ports."""
    return {
        "tls": "both",
        "token": "t",
        "cert": certificates.path("server.pem"),
        "key": certificates.path("server.key"),
    }


def test_half_a_header_is_no_health_check(bench: Bench) -> None:
    server = bench.server(**BELIEVE)
    through(bench, service_port(server), b"PROXY TCP4").close()
    [event] = bench.server_events.wait(ConnectionFailed)
    assert event.reason.startswith(f"{MISSING}the connection was closed")


@pytest.mark.parametrize("header", [header_of(1), header_of(2), LOCAL, UNKNOWN])
@pytest.mark.parametrize("tls", [False, True])
def test_a_header_from_anybody_else_is_refused(
    bench: Bench, certificates: Certificates, header: bytes, tls: bool
) -> None:
    """On both ports, plain ones and those that speak TLS; and the service gets nothing of it."""
    got = bytearray()
    server = bench.server(**BELIEVE, **(secure(certificates) if tls else {}))
    own = {"tls": "true", "token": "t", "reject_unauthorized": False} if tls else {}
    bench.client(server, bench.service(lambda sock: got.extend(sock.recv(100))).port, **own)
    is_reset(through(bench, server.relay_address[1], header, OTHER_HOST))
    [refused] = bench.server_events.wait(LinkRefused)
    assert refused.reason == UNTRUSTED
    sock = through(bench, service_port(server), header, OTHER_HOST)
    assert is_reset(sock)
    reason = ends_of_all(bench)
    assert {e.code for e in bench.server_events.of(ConnectionFailed)} <= {"tls" if tls else "protocol"}
    before = "no TLS handshake" if tls else f"service client {show_address(sock.getsockname())}"
    assert reason == f"{before}: {UNTRUSTED}"
    assert not got


def ends_of_all(bench: Bench) -> str:
    """Why the first connection was refused, or broken off where it was opened already."""
    kinds = ConnectionFailed, ConnectionClosed
    events = wait_until(lambda: [e for kind in kinds for e in bench.server_events.of(kind)])
    return str(events[0].reason)


@pytest.mark.parametrize("header", [header_of(1), header_of(2)])
def test_a_header_from_anybody_else_in_pieces(bench: Bench, header: bytes) -> None:
    """As soon as it can be told; what the service gets before is no header."""
    got, ended = bytearray(), []

    def serve(sock: socket.socket) -> None:
        try:
            while piece := sock.recv(100):
                got.extend(piece)
        finally:
            ended.append(True)

    server = bench.server(**BELIEVE)
    bench.client(server, bench.service(serve).port)
    sock = connect_from(bench, OTHER_HOST, service_port(server))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):  # the first call that meets the reset
        for number in range(len(header)):
            sock.sendall(header[number : number + 1])
        sock.recv(1)
    assert ends_of_all(bench).endswith(UNTRUSTED)
    assert len(got) < 12
    assert not got.startswith(b"PROXY ")


@pytest.mark.parametrize("header", [header_of(1), header_of(2)])
@pytest.mark.parametrize("where", ["opening", "pumps", "raw", "paced"])
def test_a_header_from_anybody_else_behind_the_service_s_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, header: bytes, where: str
) -> None:
    """However late it comes: a piece of it that may be anything has been answered before the next one is sent."""
    replace(monkeypatch, "OPENING_TIME", 6 * PATIENCE if where == "opening" else 0.0)
    mark = b"PROXY " if header.startswith(b"PROXY ") else SIGNATURE
    wire = "raw" if where == "raw" else "v1"
    server = bench.server(**BELIEVE, wire=wire, **({"limit_rate": "1Mi"} if where == "paced" else {}))
    bench.client(server, bench.service().port, wire=wire)
    sock = connect_from(bench, OTHER_HOST, service_port(server))
    for number in range(len(mark) - 1):
        sock.sendall(mark[number : number + 1])
        assert sock.recv(1) == mark[number : number + 1]
    bench.server_events.wait(ConnectionOpened)
    sock.sendall(header[len(mark) - 1 :])
    assert is_reset(sock)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason == f"service client {closed.peer}: {UNTRUSTED}"
    assert (closed.bytes_in, closed.bytes_out) == (len(mark) - 1, len(mark) - 1)


def test_what_another_process_has_received_counts() -> None:
    """A service client may be handed over in the midst of a header."""
    near, far = tcp_pair()
    with near, far:
        before = Stream(near, "service client 192.0.2.7:1")
        far.sendall(b"PRO")
        assert before.recv_into(memoryview(bytearray(9))) == 3
        stream = WaryStream(before, b"PRO")
        assert (stream.received, stream.name) == (3, before.name)
        far.sendall(b"XY ")
        with pytest.raises(HeaderFault, match="does not name its address"):
            stream.recv_into(memoryview(bytearray(9)))


def test_what_only_begins_like_a_header_is_served(bench: Bench) -> None:
    """And so is anything else, from whoever is not a proxy that is believed."""
    server = bench.server(**BELIEVE)
    bench.client(server, bench.service().port)
    for data in (b"PROXX UNKNOWN\r\n", b"\r\n\r\nGET /", b"P", b"hello PROXY "):
        sock = through(bench, service_port(server), data[:1], OTHER_HOST)
        assert read_exactly(sock, 1) == data[:1]
        sock.sendall(data[1:])
        assert read_exactly(sock, len(data) - 1) == data[1:]
        sock.close()


@pytest.mark.parametrize("header", [header_of(1), header_of(2)])
def test_without_the_option_nothing_changes(bench: Bench, header: bytes) -> None:
    """A header passes to the service untouched; and at the relay port it is told which option believes it."""
    server = bench.relay()
    sock = through(bench, service_port(server), header + b"x")
    assert read_exactly(sock, len(header) + 1) == header + b"x"
    [opened] = bench.server_events.wait(ConnectionOpened)
    assert opened.peer == "{}:{}".format(*sock.getsockname())
    through(bench, server.relay_address[1], header)
    [refused] = bench.server_events.wait(LinkRefused)
    assert refused.reason == (
        "it sent a PROXY protocol header; --accept-proxy-protocol is to name its address, if it is your proxy"
    )


@pytest.mark.parametrize("port", ["service", "relay"])
def test_silent_ones_are_bounded_as_handshakes_are(bench: Bench, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    """They displace each other, and not somebody else's connections; no place in the queue is theirs."""
    replace(monkeypatch, "bounds_of_handshakes", lambda *_: (4, 4))
    server = bench.server(**BELIEVE)
    number = service_port(server) if port == "service" else server.relay_address[1]
    silent = [connect_from(bench, PROXY_HOST, number) for _ in range(4)]
    for count in range(1, 9):
        with contextlib.suppress(ConnectionResetError):  # it may be refused before connect() returns
            silent.append(connect_from(bench, PROXY_HOST, number))
        refused = bench.server_events.wait(ConnectionFailed if port == "service" else LinkRefused, count)
    assert {event.reason for event in refused} == {"too many handshakes at once"}
    assert server._pool._expected == {"default": 0}
    bench.client(server, bench.service().port)
    end = bench.connect(server)
    end.sendall(b"x")
    assert read_exactly(end, 1) == b"x"


def test_a_silent_one_does_not_keep_the_server_from_ending(bench: Bench) -> None:
    server = bench.server(**BELIEVE)
    held = [connect_from(bench, PROXY_HOST, port) for port in (service_port(server), server.relay_address[1])]
    wait_until(lambda: all(shakes._count == 1 for shakes in (server._links._handshakes, of_clients(server))))
    server.end()
    assert all(is_reset(sock) for sock in held)
    assert {event.reason for event in bench.server_events.wait(ConnectionFailed)} == {"the relay server is ending"}


def of_clients(server: RelayServer) -> Handshakes:
    found: Handshakes = server._intake.serve_client.__self__._handshakes  # type: ignore[attr-defined]
    return found


def test_who_is_refused_before_the_header_is_read_has_the_right_record(bench: Bench) -> None:
    """Its header is looked at, and that is all: here there is no place for one more connection."""
    server = bench.server(max_connections=1, **BELIEVE)
    bench.client(server, bench.service().port)
    first = through(bench, service_port(server), header_of(1) + b"x")
    assert read_exactly(first, 1) == b"x"
    held_back = gate(server)
    second = through(bench, service_port(server), header_of(2, "192.0.2.8"))
    held_back.set()
    assert is_reset(second)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason == "too many connections at once (--max-connections)"
    assert failed.peer == "192.0.2.8:50312"


def gate(server: RelayServer) -> threading.Event:
    """What holds the next service client back, before a place is looked for, until it is set."""
    places, enter, event = server.runtime.places, server.runtime.places.enter, threading.Event()
    places.enter = lambda: event.wait(PATIENCE) and enter()  # type: ignore[method-assign]
    return event


def test_a_glance_takes_nothing() -> None:
    """And nothing is believed that is not a whole header, or comes from elsewhere."""
    near, far = tcp_pair()
    with near, far:
        networks = [parse_network("127.0.0.0/8")]
        for held, source in ((b"", None), (b"PROXY TCP4 192", None), (header_of(1), STRANGER)):
            sent = held[len(received(near)) :]
            far.sendall(sent)
            wait_until(partial(is_here, near, held))
            assert glance(near, far.getsockname(), networks) == (source or far.getsockname())
            assert received(near) == held
        assert glance(near, far.getsockname(), [parse_network("192.0.2.0/24")]) == far.getsockname()


def is_here(sock: socket.socket, data: bytes) -> bool:
    return received(sock) == data


def received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def test_the_bytes_of_a_header_count_as_received() -> None:
    """Without them a reset of a connection on which one came would be taken for an end: see `Stream.believe_end`."""
    near, far = tcp_pair()
    with far:
        client = ServiceClient("default", near, far.getsockname())
        client.early += b"hello"
        client.introduce(STRANGER, 30)
        again = ServiceClient("default", near, far.getsockname())
        again.resume({**client.state, "waited": 0.0, "queued": False}, bytes(client.early))
        assert (again.peer, again.record["peer"], again.stream.name) == (
            "192.0.2.7:50312", "192.0.2.7:50312", "service client 192.0.2.7:50312",
        )  # fmt: skip
        assert (again.stream.received, again.address) == (35, far.getsockname())
        near.close()


# --- Real proxies before the relay server ---------------------------------------------------------------------


def haproxy(peers: Peers, *sections: str) -> Program:
    """HAProxy, once it listens; its log is its output."""
    config = peers.path / "haproxy.cfg"
    defaults = "defaults\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n log global"
    config.write_text("\n".join(["global\n log stdout format raw local0", defaults, *sections, ""]))
    program = peers.program(find("haproxy"), "-f", str(config), "-db")
    for port in re.findall(rf"bind {HOST}:(\d+)", config.read_text()):
        program.wait_until_listening(int(port))
    return program


def proxied(peers: Peers, server: RelayProcess, version: int) -> tuple[int, int]:
    """HAProxy, at the address that is believed, before the service port and the relay port; returns its own ports."""
    ports = free_port(), free_port()
    send = "send-proxy" if version == 1 else "send-proxy-v2"
    names = zip(("service", "relay"), ports, (server.service_port, server.relay_port), strict=True)
    haproxy(peers, *(
        f"listen {name}\n mode tcp\n bind {HOST}:{port}\n server s {HOST}:{to} {send} source {PROXY_HOST}"
        for name, port, to in names
    ))  # fmt: skip
    return ports


@pytest.mark.peer("haproxy")
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_haproxy_before_both_ports(peers: Peers, certificates: Certificates, version: int, tls: bool) -> None:
    """The records of both roles have the service client's own address, and the server's the relay client's; TLS passes
    through."""
    pair = "--cert", certificates.path("server.pem"), "--key", certificates.path("server.key")
    secured = ["--tls", "both", "--token", "t", *pair] if tls else []
    server = peers.server("--accept-proxy-protocol", PROXY_HOST, *secured)
    port, relay_port = proxied(peers, server, version)
    trust = ["--tls", "true", "--token", "t", "--reject-unauthorized", "false"] if tls else []
    client = peers.client(relay_port, peers.service(echo).port, *trust)
    assert server.wait_event("ClientUp")["peer"] == HOST
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        sock.bind((OTHER_HOST, 0))
        sock.connect((HOST, port))
        own = "{}:{}".format(*sock.getsockname())
        if tls:
            sock.settimeout(None)
        with TLSEnd(sock, tls_context(), False) if tls else sock as end:
            end.sendall(b"hello")
            end.shutdown(socket.SHUT_WR)
            assert end.recv(100) == b"hello"
            assert end.recv(100) == b""
    for role in (server, client):
        assert role.wait_event("ConnectionOpened")["peer"] == own
        closed = role.wait_event("ConnectionClosed")
        assert (closed["peer"], closed["bytes_in"], closed["reason"]) == (own, 5, "")


@pytest.mark.peer("haproxy")
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("version", [1, 2])
def test_haproxy_checks_both_ports(peers: Peers, version: int) -> None:
    """Its health checks find them up, and make no noise."""
    server = peers.server("--accept-proxy-protocol", PROXY_HOST, "--log-level", "debug")
    peers.client(server.relay_port, peers.service(echo).port)
    port = free_port()
    send = "send-proxy" if version == 1 else "send-proxy-v2"
    program = haproxy(
        peers, f"""listen checked
 mode tcp
 bind {HOST}:{port}
 server service {HOST}:{server.service_port} {send} source {PROXY_HOST} check inter 100ms
 server relay {HOST}:{server.relay_port} {send} source {PROXY_HOST} check inter 100ms""",
    )  # fmt: skip

    def seen(what: str) -> list[str]:
        return [line for line in list(server.lines) if f"{what} from {PROXY_HOST}:" in line]

    wait_until(lambda: len(seen("link")) >= 3 and len(seen("connection")) >= 3)
    assert not [line for line in program.lines if "DOWN" in line]
    assert not [line for line in server.lines if '"warning"' in line]


@pytest.mark.usefixtures("workers")
def test_faults_of_a_proxy_and_of_others(peers: Peers) -> None:
    """Each has one record that says so, with worker processes as without."""
    server = peers.server("--accept-proxy-protocol", PROXY_HOST)
    peers.client(server.relay_port, peers.service(echo).port, "--num-conn", "2")

    def say(port: int, data: bytes, host: str) -> bool:
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.bind((host, 0))
            sock.connect((HOST, port))
            sock.sendall(data)
            return is_reset(sock)

    assert say(server.service_port, b"hello", PROXY_HOST)
    assert server.wait_event("ConnectionFailed")["reason"].startswith(MISSING)
    assert say(server.relay_port, b"hello", PROXY_HOST)
    assert server.wait_event("LinkRefused")["reason"].startswith(MISSING)
    assert say(server.service_port, header_of(2), OTHER_HOST)
    server.wait_for(lambda line: "Connection" in line and UNTRUSTED in line)
    say(server.relay_port, header_of(2), OTHER_HOST)
    server.wait_event("LinkRefused", reason=UNTRUSTED)
    say(server.relay_port, header_of(2), PROXY_HOST)
    assert server.wait_event("LinkRefused", code="protected")["peer"] == "192.0.2.7:50312"


@pytest.mark.usefixtures("workers")
def test_a_service_client_that_nobody_serves_has_its_own_address(peers: Peers) -> None:
    """With workers it waits in the parent, which reads no header, and only looks at it."""
    server = peers.server("--accept-proxy-protocol", PROXY_HOST, "--pair-timeout", "0.3")
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        sock.bind((PROXY_HOST, 0))
        sock.connect((HOST, server.service_port))
        sock.sendall(header_of(2))
        assert is_reset(sock)
    assert server.wait_event("ConnectionFailed")["peer"] == "192.0.2.7:50312"


def test_a_service_client_that_is_passed_on_is_not_asked_again(peers: Peers) -> None:
    """From a worker whose relay client cannot reach the service to another one's, or to nobody."""
    server = peers.server("--workers", "2", "--accept-proxy-protocol", PROXY_HOST)
    dead = unused_port()
    peers.client(server.relay_port, dead, "--num-conn", "1")
    live = peers.client(server.relay_port, peers.service(echo).port, "--num-conn", "1")
    data = b"PROXY hello\r\n"  # which is the service's

    def ask() -> bytes:
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.bind((PROXY_HOST, 0))
            sock.connect((HOST, server.service_port))
            sock.sendall(header_of(1) + data)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    for _ in range(8):
        assert ask() == data
        wait_until(lambda: len(server.events("ConnectionClosed")) == len(server.events("ConnectionOpened")))
    for event in server.events("ConnectionOpened") + server.events("ConnectionClosed"):
        assert event["peer"] == "192.0.2.7:50312"
    live.signal(signal.SIGTERM)
    assert live.wait() == 0
    server.wait_event("ClientDown")
    with pytest.raises(ConnectionResetError):
        ask()
    failed = server.wait_event("ConnectionFailed")
    assert failed["peer"] == "192.0.2.7:50312"
    assert "the service cannot be reached" in failed["reason"]


# --- Out: to the services -------------------------------------------------------------------------------------


class Told:
    """A service that keeps what each connection to it begins with, up to its end."""

    def __init__(self, make: Callable[..., Service], **where: object) -> None:
        self.got: list[bytes] = []
        self.service = make(self._serve, **where)

    def _serve(self, sock: socket.socket) -> None:
        self.got.append(read_all(sock))
        sock.sendall(b"bye")

    def wait(self) -> bytes:
        return bytes(wait_until(lambda: self.got and self.got.pop(0)))


def ask_from(bench: Bench, server: RelayServer, host: str, service: str = "default") -> str:
    """Have a service client ask; returns its address."""
    sock = through(bench, server.service_addresses[service][1], b"question", host)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"bye"
    return "{}:{}".format(*sock.getsockname())


@pytest.mark.parametrize("version", [1, 2])
def test_a_service_is_told_of_its_client(bench: Bench, version: int) -> None:
    """Before the first byte; and the header is not counted."""
    server, told = bench.server(), Told(bench.service)
    bench.client(server, told.service.port, proxy_protocol=f"v{version}")
    own = ask_from(bench, server, OTHER_HOST)
    assert told.wait() == encode_proxy_header(version, own, f"127.0.0.1:{service_port(server)}") + b"question"
    for events in (bench.server_events, bench.client_events):
        [closed] = events.wait(ConnectionClosed)
        assert (closed.bytes_in, closed.bytes_out, closed.reason) == (8, 3, "")


def test_each_service_is_told_in_its_own_version(bench: Bench) -> None:
    """What is said without a name is for all the others."""
    server = bench.server(service=["web=0", "ssh=0"])
    tolds = {name: Told(bench.service) for name in ("default", "web", "ssh")}
    publish = [f"{name}=127.0.0.1:{tolds[name].service.port}" for name in ("web", "ssh")]
    bench.client(server, tolds["default"].service.port, publish=publish, proxy_protocol=["v2", "web=v1"])
    for name, begin in (("default", SIGNATURE), ("web", b"PROXY TCP4 127.0.0.3 "), ("ssh", SIGNATURE)):
        ask_from(bench, server, OTHER_HOST, name)
        assert tolds[name].wait().startswith(begin)


def test_only_the_service_that_is_named_is_told(bench: Bench) -> None:
    server, plain, web = bench.server(service="web=0"), Told(bench.service), Told(bench.service)
    publish = f"web=127.0.0.1:{web.service.port}"
    bench.client(server, plain.service.port, publish=publish, proxy_protocol="web=v1")
    ask_from(bench, server, OTHER_HOST)
    assert plain.wait() == b"question"
    ask_from(bench, server, OTHER_HOST, "web")
    assert web.wait().startswith(b"PROXY TCP4 127.0.0.3 ")


def test_a_service_at_a_unix_socket_is_told(bench: Bench, tmp_path: Path) -> None:
    def make(serve: Callable[[socket.socket], object], path: str) -> Service:
        service = Service(serve, path)
        bench.enter(contextlib.closing(service))
        return service

    server, told = bench.server(), Told(make, path=str(tmp_path / "service"))
    client = tcprelay_client.RelayClient(
        f"unix:{tmp_path / 'service'}", None, "127.0.0.1", server.relay_address[1], 1, proxy_protocol="v1",
        try_service=False, drain_timeout=0.0,
    )  # fmt: skip
    bench.enter(client)
    own = ask_from(bench, server, OTHER_HOST)
    assert told.wait() == encode_proxy_header(1, own, f"127.0.0.1:{service_port(server)}") + b"question"


def test_addresses_of_two_families_are_written_as_ipv6(bench: Bench) -> None:
    """In and out at once: what a believed proxy says is passed on."""
    server, told = bench.server(**BELIEVE), Told(bench.service)
    bench.client(server, told.service.port, proxy_protocol="v1")
    sock = through(bench, service_port(server), header_of(2, "2001:db8::7"))
    sock.shutdown(socket.SHUT_WR)
    read_all(sock)
    assert told.wait() == f"PROXY TCP6 2001:db8::7 ::ffff:127.0.0.1 50312 {service_port(server)}\r\n".encode()


@pytest.mark.parametrize("version", [1, 2])
def test_an_address_that_is_not_known(bench: Bench, version: int) -> None:
    """A relay server that is not ours may say anything, or nothing."""
    relay, told = bench.enter(FakeServer()), Told(bench.service)
    client = tcprelay_client.RelayClient(
        "127.0.0.1", told.service.port, "127.0.0.1", relay.port, 1, proxy_protocol=f"v{version}", try_service=False,
        drain_timeout=0.0,
    )  # fmt: skip
    bench.enter(client)
    link = relay.accept()
    relay.welcome(link)
    link.send(START, {"id": "1", "client": "x\r\nPROXY:1", "waiting": 0})
    link.stream.send(link.pack_end())
    assert told.wait() == (UNKNOWN if version == 1 else LOCAL)


def test_the_look_at_a_service_sends_a_header_that_says_nothing(bench: Bench) -> None:
    """Services that wait for one log an error otherwise."""
    server, told = bench.server(), Told(bench.service)
    bench.client(server, told.service.port, proxy_protocol="v1", try_service=True)
    assert told.wait() == UNKNOWN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v3"], "expected v1 or v2, with a service before it as in web=v2"),
        (["web="], "expected v1 or v2, with a service before it as in web=v2"),
        (["=v1"], "expected a name of 1 to 64 letters"),
        (["web=v1"], "--proxy-protocol: no service is named web"),
        (["v1", "v2"], "--proxy-protocol stands there twice for all services"),
        (["default=v1", "default=v1"], "--proxy-protocol stands there twice for default"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_the_start(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for value in words for word in ("--proxy-protocol", value)]
    with pytest.raises(SystemExit) as caught:
        tcprelay_client.main(["relay:1080", "22", *options, "--check"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_it_is_of_no_use_on_the_raw_wire(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody tells the address."""
    with pytest.raises(SystemExit):
        tcprelay_client.main(["relay:1080", "22", "--proxy-protocol", "v1", "--wire", "raw", "--check"])
    assert "--proxy-protocol is of no use with --wire raw" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "192.0.2.0/33", "2001:db8::/129", "192.0.2.7:80", "[::1]", "192.0.2.0/24/1"])
def test_what_is_no_network(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tcprelay_server.main(["1080", "1081", "--accept-proxy-protocol", text, "--check"])
    assert caught.value.code == 2
    assert "expected a network, as in 192.0.2.0/24, or an address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("192.0.2.7", ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.2.8", "2001:db8::7"]),
        ("192.0.2.7/24", ["192.0.2.0", "192.0.2.255"], ["192.0.3.0"]),
        ("2001:db8::7", ["2001:db8::7"], ["2001:db8::8", "192.0.2.7"]),
        ("fe80::/10", ["fe80::1%eth0"], ["fec0::1"]),
        ("::ffff:192.0.2.0/120", ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.3.7"]),
        ("::/0", ["2001:db8::7"], ["192.0.2.7", "::ffff:192.0.2.7"]),
    ],
)
def test_who_is_in_a_network(text: str, inside: list[str], outside: list[str]) -> None:
    networks = [parse_network(text)]
    assert all(is_among((host, 80), networks) for host in inside)
    assert not any(is_among((host, 80), networks) for host in outside)
    assert not is_among("a Unix socket's", networks)


# --- Real services --------------------------------------------------------------------------------------------


def nginx_that_logs(peers: Peers, trust: tuple[str, str] | None) -> tuple[int, Program]:
    """nginx behind a relay client, which it believes; it logs where each request comes from."""
    port, state = free_port(), peers.path / "nginx"
    state.mkdir()
    kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
    temporary = "".join(f"{kind}_temp_path {state}/{kind};" for kind in kinds)
    secure = f"ssl_certificate {trust[0]}; ssl_certificate_key {trust[1]};" if trust else ""
    config = state / "nginx.conf"
    config.write_text(f"""
        daemon off; worker_processes 1; pid {state}/pid; error_log stderr info;
        events {{}}
        http {{
            log_format source "from $remote_addr:$remote_port to $proxy_protocol_server_port";
            access_log /dev/stdout source; {temporary}
            server {{
                listen {HOST}:{port} {"ssl" if trust else ""} proxy_protocol; {secure}
                set_real_ip_from 127.0.0.1; real_ip_header proxy_protocol; return 200 "a page\n";
            }}
        }}
    """)
    program = peers.program(find("nginx"), "-p", str(state), "-c", str(config), "-e", "stderr")
    program.wait_until_listening(port)
    return port, program


def haproxy_that_logs(peers: Peers, trust: tuple[str, str] | None) -> tuple[int, Program]:
    """The same of HAProxy."""
    port, pem = free_port(), peers.path / "both.pem"
    if trust:
        pem.write_text("".join(Path(file).read_text() for file in trust))
    secure = f"ssl crt {pem}" if trust else ""
    program = haproxy(
        peers, f"""frontend web
 mode http
 bind {HOST}:{port} accept-proxy {secure}
 log-format "from %ci:%cp to %fp"
 option dontlognull
 http-request return status 200 content-type text/plain string "a page\\n\"""",
    )  # fmt: skip
    return port, program


@pytest.mark.peer("nginx", "haproxy", "curl")
@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("make", [nginx_that_logs, haproxy_that_logs])
def test_a_real_service_logs_the_service_client_s_own_address(
    peers: Peers, certificates: Certificates, make: Callable[..., tuple[int, Program]], version: str, tls: bool
) -> None:
    """Over TLS the header comes before the handshake; and the look at the service leaves no complaint behind."""
    trust = (certificates.path("server.pem"), certificates.path("server.key")) if tls else None
    port, program = make(peers, trust)
    server = peers.server()
    more = ["--tls", "service", "--service-ca-file", certificates.path("ca.pem")] if tls else []
    client = peers.client(server.relay_port, port, "--proxy-protocol", version, "--try-service", "true", *more)
    client.wait_message("service default: something listens at")
    page = run(*curl("--interface", "127.0.0.7", f"http://{HOST}:{server.service_port}/"))
    assert (page.returncode, page.stdout) == (0, b"a page\n"), page.stderr
    own = server.wait_event("ConnectionClosed")["peer"]
    assert own.startswith("127.0.0.7:")
    program.wait_for(lambda line: line == f"from {own} to {server.service_port}")
    assert not [line for line in program.lines if re.search("PROXY protocol|broken header|invalid", line)]


def test_the_lists_are_for_the_real_address(bench: Bench) -> None:
    """Of service clients and of relay clients; whether the proxy itself is in them does not matter."""
    words: dict[str, Any] = {"accept_proxy_protocol": HOST, "allow": "203.0.113.0/24", "deny_links": "203.0.113.8"}
    server = bench.server(token="a token of the tests", **words)
    for source, reason in (
        ("198.51.100.1", "its address is not among those that may connect (--allow)"),
        ("203.0.113.7", ""),
    ):
        with bench.connect(server) as sock:
            sock.sendall(f"PROXY TCP4 {source} 192.0.2.1 4000 80\r\n".encode())
            if reason:
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
                assert bench.server_events.wait(ConnectionFailed)[0].reason == reason
                assert bench.server_events.of(ConnectionFailed)[0].peer == f"{source}:4000"
    with socket.create_connection((HOST, server.relay_address[1]), PATIENCE) as sock:
        sock.sendall(b"PROXY TCP4 203.0.113.8 192.0.2.1 4000 80\r\n")
        event = bench.server_events.wait(LinkRefused)[0]
        assert (event.code, event.peer) == ("address", "203.0.113.8:4000")


def test_a_header_without_an_address_is_no_way_around_the_lists(bench: Bench) -> None:
    """The address of the proxy is judged then, without a word: it may only look whether somebody listens."""
    server = bench.server(token="a token of the tests", accept_proxy_protocol=HOST, allow="192.0.2.0/24")
    with bench.connect(server) as sock, pytest.raises(ConnectionResetError):
        sock.sendall(b"PROXY UNKNOWN\r\nGET / HTTP/1.0\r\n\r\n")
        sock.recv(1)
    assert not bench.server_events.of(ConnectionFailed)


def test_what_comes_over_tls_is_no_header(bench: Bench, certificates: Certificates) -> None:
    server = bench.server(**BELIEVE, **secure(certificates))
    bench.client(server, bench.service().port, tls="relay", token="t", reject_unauthorized=False)
    sock = connect_from(bench, OTHER_HOST, service_port(server))
    data = header_of(1) + b"x"
    with TLSEnd(sock, tls_context(), False) as end:
        end.sendall(data)
        got = b""
        while len(got) < len(data):
            piece = end.recv(100)
            assert piece
            got += piece
        assert got == data


def test_a_proxied_link_gives_back_nobody_s_share(bench: Bench) -> None:
    server = bench.server(max_links_per_address=1, allow_unauthenticated=True, **BELIEVE)
    direct = bench.enter(LinkThrough(bench, server, b"", OTHER_HOST))
    assert direct.hello().kind == WELCOME
    link = bench.enter(LinkThrough(bench, server, header_of(1, OTHER_HOST)))
    assert link.hello(client="other").kind == WELCOME
    link.close()
    bench.server_events.wait(LinkDown)
    assert dict(server._listeners.of_links._counts) == {OTHER_HOST: 1}


def test_workers_ask_the_lists_for_the_real_address(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_WORKERS", "2")
    server = peers.server("--accept-proxy-protocol", "127.0.0.2", "--deny", "192.0.2.7", "--deny-links", "192.0.2.8")
    peers.client(server.relay_port, peers.service(echo).port, "--num-conn", "2")
    for port, host, kind in (
        (server.service_port, "192.0.2.7", "ConnectionFailed"),
        (server.relay_port, "192.0.2.8", "LinkRefused"),
    ):
        with socket.create_connection((HOST, port), PATIENCE, ("127.0.0.2", 0)) as sock:
            sock.sendall(f"PROXY TCP4 {host} 192.0.2.1 4000 80\r\n".encode())
            event = server.wait_event(kind)
            assert event["reason"].endswith(("(--deny)", "(--deny-links)")), event
