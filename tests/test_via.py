"""The way to the relay server through a proxy: what is said to it, and how its answers are read.  Real proxies are in
tests/test_via_peers.py."""

from __future__ import annotations

import base64
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tcprelay_client
from _tcprelay.addresses import Endpoint
from _tcprelay.client.greeting import Greeting
from _tcprelay.client.loops import RelayPlace
from _tcprelay.client.stock import RefusedByServer, Unreachable
from _tcprelay.client.wayout import WayOut, say_proxy_of_environment
from _tcprelay.tcp import Probing
from _tcprelay.tunnel import (
    ACCEPTED, LONGEST_HEAD, Proxy, ProxyFault, Tunnel, open_tunnel, parse_proxy, parse_via, show_via,
)  # fmt: skip
from _tcprelay.waiting import Deadline, Stop, Stopping
from tcprelay import ConnectionFailed, RelayClient, RelayServer, Unpublished

from .certificates import Certificates
from .conftest import PATIENCE, Bench, Service, read_exactly, replace, stock_of, unused_port, wait_until
from .peers import HOST, ROOT
from .rigs import reset
from .test_secrets import CANARY, find_secrets

RELAY = Endpoint("relay.example.net", 10080)
PLAIN, SOCKS = Proxy("http", Endpoint("proxy", 3128)), Proxy("socks5", Endpoint("proxy", 1080))
USER = {"user": b"ann", "password": CANARY.encode()}
PLAIN_USER, SOCKS_USER = Proxy("http", PLAIN.endpoint, **USER), Proxy("socks5", SOCKS.endpoint, **USER)


