"""Proofs that cover the server's certificate: nobody in the middle can pass them on, with old peers and without."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.certificates import pin_of, shown_certificate
from _tcprelay.link import Link
from _tcprelay.protocol import (
    AUTH, CHALLENGE, CLIENT, FRAME_NAMES, HELLO, REFUSED, SERVER, WELCOME, Frame, decode_fields, encode_frame,
    new_nonce, prove,
)  # fmt: skip
from _tcprelay.streams import Stream
from _tcprelay.tls import TLSStream
from _tcprelay.waiting import Deadline
from tcprelay import LinkRefused, Published, RelayClient, RelayServer, Unpublished

from .certificates import Certificates, tls_context
from .conftest import PATIENCE, Bench, Service, connect, read_exactly, replace, wait_until

TOKEN = "a token that is long enough"
Tamper = Callable[[str, dict[str, Any]], None]
"""What somebody in the middle does with the fields of a frame; the first word is its name."""


def untouched(kind: str, fields: dict[str, Any]) -> None:
    """Passes all on as it is."""


class Middle:
    """Somebody between a relay client and a relay server, with TLS to both and a certificate of his own."""

    def __init__(self, server: RelayServer, cert: str, key: str, tamper: Tamper) -> None:
        self._target = server.relay_address
        self._context, self._tamper = tls_context(True, cert, key), tamper
        self.certificate = pin_of(ssl.PEM_cert_to_DER_cert(Path(cert).read_text()))
        self.seen: list[str] = []
        """The names of the frames that he could read."""
        self._socks: list[socket.socket] = []
        self._service = Service(self._serve)
        self.port = self._service.port

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError), contextlib.ExitStack() as stack:  # until a side has ended
            near = stack.enter_context(self._context.wrap_socket(sock, server_side=True))
            far = stack.enter_context(tls_context().wrap_socket(connect(self._target)))
            self._socks += [near, far]
            while True:
                for source, sink in ((near, far), (far, near)):
                    if source.pending() or select.select([source], [], [], 0.01)[0]:
                        self._pass(source, sink)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass a frame on.  Raises `OSError`, and `AssertionError` at the end."""
        head = read_exactly(source, 4)
        body = read_exactly(source, int.from_bytes(head[1:], "big")) if any(head[1:]) else b""
        name, fields = FRAME_NAMES[head[0]], decode_fields(head[0], body)
        self.seen.append(name)
        self._tamper(name, fields)
        sink.sendall(encode_frame(head[0], fields))

    def __enter__(self) -> Middle:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._service.close()


@pytest.fixture
def middle(bench: Bench, certificates: Certificates) -> Iterator[Callable[..., Middle]]:
    """Puts somebody with a certificate of another CA between a client and this server."""

    def stand(server: RelayServer, tamper: Tamper = untouched) -> Middle:
        made = Middle(server, certificates.path("foreign.pem"), certificates.path("foreign.key"), tamper)
        return bench.enter(made)  # type: ignore[no-any-return]

    yield stand


def client(bench: Bench, port: int, **options: Any) -> RelayClient:
    own = {"num_conn": 1, "drain_timeout": 0.0, "on_event": bench.client_events, "try_service": False, "tls": "relay"}
    return bench.enter(RelayClient("127.0.0.1", 1, "127.0.0.1", port, **{**own, "token": TOKEN, **options}))  # type: ignore[no-any-return]


def refusal(bench: Bench) -> str:
    """Why the client gets no link, once that is certain."""
    event = wait_until(lambda: next((event for event in bench.client_events.of(Unpublished) if event.lasting), None))
    assert not bench.client_events.of(Published)
    return str(event.reason)


# Without an old peer


def test_the_token_vouches_for_the_certificate(bench: Bench, tmp_path: Path) -> None:
    """Neither a pin nor a CA is needed; each link's proofs cover the certificate, those with a nonce ahead, too."""
    server = bench.server(tls="relay", state_dir=str(tmp_path / "state"), token=TOKEN)
    bench.client(server, bench.service().port, token=TOKEN, tls="relay", num_conn=3)
    with bench.connect(server) as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
    assert not bench.server_events.of(LinkRefused)


