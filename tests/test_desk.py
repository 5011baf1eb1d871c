"""The status over HTTP: what is answered, to whom, and that nobody who asks holds anything up."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import itertools
import json
import logging
import os
import re
import selectors
import socket
import stat
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.addresses import Endpoint
from _tcprelay.status.asking import Asking
from _tcprelay.status import desk as desk_room
from _tcprelay.status.desk import MOST_VISITORS, Desk
from _tcprelay.status.report import Status, as_dict
from _tcprelay.status.web import MOST_HEAD, Request, given_token, is_address
from tcprelay import RelayClient, RelayServer

from .conftest import PATIENCE, Bench, connect, read_all, read_exactly, replace, unused_port, wait_until
from .peers import HOST, Peers, RelayProcess, workers_of

TOKEN = "a long and random secret"
STATUS_TOKEN = "another long and random secret"


def ask(
    address: tuple[str, int], path: str = "/status.json", method: str = "GET", **headers: str
) -> http.client.HTTPResponse:
    """One request; of the headers' names underscores are dashes.  The answer is read, and kept in `body`."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        answer.body = answer.read()  # type: ignore[attr-defined]
        return answer


def body_of(answer: http.client.HTTPResponse) -> bytes:
    return answer.body  # type: ignore[attr-defined, no-any-return]


def say(address: tuple[str, int], words: bytes) -> bytes:
    """All that comes after these words."""
    with connect(address) as sock:
        sock.sendall(words)
        return read_all(sock)


@pytest.fixture
def server(bench: Bench) -> RelayServer:
    return bench.server(status="0")


# --- What is answered -------------------------------------------------------------------------------------------


def test_the_status_as_json(bench: Bench) -> None:
    """The same as `Relay.status`, of both roles."""
    server = bench.server(status="0")
    client = bench.client(server, bench.service().port, status="127.0.0.1:0")
    for relay, role in ((server, "server"), (client, "client")):
        answer = ask(relay.status_address)
        assert (answer.status, answer.getheader("Content-Type")) == (200, "application/json")
        found = json.loads(body_of(answer))
        assert (found["role"], found["pid"], found["problems"]) == (role, os.getpid(), [])
        assert [one["name"] for one in found["services"]] == ["default"]
        assert len(found["services"][0]["history_in"]) > 100