# --- The option -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "proxy", "shown"),
    [
        ("http://proxy:3128", PLAIN, "http://proxy:3128"),
        ("HTTP://proxy:3128/", PLAIN, "http://proxy:3128"),
        ("socks5h://proxy:1080", SOCKS, "socks5://proxy:1080"),
        ("http://[::1]:1", Proxy("http", Endpoint("::1", 1)), "http://[::1]:1"),
        (f"http://ann:{CANARY}@proxy:3128", PLAIN_USER, "http://***@proxy:3128"),
        ("http://a@b:c:d/%40@p:1", Proxy("http", Endpoint("p", 1), b"a@b", b"c:d/@"), "http://***@p:1"),
        ("http://ann@p:1", Proxy("http", Endpoint("p", 1), b"ann"), "http://***@p:1"),
        ("socks5://%C3%a9%3a:%00@p:1", Proxy("socks5", Endpoint("p", 1), "é:".encode(), b"\0"), "socks5://***@p:1"),
    ],
)
def test_a_proxy_is_named(text: str, proxy: Proxy, shown: str) -> None:
    """As programs name them; neither the user nor the password is shown."""
    assert parse_proxy(text) == proxy
    assert str(proxy) == shown
    assert parse_via(text) == text
    assert show_via(text) == (shown if "@" in text else text)
    assert not find_secrets(repr(proxy))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("proxy:3128", ACCEPTED),
        ("https://proxy:3128", ACCEPTED),
        ("socks4://proxy:3128", ACCEPTED),
        ("http://proxy", ACCEPTED),
        ("http://proxy:3128/path", ACCEPTED),
        (f"http://{CANARY}:%4@proxy:3128", ACCEPTED),
        (f"http://ann:{CANARY}\x01@proxy:3128", ACCEPTED),
        ("http://proxy:0", "a proxy with the port that it listens on, as in http://proxy.example.net:3128"),
        (f"http://:{CANARY}@p:1", "a user whose name is not empty and has no colon in it"),
        (f"http://a%3A:{CANARY}@p:1", "a user whose name is not empty and has no colon in it"),
        (f"socks5://{CANARY}@p:1", "a user and a password of 1 to 255 bytes each: SOCKS5 has no others"),
        (f"socks5://{CANARY}:{256 * 'x'}@p:1", "a user and a password of 1 to 255 bytes each: SOCKS5 has no others"),
    ],
)
def test_what_names_no_proxy(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is accepted is said, and nothing of what was given."""
    with pytest.raises(ValueError) as caught:
        RelayClient("h", 1, "r", 1, via=text)
    assert str(caught.value) == f"via: expected {expected}"
    with pytest.raises(SystemExit):
        tcprelay_client.main(["r:1", "22", "--via", text])
    said = capsys.readouterr().err
    assert expected in said
    assert not find_secrets(said)


def test_an_interface_of_this_host_is_unknown_to_a_proxy() -> None:
    with pytest.raises(ValueError, match="only this host knows where fe80::1%eth0 is"):
        RelayClient("h", 1, "fe80::1%eth0", 1, via="http://proxy:1")


def check(*words: str, **env: str) -> str:
    """What ``--check`` says, on both outputs."""
    command = [sys.executable, "-m", "tcprelay_client", "h:1", "22", "--check", *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", ["command line", "environment", "file"])
def test_what_a_check_says_of_it(tmp_path: Path, source: str) -> None:
    """Where it comes from, and never the password, of which it warns where ``ps`` shows it or others can read it."""
    via, config = f"http://ann:{CANARY}@proxy:3128", tmp_path / "conf"
    config.write_text(f"via = {via}\n")
    config.chmod(0o644)
    if source == "command line":
        said = check("--via", via)
    elif source == "environment":
        said = check(TCPRELAY_VIA=via)
    else:
        said = check("--config", str(config))
    assert "  via = http://***@proxy:3128    " in said
    assert not find_secrets(said)
    assert ("the password of --via stands on the command line" in said) == (source == "command line")
    assert ("conf holds the password of --via, and others can read it" in said) == (source == "file")


def test_without_a_password_nothing_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("via = http://proxy:3128\n")
    (tmp_path / "conf").chmod(0o644)
    assert "WARNING" not in check("--config", str(tmp_path / "conf"))
    assert "WARNING" not in check("--via", "http://proxy:3128")


# --- What is said, without I/O --------------------------------------------------------------------------------

Step = tuple[bytes, bytes]
"""What the proxy answers, and what it gets next."""
ASCII_NAME = b"\5\1\0\3\x11relay.example.net\x27\x60"
OPENINGS: dict[str, tuple[Proxy, Endpoint, bytes, list[Step]]] = {
    "HTTP": (
        PLAIN, RELAY, b"CONNECT relay.example.net:10080 HTTP/1.1\r\nHost: relay.example.net:10080\r\n\r\n",
        [(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b"")],
    ),
    "HTTP with a user": (
        PLAIN_USER, Endpoint("192.0.2.1", 1),
        b"CONNECT 192.0.2.1:1 HTTP/1.1\r\nHost: 192.0.2.1:1\r\nProxy-Authorization: Basic "
        + base64.b64encode(b"ann:" + CANARY.encode()) + b"\r\n\r\n",
        [(b"HTTP/1.0 200 Connection established\r\n\r\n", b"")],
    ),
    "HTTP with IPv6, bare line ends and an answer ahead": (
        PLAIN, Endpoint("2001:db8::1", 443),
        b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\r\n",
        [(b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\nHTTP/1.1 299\nX: " + 4000 * b"x" + b"\n\n", b"")],
    ),
    "HTTP with a name of other letters": (
        PLAIN, Endpoint("bücher.example", 1),
        b"CONNECT xn--bcher-kva.example:1 HTTP/1.1\r\nHost: xn--bcher-kva.example:1\r\n\r\n",
        [(b"HTTP/1.1 200 \r\n\r\n", b"")],
    ),
    "SOCKS5": (SOCKS, RELAY, b"\5\1\0", [(b"\5\0", ASCII_NAME), (b"\5\0\0\1\0\0\0\0\0\0", b"")]),
    "SOCKS5 with a user": (
        SOCKS_USER, Endpoint("192.0.2.1", 443), b"\5\2\0\2",
        [
            (b"\5\2", b"\1\3ann" + bytes([len(CANARY)]) + CANARY.encode()),
            (b"\1\0", b"\5\1\0\1\xc0\0\2\1\1\xbb"),
            (b"\5\0\0\4" + bytes(16) + b"\0\1", b""),
        ],
    ),
    "SOCKS5 with a user whom nobody asks for, and IPv6": (
        SOCKS_USER, Endpoint("2001:db8::1", 1), b"\5\2\0\2",
        [
            (b"\5\0", b"\5\1\0\4" + socket.inet_pton(socket.AF_INET6, "2001:db8::1") + b"\0\1"),
            (b"\5\0\0\3\4host\0\1", b""),
        ],
    ),
    "SOCKS5 with an answer of another version to the proof": (
        SOCKS_USER, RELAY, b"\5\2\0\2",
        [
            (b"\5\2", b"\1\3ann" + bytes([len(CANARY)]) + CANARY.encode()),
            (b"\5\0", ASCII_NAME),
            (b"\5\0\0\3\0\0\1", b""),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENINGS)
def test_a_way_is_opened_however_the_answers_are_cut(name: str) -> None:
    """Byte by byte, at once, and at random; what the relay server says behind them is left, to the last byte."""
    proxy, relay, begin, steps = OPENINGS[name]
    chance = random.Random(18)
    for size in [1, 10000, *(chance.randrange(2, 40) for _ in range(50))]:
        tunnel = open_tunnel(proxy, relay)
        assert tunnel.begin() == begin
        for answer, expected in steps:
            stream, sent = answer + b"\x16\x03\x01 the relay server\r\n\r\n", b""
            taken_in_all = 0
            while taken_in_all < len(answer):
                assert not tunnel.is_open
                assert tunnel.is_amid == (taken_in_all > 0) or b"100" in answer
                taken, out = tunnel.feed(stream[taken_in_all : taken_in_all + size])
                sent += out
                taken_in_all += taken
            assert (taken_in_all, sent) == (len(answer), expected)
        assert tunnel.is_open
        assert tunnel.count == sum(len(answer) for answer, _ in steps)
        assert tunnel.feed(b"more") == (0, b"")


MAY_NOT = "refuses connections to relay.example.net:10080"
OWNER = "; its owner has to allow them, and many allow port 443 alone"
NOT_HTTP, NOT_SOCKS = "what answers at proxy:3128 is no HTTP proxy: ", "what answers at proxy:1080 is no SOCKS5 proxy: "
WRONG_PASSWORD = "does not accept the user and the password of --via"
REFUSALS: list[tuple[Proxy, bytes, str, bool]] = [
    (PLAIN, b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
     "the proxy http://proxy:3128 asks for a user and a password (407); give them as in --via "
     "http://USER:PASSWORD@…", True),
    (PLAIN_USER, b"HTTP/1.0 407 No\r\n\r\n", f"the proxy http://***@proxy:3128 {WRONG_PASSWORD} (407)", True),
    (PLAIN_USER, b"HTTP/1.1 407 No\r\nproxy-authenticate: NTLM\r\nProxy-Authenticate:\r\nProxy-Authenticate: Negotiate "
     b"\x1bx\r\n\r\n",
     "the proxy http://***@proxy:3128 asks for NTLM, Negotiate (407), and a relay client knows Basic alone", True),
    (PLAIN_USER, b"HTTP/1.0 401 Unauthorized\r\n\r\n", f"the proxy http://***@proxy:3128 {WRONG_PASSWORD} (401)", True),
    (PLAIN, b"HTTP/1.1 403 Filtered\r\n\r\n", f"the proxy http://proxy:3128 {MAY_NOT} (403){OWNER}", True),
    (PLAIN, b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
     "the proxy http://proxy:3128 cannot reach relay.example.net:10080; it says 502 Bad Gateway", False),
    (PLAIN, b"HTTP/1.1 405 \x1b[31m\xe9" + 100 * b"x" + b"\r\n\r\n", "the proxy http://proxy:3128 does not connect to "
     "relay.example.net:10080; it says 405 \\x1b[31m\\xe9" + 44 * "x", False),
    (PLAIN, b"HTTP/1.1 302 Found\r\n\r\n",
     "the proxy http://proxy:3128 does not connect to relay.example.net:10080; it says 302 Found", False),
    (PLAIN_USER, b"HTTP/1.1 500 ann has " + CANARY.encode() + b" " + base64.b64encode(b"ann:" + CANARY.encode())
     + b"\r\n\r\n", "the proxy http://***@proxy:3128 cannot reach relay.example.net:10080; it says 500 *** has *** ***",
     False),
    (PLAIN, b"SSH-2.0-OpenSSH_9.2\r\n", f"{NOT_HTTP}it says SSH-2.0-OpenSSH_9.2", True),
    (PLAIN, b"\x15\x03\x01\x00\x02\x02\x46", f"{NOT_HTTP}it says \\x15\\x03\\x01\\x00\\x02\\x02F", True),
    (PLAIN, b"HTTP/2 200\r\n", f"{NOT_HTTP}it says HTTP/2 200", True),
    (PLAIN, b"HTTP/1.1 20\r\n", f"{NOT_HTTP}it says HTTP/1.1 20", True),
    (PLAIN, b"HTTP/1.1 2000 OK\r\n", f"{NOT_HTTP}it says HTTP/1.1 2000 OK", True),
    (PLAIN, b"\r\nHTTP/1.1 200 OK\r\n", f"{NOT_HTTP}it says ", True),
    (PLAIN, b"HTTP/1.1 200 " + LONGEST_HEAD * b"x", f"{NOT_HTTP}its answer has more than 8192 bytes", True),
    (PLAIN, b"HTTP/1.1 200 OK\r\n" + 1000 * b"A: bcdefg\r\n", f"{NOT_HTTP}its answer has more than 8192 bytes", True),
    (PLAIN, 1000 * b"HTTP/1.1 100 Continue\r\n\r\n", f"{NOT_HTTP}its answer has more than 8192 bytes", True),
    (SOCKS, b"HTTP/1.1 400 Bad Request\r\n", f"{NOT_SOCKS}it says HTTP/1.1 400 Bad Request", True),
    (SOCKS, b"\4\0", f"{NOT_SOCKS}it says \\x04\\x00", True),
    (SOCKS, b"\5\2", f"{NOT_SOCKS}it says \\x05\\x02", True),
    (SOCKS, b"\5\xff", "the proxy socks5://proxy:1080 asks for a user and a password; give them as in --via "
     "socks5://USER:PASSWORD@…", True),
    (SOCKS_USER, b"\5\xff", "the proxy socks5://***@proxy:1080 asks for more than a user and a password", True),
    (SOCKS_USER, b"\5\2\1\1", f"the proxy socks5://***@proxy:1080 {WRONG_PASSWORD}", True),
    (SOCKS_USER, b"\5\2\0" + CANARY.encode(), f"{NOT_SOCKS}it says \\x00", True),
    (SOCKS, b"\5\0\5\2", f"the proxy socks5://proxy:1080 {MAY_NOT}{OWNER}", True),
    (SOCKS, b"\5\0\5\1", "the proxy socks5://proxy:1080 cannot reach relay.example.net:10080: it has failed", False),
    (SOCKS, b"\5\0\5\5", "the proxy socks5://proxy:1080 cannot reach relay.example.net:10080: connection refused",
     False),
    (SOCKS, b"\5\0\5\x63", "the proxy socks5://proxy:1080 cannot reach relay.example.net:10080: it says 99", False),
    (SOCKS, b"\5\0\4\0", f"{NOT_SOCKS}it says \\x04", True),
    (SOCKS, b"\5\0\5\0\0\2\0\0\0", f"{NOT_SOCKS}it says \\x05\\x00\\x00\\x02\\x00", True),
]  # fmt: skip


def feed_all(tunnel: Tunnel, stream: bytes, size: int) -> None:
    tunnel.begin()
    while stream and not tunnel.is_open:
        taken, _ = tunnel.feed(stream[:size])
        stream = stream[taken:]


@pytest.mark.parametrize(("proxy", "answer", "said", "lasting"), REFUSALS)
def test_a_refusal_is_explained(proxy: Proxy, answer: bytes, said: str, lasting: bool) -> None:
    """In one line, with what to do; byte by byte too, where of garbage less has come."""
    with pytest.raises(ProxyFault) as caught:
        feed_all(open_tunnel(proxy, RELAY), answer, len(answer))
    assert (str(caught.value), caught.value.lasting) == (said, lasting)
    with pytest.raises(ProxyFault) as caught:
        feed_all(open_tunnel(proxy, RELAY), answer, 1)
    assert caught.value.lasting == lasting
    assert str(caught.value).partition("it says")[0] == said.partition("it says")[0]


@pytest.mark.parametrize("host", ["a..b", f"{64 * 'x'}.example", ".".join(6 * [60 * "x"])])
def test_a_name_that_no_proxy_can_be_told(host: str) -> None:
    with pytest.raises(ProxyFault, match="is not a host name"):
        open_tunnel(SOCKS, Endpoint(host, 1))


@pytest.mark.parametrize("proxy", [PLAIN_USER, SOCKS_USER])
def test_hostile_answers(proxy: Proxy) -> None:
    """Whatever comes, in whatever pieces: the way is open, or there is one fault, and no secret is in it; of what is
    taken there is an end."""
    chance = random.Random(1928)
    seeds = [answer for other, answer, _, _ in REFUSALS if other.scheme == proxy.scheme]
    seeds += [b"".join(step for step, _ in steps) for other, _, _, steps in OPENINGS.values() if other == proxy]
    seeds += [open_tunnel(proxy, RELAY).begin(), CANARY.encode()]
    faults = opened = 0
    for _ in range(3000):
        stream = bytearray(b"".join(chance.choice(seeds) for _ in range(chance.randrange(1, 4))))
        for _ in range(chance.randrange(3)):
            stream[chance.randrange(len(stream))] = chance.randrange(128)
        tunnel = open_tunnel(proxy, RELAY)
        try:
            feed_all(tunnel, bytes(stream), chance.randrange(1, 60))
        except ProxyFault as fault:
            faults += 1
            assert str(fault).isprintable()
            assert len(str(fault)) < 240
            assert not find_secrets(str(fault))
        opened += tunnel.is_open
        assert tunnel.count <= LONGEST_HEAD + 60
    assert faults > 1000
    assert opened > 50


# --- Connecting through one -----------------------------------------------------------------------------------


class FakeProxy(Service):
    """A proxy that does what a test says, with each connection in a thread of its own."""

    def via(self, scheme: str = "http") -> str:
        return f"{scheme}://{HOST}:{self.port}"


def read_request(sock: socket.socket) -> bytes:
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += read_exactly(sock, 1)
    return request


FakeMaker = Callable[[Callable[[socket.socket], object]], FakeProxy]


@pytest.fixture
def fake(bench: Bench) -> FakeMaker:
    def make(serve: Callable[[socket.socket], object]) -> FakeProxy:
        proxy = FakeProxy(serve)
        bench.enter(closing(proxy))
        return proxy

    return make


@pytest.fixture
def stop(bench: Bench) -> Stop:
    made = Stop()
    bench.enter(closing(made))
    return made


def way(proxy: str, timeout: float = PATIENCE, relay: Endpoint = RELAY) -> WayOut:
    return WayOut(relay, parse_proxy(proxy), timeout, Probing(), 5.0)


def test_a_relay_server_that_speaks_first(fake: FakeMaker, stop: Stop) -> None:
    """Its bytes come with the proxy's answer, and are read from the socket, which has what links have."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nthe relay server")
        sock.recv(1)

    sock, count = way(fake(serve).via()).dial(stop)
    with sock:
        assert count == len(b"HTTP/1.1 200 OK\r\n\r\n")
        assert read_exactly(sock, 16) == b"the relay server"
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_what_the_proxy_has_said_counts_as_received(fake: FakeMaker, bench: Bench) -> None:
    """Without that a reset would be taken for an end: see `Stream.believe_end`."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        sock.recv(1)

    client = RelayClient("h", 1, "relay.example.net", 1, via=fake(serve).via())
    client.runtime.begin()
    bench.enter(closing(client.runtime))
    [relay] = client.options.relays
    stream = Greeting(client.runtime, relay, relay, 1, "id", 0)._dial(None, Deadline(None), print)
    with stream.sock:
        assert stream.received == 19


def test_a_name_goes_to_the_proxy_as_it_is(fake: FakeMaker, stop: Stop) -> None:
    """No name server is asked for it here."""
    seen: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        assert read_exactly(sock, 3) == b"\5\1\0"
        sock.sendall(b"\5\0")
        seen.append(read_exactly(sock, len(ASCII_NAME)))
        sock.sendall(b"\5\0\0\1\0\0\0\0\0\0")

    way(fake(serve).via("socks5")).dial(stop)[0].close()
    assert seen == [ASCII_NAME]


def send_and_wait(data: bytes) -> Callable[[socket.socket], object]:
    def serve(sock: socket.socket) -> None:
        sock.sendall(data)
        while sock.recv(4096):
            pass

    return serve


def send_and_close(data: bytes) -> Callable[[socket.socket], object]:
    """Reads the request first: a socket that is closed with unread bytes is reset."""

    def serve(sock: socket.socket) -> None:
        if read_exactly(sock, 3) == b"CON":
            read_request(sock)
        sock.sendall(data)

    return serve


def send_and_reset(sock: socket.socket) -> None:
    sock.recv(1)
    reset(sock)


SILENT = "nothing within 1 s; it hangs, or does not reach relay.example.net:10080 itself"


@pytest.mark.parametrize(
    ("scheme", "serve", "said"),
    [
        ("http", send_and_wait(b""), f"no answer from the proxy VIA: {SILENT}"),
        ("http", send_and_wait(b"HTTP/1.1 2"), f"only a part of an answer from the proxy VIA: {SILENT}"),
        ("http", send_and_wait(b"HTTP/1.1 200 OK\r\nA: b"), f"only a part of an answer from the proxy VIA: {SILENT}"),
        ("socks5", send_and_wait(b"\5"), f"only a part of an answer from the proxy VIA: {SILENT}"),
        ("socks5", send_and_wait(b"\5\0"), f"no answer from the proxy VIA: {SILENT}"),
        ("http", send_and_close(b""), "no answer from the proxy VIA: it has closed the connection"),
        (
            "http",
            send_and_close(b"HTTP/1"),
            "only a part of an answer from the proxy VIA: it has closed the connection",
        ),
        ("socks5", send_and_close(b"\5"), "only a part of an answer from the proxy VIA: it has closed the connection"),
        ("http", send_and_reset, "no answer from the proxy VIA: connection reset by peer"),
    ],
)
def test_a_proxy_that_does_not_answer(
    fake: FakeMaker, stop: Stop, scheme: str, serve: Callable[[socket.socket], object], said: str
) -> None:
    """It is told apart from the relay server, in time, and nothing is left open."""
    via, began = fake(serve).via(scheme), time.monotonic()
    with pytest.raises(ProxyFault) as caught:
        way(via, 1.0).dial(stop)
    assert (str(caught.value), caught.value.lasting) == (said.replace("VIA", via), False)
    assert time.monotonic() - began < PATIENCE / 2


def test_a_proxy_that_answers_slowly_has_no_more_time(fake: FakeMaker, stop: Stop) -> None:
    """A byte now and then does not put the end off."""
    is_over = threading.Event()

    def serve(sock: socket.socket) -> None:
        while not is_over.wait(0.02):
            sock.sendall(b"x" if sent else b"HTTP/1.1 200 ")
            sent.append(1)

    sent: list[int] = []
    with pytest.raises(ProxyFault, match=r"^only a part of an answer from the proxy .*: nothing within 1 s"):
        way(fake(serve).via(), 1.0).dial(stop)
    is_over.set()
    assert len(sent) > 2


def test_a_dead_proxy(stop: Stop) -> None:
    via = f"socks5://u:{CANARY}@{HOST}:{unused_port()}"
    with pytest.raises(ProxyFault) as caught:
        way(via).dial(stop)
    assert str(caught.value) == f"cannot reach the proxy {show_via(via)}: connection refused; is it running?"


def test_the_end_of_the_client_cuts_it_short(fake: FakeMaker, stop: Stop) -> None:
    def serve(sock: socket.socket) -> None:
        read_request(sock)
        stop.request()
        sock.recv(1)

    with pytest.raises(Stopping):
        way(fake(serve).via()).dial(stop)


# --- The client -----------------------------------------------------------------------------------------------


def carry(near: socket.socket, far: socket.socket) -> None:
    """Pass bytes on both ways, to both ends."""

    def one_way(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    thread = threading.Thread(target=one_way, args=(far, near))
    near.settimeout(None)
    thread.start()
    one_way(near, far)
    thread.join()


def connecting_on(server: RelayServer) -> Callable[[socket.socket], object]:
    """A proxy that connects on to this relay server, whatever is asked for."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        with socket.create_connection((HOST, server.relay_address[1])) as far:
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            carry(sock, far)

    return serve


@pytest.mark.parametrize("tls", ["", "relay"])
def test_a_service_is_published_through_a_proxy(
    bench: Bench, fake: FakeMaker, certificates: Certificates, tls: str
) -> None:
    """With a name that only the proxy knows, which stands in the relay server's certificate."""
    options = {"tls": tls, "token": "sixteen letters!"}
    cert = {"cert": certificates.path("elsewhere.pem"), "key": certificates.path("elsewhere.key")} if tls else {}
    server = bench.server(hostname=HOST, **options, **cert)
    via = fake(connecting_on(server)).via()
    ca = {"ca_file": certificates.path("ca.pem")} if tls else {}
    client = RelayClient("localhost", bench.service().port, "elsewhere.example", 1, 2, via=via, drain_timeout=0.0,
                         on_event=bench.client_events, **options, **ca)  # fmt: skip
    with client:
        client.wait_until_published(PATIENCE)
        with bench.connect(server) as sock:
            sock.sendall(b"there and back")
            assert read_exactly(sock, 14) == b"there and back"


@pytest.mark.parametrize(
    ("answer", "kind"), [(b"HTTP/1.1 407 x\r\n\r\n", RefusedByServer), (b"HTTP/1.1 503 x\r\n\r\n", Unreachable)]
)
def test_what_does_not_pass_by_itself_is_told_as_such(
    bench: Bench, fake: FakeMaker, answer: bytes, kind: type[Exception]
) -> None:
    """With a wrong password the client does not try again soon, which might close the account; a relay server that
    cannot be reached is looked for at the usual pace."""
    proxy = fake(send_and_close(answer))
    via = proxy.via().replace("//", f"//ann:{CANARY}@")
    with RelayClient("h", 1, "relay", 1, 1, via=via, on_event=bench.client_events, drain_timeout=0.0):
        [event] = bench.client_events.wait(Unpublished)
    assert event.lasting == (kind is RefusedByServer)
    assert "http://***@" in event.reason
    assert not find_secrets(str(bench.client_events.events))


@pytest.mark.parametrize(
    ("name", "value", "no_proxy", "said"),
    [
        ("https_proxy", f"http://ann:{CANARY}@proxy:3128", "", "in https_proxy (http://***@proxy:3128),"),
        ("ALL_PROXY", "socks5h://proxy:1080/", "other.example", "in ALL_PROXY (socks5://proxy:1080),"),
        ("HTTPS_PROXY", f"{CANARY}:3128", "", "in HTTPS_PROXY,"),
        ("https_proxy", "http://proxy:3128", "x, .example.net", ""),
        ("https_proxy", "http://proxy:3128", "*", ""),
        ("https_proxy", "", "", ""),
    ],
)
def test_a_proxy_of_the_environment_is_spoken_of(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, no_proxy: str, said: str
) -> None:
    """Without what is secret in it, and not where it is not for that host."""
    for other in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", no_proxy)
    found = say_proxy_of_environment("Relay.example.net")
    assert said in found
    assert bool(found) == bool(said)
    assert not find_secrets(found)


def test_it_is_told_once_and_not_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fake: FakeMaker
) -> None:
    """Where the relay server cannot be reached straight, and --via is not given."""
    replace(monkeypatch, "FIRST_BACKOFF", 0.01)
    proxy = fake(send_and_close(b""))
    monkeypatch.setenv("https_proxy", proxy.via())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = RelayClient("h", 1, HOST, unused_port(), 1, on_event=bench.client_events, drain_timeout=0.0)
    with client:
        wait_until(lambda: stock_of(client).services[0].failures > 2)
    said = [record.getMessage() for record in caplog.records if "https_proxy" in record.getMessage()]
    assert said == [
        f"the environment has a proxy in https_proxy ({proxy.via()}), and it is not used unasked: --via names one for "
        "the links"
    ]
    assert proxy.connections == 0