def test_who_passes_the_proofs_on_is_refused(bench: Bench, middle: Callable[..., Middle]) -> None:
    """The client sees that the certificate is not the one that the server names, and shows him no proof."""
    server = bench.server(tls="relay", token=TOKEN)
    between = middle(server)
    client(bench, between.port)
    assert refusal(bench).startswith(
        f"the relay server's certificate is {server.runtime.credentials.certificate}, and the one that arrives here is "
        f"{between.certificate}: somebody on the way has opened the TLS connection"
    )
    assert "AUTH" not in between.seen
    [event] = bench.server_events.wait(LinkRefused)
    assert event.reason == "the relay client gave up: another certificate than this server's has arrived there"
    assert server.counters["links_idle"] == 0


def test_who_names_his_own_certificate_is_refused(bench: Bench, middle: Callable[..., Middle]) -> None:
    """The client takes that for the server's, and its proof is worth nothing to the server."""
    server = bench.server(tls="relay", token=TOKEN)

    def lie(kind: str, fields: dict[str, Any]) -> None:
        if kind == "CHALLENGE":
            fields["certificate"] = between.certificate

    between = middle(server, lie)
    client(bench, between.port)
    why = "another certificate than this server's has arrived there: somebody on the way has opened the TLS connection"
    assert refusal(bench).startswith(f"refused by the relay: {why}")
    event = bench.server_events.wait(LinkRefused)[0]
    assert (event.code, event.reason.startswith(why)) == ("certificate", True)
    assert server.counters["links_idle"] == 0


@pytest.mark.parametrize("told", ["the server's", "his own", "none"])
def test_no_word_of_his_makes_the_proof_pass(bench: Bench, middle: Callable[..., Middle], told: str) -> None:
    """Whatever he puts into AUTH as well: the server's certificate is in no proof of the client's."""
    server = bench.server(tls="relay", token=TOKEN)

    def lie(kind: str, fields: dict[str, Any]) -> None:
        if kind == "CHALLENGE":
            fields["certificate"] = between.certificate
        elif kind == "AUTH" and told == "none":
            fields.pop("certificate", None)
        elif kind == "AUTH" and told == "the server's":
            fields["certificate"] = server.runtime.credentials.certificate

    between = middle(server, lie)
    client(bench, between.port)
    assert refusal(bench)
    assert "WELCOME" not in between.seen
    assert server.counters["links_idle"] == 0


def test_who_hides_that_there_is_a_binding_is_refused(bench: Bench, middle: Callable[..., Middle]) -> None:
    """Then the server's certificate has to be verified by itself, and his is not."""
    server = bench.server(tls="relay", token=TOKEN)

    def hide(kind: str, fields: dict[str, Any]) -> None:
        fields.pop("certificate", None)

    between = middle(server, hide)
    client(bench, between.port)
    assert "give --ca-file or --pin" in refusal(bench)
    assert "AUTH" not in between.seen
    assert server.counters["links_idle"] == 0


def test_a_nonce_ahead_is_no_way_around(
    bench: Bench, middle: Callable[..., Middle], certificates: Certificates
) -> None:
    """The server has no certificate but its own for the proof in HELLO, either."""
    server = bench.server(tls="relay", token=TOKEN)
    nonces: list[str] = []
    own = TLSLink(server.relay_address[1])
    with own:
        nonce, shown = new_nonce(), own.certificate
        own.link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "token": True})
        challenge = own.next()
        assert challenge.fields["certificate"] == shown
        parts = nonce, challenge.text("nonce"), "default", "c"
        own.link.send(AUTH, {"proof": prove(TOKEN.encode(), CLIENT, *parts, shown), "certificate": shown})
        welcome = own.next()
        assert welcome.fields["proof"] == prove(TOKEN.encode(), SERVER, *parts, shown)
        nonces += welcome.fields["nonces"]
    for certificate, answer in ((pin_of(b"his"), REFUSED), (shown, WELCOME)):
        with TLSLink(server.relay_address[1]) as own:
            ahead, nonce = nonces.pop(), new_nonce()
            proof = prove(TOKEN.encode(), CLIENT, nonce, ahead, "default", "c", certificate)
            hello = {"version": 1, "service": "default", "client": "c", "nonce": nonce, "server_nonce": ahead}
            own.link.send(HELLO, {**hello, "proof": proof, "certificate": certificate})
            assert own.next().kind == answer


class TLSLink:
    """A relay client's end of a link with TLS, played by the test."""

    def __init__(self, port: int) -> None:
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        sock.settimeout(None)
        self.stream = TLSStream(sock, "the server", tls_context())
        self.stream.handshake(Deadline(PATIENCE))
        self.link = Link(self.stream, CLIENT)
        self.certificate = pin_of(self.stream.tls.getpeercert(binary_form=True) or b"")

    def next(self) -> Frame:
        return self.link.receive(Deadline(PATIENCE))

    def __enter__(self) -> TLSLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