def test_each_page(server: RelayServer) -> None:
    """With the type that it is, and nothing that a cache, a frame or another page may use."""
    kinds = {"/": "text/html", "/status.json": "application/json", "/metrics": "text/plain", "/healthz": "text/plain"}
    for path, kind in kinds.items():
        answer = ask(server.status_address, path)
        assert (answer.status, answer.getheader("Content-Type", "").partition(";")[0]) == (200, kind)
        assert int(answer.getheader("Content-Length", "0")) == len(body_of(answer)) > 0
        told = {name: answer.getheader(name) for name in ("Connection", "Cache-Control", "X-Content-Type-Options")}
        assert told == {"Connection": "close", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        policy = answer.getheader("Content-Security-Policy", "")
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert answer.getheader("Access-Control-Allow-Origin") is None


def test_the_metrics_come_in_the_format_that_is_asked_for(server: RelayServer) -> None:
    answer = ask(server.status_address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.getheader("Content-Type", "").startswith("application/openmetrics-text")
    assert body_of(answer).endswith(b"# EOF\n")
    assert b"# EOF" not in body_of(ask(server.status_address, "/metrics"))


def test_the_nonce_of_the_page_is_another_one_each_time(server: RelayServer) -> None:
    """What somebody has learnt from one answer allows nothing in the next."""
    seen = set()
    for _ in range(3):
        answer = ask(server.status_address, "/")
        [nonce, *others] = set(re.findall(r"'nonce-(\w+)'", answer.getheader("Content-Security-Policy", "")))
        assert not others and f'<script nonce="{nonce}">'.encode() in body_of(answer)
        seen.add(nonce)
    assert len(seen) == 3 and all(len(nonce) == 32 for nonce in seen)


def test_a_head_alone(server: RelayServer) -> None:
    for path in ("/", "/status.json", "/metrics", "/healthz"):
        answer = say(server.status_address, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and body == b""
        assert b"Content-Length: 0" not in head


def test_a_question_mark_is_no_other_page(server: RelayServer) -> None:
    assert ask(server.status_address, "/healthz?from=haproxy").status == 200


def test_whether_all_is_well(bench: Bench) -> None:
    """200 or 503, and in words why: for a client without a link, and for a server that is ending."""
    client = bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", unused_port(), status="0"))
    answer = wait_until(lambda: b"refused" in body_of(found := ask(client.status_address, "/healthz")) and found)
    assert answer.status == 503
    assert body_of(answer).startswith(b"service default has no link: ")
    server = bench.relay(status="0")
    assert (ask(server.status_address, "/healthz").status, body_of(ask(server.status_address, "/healthz"))) == (
        200, b"well\n",
    )  # fmt: skip
    sock = bench.connect(server)
    sock.sendall(b"x")
    read_exactly(sock, 1)
    ender = threading.Thread(target=server.end, args=(PATIENCE,))
    ender.start()
    try:
        wait_until(lambda: ask(server.status_address, "/healthz").status == 503)
        assert body_of(ask(server.status_address, "/healthz")) == b"the relay server is ending\n"
    finally:
        sock.close()
        ender.join(PATIENCE)


def test_whether_a_service_can_be_reached(bench: Bench) -> None:
    """For a load balancer: a relay server that has just been started is well, and has no relay clients yet."""
    server = bench.server(status="0")

    def look(query: str) -> tuple[int, bytes]:
        answer = ask(server.status_address, f"/healthz{query}")
        return answer.status, body_of(answer)

    assert look("") == (200, b"well\n")
    assert look("?service=default") == (503, b"service default: no relay client is connected\n")
    assert look("?x=y&service=nope") == (503, b"there is no service nope\n")
    bench.client(server, bench.service().port)
    wait_until(lambda: look("?service=default") == (200, b"well\n"))
    assert look("?service=default&service=nope")[0] == 503


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / SPDY/3\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHOST: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nnonsense\r\n\r\n", 400),
        (b"GET /" + b"a" * MOST_HEAD + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /status.json HTTP/1.1\r\n\r\n", 421),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET //evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /../status.json HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
        (b"DELETE /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"CONNECT / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    ],
)
def test_what_is_no_question(server: RelayServer, words: bytes, status: int) -> None:
    """It gets a whole answer that says so."""
    answer = say(server.status_address, words)
    assert answer.startswith(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head and body.endswith(b"\n")


def test_a_question_that_comes_byte_by_byte(server: RelayServer) -> None:
    with connect(server.status_address) as sock:
        for byte in b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert b"200 OK" in read_all(sock)


# --- To whom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "192.0.2.1"])
def test_hosts_that_may_be_named(server: RelayServer, host: str) -> None:
    """Addresses, and localhost; HAProxy's checks name none, in HTTP/1.0."""
    named = host.format(port=server.status_address[1])
    assert ask(server.status_address, Host=named).status == 200
    assert say(server.status_address, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example",
                                  "[evil]", "::1", "a b"])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/healthz"])
def test_names_that_somebody_can_have_mean_this_host(server: RelayServer, host: str, path: str) -> None:
    """DNS rebinding: a page of evil.example, whose name has come to mean 127.0.0.1, may read what it gets."""
    answer = ask(server.status_address, path, Host=host)
    assert (answer.status, b"default" in body_of(answer)) == (421, False)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)  # fmt: skip
def test_another_page_may_not_ask(server: RelayServer, headers: dict[str, str]) -> None:
    assert ask(server.status_address, **headers).status == 403


def test_its_own_page_may_and_so_may_a_link_to_it(server: RelayServer) -> None:
    own = "http://{}:{}".format(*server.status_address)
    assert ask(server.status_address, Origin=own).status == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(server.status_address, "/", **link).status == 200


@pytest.mark.parametrize("more", [0, 1, 500])
def test_what_is_too_long_is_not_judged_by_a_part_of_it(server: RelayServer, more: int) -> None:
    """Where it comes from may stand behind what was read: so could any page have read the status."""
    line = b"GET /status.json?%s HTTP/1.1"
    padding = b"a" * (MOST_HEAD - len(line) + 2 + more)
    answer = say(
        server.status_address, line % padding + b"\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 431 ") and b"services" not in answer


def test_a_token_that_is_not_ascii(bench: Bench) -> None:
    token = "sesam öffne dich, bitte"
    server = bench.server(status="0", status_token=token)
    wire = token.encode().decode("latin-1")
    assert ask(server.status_address, Authorization=f"Bearer {wire}").status == 200
    basic = base64.b64encode(f"me:{token}".encode()).decode()
    assert ask(server.status_address, Authorization=f"Basic {basic}").status == 200


def test_a_token_is_asked_for_where_there_is_one(bench: Bench) -> None:
    """As a bearer token or as a password; with it any name of this host will do."""
    server = bench.server(status="127.0.0.1:0", status_token=STATUS_TOKEN)
    basic = base64.b64encode(f"anybody:{STATUS_TOKEN}".encode()).decode()
    for path in ("/", "/status.json", "/metrics"):
        refused = ask(server.status_address, path)
        assert refused.status == 401
        assert "Basic" in refused.getheader("WWW-Authenticate", "")
        for wrong in (
            "",
            "Bearer",
            f"Bearer {STATUS_TOKEN}x",
            "Basic !!!",
            f"Digest {STATUS_TOKEN}",
            "Basic " + "eDp5",
        ):
            assert ask(server.status_address, path, Authorization=wrong).status == 401
        for right in (f"Bearer {STATUS_TOKEN}", f"bearer  {STATUS_TOKEN}", f"Basic {basic}"):
            assert ask(server.status_address, path, Authorization=right, Host="relay.example.net").status == 200
    assert (
        ask(server.status_address, Authorization=f"Bearer {STATUS_TOKEN}", Origin="http://evil.example").status == 403
    )


def test_health_is_told_without_the_token_and_nothing_else(bench: Bench) -> None:
    client = bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", unused_port(), status="0", status_token=STATUS_TOKEN))
    answer = wait_until(lambda: (found := ask(client.status_address, "/healthz")).status == 503 and found)
    assert body_of(answer) == b"not well\n"
    answer = ask(client.status_address, "/healthz", Authorization=f"Bearer {STATUS_TOKEN}")
    assert body_of(answer).startswith(b"service default has no link")


@pytest.mark.parametrize(
    ("authorization", "token"),
    [
        ("Bearer x", b"x"),
        ("Basic dTpwOnc=", b"p:w"),
        ("Basic dXA=", b""),
        ("Basic \xe9", b""),
        ("Basic", b""),
        ("", b""),
    ],
)
def test_the_token_in_a_header(authorization: str, token: bytes) -> None:
    """A password may have colons."""
    assert given_token(authorization) == token


@pytest.mark.parametrize("place", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "relay.example.net:9090"])
@pytest.mark.parametrize("cls", [RelayServer, RelayClient])
def test_beyond_this_host_it_needs_a_token(cls: Any, place: str) -> None:
    words = (0, 0) if cls is RelayServer else ("localhost", 1, "localhost", 1)
    with pytest.raises(ValueError, match="--status-token-file"):
        cls(*words, status=place)
    cls(*words, status=place, status_token=STATUS_TOKEN)


def test_beyond_this_host_with_a_token(bench: Bench) -> None:
    server = bench.server(status="0.0.0.0:0", status_token=STATUS_TOKEN)
    assert ask((HOST, server.status_address[1])).status == 401
    assert ask((HOST, server.status_address[1]), Authorization=f"Bearer {STATUS_TOKEN}").status == 200


@pytest.mark.parametrize("given", [{"status_token": "too short"}, {"status_token_file": "token"}])
def test_a_token_that_can_be_guessed_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "token").write_text("too short\n")
    given = {name: str(tmp_path / value) if name.endswith("file") else value for name, value in given.items()}
    with pytest.raises(ValueError, match="it can be guessed"):
        RelayServer(0, 0, status="0", **given)