class FakeSock:
    """The ends of a socket."""

    def __init__(self, peer: Any, own: Any) -> None:
        self.getpeername, self.getsockname = lambda: peer, lambda: own


@pytest.mark.parametrize(
    ("relay", "peer", "far", "address", "back"),
    [
        ("203.0.113.1", ("127.0.0.1", 3128), ("203.0.113.1", 2222), "[::]:2222", True),
        ("203.0.113.1", ("127.0.0.1", 3128), ("203.0.113.1", 10080), "", True),
        ("203.0.113.1", ("127.0.0.1", 3128), ("127.0.0.1", 2222), "127.0.0.1:2222", False),
        ("203.0.113.1", ("10.0.0.9", 3128), ("10.0.0.9", 2222), "[::]:2222", False),
        ("2001:db8::1", ("10.0.0.9", 3128), ("2001:db8::1", 2222, 0, 0), "[::]:2222", True),
        ("127.0.0.1", ("10.0.0.9", 3128), ("10.0.0.9", 2222), "[::]:2222", True),
        ("localhost", ("10.0.0.9", 3128), ("10.0.0.9", 10080), "", True),
        ("relay.example.net", ("10.0.0.9", 3128), ("10.0.0.9", 2222), "10.0.0.9:2222", False),
        ("relay.example.net", ("10.0.0.9", 3128), ("1.1.1.1", 2222), "1.1.1.1:2222", True),
        ("relay.example.net", ("10.0.0.9", 3128), ("1.1.1.1", 2223), "1.1.1.1:2222", False),
        ("relay.example.net", ("127.0.0.1", 3128), ("127.0.0.1", 2222), "127.0.0.1:2222", False),
    ],
)
def test_where_the_relay_server_is_beyond_a_proxy(relay: str, peer: Any, far: Any, address: str, back: bool) -> None:
    """The proxy's place is not taken for it; loopback is the proxy's own."""
    place = RelayPlace(FakeSock(peer, ("10.0.0.5", 1)), Endpoint(relay, 10080))  # type: ignore[arg-type]
    assert place.is_at(far, address) == back