# With an old one


def test_a_client_that_knows_no_binding_is_served(bench: Bench) -> None:
    """It has verified the certificate in its own way."""
    server = bench.server(tls="relay", token=TOKEN)
    with TLSLink(server.relay_address[1]) as own:
        nonce = new_nonce()
        own.link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "token": True})
        parts = nonce, own.next().text("nonce"), "default", "c"
        own.link.send(AUTH, {"proof": prove(TOKEN.encode(), CLIENT, *parts)})
        assert own.next().fields["proof"] == prove(TOKEN.encode(), SERVER, *parts)


class OldServer:
    """A relay server with TLS that says nothing of its certificate but what `challenge` has, played up to WELCOME."""

    def __init__(self, cert: str, key: str, challenge: dict[str, Any] | None = None, **welcome: Any) -> None:
        self.context = tls_context(True, cert, key)
        self._challenge, self._welcome = {"nonce": "n", **(challenge or {})}, welcome
        self.hellos: list[dict[str, Any]] = []
        self.proven: list[bool] = []
        self._socks: list[socket.socket] = []
        self._service = Service(self._serve)
        self.port = self._service.port

    def _serve(self, sock: socket.socket) -> None:
        self._socks.append(sock)
        sock.settimeout(None)
        stream = TLSStream(sock, "the client", self.context, server_side=True)
        link = Link(stream, SERVER)
        with contextlib.suppress(EOFError):
            stream.handshake(Deadline(PATIENCE))
            hello = link.receive(Deadline(PATIENCE))
            self.hellos.append(hello.fields)
            link.send(CHALLENGE, self._challenge)
            auth = link.receive(Deadline(PATIENCE))
            parts = hello.text("nonce"), "n", "default", hello.text("client")
            self.proven.append(auth.text("proof") == prove(TOKEN.encode(), CLIENT, *parts))
            link.send(WELCOME, {"proof": prove(TOKEN.encode(), SERVER, *parts), "heartbeat": 15, **self._welcome})
            link.receive(Deadline(None))  # its end

    def cut(self) -> None:
        """End all links."""
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> OldServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._service.close()


@pytest.mark.parametrize("how", ["ca", "pin", "not at all"])
def test_a_server_that_knows_no_binding_is_believed_by_its_certificate(
    bench: Bench, certificates: Certificates, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system's CAs, where neither --ca-file nor --pin is given; a client that verifies nothing has said so."""
    old = bench.enter(OldServer(certificates.path("server.pem"), certificates.path("server.key")))
    options: dict[str, Any] = {"reject_unauthorized": False} if how == "not at all" else {}
    if how == "pin":
        options["pin"] = pin_of(ssl.PEM_cert_to_DER_cert(Path(certificates.path("server.pem")).read_text()))
    if how == "ca":
        monkeypatch.setenv("SSL_CERT_FILE", certificates.path("ca.pem"))
    client(bench, old.port, **options)
    bench.client_events.wait(Published)
    assert old.proven == [True]
    assert not bench.client_events.of(Unpublished)


def test_a_server_that_knows_no_binding_is_not_believed_otherwise(bench: Bench, certificates: Certificates) -> None:
    """It is shown no proof."""
    old = bench.enter(OldServer(certificates.path("server.pem"), certificates.path("server.key")))
    client(bench, old.port)
    assert "give --ca-file or --pin" in refusal(bench)
    assert old.proven == []


def test_a_token_that_can_be_guessed_vouches_for_nothing(bench: Bench) -> None:
    """Who has a proof made with it could try all that it may be."""
    server = bench.server(tls="relay", token="short")
    client(bench, server.relay_address[1], token="short")
    assert "give --ca-file or --pin" in refusal(bench)
    assert "--pin sha256:" in server.invitation(with_secrets=False).splitlines()[1]


def test_without_tls_nothing_is_bound(bench: Bench) -> None:
    """CHALLENGE names no certificate, and one that is named all the same counts for nothing."""
    server = bench.server(token=TOKEN)
    sock = bench.enter(connect(server.relay_address))
    sock.settimeout(None)
    link = Link(Stream(sock, "the server"), CLIENT)
    nonce = new_nonce()
    link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "token": True})
    challenge = link.receive(Deadline(PATIENCE))
    assert "certificate" not in challenge.fields
    parts = nonce, challenge.text("nonce"), "default", "c"
    link.send(AUTH, {"proof": prove(TOKEN.encode(), CLIENT, *parts), "certificate": pin_of(b"any")})
    assert link.receive(Deadline(PATIENCE)).kind == WELCOME


