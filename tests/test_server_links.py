"""The server's side of the link protocol, with a relay client that the test plays."""

from __future__ import annotations

import select
import socket
import struct
import threading
from typing import Any

import pytest

import tcprelay
from _tcprelay.telling import Events
from _tcprelay.protocol import (
    ABORT, AUTH, BYE, CHALLENGE, CLIENT, DATA, END, FAIL, HELLO, PING, PONG, READY, REFUSED, SERVER, START, WELCOME,
    encode_frame, encode_header, prove,
)  # fmt: skip
from _tcprelay.pump import Flow
from _tcprelay.server.limits import Handshakes
from _tcprelay.server.links import Links
from _tcprelay.server.pool import Pool
from _tcprelay.server.pooled import PooledLink
from _tcprelay.streams import Stream
from _tcprelay.waiting import Deadline, wait_for
from _tcprelay.watch import in_batches
from tcprelay import (
    ConnectionClosed, ConnectionFailed, ConnectionOpened, Event, LinkDown, LinkNotMade, LinkRefused, LinkUp,
    RelayServer,
)  # fmt: skip

from .certificates import Certificates
from .conftest import PATIENCE, Bench, connect, read_all, read_exactly, replace, wait_until
from .ends import send_end
from .peers_v1 import FakeClient

RESET = struct.pack("ii", 1, 0)


def fake(bench: Bench, **options: object) -> FakeClient:
    """A link of a played client in the pool of a new server."""
    return pooled(bench, bench.server(**options), "fake")


def pooled(bench: Bench, server: RelayServer, client: str) -> FakeClient:
    """A link of a played client, once it is in the pool (behind the links that are there already)."""
    link: FakeClient = bench.enter(FakeClient(server))
    assert link.hello(idle=8, client=client).kind == WELCOME
    port = link.sock.getsockname()[1]

    def is_there() -> bool:
        own = [known for known in server._pool.idle_links() if known.address[1] == port]
        return any(not known.pongs_due for known in own)

    wait_until(is_there)
    return link


# The handshake


def test_welcome_tells_the_client_what_it_needs(bench: Bench) -> None:
    """The heartbeat, the service's address, and how many service clients wait."""
    server = bench.server(heartbeat=7)
    sock = bench.connect(server)
    wait_until(lambda: server.counters["waiting"] == 1)
    link = bench.enter(FakeClient(server))
    welcome = link.hello()
    host, port = server.service_addresses["default"]
    assert welcome.fields == {"heartbeat": 7.0, "address": f"[{host}]:{port}", "waiting": 1}
    assert link.next().kind == START
    sock.close()


@pytest.mark.parametrize("token", [b"", b"wrong", b"secret-tokeN"])
def test_a_wrong_token_is_refused_with_a_reason(bench: Bench, token: bytes) -> None:
    """Nothing gets into the pool, and both sides learn why."""
    server = bench.server(token="secret-token")
    link = bench.enter(FakeClient(server))
    refused = link.hello(token=token)
    assert refused.kind == REFUSED
    assert refused.fields["code"] == "token"
    assert "copy the server's" in refused.fields["reason"]
    [event] = bench.server_events.wait(LinkRefused)
    assert (event.code, event.reason) == ("token", "its token is not this server's")
    assert server.counters["links_idle"] == 0
    assert "secret-token" not in str(bench.server_events.events)


def test_an_auth_cannot_be_replayed(bench: Bench) -> None:
    """Each handshake has a nonce of the server's own, so that a recorded proof is worth nothing."""
    server = bench.server(token="secret-token")
    recorded = bench.enter(FakeClient(server))
    nonce = {"nonce": "00", "version": 1, "service": "default", "client": "x"}
    recorded.send(HELLO, nonce)
    first = recorded.next()
    proof = prove(b"secret-token", CLIENT, "00", first.text("nonce"), "default", "x")
    recorded.send(AUTH, {"proof": proof})
    assert recorded.next().kind == WELCOME
    replay = bench.enter(FakeClient(server))
    replay.send(HELLO, nonce)
    second = replay.next()
    assert second.kind == CHALLENGE
    assert second.text("nonce") != first.text("nonce")
    replay.send(AUTH, {"proof": proof})
    assert replay.next().kind == REFUSED


def test_the_server_proves_that_it_knows_the_token(bench: Bench) -> None:
    """WELCOME carries the proof of the server's role over the same nonces."""
    link = bench.enter(FakeClient(bench.server(token="secret-token")))
    link.send(HELLO, {"version": 1, "service": "default", "client": "me", "nonce": "abc"})
    nonce = link.next().text("nonce")
    link.send(AUTH, {"proof": prove(b"secret-token", CLIENT, "abc", nonce, "default", "me")})
    assert link.next().fields["proof"] == prove(b"secret-token", SERVER, "abc", nonce, "default", "me")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"service": "nope"}, "service", "there is no service nope here"),
        ({"service": ""}, "service", "there is no service"),
        ({"service": "a\nb\x1b"}, "service", r"no service a\nb\x1b here"),
        ({"version": 2}, "version", "link protocol 1"),
        ({"service": 5}, "protocol", "service is not a string"),
        ({"idle": "many"}, "protocol", "idle is not a number"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(bench: Bench, fields: dict[str, object], code: str, words: str) -> None:
    """The reason names the fault, escaped."""
    link = bench.enter(FakeClient(bench.server()))
    link.send(HELLO, {"version": 1, "service": "default", "client": "x", "nonce": "0", **fields})
    refused = link.next()
    assert (refused.kind, refused.fields["code"]) == (REFUSED, code)
    assert words in refused.fields["reason"]
    bench.server_events.wait(LinkRefused)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it speaks HTTP, not the link protocol"),
        (b"\x16\x03\x01\x02\x00\x01", "it speaks TLS, not the link protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it speaks SSH, not the link protocol"),
        (b"\x00" * 1000, "unknown frame type 0"),
        (encode_frame(PING), "PING from the client where the link is new"),
        (encode_header(HELLO, 5000), "HELLO of 5000 bytes is longer than 4096"),
        (encode_header(HELLO, 4) + b"{]}}", "HELLO: the body is not JSON"),
        (encode_header(DATA, 10) + b"x" * 10, "DATA from the client where the link is new"),
    ],
)
def test_noise_on_the_relay_port_is_refused_at_once(bench: Bench, noise: bytes, words: str) -> None:
    """One warning, REFUSED with the fault, the connection closed, and nobody else disturbed."""
    server = bench.relay()
    with connect(server.relay_address) as sock:
        sock.sendall(noise)
        answer = read_all(sock)
    assert answer[0] == REFUSED
    assert words.encode() in answer
    [refused] = bench.server_events.wait(LinkRefused)
    assert words in refused.reason
    with bench.connect(server) as other:
        other.sendall(b"x")
        assert other.recv(1) == b"x"


