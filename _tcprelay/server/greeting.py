"""How a connection to the relay port becomes a link: TLS, HELLO, CHALLENGE, AUTH, WELCOME; or why it does not.

Each runs in the thread of its connection, within `HANDSHAKE_TIMEOUT`, and `Handshakes` bounds how many there are.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from ..addresses import show_address
from ..certificates import certificate_name
from ..events import LinkNotMade, LinkRefused
from ..link import Link, RawLink
from ..server_options import ServerOptions
from ..protocol import (
    CHALLENGE, CLIENT, HELLO, NEW, PROTOCOL_VERSION, PROXY, REFUSED, SERVER, WELCOME, Frame, LinkFault, encode_frame,
    guess_protocol, is_proof, is_same, new_nonce, prove,
)  # fmt: skip
from ..rights import Identity, Rights
from ..runtime import Credentials, Runtime
from ..streams import Stream
from ..system import ignore_oserror
from ..tcp import say_path
from ..text import is_tls_error, say_error, shown
from ..tls import ACCESS_DENIED, NOT_TLS
from ..values import parse_name
from ..waiting import Deadline, Stopping, wait_for
from .clients import UNTRUSTED, Refusal
from .intake import Intake
from .leases import Ask, asked_port, name_in
from .limits import TOO_MANY_HANDSHAKES, Handshakes
from .nonces import Nonces
from .pooled import PooledLink
from .trust import check_protected_mode, explain_tls

HANDSHAKE_TIMEOUT, HANDSHAKE_STEP = 20.0, 10.0
"""Seconds that a server gives a handshake as a whole, and each answer in it: three round trips of a saturated uplink
take that long, and a silent peer is not waited for longer."""
WELCOME_NONCES = 4
"""So many are handed out with a WELCOME: a burst has a relay client open links in growing numbers."""


DECOY = os.urandom(32)
"""The token of relay clients that a server does not know: they are asked for a proof like all others, and refused."""


def wrong_token(called: str, identity: Identity | None, rights: Rights | None) -> Refusal:
    """Why a proof is not accepted.  Who is refused does not learn which names there are."""
    if rights is None:
        return Refusal(
            "its token is not this server's", "token",
            "this client's token is not the server's: copy the server's, and name it in --token-file",
        )  # fmt: skip
    return Refusal(
        f"its token is not that of {shown(called, 64)} in the clients file"
        if identity
        else f"it calls itself {shown(called, 64)}, and the clients file has no such section",
        "token",
        f"the server knows no {shown(called, 64)} with this token: --name and the token have to be those of a section "
        "of its clients file",
    )


def lost_right(pooled: PooledLink, runtime: Runtime[ServerOptions]) -> str:
    """Why a link may not stay, by what is in force now; "" where it may."""
    identity, rights, port = pooled.identity, runtime.credentials.rights, pooled.port
    if identity is None and rights is None:
        lost = port is not None and not any(port in ports for ports in runtime.options.client_ports)
        return f"revoked: port {port} is not among those that relay clients may ask for any more" if lost else ""
    if identity is None:
        return "revoked: relay clients have to be known by name now"
    now = rights.get(identity.name) if rights else None
    if now is None:
        return f"revoked: the server does not know {identity.name} any more"
    if now.token != identity.token:
        return f"revoked: {identity.name} has another token now"
    reason = now.why_not(pooled.host, name_in(pooled.service), port)
    return reason and f"revoked: {reason}"


def renew_rights(pooled: PooledLink, runtime: Runtime[ServerOptions]) -> None:
    """Have the limits of what is in force now count for a link that may stay."""
    if pooled.identity and runtime.credentials.rights is not None:
        pooled.identity = runtime.credentials.rights.get(pooled.identity.name, pooled.identity)


class Greeting:
    """Shakes hands with relay clients.

    Parameters: the runtime; where connections come from; the handshakes under way; the nonces that are handed out; and
    what counts a link in before its client is told WELCOME, which may raise `Refusal`, and out again, with the reason.
    """

    def __init__(
        self, runtime: Runtime[ServerOptions], intake: Intake, handshakes: Handshakes, nonces: Nonces,
        join: Callable[[PooledLink], None], forget: Callable[[PooledLink, str], None],
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._intake = intake
        self._handshakes = handshakes
        self._nonces = nonces
        self._join = join
        self._forget = forget

    def receive(self, stream: Stream, credentials: Credentials) -> PooledLink | None:
        """A link's handshake, by the credentials of its TLS; ``None`` where it came to nothing, and its client has been
        told why."""
        link, deadline = Link(stream, SERVER), Deadline(HANDSHAKE_TIMEOUT)
        gave_up = False
        try:
            check_protected_mode(self._runtime, stream)
            stream.handshake(deadline.within(HANDSHAKE_STEP), self._runtime.stop)
            raw = self._runtime.options.wire == "raw"
            return self._greet_raw(stream, deadline) if raw else self._greet(link, credentials, deadline)
        except Refusal as error:
            refusal = error.apart()
        except LinkFault as error:
            spoken = guess_protocol(link.unread())
            known = link.machine.state == NEW and spoken != "something else"
            first = f"it speaks {spoken}, not the link protocol: " if known else ""
            hint = "; if it is a tcprelayc, add --tls here, or leave it out there" if known and spoken == "TLS" else ""
            header = self._explain_header(link.unread()) if known else ""
            refusal = Refusal(header or f"{first}{error}{hint}", "protocol")
        except TimeoutError:
            step = f"{HANDSHAKE_STEP:g} s for each answer and {HANDSHAKE_TIMEOUT:g} s in all"
            refusal = Refusal(f"its handshake was not complete in time ({step}){say_path(stream.sock)}", "timeout")
        except Stopping:
            refusal = Refusal("the relay server is ending", "draining")
        except (OSError, EOFError) as error:
            evicted = self._handshakes.was_evicted(stream)
            gave_up = not evicted and (isinstance(error, EOFError) or error.errno is not None)  # or we have
            reason = "closed before its handshake was complete" if isinstance(error, EOFError) else say_error(error)
            refusal = Refusal(TOO_MANY_HANDSHAKES if evicted else reason, "lost")
            if is_tls_error(error):
                header = self._explain_header(stream.beginning)
                refusal, gave_up = Refusal(header or explain_tls(error), "tls"), False
                if error.reason in NOT_TLS:  # a plain relay client may be told in its own language
                    plain = encode_frame(REFUSED, {"code": "tls", "reason": "it speaks TLS; add --tls"})
                    ignore_oserror(stream.sock.sendall, plain)
        self._refuse(link, refusal, gave_up)
        return None

    def _refuse(self, link: Link, refusal: Refusal, gave_up: bool) -> None:
        """Tell why there is no link, in the log and, as far as it can be told there, to the relay client, unless that
        (or the path) gave it up."""
        stream = link.stream
        # A peer that has sent nothing may be a raw client, which would take REFUSED for bytes of a connection; or a
        # port scan, which is no refusal.
        nothing = not link.unread() and not stream.beginning and link.machine.state == NEW
        silent = nothing and type(stream) is Stream
        kind = LinkNotMade if gave_up else LinkRefused
        event = kind(peer=show_address(stream.peer), code=refusal.code, reason=str(refusal))
        checked = nothing and stream.received  # nothing but the header of a proxy that is believed: a health check
        if (silent or checked) and gave_up:
            self._runtime.log.debug("%s", event)
        else:
            self._runtime.emit(event)
        if stream.secure and refusal.code == "protected":
            ignore_oserror(link.sock.sendall, ACCESS_DENIED)
            stream.linger()
            return
        raw = self._runtime.options.wire == "raw"
        if raw or refusal.code == "lost" or (silent and refusal.code == "timeout"):
            return
        if refusal.code != "tls":  # then an alert has been sent
            link.refuse(refusal.code, refusal.told)
        stream.linger()

    def _explain_header(self, start: bytes) -> str:
        """What is to be said of a peer that has begun with a PROXY protocol header; "" of others."""
        if guess_protocol(start) != PROXY:
            return ""
        if self._runtime.options.accept_proxy_protocol:
            return UNTRUSTED
        return "it sent a PROXY protocol header; --accept-proxy-protocol is to name its address, if it is your proxy"

    def _greet(self, link: Link, credentials: Credentials, deadline: Deadline) -> PooledLink:
        """HELLO, CHALLENGE, AUTH, WELCOME.  Raises `Refusal`, `LinkFault`, `OSError`, `EOFError`."""
        runtime = self._runtime
        hello = link.receive(deadline.within(HANDSHAKE_STEP), runtime.stop)
        if hello.kind == REFUSED:
            raise Refusal(f"the relay client gave up: {shown(hello.text('reason'))}", "lost")
        if hello.kind != HELLO:
            raise LinkFault("the first frame is not HELLO")
        if hello.fields.get("version") != PROTOCOL_VERSION:
            raise Refusal("the versions differ: this relay server speaks link protocol 1", "version")
        service, client = hello.text("service"), hello.text("client")[:64]
        host, called = show_address(link.stream.peer).rpartition(":")[0], hello.text("name")
        identity = credentials.rights.get(called) if credentials.rights is not None else None
        proof = self._check_proof(link, hello, host, identity, credentials, deadline)
        name, proven = shown(called, 64), certificate_name(link.stream)  # the latter as it is: to be compared
        if identity:
            if runtime.options.auth and proven != identity.name:
                raise Refusal(
                    f"its certificate is that of {shown(proven, 64)}: then its --name must be that, too", "rights"
                )
            if reason := identity.why_not(host, service, asked_port(hello)):
                raise Refusal(reason, "rights")
        key, port = self._find_service(hello, service, client, host, identity)
        name = f"{name} (certificate {shown(proven, 64)})" if proven and not identity else name
        pooled = PooledLink(link, key, client, name, link.stream.peer, identity)
        pooled.port = port
        vouched = "the clients file" if identity else "the token" if proof else ""
        pooled.proof = f"certificate {shown(proven, 64)}" if proven else vouched
        pooled.known_as = name if pooled.proof else ""
        pooled.worker = int(hello.number("worker", 0, 1e6))
        pooled.is_doubtful = hello.fields.get("doubtful") is True
        pooled.wanted = self._intake.own_share(int(hello.number("idle", 1, 1e6)))
        welcome = {
            "heartbeat": runtime.options.heartbeat,
            "address": self._say_address(key),
            "waiting": self._intake.count_waiting(key),
        }
        if port is not None:
            welcome["service_port"] = port
        self._join(pooled)
        if runtime.credentials is not credentials:
            if reason := lost_right(pooled, runtime):
                self._forget(pooled, reason)  # whoever looks for such links may have looked before it joined
                raise Refusal(reason, "rights")
            renew_rights(pooled, runtime)
        pooled.pongs_due += 1  # until it has answered once, others are given out first: its client may have given up
        try:
            if proof:
                welcome = {"proof": proof, **welcome, "nonces": self._nonces.hand_out(client, host, WELCOME_NONCES)}
            out = link.pack_control(WELCOME, welcome)
            link.stream.send(out + link.pack_ping())
        except BaseException as error:
            self._forget(pooled, say_error(error))
            raise
        return pooled

    def _check_proof(
        self, link: Link, hello: Frame, host: str, identity: Identity | None, credentials: Credentials,
        deadline: Deadline,
    ) -> str:  # fmt: skip
        """Have a relay client prove that it knows its token, if it has to; returns the server's own proof, "" for none.
        Raises `Refusal`."""
        runtime, rights, token, called = self._runtime, credentials.rights, credentials.token, hello.text("name")
        if rights is not None:
            token = identity.token if identity else DECOY
            if identity is None and runtime.options.auth:  # its certificate may have been enough
                raise wrong_token(called, None, rights)
        if not token:
            if hello.fields.get("token") is True:
                raise Refusal(
                    "it wants a token to be proven, and none is set here; set --token-file", "token",
                    "the relay server has no token to prove: set the same --token-file there",
                )  # fmt: skip
            return ""
        service, client, nonce = hello.text("service"), hello.text("client")[:64], hello.text("nonce")
        certificate = credentials.certificate if link.stream.secure else ""
        own_nonce, auth = hello.text("server_nonce"), hello
        if not self._nonces.take(own_nonce, client, host):
            own_nonce = new_nonce()
            link.send(CHALLENGE, {"nonce": own_nonce, **({"certificate": certificate} if certificate else {})})
            auth = link.receive(deadline.within(HANDSHAKE_STEP), runtime.stop)
        if auth.kind == REFUSED:
            raise Refusal(f"the relay client gave up: {shown(auth.text('reason'))}", "lost")
        found = auth.text("certificate") if certificate else ""
        if not is_proof(auth.text("proof"), prove(token, CLIENT, nonce, own_nonce, service, client, found)):
            raise wrong_token(called, identity, rights)
        if found not in ("", certificate):
            raise Refusal(
                "another certificate than this server's has arrived there: somebody on the way has opened the TLS "
                "connection; if that is a proxy of yours, let it pass TLS on", "certificate",
            )  # fmt: skip
        return prove(token, SERVER, nonce, own_nonce, service, client, found)

    def _find_service(
        self, hello: Frame, service: str, client: str, host: str, identity: Identity | None
    ) -> tuple[str, int | None]:
        """The key of the service that a link is to be for, and the port, where it has asked for one and was given it.
        Raises `Refusal`."""
        ask = Ask.read(hello, service, client, identity.name if identity else "", host)
        if ask is None:
            if service in (known := [one.name for one in self._runtime.options.services]):
                return service, None
            there = f"there is {shown(', '.join(known), 200)} (--service adds one)"
            if not known:
                there = "its clients ask for a port, as with @0 behind the service"
            raise Refusal(f"there is no service {shown(service, 64)} here; {there}", "service")
        try:
            parse_name(service)
        except ValueError:
            raise Refusal(f"{shown(service, 64)} cannot be the name of a service", "service") from None
        key = self._intake.ask(ask)
        return key, self._intake.addresses[key][1]

    def _say_address(self, service: str) -> str:
        """Where service clients connect, as the relay client is told."""
        host, port = self._intake.addresses[service]
        if self._runtime.options.public_host and host in ("::", "0.0.0.0"):
            host = self._runtime.options.public_host
        return show_address((host, port))

    def _greet_raw(self, stream: Stream, deadline: Deadline) -> PooledLink:
        """Raw wire has no handshake, except for the key of node-tcp-relay 0.0.13 where one is set."""
        options = self._runtime.options
        key = options.secret.encode("utf-8", "surrogateescape")
        given = bytearray(len(key))
        have = 0
        while have < len(key):
            count = stream.recv_now(memoryview(given)[have:])
            if count is None:
                wait_for(stream.fd, select.POLLIN, deadline, self._runtime.stop)
            elif count == 0:
                raise EOFError("the link was closed")
            have += count or 0
        if not is_same(bytes(given), key):
            raise Refusal("the secret is wrong or missing", "token")
        host = show_address(stream.peer).rpartition(":")[0]
        name = shown(certificate_name(stream), 64) or "raw"
        pooled = PooledLink(RawLink(stream), options.services[0].name, host, name, stream.peer)
        pooled.proof = "the secret" if key else f"certificate {name}" if name != "raw" else ""
        self._join(pooled)
        return pooled