def test_a_token_of_no_use() -> None:
    with pytest.raises(ValueError, match="--status-token is of no use without --status"):
        RelayServer(0, 0, status_token=STATUS_TOKEN)


def test_the_token_is_read_again(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{STATUS_TOKEN}\n")
    path.chmod(0o600)
    server = bench.server(status="0", status_token_file=str(path))
    assert ask(server.status_address, Authorization=f"Bearer {STATUS_TOKEN}").status == 200
    path.write_text("quite another long secret")
    assert server.reload()
    assert ask(server.status_address, Authorization=f"Bearer {STATUS_TOKEN}").status == 401
    assert ask(server.status_address, Authorization="Bearer quite another long secret").status == 200
    path.write_text("short")
    assert not server.reload()
    assert ask(server.status_address, Authorization="Bearer quite another long secret").status == 200


@pytest.mark.parametrize(
    ("host", "is_one"), [("127.0.0.1", True), ("[fe80::1%eth0]:1", True), ("x", False), ("", False)]
)
def test_what_is_an_address(host: str, is_one: bool) -> None:
    assert is_address(host) is is_one


def test_no_secret_is_shown(bench: Bench) -> None:
    """Neither the links' token nor that of the page."""
    server = bench.server(status="0", status_token=STATUS_TOKEN, token=TOKEN)
    bench.client(server, bench.service().port, token=TOKEN)
    for path in ("/", "/status.json", "/metrics", "/healthz"):
        found = body_of(ask(server.status_address, path, Authorization=f"Bearer {STATUS_TOKEN}"))
        assert TOKEN.encode() not in found and STATUS_TOKEN.encode() not in found


# --- Nobody holds anything up -----------------------------------------------------------------------------------


def test_who_asks_nothing_or_takes_nothing_is_sent_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And meanwhile others are answered."""
    replace(monkeypatch, "PATIENCE", 1.0)
    server = bench.server(status="0")
    with connect(server.status_address) as silent, connect(server.status_address) as half:
        half.sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n")
        assert ask(server.status_address).status == 200
        assert read_all(silent) == read_all(half) == b""
    assert not server.desk._visitors


def test_a_slow_reader_is_sent_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer does not fit into the system's buffers, and it reads nothing."""
    import _tcprelay.status.desk as desk

    monkeypatch.setattr(desk, "PATIENCE", 1.0)
    monkeypatch.setattr(desk, "answer", lambda *_: b"x" * (16 << 20))
    server = bench.server(status="0")
    with connect(server.status_address) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: any(visitor.answer for visitor in server.desk._visitors))
        with connect(server.service_addresses["default"]):
            pass  # what is relayed does not notice
        wait_until(lambda: not server.desk._visitors)
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(slow)) < 16 << 20