def test_silence_and_half_a_frame_are_closed_at_the_deadline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that says nothing, or drips, gets no longer than the handshake's deadline in all; who has said
    nothing is told nothing, since it may be a raw client."""
    replace(monkeypatch, "HANDSHAKE_STEP", 0.3)
    server = bench.server()
    silent, half = connect(server.relay_address), connect(server.relay_address)
    half.sendall(b"\x01\x00")
    with silent, pytest.raises(ConnectionResetError):
        read_all(silent)
    with half:
        assert b"not complete in time (0.3 s for each answer and 20 s in all)" in read_all(half)
    assert {event.code for event in bench.server_events.wait(LinkRefused, 2)} == {"timeout"}


def test_an_evicted_handshake_does_not_join_the_pool(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives way at the last moment, with its proof given and its receiving over: no WELCOME, and no link."""
    server = bench.server()
    greeting = server._links._greeting
    handshakes = server._links._handshakes = greeting._handshakes = Handshakes(1, lambda: 0.0)  # the first gives way
    join_pool = greeting._join

    def join_late(link: PooledLink) -> None:
        bench.enter(connect(server.relay_address))
        wait_until(lambda: handshakes._evicted)
        join_pool(link)

    monkeypatch.setattr(greeting, "_join", join_late)
    link = bench.enter(FakeClient(server))
    with pytest.raises((EOFError, ConnectionError)):
        link.hello()
    [refused] = bench.server_events.wait(LinkRefused)
    assert refused.reason == "too many handshakes at once"
    assert not server._pool._members
    assert not bench.server_events.of(LinkUp)


def test_an_error_on_the_way_into_the_pool_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is counted out, wherever it happens, and the next one is served."""
    server = bench.server(max_links_per_address=1)
    emit = server.runtime.emit

    def fail_once(event: Event) -> None:
        monkeypatch.setattr(server.runtime, "emit", emit)
        raise MemoryError("out of memory")

    monkeypatch.setattr(server.runtime, "emit", fail_once)
    lost = bench.enter(FakeClient(server))
    with pytest.raises((EOFError, ConnectionError)):
        lost.hello()
    wait_until(lambda: not server._listeners.of_links._counts)
    assert not server._pool._members
    assert bench.enter(FakeClient(server)).hello().kind == WELCOME


def test_protected_mode(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token, a link from another host is refused with what to set; with one, or if allowed, it is not."""
    replace(monkeypatch, "is_loopback", lambda address: False)
    refused = bench.enter(FakeClient(bench.server())).hello()
    assert (refused.kind, refused.fields["code"]) == (REFUSED, "protected")
    assert "--token-file" in refused.fields["reason"]
    assert bench.enter(FakeClient(bench.server(allow_unauthenticated=True))).hello().kind == WELCOME
    assert bench.enter(FakeClient(bench.server(token="t"))).hello(token=b"t").kind == WELCOME


# Idle links


def test_an_idle_link_is_pinged_and_kept(bench: Bench) -> None:
    """A link that answers PING stays."""
    link = fake(bench, heartbeat=0.1)
    for _ in range(5):
        assert link.next().kind == PING
        link.send(PONG)
    assert not bench.server_events.of(LinkDown)


def test_a_silent_link_is_evicted(bench: Bench) -> None:
    """Without an answer to PING it is gone after two and a half heartbeats, and not before."""
    link = fake(bench, heartbeat=0.2)
    [up] = bench.server_events.wait(LinkUp)
    [down] = bench.server_events.wait(LinkDown)
    assert down.reason == "silent for 0.5 s"
    assert link.next().kind == PING
    assert up.client == down.client == "fake"


def test_a_link_that_comes_back_from_a_long_connection_is_alive(bench: Bench) -> None:
    """The time that it was in use does not count as silence."""
    link = fake(bench, heartbeat=0.2)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    sock.settimeout(0.7)
    with pytest.raises(TimeoutError):
        sock.recv(1)  # longer than two and a half heartbeats
    link.send(END)
    sock.shutdown(socket.SHUT_WR)
    link.read_end()
    for _ in range(3):
        assert link.next().kind == PING
        link.send(PONG)
    assert not bench.server_events.of(LinkDown)


def test_a_pong_that_nobody_asked_for_is_a_fault(bench: Bench) -> None:
    """A flood of them keeps neither the keeper nor a service client's thread busy."""
    link = fake(bench)
    link.stream.send(encode_frame(PONG) * 10_000)
    bench.server_events.wait(LinkDown)
    assert bench.server_events.of(LinkDown)[0].reason == "PONG without PING"
    again = pooled(bench, link.server, "again")
    sock = bench.connect(link.server)
    assert again.next().kind == START
    again.stream.send(encode_frame(PONG) * 10_000)
    assert "PONG without PING" in bench.server_events.wait(LinkDown, 2)[1].reason
    sock.close()