def test_the_certificate_is_the_one_that_is_shown(certificates: Certificates, tmp_path: Path) -> None:
    """Of a file with several, of either kind of key."""
    for name in ("server", "rsa"):
        chain = tmp_path / "chain.pem"
        chain.write_text(
            Path(certificates.path(f"{name}.pem")).read_text() + Path(certificates.path("ca.pem")).read_text()
        )
        expected = pin_of(ssl.PEM_cert_to_DER_cert(Path(certificates.path(f"{name}.pem")).read_text()))
        assert shown_certificate(tls_context(True, str(chain), certificates.path(f"{name}.key"))) == expected


# What would otherwise go unseen


def watch_nonces(server: RelayServer) -> list[bool]:
    """Whether nonces that come with HELLO are taken, as they come."""
    taken, take = list[bool](), server._nonces.take

    def watch(nonce: str, client: str, host: str) -> bool:
        taken.append(take(nonce, client, host))
        return taken[-1]

    server._nonces.take = watch  # type: ignore[method-assign]
    return taken


def test_ahead_nonce_is_used(bench: Bench, tmp_path: Path) -> None:
    server = bench.server(tls="relay", state_dir=str(tmp_path / "state"), token=TOKEN)
    taken = watch_nonces(server)
    bench.client(server, bench.service().port, token=TOKEN, tls="relay", num_conn=3)
    assert any(taken)


@pytest.mark.parametrize("option", ["tls_server_name", "ca_file"])
def test_what_is_named_is_verified_beside_the_token(bench: Bench, certificates: Certificates, option: str) -> None:
    server = bench.server(tls="relay", token=TOKEN)
    named = {"tls_server_name": "other.example", "ca_file": certificates.path("ca.pem")}
    client(bench, server.relay_address[1], **{option: named[option]})
    assert "give --ca-file or --pin" in refusal(bench)


def test_a_certificate_that_no_proof_covers(bench: Bench) -> None:
    server = bench.server(tls="relay", token=TOKEN)
    with TLSLink(server.relay_address[1]) as own:
        nonce = new_nonce()
        own.link.send(HELLO, {"version": 1, "service": "default", "client": "c", "nonce": nonce, "token": True})
        parts = nonce, own.next().text("nonce"), "default", "c"
        own.link.send(AUTH, {"proof": prove(TOKEN.encode(), CLIENT, *parts), "certificate": own.certificate})
        assert own.next().kind == REFUSED


def test_an_unproven_server_gets_no_proof_ahead(
    bench: Bench, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in ("FIRST_BACKOFF", "LAST_BACKOFF", "REFUSED_BACKOFF"):
        replace(monkeypatch, n, 0.05)
    monkeypatch.setenv("SSL_CERT_FILE", certificates.path("ca.pem"))
    own = certificates.path("server.pem"), certificates.path("server.key")
    old = bench.enter(OldServer(*own, nonces=["a", "b", "c"]))
    client(bench, old.port)
    bench.client_events.wait(Published)
    old.context = tls_context(True, certificates.path("foreign.pem"), certificates.path("foreign.key"))
    count = len(old.hellos)
    old.cut()
    wait_until(lambda: len(old.hellos) > count)  # HELLO over an unverified TLS connection
    assert not any("proof" in hello for hello in old.hellos[count:])


def test_each_proof_is_bound(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    server = bench.server(tls="relay", state_dir=str(tmp_path / "state"), token=TOKEN)
    taken = watch_nonces(server)

    def spy(*words: Any) -> str:
        if words[0]:  # not when a relay is made
            seen.append(words[6:])
        return prove(*words)

    replace(monkeypatch, "prove", spy)
    bench.client(server, bench.service().port, token=TOKEN, tls="relay", num_conn=3)
    assert any(taken)
    assert set(seen) == {(server.runtime.credentials.certificate,)}


def test_a_server_s_proof_has_to_be_bound_too(bench: Bench, certificates: Certificates) -> None:
    own = certificates.path("server.pem"), certificates.path("server.key")
    pin = pin_of(ssl.PEM_cert_to_DER_cert(Path(own[0]).read_text()))
    half = bench.enter(OldServer(*own, challenge={"certificate": pin}))
    client(bench, half.port)
    assert refusal(bench).startswith("the relay did not prove that it knows the token")