def test_only_so_many_at_once(server: RelayServer) -> None:
    """The ones that have been there longest go first, and nobody is kept from asking."""
    socks = [connect(server.status_address) for _ in range(MOST_VISITORS + 5)]
    try:
        wait_until(lambda: len(server.desk._visitors) == MOST_VISITORS)
        assert ask(server.status_address).status == 200
        for sock in socks[:5]:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert len(server.desk._visitors) <= MOST_VISITORS
    finally:
        for sock in socks:
            sock.close()


def test_strangers_do_not_keep_the_commands_from_asking(peers: Peers, workers: str) -> None:
    """Those who come over TCP and say nothing are counted apart."""
    server = peers.server("--status", "0")
    place = Path(os.environ["XDG_RUNTIME_DIR"], "tcprelay", f"server-{server.process.pid}.sock")
    address, over = port_of(server), threading.Event()

    def flood() -> None:
        with contextlib.ExitStack() as stack:
            socks: list[socket.socket] = []
            while not over.is_set():
                socks.append(stack.enter_context(connect(address)))
                if len(socks) > 40:
                    socks.pop(0).close()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(str(place))
                sock.sendall(b"GET /status.json HTTP/1.1\r\nHost: tcprelay\r\n\r\n")
                assert read_all(sock).startswith(b"HTTP/1.1 200 ")
    finally:
        over.set()
        flooding.join(PATIENCE)