def test_a_lost_link_leaves_the_pool_at_once(bench: Bench) -> None:
    """The end of an idle link's connection is noticed without a PING."""
    link = fake(bench)
    link.close()
    [down] = bench.server_events.wait(LinkDown)
    assert down.reason == "the link was closed"


def test_a_fault_on_an_idle_link_ends_it(bench: Bench) -> None:
    """READY without START is answered with REFUSED that says so."""
    link = fake(bench)
    link.stream.send(encode_frame(READY))
    refused = link.next()
    assert (refused.kind, refused.fields["reason"]) == (REFUSED, "READY from the client where the link is idle")


def test_a_client_takes_a_link_back_with_bye(bench: Bench) -> None:
    """The server takes it from the pool and closes it."""
    link = fake(bench)
    link.send(BYE)
    with pytest.raises(EOFError):
        link.next()
    assert link.server.counters["links_idle"] == 0


def test_a_bye_right_behind_the_end_is_heard(bench: Bench) -> None:
    """It is read together with END, and the link is not given to the next service client."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    sock.shutdown(socket.SHUT_WR)
    link.read_end()
    for kind in (READY, END, BYE):
        link.machine.send(kind)
    link.stream.send(encode_frame(READY) + encode_frame(END) + encode_frame(BYE))
    assert read_all(sock) == b""
    with pytest.raises(EOFError):
        link.next()
    assert link.server.counters["links_idle"] == 0


def test_surplus_links_are_retired_with_bye(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that wants one idle link keeps one of three."""
    replace(monkeypatch, "SURPLUS_TIME", 0.1)
    server = bench.server(heartbeat=0.5)
    links = [bench.enter(FakeClient(server)) for _ in range(3)]
    assert {link.hello(idle=1).kind for link in links} == {WELCOME}
    wait_until(lambda: server.counters["links_idle"] == 1)
    assert {event.reason for event in bench.server_events.wait(LinkDown, 2)} == {"surplus"}


# Connections


def test_start_brings_the_first_bytes_with_it(bench: Bench) -> None:
    """What the service client has sent while it waited follows START at once, before READY."""
    server = bench.server()
    sock = bench.connect(server)
    sock.sendall(b"early")
    wait_until(lambda: server.counters["waiting"] == 1)
    link = bench.enter(FakeClient(server))
    link.hello()
    start = link.next()
    assert start.kind == START
    assert start.fields["client"] == "{}:{}".format(*sock.getsockname())
    assert link.read(5) == b"early"
    sock.sendall(b", more")
    assert link.read(6) == b", more"
    sock.shutdown(socket.SHUT_WR)
    link.read_end()
    link.send(READY)
    link.write(b"answer")
    send_end(link, passed=11)
    assert read_all(sock) == b"answer"
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert (closed.bytes_in, closed.bytes_out, closed.reason) == (11, 6, "")
    wait_until(lambda: server.counters["links_idle"] == 1)


def test_early_bytes_are_bounded(bench: Bench) -> None:
    """Before READY the server takes 64 KiB and no more; afterwards all of it arrives."""
    link = fake(bench)
    sock = bench.connect(link.server)
    sock.settimeout(0.5)
    data = bytes(range(256)) * 40_000
    sent = 0
    try:
        while sent < len(data):
            sent += sock.send(data[sent:])
    except TimeoutError:
        pass
    assert link.next().kind == START
    assert link.read(65536) == data[:65536]
    link.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        link.recv_into(memoryview(bytearray(1)))
    link.sock.settimeout(None)
    link.send(READY)
    assert link.read(sent - 65536) == data[65536:sent]
    link.send(END)
    sock.close()


def test_a_failed_service_client_is_offered_to_another_relay_client(bench: Bench) -> None:
    """FAIL: the next client's link gets START with the same bytes, and the first link goes back to the pool."""
    server = bench.server()
    one, two = pooled(bench, server, "one"), pooled(bench, server, "two")
    sock = bench.connect(server)
    sock.sendall(b"early")
    first = one.next()
    assert first.kind == START
    assert one.read(5) == b"early"
    one.send(FAIL, {"reason": "down"})
    one.read_end()
    second = two.next()
    assert second.kind == START
    assert second.fields["id"] == first.fields["id"]
    assert two.read(5) == b"early"
    two.send(READY)
    two.write(b"answer")
    send_end(two, passed=5)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"answer"
    wait_until(lambda: server.counters["links_idle"] == 2)
    assert not bench.server_events.of(LinkDown)


def test_when_all_have_failed_the_service_client_is_reset(bench: Bench) -> None:
    """With nobody left to offer it to it gets an RST, and the record has the reason, escaped."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(FAIL, {"reason": "no\nroute"})
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason == r"the service cannot be reached: no\nroute"


def test_a_link_that_dies_unanswered_is_replaced_where_no_byte_was_sent(bench: Bench) -> None:
    """START went out alone, so the service client can be offered to the next link."""
    server = bench.server()
    one, two = pooled(bench, server, "one"), pooled(bench, server, "two")
    sock = bench.connect(server)
    assert one.next().kind == START
    one.close()
    assert two.next().kind == START
    two.send(READY)
    two.write(b"hello")
    assert read_exactly(sock, 5) == b"hello"


def test_a_request_is_never_delivered_twice(bench: Bench) -> None:
    """A link that dies unanswered with bytes on it: the service client is reset, no other link gets them."""
    server = bench.server()
    one, two = pooled(bench, server, "one"), pooled(bench, server, "two")
    sock = bench.connect(server)
    sock.sendall(b"order")
    assert one.next().kind == START
    assert one.read(5) == b"order"
    one.close()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "lost before the service answered" in failed.reason
    assert two.receive_now() is None


def test_a_link_that_dies_in_mid_connection_is_no_end(bench: Bench) -> None:
    """Without END the service client gets what came, and then an RST."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    link.write(b"half")
    assert read_exactly(sock, 4) == b"half"
    link.close()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason.endswith("the link was lost")


