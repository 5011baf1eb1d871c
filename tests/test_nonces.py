"""Nonces that are handed out ahead: a handshake of one round trip, and nobody gets in with what others have used."""

from __future__ import annotations

import os
from typing import Any

import pytest

from _tcprelay.link import Link
from _tcprelay.protocol import (
    AUTH, CHALLENGE, CLIENT, HELLO, PING, PONG, REFUSED, SERVER, START, WELCOME, Frame, new_nonce, prove,
)  # fmt: skip
from _tcprelay.server.nonces import Nonces
from _tcprelay.streams import Stream
from _tcprelay.waiting import Deadline
from tcprelay import LinkRefused, Published, RelayClient, Unpublished

from .conftest import PATIENCE, Bench, connect_from, unused_port
from .peers_v1 import FakeClient, FakeServer

TOKEN = "a token for the tests"


def hello_with(nonce: str, *, token: str = TOKEN, client: str = "fake", own: str = "") -> dict[str, Any]:
    """The fields of a HELLO that proves itself with a nonce of the server's."""
    own = own or new_nonce()
    proof = prove(token.encode(), CLIENT, own, nonce, "default", client)
    return {"version": 1, "service": "default", "client": client, "nonce": own, "server_nonce": nonce, "proof": proof}


def say(bench: Bench, server: Any, fields: dict[str, Any]) -> Frame:
    """HELLO with these fields on a new link; returns the answer."""
    link: FakeClient = bench.enter(FakeClient(server))
    link.send(HELLO, fields)
    return link.next()


def place_of(nonce: str) -> int:
    """The place in a process's table where it is marked as used."""
    return int(nonce[8:16], 16) % Nonces.SLOTS


# What is handed out


def test_each_is_good_once_and_for_its_relay_client() -> None:
    """At its address, too: a copy of HELLO that comes from elsewhere is worth nothing.  All are different, and nothing
    else is taken for one."""
    nonces = Nonces()
    found = nonces.hand_out("one", "host", 50)
    assert len(set(found)) == 50
    found = list({place_of(nonce): nonce for nonce in found}.values())  # no two of one place
    assert not any(nonces.take(nonce, "another", "host") for nonce in found)
    assert not any(nonces.take(nonce, "one", "another host") for nonce in found)
    assert all(nonces.take(nonce, "one", "host") for nonce in found)
    assert not any(nonces.take(nonce, "one", "host") for nonce in found)
    for other in (
        "",
        "x",
        "\udcff" * 56,
        "0" * 56,
        found[0][:-1],
        found[0] + "0",
        Nonces().hand_out("one", "host", 1)[0],
    ):
        assert not nonces.take(other, "one", "host")