def test_many_ask_and_one_status_is_made(server: RelayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a second; a hundred pages that are left open cost as much as one."""
    made, survey = [], server.survey
    monkeypatch.setattr(server, "survey", lambda last: made.append(time.monotonic()) or survey(last))  # type: ignore[func-returns-value]
    began = time.monotonic()
    count = 0
    while len(made) < 3:
        assert ask(server.status_address).status == 200
        assert time.monotonic() - began < PATIENCE
        count += 1
    assert count > 2 * len(made)
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(made))


def test_a_status_that_cannot_be_made(server: RelayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on, and so does the relay."""
    with monkeypatch.context() as patch:
        patch.setattr(server, "survey", lambda last: 1 / 0)
        with connect(server.status_address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_all(sock).startswith(b"HTTP/1.1 500 ")
    wait_until(lambda: ask(server.status_address).status == 200)


def test_its_port_is_given_back(bench: Bench) -> None:
    port = unused_port()
    for _ in range(2):
        with RelayServer(0, 0, status=f"127.0.0.1:{port}") as server:
            assert ask(server.status_address).status == 200
    with pytest.raises(ConnectionRefusedError):
        ask((HOST, port))


def test_a_port_that_is_taken(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port} \(--status\): address already in use"):
            RelayServer(0, 0, status=str(port)).start()


def test_there_is_none_unless_it_is_asked_for(bench: Bench) -> None:
    """A program that embeds a relay has no Unix socket either, which is for the commands."""
    with pytest.raises(RuntimeError, match="no status page"):
        _ = bench.server().status_address
    assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob(f"*-{os.getpid()}.sock"))


# --- Commands, with workers too ---------------------------------------------------------------------------------


def port_of(relay: RelayProcess) -> tuple[str, int]:
    """Where the status of a command is: its log says so."""
    lines = wait_until(lambda: [line for line in relay.lines if "the status is at http://" in line])
    return HOST, int(json.loads(lines[0])["message"].rpartition(":")[2].strip("/"))


def status_of(relay: RelayProcess) -> dict[str, Any]:
    return dict(json.loads(body_of(ask(port_of(relay)))))


def test_the_status_of_commands(peers: Peers, workers: str) -> None:
    """With workers it is the whole role's."""
    target = peers.service(lambda sock: sock.sendall(sock.recv(100)))
    server = peers.server("--status", "0", "--token", TOKEN)
    client = peers.client(server.relay_port, target.port, "--status", "0", "--token", TOKEN, "--num-conn", "4")
    socks = [peers.connect(server.service_port) for _ in range(6)]
    wait_until(lambda: status_of(server)["open"] == 6)
    found, other = status_of(server), wait_until(lambda: (s := status_of(client))["open"] == 6 and s)
    assert (found["workers"], found["missing"], found["problems"]) == (int(workers), [], [])
    [service] = found["services"]
    assert (service["name"], service["open"], service["links_busy"]) == ("default", 6, 6)
    [connected] = found["clients"]
    assert connected["links_busy"] == 6 and connected["proof"] == "the token"
    peer = "{}:{}".format(*socks[0].getsockname())
    assert peer in [one["peer"] for one in found["connections"]] and peer in [
        one["peer"] for one in other["connections"]
    ]
    assert {one["id"] for one in found["connections"]} == {one["id"] for one in other["connections"]}
    assert found["process"]["memory_bytes"] > (1 + int(workers)) * 5_000_000
    for sock in socks:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        sock.close()
    wait_until(lambda: status_of(server)["services"][0]["bytes_out"] == 30)
    wait_until(lambda: sum(status_of(client)["services"][0]["duration"]["counts"]) == 6)
    assert ask(port_of(server), "/healthz").status == ask(port_of(client), "/healthz").status == 200


def test_a_worker_that_hangs_or_dies_leaves_a_gap(peers: Peers) -> None:
    """It is shown within a second or two; what was counted there does not get lost, and its successor is shown."""
    import signal

    target = peers.service(lambda sock: sock.sendall(sock.recv(100)))
    server = peers.server("--status", "0", "--workers", "2")
    server.expected_error = "worker "
    peers.client(server.relay_port, target.port, "--num-conn", "4", "--workers", "0")
    wait_until(lambda: status_of(server)["services"][0]["links_idle"] >= 4)
    for _ in range(20):
        sock = peers.connect(server.service_port)
        sock.sendall(b"x")
        read_exactly(sock, 1)
        sock.close()
    wait_until(lambda: sum(status_of(server)["services"][0]["duration"]["counts"]) == 20)
    assert status_of(server)["services"][0]["opened"] == 20
    pids = workers_of(server)
    os.kill(pids[0], signal.SIGSTOP)
    try:
        found = wait_until(lambda: (s := status_of(server))["missing"] == [0] and s)
        assert (found["missing"], found["problems"]) == ([0], ["worker 0 does not answer"])
        assert found["services"][0]["opened"] == 20
        assert ask(port_of(server), "/healthz").status == 503
    finally:
        os.kill(pids[0], signal.SIGCONT)
    wait_until(lambda: status_of(server)["missing"] == [])
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: len(workers_of(server)) == 2 and pids[0] not in workers_of(server))
    found = wait_until(lambda: not (s := status_of(server))["missing"] and s)
    assert found["services"][0]["opened"] == 20 and sum(found["services"][0]["duration"]["counts"]) == 20


def test_the_unix_socket_of_a_command(peers: Peers, workers: str) -> None:
    """For this user alone; without a token, and whatever host is named; gone at the end."""
    server = peers.server("--status", "0", "--status-token", STATUS_TOKEN)
    place = Path(os.environ["XDG_RUNTIME_DIR"], "tcprelay", f"server-{server.process.pid}.sock")
    wait_until(place.exists)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600 and stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(place))
        sock.sendall(b"GET /status.json HTTP/1.1\r\nHost: tcprelay\r\n\r\n")
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and json.loads(body)["pid"] == server.process.pid
    server.close()
    assert not place.exists()