def test_a_link_that_dies_after_its_end_is_noticed(bench: Bench) -> None:
    """The service has ended, the service client is silent: the loss of the link still ends the connection."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    link.send(END)
    assert read_all(sock) == b""
    link.close()
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason.endswith("connection lost")


def test_a_frame_cut_short_is_no_end(bench: Bench) -> None:
    """A link that ends inside a DATA frame is an error, too."""
    link = fake(bench)
    sock = bench.connect(link.server)
    link.next()
    link.send(READY)
    link.stream.send(encode_header(DATA, 100) + b"x" * 50)
    assert read_exactly(sock, 50) == b"x" * 50
    link.stream.close_normally()
    link.close()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_frames_split_at_every_byte(bench: Bench) -> None:
    """However the link's bytes are cut into segments, the connection's are the same."""
    link = fake(bench)
    sock = bench.connect(link.server)
    link.next()
    stream = (
        encode_frame(READY) + encode_header(DATA, 3) + b"abc" + encode_header(DATA, 0) + encode_header(DATA, 2) + b"de"
    )
    for i in range(len(stream)):
        link.stream.send(stream[i : i + 1])
    assert read_exactly(sock, 5) == b"abcde"
    link.machine.send(READY)
    link.send(END)
    assert read_all(sock) == b""


def test_many_frames_in_one_segment(bench: Bench) -> None:
    """READY, DATA, END at once: nothing that was read ahead is lost."""
    link = fake(bench)
    sock = bench.connect(link.server)
    link.next()
    for kind in (READY, END):
        link.machine.send(kind)
    link.stream.send(encode_frame(READY) + (encode_header(DATA, 2) + b"ab") * 5000 + encode_frame(END))
    assert read_all(sock) == b"ab" * 5000


def test_an_abort_leaves_the_link_in_use(bench: Bench) -> None:
    """ABORT resets the service client; after the server's own ABORT the next connection uses the link, once its client
    listens: it may still be passing on what came before."""
    link = fake(bench)
    sock = bench.connect(link.server)
    link.next()
    link.send(READY)
    link.write(b"part")
    link.send(ABORT, {"reason": "reset by the service"})
    assert read_exactly(sock, 4) == b"part"
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert link.next().kind == ABORT
    assert link.next().kind == PING
    bench.connect(link.server)
    wait_until(lambda: link.server.counters["waiting"] == 1)
    link.send(PONG)
    assert link.next().kind == START


def test_the_service_client_aborts_before_ready(bench: Bench) -> None:
    """Its RST goes out as ABORT; after the answer the link is idle again."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()
    abort = link.next()
    assert (abort.kind, "reset" in abort.fields["reason"]) == (ABORT, True)
    link.send(READY)
    link.send(ABORT)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert "reset" in closed.reason
    assert link.next().kind == PING
    link.send(PONG)
    wait_until(lambda: link.server.counters["links_idle"] == 1)


def test_a_bye_that_crossed_start_does_not_lose_the_service_client(bench: Bench) -> None:
    """The connection is served to its end, and then the link is closed."""
    link = fake(bench)
    sock = bench.connect(link.server)
    start = link.next()
    assert start.kind == START
    link.send(BYE)
    link.send(READY)
    link.write(b"served")
    link.send(END)
    assert read_all(sock) == b"served"
    sock.close()
    link.read_end()
    with pytest.raises(EOFError):
        link.next()


def test_an_unanswered_start_ends_with_the_pair_timeout(bench: Bench) -> None:
    """No service client waits longer, and the link is given up."""
    link = fake(bench, pair_timeout=0.3)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert failed.reason.startswith("no answer from the service within 0.3 s; the relay client's host has received")
    with pytest.raises((EOFError, ConnectionResetError)):
        link.next()


# Waiting for links


@pytest.mark.parametrize("early", [b"", b"early"])
def test_a_start_that_nobody_acknowledges_makes_its_client_suspect(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, early: bytes
) -> None:
    """The other links of that relay client are not used before they have answered; who has sent nothing is offered to
    another one, and who has sent something, which may have arrived, goes on waiting."""
    replace(monkeypatch, "SUSPICION", 0.5)
    replace(monkeypatch, "path_is_dead", lambda sock, seconds: seconds == 0.5)
    replace(monkeypatch, "is_resent", lambda sock: True)
    server = bench.server()
    idle, chosen = pooled(bench, server, "lost"), pooled(bench, server, "lost")
    sock = bench.connect(server)
    sock.sendall(early)
    assert chosen.next().kind == START
    assert idle.next().kind == PING
    assert server.counters["links_idle"] == 0
    if early:
        assert chosen.read(len(early)) == early
        chosen.send(READY)
        wait_until(lambda: bench.server_events.of(ConnectionOpened))
    else:
        with pytest.raises(ConnectionResetError):
            chosen.next()
        wait_until(lambda: server.counters["waiting"] == 1)
        later = bench.connect(server)
        later.sendall(b"later")
        wait_until(lambda: server.counters["waiting"] == 2)
        idle.send(PONG)
        assert idle.next().fields["client"] == "{}:{}".format(*sock.getsockname())
        later.close()
    sock.close()