def test_they_are_good_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are asked about, as those of another server."""
    nonces = Nonces()
    old = nonces.hand_out("one", "host", 1)[0]
    monkeypatch.setattr(Nonces, "LIFETIME", -1)
    assert not nonces.take(old, "one", "host")
    monkeypatch.undo()
    assert nonces.take(old, "one", "host")


def test_where_two_need_one_place_the_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """To overwrite the first would make it good again."""
    monkeypatch.setattr(Nonces, "SLOTS", 1)
    nonces = Nonces()
    first, second = nonces.hand_out("one", "host", 2)
    assert nonces.take(first, "one", "host")
    assert not nonces.take(second, "one", "host")
    assert not nonces.take(first, "one", "host")


def test_worker_processes_take_none_twice() -> None:
    """Two that are given the same ones at the same time: no nonce is taken by both, and hardly one by neither."""
    nonces = Nonces(2)
    found = nonces.hand_out("one", "host", 2000)
    reader, writer = os.pipe()
    go_reader, go_writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            nonces.process = 1
            os.write(writer, b"!")
            os.read(go_reader, 1)
            taken = bytes(nonces.take(nonce, "one", "host") for nonce in found)
            status = int(os.write(writer, taken) != len(taken))
        finally:
            os._exit(status)
    try:
        assert os.read(reader, 1) == b"!"
        os.write(go_writer, b"!")
        mine = [nonces.take(nonce, "one", "host") for nonce in found]
        theirs = b""
        while len(theirs) < len(found):
            piece = os.read(reader, 65536)
            assert piece
            theirs += piece
    finally:
        assert os.waitpid(child, 0)[1] == 0
        for fd in (reader, writer, go_reader, go_writer):
            os.close(fd)
    both = [one and other for one, other in zip(mine, theirs, strict=True)]
    assert sum(both) == 0
    assert sum(mine) + sum(theirs) > 1500
    assert not any(nonces.take(nonce, "one", "host") for nonce, other in zip(found, theirs, strict=True) if other)


# The server's side


def test_a_hello_that_proves_itself_is_welcome_at_once(bench: Bench) -> None:
    """Without CHALLENGE; the server proves itself over the same nonces, and hands out others."""
    server = bench.server(token=TOKEN)
    first = bench.enter(FakeClient(server)).hello(token=TOKEN.encode())
    nonces = first.fields["nonces"]
    assert len(set(nonces)) == 4
    fields = hello_with(nonces[0])
    welcome = say(bench, server, fields)
    assert welcome.kind == WELCOME
    assert welcome.fields["proof"] == prove(TOKEN.encode(), SERVER, fields["nonce"], nonces[0], "default", "fake")
    assert not set(nonces) & set(welcome.fields["nonces"])


def test_a_hello_cannot_be_replayed(bench: Bench) -> None:
    """Nor can its proof be shown as an answer to CHALLENGE."""
    server = bench.server(token=TOKEN)
    nonce, *_ = bench.enter(FakeClient(server)).hello(token=TOKEN.encode()).fields["nonces"]
    fields = hello_with(nonce)
    assert say(bench, server, fields).kind == WELCOME
    link = bench.enter(FakeClient(server))
    link.send(HELLO, fields)
    assert link.next().kind == CHALLENGE
    link.send(AUTH, {"proof": fields["proof"]})
    assert link.next().kind == REFUSED


def test_a_copy_that_arrives_first_is_worth_nothing_elsewhere(bench: Bench) -> None:
    """On a plain link others may hear a HELLO, and send it before it has arrived."""
    server = bench.server(token=TOKEN)
    nonce, *_ = bench.enter(FakeClient(server)).hello(token=TOKEN.encode()).fields["nonces"]
    fields = hello_with(nonce)
    sock = bench.enter(connect_from(bench, "127.0.0.2", server.relay_address[1]))
    listener = Link(Stream(sock, "a listener"), CLIENT)
    listener.send(HELLO, fields)
    assert listener.receive(Deadline(PATIENCE)).kind == CHALLENGE
    assert say(bench, server, fields).kind == WELCOME


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"token": "another token"}, REFUSED),  # known, and proven wrongly
        ({"client": "another"}, CHALLENGE),
    ],
)
def test_a_nonce_alone_is_worth_nothing(bench: Bench, more: dict[str, str], kind: int) -> None:
    server = bench.server(token=TOKEN)
    nonce, *_ = bench.enter(FakeClient(server)).hello(token=TOKEN.encode()).fields["nonces"]
    answer = say(bench, server, hello_with(nonce, **more))
    assert answer.kind == kind
    if kind == REFUSED:
        assert answer.fields["code"] == "token"
        [event] = bench.server_events.wait(LinkRefused)
        assert event.code == "token"


def test_the_nonces_of_another_server_are_asked_about(bench: Bench) -> None:
    """As those of one that was restarted: CHALLENGE, as ever."""
    server, other = bench.server(token=TOKEN), bench.server(token=TOKEN)
    nonce, *_ = bench.enter(FakeClient(server)).hello(token=TOKEN.encode()).fields["nonces"]
    assert say(bench, other, hello_with(nonce)).kind == CHALLENGE


def test_a_ping_brings_fresh_ones(bench: Bench) -> None:
    """So that a client whose links have been idle for long has some."""
    server = bench.server(token=TOKEN, heartbeat=0.2)
    link = bench.enter(FakeClient(server))
    link.hello(token=TOKEN.encode())
    ping = link.next()
    assert ping.kind == PING
    assert len(ping.fields["nonces"]) == 2
    link.send(PONG)
    assert say(bench, server, hello_with(ping.fields["nonces"][0])).kind == WELCOME


def test_without_a_token_there_are_none(bench: Bench) -> None:
    server = bench.server(heartbeat=0.2)
    link = bench.enter(FakeClient(server))
    assert "nonces" not in link.hello().fields
    assert link.next() == Frame(PING)


# The client's side


def welcome(link: Any, hello: Frame, nonce: str, **fields: Any) -> None:
    """WELCOME, with the proof over that nonce."""
    parts = hello.fields["nonce"], nonce, "default", hello.fields["client"]
    link.send(WELCOME, {"proof": prove(TOKEN.encode(), SERVER, *parts), "heartbeat": 15, **fields})


def test_a_client_proves_itself_with_what_it_was_given(bench: Bench) -> None:
    """With the newest first, each once; without one, or where the server asks all the same, it answers CHALLENGE."""
    with FakeServer() as server:
        options: dict[str, Any] = {
            "num_conn": 1,
            "drain_timeout": 0.0,
            "on_event": bench.client_events,
            "try_service": False,
        }
        bench.enter(RelayClient("127.0.0.1", unused_port(), "127.0.0.1", server.port, token=TOKEN, **options))
        link = server.accept()
        hello = link.receive(Deadline(PATIENCE))
        assert "server_nonce" not in hello.fields
        link.send(CHALLENGE, {"nonce": "n"})
        assert link.receive(Deadline(PATIENCE)).kind == AUTH
        welcome(link, hello, "n", nonces=["old", "x" * 129])
        bench.client_events.wait(Published)
        link.send(PING, {"nonces": ["new"]})
        assert link.receive(Deadline(PATIENCE)).kind == PONG
        for nonce in ("new", "old"):
            link.send(START, {"id": "1"})  # it opens another one
            second = server.accept()
            hello = second.receive(Deadline(PATIENCE))
            parts = hello.fields["nonce"], nonce, "default", hello.fields["client"]
            assert (hello.fields["server_nonce"], hello.fields["proof"]) == (
                nonce,
                prove(TOKEN.encode(), CLIENT, *parts),
            )
            if nonce == "new":
                welcome(second, hello, nonce)
            else:  # it has forgotten it
                second.send(CHALLENGE, {"nonce": "m"})
                answer = second.receive(Deadline(PATIENCE))
                parts = hello.fields["nonce"], "m", "default", hello.fields["client"]
                assert (answer.kind, answer.fields) == (AUTH, {"proof": prove(TOKEN.encode(), CLIENT, *parts)})
                welcome(second, hello, "m")
            link = second
        assert not bench.client_events.of(Unpublished)