def test_a_request_knows_its_headers_by_any_case() -> None:
    from _tcprelay.status.web import parse

    request = parse(b"GET /x?y HTTP/1.1\r\nhOST: a\r\nX-Y: z\r\n\r\n")
    assert request == Request("GET", "/x", {"host": "a", "x-y": "z"})


def test_it_accepts_again_after_an_error(server: RelayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, say: who comes meanwhile stays in the queue, and is answered."""
    accept, errors = socket.socket.accept, [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def fail_once(sock: socket.socket) -> Any:
        if errors and sock in server.desk._listeners:
            raise errors.pop()
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", fail_once)
    assert ask(server.status_address).status == 200
    assert not errors


def test_who_is_sent_away_while_a_status_is_made_keeps_it_from_nobody() -> None:
    """As with workers, one of which hangs: more have come meanwhile than there is room for."""
    asked: list[Any] = []
    desk = Desk(logging.getLogger("tcprelay.test"), lambda: b"", asked.append)
    with selectors.DefaultSelector() as selector:
        desk.bind(Endpoint(HOST, 0), "server", None)
        desk.watch(selector)

        def turn() -> bool:
            for key, _ in selector.select(0.01):
                key.data()
            return True

        assert desk.address
        socks, until = list[socket.socket](), time.monotonic() + PATIENCE
        try:
            for number in range(MOST_VISITORS + 1):
                socks.append(connect(desk.address))
                socks[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                here = {sock.getsockname() for sock in socks[max(0, number + 1 - MOST_VISITORS) :]}
                while turn() and {one.sock.getpeername() for one, *_ in desk._waiting} != here:
                    assert time.monotonic() < until
            asked.pop()(Status(role="server"))
            wait_until(lambda: turn() and not desk._visitors)
            assert all(read_all(sock).startswith(b"HTTP/1.1 200 ") for sock in socks[1:])
            assert read_all(socks[0]) == b""
        finally:
            desk.close()
            for sock in socks:
                sock.close()


def test_an_answer_that_comes_late_is_not_taken_for_the_next_one() -> None:
    """A worker that was stopped answers all that it has been asked."""
    told: list[Status] = []
    asking = Asking(1, lambda last: Status(role="server"), lambda message: [0])

    def answer(number: int, count: int, more: bool = False) -> None:
        words = json.dumps(as_dict(Status(open=count))).encode()
        asking.hear(0, {"status": number, "more": more}, words)

    asking.ask(told.append)
    asking.ask(told.append)
    answer(1, 7, more=True)
    answer(1, 8)
    assert not told
    answer(2, 9)
    assert [(status.open, status.missing) for status in told] == [(9, ())]


def test_a_link_to_a_name_that_somebody_can_have_is_refused(server: RelayServer) -> None:
    """DNS rebinding once more: a page of that name may have led there itself."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(server.status_address, "/", Host="evil.example", **link).status == 421


def test_an_answer_that_is_read_late_is_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has all of it, and the desk is done with its visitor, long before he has read it."""
    import _tcprelay.status.desk as desk

    monkeypatch.setattr(desk, "answer", lambda *_: b"x" * 20_000)
    server = bench.server(status="0")
    with socket.socket() as slow:
        slow.settimeout(PATIENCE)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(server.status_address)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: server.desk._status is not None and not server.desk._visitors)
        assert len(read_all(slow)) == 20_000


def test_who_speaks_tls_hears_at_once_that_there_is_none(server: RelayServer) -> None:
    """He has sent a ClientHello, and waits for an answer before he says more."""
    began = time.monotonic()
    with connect(server.status_address) as sock:
        sock.sendall(b"\x16\x03\x01\x02\0\x01" + bytes(500))
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    assert time.monotonic() - began < desk_room.PATIENCE / 2


def test_a_name_of_a_service_may_be_encoded(server: RelayServer) -> None:
    """As libraries that build addresses do."""
    assert "there is no service a@1\n" in ask(server.status_address, "/healthz?service=a%401").body.decode()  # type: ignore[attr-defined]


def test_the_status_token_is_no_other_token(bench: Bench) -> None:
    """It is sent with every request."""
    with pytest.raises(ValueError, match="the status token is the relay's token, too"):
        RelayServer(0, 0, token=TOKEN, status="0", status_token=TOKEN).start()