def test_a_link_that_has_never_answered_is_a_last_resort(bench: Bench) -> None:
    """Others are given out before one whose client may have given up during the handshake."""
    answered = fake(bench)
    fresh = bench.enter(FakeClient(answered.server))
    fresh.send(HELLO, {"version": 1, "service": "default", "client": "fresh", "nonce": "0"})
    assert [fresh.next().kind for _ in range(2)] == [WELCOME, PING]
    for _ in range(3):
        wait_until(lambda: answered.server.counters["links_idle"] == 2)
        answered.send_connection(bench.connect(answered.server))
    wait_until(lambda: answered.server.counters["links_idle"] == 2)
    busy = bench.connect(answered.server)
    assert answered.next().kind == START
    last = bench.connect(answered.server)
    assert fresh.next().kind == START
    busy.close()
    last.close()


def test_waiting_ends_with_the_pair_timeout(bench: Bench) -> None:
    """A service client for whom no link comes gets an RST and a record that says what to look for."""
    server = bench.server(pair_timeout=0.2)
    sock = bench.connect(server)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "no relay client is connected" in failed.reason
    assert 0.2 <= failed.seconds < 2


def test_service_clients_are_served_in_their_order(bench: Bench) -> None:
    """Who came first gets the first link, and START says how many more wait."""
    server = bench.server()
    socks = []
    for number in range(3):
        sock = bench.connect(server)
        sock.sendall(b"%d" % number)
        socks.append(sock)
        wait_until(lambda n=number: server.counters["waiting"] == n + 1)  # type: ignore[misc]
    link = bench.enter(FakeClient(server))
    link.hello()
    for number in range(3):
        start = link.next()
        assert start.fields["waiting"] == 2 - number
        assert link.read(1) == b"%d" % number
        link.send(READY)
        send_end(link, passed=1)
        socks[number].close()
        link.read_end()


def test_the_number_of_waiting_service_clients_is_bounded(bench: Bench) -> None:
    """One more than --max-pending is refused at once; those who wait go on waiting."""
    server = bench.server(max_pending=2)
    waiting = [bench.connect(server) for _ in range(2)]
    wait_until(lambda: server.counters["waiting"] == 2)
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "--max-pending" in failed.reason
    bench.client(server, bench.service(lambda s: s.sendall(b"x")).port, num_conn=1)
    assert [sock.recv(1) for sock in waiting] == [b"x", b"x"]


def test_who_waits_in_vain_keeps_nobody_in_the_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay client is connected, but no link of it comes free: then there is no use in letting others wait, too."""
    link = fake(bench, max_pending=1)
    busy = bench.connect(link.server)
    assert link.next().kind == START
    waiting = bench.connect(link.server)
    wait_until(lambda: link.server.counters["waiting"] == 1)
    third = bench.connect(link.server)
    third.settimeout(0.3)
    with pytest.raises(TimeoutError):
        third.recv(1)  # the kernel holds it
    replace(monkeypatch, "STANDSTILL", 0.1)
    third.settimeout(PATIENCE)
    with pytest.raises(ConnectionResetError):
        third.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "--max-pending" in failed.reason
    assert link.server.counters["waiting"] == 1
    busy.close()
    waiting.close()


def test_the_number_of_connections_is_bounded(bench: Bench) -> None:
    """One more than --max-connections is refused; when one ends there is room again."""
    server = bench.server(max_connections=2)
    bench.client(server, bench.service().port)
    socks = [bench.connect(server) for _ in range(2)]
    for sock in socks:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert "--max-connections" in bench.server_events.wait(ConnectionFailed)[0].reason
    socks[0].shutdown(socket.SHUT_WR)
    assert read_all(socks[0]) == b""
    bench.server_events.wait(ConnectionClosed)
    sock = bench.connect(server)
    sock.sendall(b"y")
    assert sock.recv(1) == b"y"


def test_a_service_client_that_has_gone_costs_no_link(bench: Bench) -> None:
    """Who left while waiting is dropped before a link is spent on it."""
    server = bench.server()
    gone = [bench.connect(server) for _ in range(5)]
    wait_until(lambda: server.counters["waiting"] == 5)
    stays = bench.connect(server)
    stays.sendall(b"me")
    wait_until(lambda: server.counters["waiting"] == 6)
    for sock in gone:
        sock.close()
    link = bench.enter(FakeClient(server))
    link.hello()
    start = link.next()
    assert start.fields["client"] == "{}:{}".format(*stays.getsockname())
    assert len(bench.server_events.wait(ConnectionFailed, 5)) == 5
    assert not bench.server_events.of(ConnectionOpened)


def test_a_burst_is_told_to_the_client(bench: Bench) -> None:
    """A client with one idle link serves a hundred at once: START and WELCOME say how many wait."""
    server = bench.server()
    bench.client(server, bench.service().port, num_conn=1)
    socks = [bench.connect(server) for _ in range(100)]
    for sock in socks:
        sock.sendall(b"x")
    for sock in socks:
        assert sock.recv(1) == b"x"
    assert len(bench.server_events.of(ConnectionOpened)) == 100


def test_who_waits_when_the_server_ends_is_reset(bench: Bench) -> None:
    """Nobody is left hanging until the pair time-out."""
    server = bench.server(pair_timeout=60)
    sock = bench.connect(server)
    wait_until(lambda: server.counters["waiting"] == 1)
    server.end()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert bench.server_events.wait(ConnectionFailed)[0].reason == "the relay server is ending"


# After a connection


@pytest.mark.parametrize("count", [10, 200_000])
def test_a_link_whose_client_may_not_be_done_settles_first(bench: Bench, count: int) -> None:
    """Its client may still be passing bytes on: the link is used again after a PONG, however late that comes."""
    link = fake(bench, heartbeat=0.2)
    sock = bench.connect(link.server)
    carry_one_way(link, sock, count)
    assert link.next().kind == PING
    waiting = bench.connect(link.server)
    wait_until(lambda: link.server.counters["waiting"] == 1)
    link.sock.settimeout(1.0)  # five heartbeats, in which a silent idle link would be evicted
    with pytest.raises(TimeoutError):
        link.sock.recv(1, socket.MSG_PEEK)
    link.sock.settimeout(None)
    assert not bench.server_events.of(LinkDown)
    link.send(PONG)
    assert link.next().kind == START
    waiting.close()


def carry_one_way(link: FakeClient, sock: socket.socket, count: int) -> None:
    """A connection whose service ends before it has read, and so many bytes that are on the way to it then."""
    assert link.next().kind == START
    link.send(READY)
    link.send(END)
    assert sock.recv(1) == b""
    sock.sendall(bytes(count))
    sock.shutdown(socket.SHUT_WR)
    assert link.read(count) == bytes(count)
    link.read_end()


def test_a_link_that_settles_is_not_taken_before_others(bench: Bench) -> None:
    """A newcomer gets a link that is known to be free, although it was used longer ago."""
    free = fake(bench)
    settling = pooled(bench, free.server, "another")
    carry_one_way(free, bench.connect(free.server), 10)
    assert free.next().kind == PING
    free.send(PONG)
    wait_until(lambda: free.server.counters["links_idle"] == 2)
    carry_one_way(settling, bench.connect(free.server), 10)
    assert settling.next().kind == PING
    for _ in range(2):
        free.send_connection(bench.connect(free.server))


def test_a_client_that_shows_that_it_is_done_gets_the_next_at_once(bench: Bench) -> None:
    """What it says in END that it has passed on is all that was sent: there is no PING, and START comes."""
    link = fake(bench)
    for _ in range(3):
        link.send_connection(bench.connect(link.server))


def test_a_link_that_settles_is_closed_in_peace(bench: Bench) -> None:
    """The server's end sends no RST, which would destroy what is still on the way to the relay client."""
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    link.send(END)
    assert sock.recv(1) == b""
    sock.sendall(bytes(60_000))
    sock.shutdown(socket.SHUT_WR)
    bench.server_events.wait(ConnectionClosed)  # all of it has been given to the kernel
    link.server.end()
    assert link.read(60_000) == bytes(60_000)
    link.read_end()
    assert [link.next().kind for _ in range(2)] == [PING, BYE]
    with pytest.raises(EOFError):
        link.next()