@pytest.mark.parametrize(("relay", "peer", "shared"), [
    ("203.0.113.1", "127.0.0.1", False), ("relay.example.net", "127.0.0.1", False), ("127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "10.0.0.9", False),
])  # fmt: skip
def test_a_proxy_here_does_not_bring_the_relay_server_here(relay: str, peer: str, shared: bool) -> None:
    """What connects over the loopback of the relay server's host is not a connection of this one's."""
    place = RelayPlace(FakeSock((peer, 3128), ("127.0.0.1", 1)), Endpoint(relay, 10080))  # type: ignore[arg-type]
    assert place.shares("127.0.0.1:8080") == shared
    assert place.may_return(("127.0.0.1", 2), ("127.0.0.1", 3)) == shared


def test_a_service_that_leads_back_through_a_proxy(bench: Bench, fake: FakeMaker) -> None:
    """Published onto its own service port it is refused, as without one."""
    server = bench.server(hostname=HOST)
    port, via = server.service_addresses["default"][1], fake(connecting_on(server)).via()
    client = RelayClient(HOST, port, HOST, server.relay_address[1], 2, via=via, drain_timeout=0.0, try_service=False,
                         on_event=bench.client_events)  # fmt: skip
    with client:
        client.wait_until_published(PATIENCE)
        bench.connect(server)
        [failed, *_] = bench.client_events.wait(ConnectionFailed)
    assert "leads back here" in failed.reason