def test_a_ping_that_does_not_fit_stays_due(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settling link whose socket is full is not dropped, which would lose what is under way; the PING follows."""
    full, asked = threading.Event(), threading.Event()
    plain = Stream.send_now

    def send_now(stream: Stream, data: bytearray, end_follows: bool = False) -> bool:
        if full.is_set() and bytes(data) == encode_frame(PING):
            plain(stream, data[:2])
            del data[:2]
            full.clear()
            asked.set()
            return False
        return plain(stream, data, end_follows)

    monkeypatch.setattr(Stream, "send_now", send_now)
    link = fake(bench)
    sock = bench.connect(link.server)
    full.set()
    carry_one_way(link, sock, 10)
    assert asked.wait(PATIENCE)
    assert link.next().kind == PING
    link.send(PONG)
    link.send_connection(bench.connect(link.server))
    assert not bench.server_events.of(LinkDown)


def test_a_server_without_a_token_refuses_who_wants_one_proven(bench: Bench) -> None:
    """Instead of a link that its client drops again and again, both are told what is missing."""
    link = bench.enter(FakeClient(bench.server()))
    link.send(HELLO, {"version": 1, "service": "default", "client": "x", "nonce": "0", "token": True})
    refused = link.next()
    assert (refused.kind, refused.fields["code"]) == (REFUSED, "token")
    assert "the relay server has no token to prove" in refused.fields["reason"]


def test_a_client_that_does_not_read_is_as_good_as_dead(bench: Bench) -> None:
    """A PING that does not fit into the link's buffers costs the link, and never holds up the keeper."""
    link = fake(bench, heartbeat=0.2)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    link.send(END)
    sock.settimeout(0.5)
    try:
        while True:
            sock.sendall(bytes(65536))  # until the link's buffers are full
    except TimeoutError:
        pass
    sock.close()
    other = pooled(bench, link.server, "other")
    for _ in range(8):
        assert other.next().kind == PING
        other.send(PONG)


def test_a_link_that_takes_nothing_costs_no_service_client(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link is found broken when START is sent, before the keeper finds it: the early bytes have not left, and so the
    next link gets them."""
    monkeypatch.setattr(Links, "_keep", lambda links: links._runtime.cut.wait(PATIENCE))
    server = bench.relay()
    hand_on = server._listeners.hand_on

    def wait_for_bytes(service: str, sock: socket.socket, address: Any) -> None:
        if service:
            wait_for(sock.fileno(), select.POLLIN, Deadline(PATIENCE))
        hand_on(service, sock, address)

    server._listeners.hand_on = wait_for_bytes
    broken = [*next(iter(server._pool._idle["default"].values()))][-1]  # the next to be taken
    broken.link.sock.shutdown(socket.SHUT_WR)
    sock = bench.connect(server)
    sock.sendall(b"once")
    assert read_exactly(sock, 4) == b"once"


def test_an_unexpected_error_loses_no_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails as a link goes back to the pool, or a connection opens, the link counts no longer."""
    link = fake(bench)
    server, put, emit = link.server, Pool.put, Events.__call__

    def fail_to_put(pool: Pool, pooled: PooledLink) -> bool:
        raise MemoryError

    monkeypatch.setattr(Pool, "put", fail_to_put)
    link.send_connection(bench.connect(server))
    [down] = bench.server_events.wait(LinkDown)
    assert down.reason == "unexpected error"
    monkeypatch.setattr(Pool, "put", put)
    again = pooled(bench, server, "again")

    def fail_to_tell(events: Events, event: tcprelay.Event) -> None:
        if isinstance(event, ConnectionOpened):
            raise MemoryError
        emit(events, event)

    monkeypatch.setattr(Events, "__call__", fail_to_tell)
    sock = bench.connect(server)
    assert again.next().kind == START
    again.send(READY)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    bench.server_events.wait(LinkDown, 2)
    assert not server._pool._members
    assert len(server.runtime.splices) == 0


def test_looking_after_idle_links_makes_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of thousands of them do not keep pumps from the interpreter lock."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    pieces = list(in_batches(list(range(1000))))
    assert [len(piece) for piece in pieces] == [256, 256, 256, 232]
    assert [item for piece in pieces for item in piece] == list(range(1000))
    assert len(pauses) == 3


def test_a_slow_path_is_not_suspect(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its acknowledgements take longer than that; what tells is that the kernel has sent START again."""
    replace(monkeypatch, "SUSPICION", 0.2)
    replace(monkeypatch, "path_is_dead", lambda sock, seconds: seconds == 0.2)
    link = fake(bench)
    sock = bench.connect(link.server)
    assert link.next().kind == START
    link.sock.settimeout(0.6)
    with pytest.raises(TimeoutError):
        link.sock.recv(1)
    link.sock.settimeout(None)
    link.send(READY)
    link.write(b"banner")
    assert read_exactly(sock, 6) == b"banner"


def test_without_a_queue_nobody_waits(bench: Bench) -> None:
    """--max-pending 0: who finds no idle link is refused at once, and relay clients come in."""
    link = fake(bench, max_pending=0)
    busy = bench.connect(link.server)
    assert link.next().kind == START
    with pytest.raises(ConnectionResetError):
        bench.connect(link.server).recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "--max-pending" in failed.reason
    busy.close()


def test_who_failed_elsewhere_waits_for_a_link_that_is_being_proven(bench: Bench) -> None:
    """One relay client cannot reach its service; the link of another settles, and is used when it has answered."""
    server = bench.server()
    settling = pooled(bench, server, "settling")
    carry_one_way(settling, bench.connect(server), 10)
    assert settling.next().kind == PING
    wait_until(lambda: len(server._pool.idle_links()) == 1)  # it settles there
    failing = pooled(bench, server, "failing")
    sock = bench.connect(server)
    assert failing.next().kind == START
    failing.send(FAIL, {"reason": "down"})
    failing.read_end()
    wait_until(lambda: server.counters["waiting"] == 1)
    settling.send(PONG)
    settling.send_connection(sock)


def test_a_silent_idle_link_is_reset(bench: Bench) -> None:
    """It is dead: nobody waits for an answer to a FIN."""
    link = fake(bench, heartbeat=0.1)
    with pytest.raises(ConnectionResetError):
        while True:
            assert link.next().kind == PING
    assert bench.server_events.wait(LinkDown)[0].reason == "silent for 0.25 s"


def test_a_link_that_settles_on_a_dead_path_is_reset(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is no reason, but that nothing is acknowledged for --dead-path is."""
    dead = threading.Event()
    replace(monkeypatch, "path_is_dead", lambda sock, seconds: seconds == 77.0 and dead.is_set())
    link = fake(bench, heartbeat=0.1, dead_path=77.0)
    carry_one_way(link, bench.connect(link.server), 10)
    assert link.next().kind == PING
    with pytest.raises(TimeoutError):
        link.receive(Deadline(0.5))
    dead.set()
    with pytest.raises(ConnectionResetError):
        link.next()
    assert bench.server_events.wait(LinkDown)[0].reason == "sent bytes are no longer acknowledged"


def test_a_link_with_half_a_ping_in_it_is_not_given_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """START would be read as the rest of it; who comes waits until that has gone."""
    full, half_sent, release = threading.Event(), threading.Event(), threading.Event()
    plain, ping = Stream.send_now, encode_frame(PING)

    def send_now(stream: Stream, data: bytearray, end_follows: bool = False) -> bool:
        if full.is_set() and not release.is_set() and bytes(data) in (ping, ping[2:]):
            if bytes(data) == ping:
                plain(stream, data[:2])
                del data[:2]
            else:
                half_sent.set()
            release.wait(0.01)
            return False
        return plain(stream, data, end_follows)

    monkeypatch.setattr(Stream, "send_now", send_now)
    link = fake(bench, heartbeat=1.5)
    full.set()
    assert half_sent.wait(PATIENCE)
    sock = bench.connect(link.server)
    wait_until(lambda: link.server.counters["waiting"] == 1)
    release.set()
    assert link.next().kind == PING
    link.send(PONG)
    link.send_connection(sock)


@pytest.mark.parametrize(("settles", "lost"), [(False, True), (True, True), (False, False)])
def test_a_link_that_a_new_one_would_be_better_than_is_retired(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settles: bool, lost: bool
) -> None:
    """When its connection is over for its client, too; in peace."""
    replace(monkeypatch, "is_held_back", lambda sock, sent: lost)
    replace(monkeypatch, "is_swollen", lambda sock: True)
    monkeypatch.setattr(Flow, "was_ahead", property(lambda flow: True, lambda flow, value: None), raising=False)
    link = fake(bench)
    if settles:
        carry_one_way(link, bench.connect(link.server), 10)
        assert link.next().kind == PING
        assert not bench.server_events.of(LinkDown)
        link.send(PONG)
    else:
        link.send_connection(bench.connect(link.server))
    assert link.next().kind == BYE
    with pytest.raises(EOFError):
        link.next()
    why = "it has lost packets, and a new one will be faster"
    if not lost:
        why = "a slow reader had much wait on it, and on a new one less will"
    assert bench.server_events.wait(LinkDown)[0].reason == why


def test_what_a_client_has_passed_on_counts_for_one_connection(bench: Bench) -> None:
    """The next one's END says it anew, or says nothing: then the link settles."""
    link = fake(bench)
    link.send_connection(bench.connect(link.server))
    carry_one_way(link, bench.connect(link.server), 8)  # as many as before
    assert link.next().kind == PING


@pytest.mark.parametrize("step", ["AUTH", "TLS"])
def test_each_answer_of_a_handshake_has_its_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, certificates: Certificates, step: str
) -> None:
    """Who has said HELLO and then nothing, or nothing where TLS is spoken, does not get the whole time."""
    replace(monkeypatch, "HANDSHAKE_TIMEOUT", 1000.0)
    replace(monkeypatch, "HANDSHAKE_STEP", 0.3)
    files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(token="t", **(files if step == "TLS" else {}), tls="relay" if step == "TLS" else "")
    link = bench.enter(FakeClient(server))
    if step == "AUTH":
        link.send(HELLO, {"version": 1, "service": "default", "client": "fake", "nonce": "0"})
        assert link.next().kind == CHALLENGE
    assert [event.code for event in bench.server_events.wait(LinkRefused)] == ["timeout"]


def test_a_handshake_has_its_time_in_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each answer may take."""
    replace(monkeypatch, "HANDSHAKE_TIMEOUT", 0.3)
    replace(monkeypatch, "HANDSHAKE_STEP", 1000.0)
    bench.enter(FakeClient(bench.server()))
    assert [event.code for event in bench.server_events.wait(LinkRefused)] == ["timeout"]


def test_who_had_a_link_in_vain_is_the_first_to_get_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before those who came later and wait already, and however many these are."""
    lost = threading.Event()
    replace(monkeypatch, "SUSPICION", 0.05)
    replace(monkeypatch, "STANDSTILL", 0.0)
    replace(monkeypatch, "path_is_dead", lambda sock, seconds: seconds == 0.05 and lost.wait(PATIENCE))
    replace(monkeypatch, "is_resent", lambda sock: True)
    link = fake(bench, max_pending=1)
    first = bench.connect(link.server)
    assert link.next().kind == START
    later = bench.connect(link.server)
    wait_until(lambda: link.server.counters["waiting"] == 1)
    lost.set()
    wait_until(lambda: link.server.counters["waiting"] == 2)
    other = bench.enter(FakeClient(link.server))
    assert other.hello(client="other").kind == WELCOME
    assert other.next().fields["client"] == "{}:{}".format(*first.getsockname())
    later.close()
    first.close()
    assert not bench.server_events.of(ConnectionFailed)


def test_where_nobody_is_served_nobody_is_kept_in_the_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a relay client one more than --max-pending is refused at once."""
    replace(monkeypatch, "STANDSTILL", 1000.0)
    server = bench.server(max_pending=1)
    bench.connect(server)
    wait_until(lambda: server.counters["waiting"] == 1)
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    assert "--max-pending" in bench.server_events.wait(ConnectionFailed)[0].reason


def test_when_a_link_was_given_out_is_known(bench: Bench) -> None:
    """From the pool, and to who waits: others may hope then."""
    link = fake(bench)
    given_at = link.server._pool._given_at
    assert not given_at["default"]
    link.send_connection(bench.connect(link.server))
    first = given_at["default"]
    assert first
    wait_until(lambda: link.server.counters["links_idle"] == 1)
    busy = bench.connect(link.server)
    waiting: list[socket.socket] = []

    def wait_in_vain() -> None:
        waiting.append(bench.connect(link.server))
        wait_until(lambda: link.server.counters["waiting"] == 1)
        given_at["default"] = 0.0

    plain = link.read_end
    link.read_end = lambda: [wait_in_vain(), plain()][1]  # type: ignore[method-assign, func-returns-value]
    link.send_connection(busy)
    assert link.next().kind == START
    assert given_at["default"] > first
    waiting[0].close()


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_who_gets_no_thread_is_waited_for_no_longer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """It does not count among those that have no link yet: with a few of them the kernel would hold all others."""
    server = bench.server()

    def fail(*_: object) -> None:
        raise kind("no thread")

    monkeypatch.setattr(server.runtime.threads, "start", fail)
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    monkeypatch.undo()
    wait_until(lambda: server._pool._expected["default"] == 0)


def test_who_gives_a_handshake_up_was_not_refused(bench: Bench) -> None:
    """Nobody has to be warned of it."""
    link = bench.enter(FakeClient(bench.server(token="t")))
    link.send(HELLO, {"version": 1, "service": "default", "client": "fake", "nonce": "0"})
    assert link.next().kind == CHALLENGE
    link.close()
    [event] = bench.server_events.wait(LinkRefused)
    assert type(event) is LinkNotMade
    assert event.level < LinkRefused.level


def test_a_link_that_is_given_up_in_a_connection_is_down_for_that_reason(bench: Bench) -> None:
    """REFUSED may come at any time: the connection is broken, and the link does not count as idle."""
    link = fake(bench)
    bench.connect(link.server)
    assert link.next().kind == START
    link.send(READY)
    bench.server_events.wait(ConnectionOpened)
    link.stream.send(encode_frame(REFUSED, {"reason": "no more"}))
    link.close()
    [closed] = bench.server_events.wait(ConnectionClosed)
    [down] = bench.server_events.wait(LinkDown)
    assert closed.reason
    assert down.reason == f"its connection was broken off: {closed.reason}"


def test_who_got_no_link_is_expected_no_longer(bench: Bench) -> None:
    """It takes no place of those who may wait."""
    server = bench.server(pair_timeout=0.05)
    bench.connect(server)
    bench.server_events.wait(ConnectionFailed)
    assert server._pool._expected == {"default": 0}
