"""How a relay client gets a link: it dials the relay server, and then TLS, HELLO, CHALLENGE, AUTH, WELCOME.

Each runs in the thread of its link.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ..addresses import Endpoint
from ..certificates import make_context, pin_of, trust
from ..link import AnyLink, Link, RawLink
from ..client_options import ClientOptions
from ..protocol import (
    AUTH, CHALLENGE, CLIENT, HELLO, PROTOCOL_VERSION, REFUSED, SERVER, Frame, LinkFault, guess_protocol, is_proof,
    new_nonce, prove,
)  # fmt: skip
from ..runtime import SHORTEST_TOKEN, Credentials, Runtime
from ..streams import Stream
from ..system import ssl
from ..tcp import round_trip, say_path, unsent_bytes
from ..text import is_tls_error, say_error, shown
from ..tls import NOT_TLS, TLSStream
from ..tunnel import ProxyFault
from ..waiting import Deadline, Stopping
from .offers import load_offers
from .refill import EAGER_SPAN
from .stock import RefusedByServer, Service, Unreachable
from .wayout import WayOut, say_proxy_of_environment

RELAY_DIAL_TIMEOUT, DIAL_AGAIN = 15.0, 5.0
"""Seconds to reach the relay server, and after how many without an answer it is tried once more beside the first
attempt: a saturated uplink has round trips of seconds, and a path that is back is found soon."""
SILENCE_TIMEOUT = 2.0
"""Seconds after which it is told that nothing answers, where the path is good: a service port is silent, too."""
LINK_TIMEOUT = 30.0
"""Seconds from a link's TCP connection to WELCOME; clearly more than the relay server gives it, so that a link that
is in the server's pool has not been given up here."""


MOST_NONCES, LONGEST_NONCE = 64, 128
"""So many of the server's nonces are kept for links to come, and how long one may be; the oldest go first."""
NOT_YET_VALID, EXPIRED = 9, 10
"""What OpenSSL calls a certificate (X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED)."""
CLOCK = "; is this host's clock right?"
WHY_NO_WORD = "does it use --wire raw, or TLS, or is this a service port?"


def load_credentials(options: ClientOptions) -> Credentials:
    """What a relay client's options name, for the links and for services.  Raises `OSError` and `ValueError`."""
    token = options.read_token()
    links = unverified = None
    vouches = False
    if options.tls in ("relay", "both"):
        own = options.cert, options.key, options.pfx
        links = make_context(options, False, *own)
        pinned = [bool(options.pin_of(relay)) for relay in options.relays]
        if all(pinned) or not options.reject_unauthorized:
            links.check_hostname, links.verify_mode = False, ssl.CERT_NONE
        else:
            trust(links, options.ca_file)
            named = options.ca_file or options.tls_server_name or options.wire == "raw"
            vouches = len(token) >= SHORTEST_TOKEN and not named
            if vouches or any(pinned):
                unverified = make_context(options, False, *own)
                unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    return Credentials(token, links, services=load_offers(options), unverified=unverified, token_vouches=vouches)


class Greeting:
    """Opens links to one relay server.

    Parameters: the runtime; where the relay server is, and what it is called in the options: the same, or the name
    behind which this is one address; how many idle links this process keeps for each service; the relay client's id;
    and the number of this process, of several.
    """

    def __init__(
        self, runtime: Runtime[ClientOptions], relay: Endpoint, called: Endpoint, most_idle: int, id: str, worker: int
    ) -> None:
        self._runtime = runtime
        self._most_idle = most_idle
        self._id = id
        self.worker = worker
        self.relay = relay
        self._called = called
        options = runtime.options
        self._way = WayOut(self.relay, options.proxy, RELAY_DIAL_TIMEOUT, runtime.probing, DIAL_AGAIN)
        self.beyond = self.relay if options.via else None
        """The relay server, where links lead to a proxy that is before it."""
        self._told_of_proxy = bool(options.via) or worker != 0 or called != options.relays[0]
        self._nonces: deque[str] = deque(maxlen=MOST_NONCES)
        self._is_bound = False
        """The server's proofs covered its certificate on the last link, so they do where its nonces are used."""
        self._must_verify = False
        """They did not, and its certificate alone can show who it is."""
        self.in_doubt = 0.0
        """When it was found that the other links may be dead, so that a new one has them prove themselves; 0 is not."""

    @property
    def place(self) -> tuple[int, Any] | None:
        """The family and the socket address by which the relay server was reached last."""
        return self._way.dialer.favourite

    def hurry(self, eager: bool) -> None:
        """Where it is `eager`, dial once more soon where nothing answers: see `EAGER_SPAN`."""
        self._way.dialer.again = EAGER_SPAN if eager else DIAL_AGAIN

    def connect(self, service: Service, doubt: Callable[[str], object]) -> tuple[AnyLink, str, int]:
        """Dial the relay server and bring a link to its idle state; with the service's address there, and how many
        service clients wait.  `doubt` is called with what may be wrong where it takes long.

        Raises `OSError`, `EOFError`, and `RefusedByServer` with the server's reason.
        """
        try:
            return self._connect(service, doubt, self._must_verify)
        except NotBound:
            self._must_verify = True
            return self._connect(service, doubt, True)

    def _connect(self, service: Service, doubt: Callable[[str], object], verify: bool) -> tuple[AnyLink, str, int]:
        """The same; with TLS the server's certificate is verified by itself where that is asked for, or the token's
        proof need not cover it.  Raises `NotBound`, too, where the proof would have to and does not."""
        deadline, credentials = Deadline(None), self._runtime.credentials
        pinned = bool(self._runtime.options.pin_of(self._called))
        verify = verify or pinned or not credentials.token_vouches
        context = credentials.links if verify and not (pinned and credentials.unverified) else credentials.unverified
        stream, options = self._dial(context, deadline, doubt), self._runtime.options
        try:
            if options.wire == "raw":
                stream.send(options.secret.encode("utf-8", "surrogateescape"))
                return RawLink(stream), "", 0
            link = Link(stream, CLIENT)
            welcome = self._greet(link, service, credentials.token, verify, deadline, doubt)
            link.heartbeat = max(0.05, welcome.number("heartbeat", 15, 3600))
            return link, shown(welcome.text("address")), int(welcome.number("waiting", 0, 1e6))
        except BaseException as error:
            late = self._say_late(stream.sock)
            stream.close()
            if isinstance(error, TimeoutError):
                raise late from None
            raise

    def keep_nonces(self, frame: Frame) -> None:
        """Keep what a WELCOME or a PING brings for the next links.  Raises `LinkFault`."""
        self._nonces.extend(nonce for nonce in frame.texts("nonces", MOST_NONCES) if len(nonce) <= LONGEST_NONCE)

    def _dial(self, context: ssl.SSLContext | None, deadline: Deadline, doubt: Callable[[str], object]) -> Stream:
        """Connect to the relay server, with TLS where there is a context; the deadline begins when there is a
        connection.  Raises `OSError`, `EOFError`; `Unreachable` where there is none."""
        runtime, options = self._runtime, self._runtime.options
        try:
            sock, before = self._way.dial(runtime.stop)
        except ProxyFault as fault:
            raise (RefusedByServer if fault.lasting else Unreachable)(str(fault)) from fault
        except OSError as error:
            self._tell_of_proxy(error)
            refused = isinstance(error, ConnectionRefusedError)
            hint = "; is the relay server running, and is this its relay port?" if refused else ""
            raise Unreachable(f"{say_error(error)}{hint}") from error
        deadline.shorten(LINK_TIMEOUT)
        name = f"link with relay {self.relay}"
        if context is None:
            stream = Stream(sock, name)
            stream.received = before
            return stream
        try:
            stream = TLSStream(sock, name, context, server_hostname=options.tls_server_name or self._called.host)
            stream.received = before
            self._patiently(lambda until: stream.handshake(until, runtime.stop), sock, deadline, doubt)
            found = certificate_of(stream)
            if (pin := options.pin_of(self._called)) and found != pin:
                if options.wire != "raw":  # there it would be bytes of a connection
                    Link(stream, CLIENT).refuse("pin", "this server's certificate is not the one in --pin")
                raise RefusedByServer(
                    f"the relay's certificate is {found}, not the one in --pin; compare it with what the server says "
                    "at its start before you change that"
                )
        except BaseException as error:
            late = self._say_late(sock)
            sock.close()
            if isinstance(error, TimeoutError):
                raise late from None
            if hint := explain_tls(error):
                self._must_verify = False  # it may be another server by the next time
                raise RefusedByServer(hint, "clock" if hint.endswith(CLOCK) else "") from error
            if isinstance(error, ConnectionResetError):
                raise ConnectionResetError(f"the relay reset the link without a word; {WHY_NO_WORD}") from None
            raise
        return stream

    def _tell_of_proxy(self, error: OSError) -> None:
        """The relay server cannot be reached straight: say once that there may be another way."""
        if self._told_of_proxy or isinstance(error, Stopping):
            return
        self._told_of_proxy = True
        if said := say_proxy_of_environment(self.relay.host):
            self._runtime.log.warning("%s", said)

    def _patiently(
        self, step: Callable[[Deadline], ResultT], sock: socket.socket, deadline: Deadline,
        doubt: Callable[[str], object],
    ) -> ResultT:  # fmt: skip
        """Take a step that waits for the relay's first answer, and doubt that there will be one where it takes long
        although what was sent has arrived.  Raises what the step raises."""
        try:
            return step(deadline.within(SILENCE_TIMEOUT))
        except TimeoutError as error:
            if error.errno is not None:  # the system has given the connection up
                raise
            if deadline.remaining() and not unsent_bytes(sock) and round_trip(sock) < SILENCE_TIMEOUT / 4:
                doubt(
                    f"no answer yet; is {self.relay} the relay port of a tcprelays, and not one of its service ports?"
                )
            return step(deadline)

    def _say_late(self, sock: socket.socket) -> TimeoutError:
        """What to raise where the relay has not answered in time."""
        why = say_path(sock) or f"; is {self.relay} the relay port of a tcprelays?"
        return TimeoutError(f"no answer within {LINK_TIMEOUT:g} s{why}")

    def _greet(
        self,
        link: Link,
        service: Service,
        token: bytes,
        verified: bool,
        deadline: Deadline,
        doubt: Callable[[str], object],
    ) -> Frame:
        """HELLO, and CHALLENGE and AUTH where there was no nonce for HELLO; returns WELCOME.  The server proves that it
        knows the token, too."""
        runtime = self._runtime
        name = runtime.options.name or socket.gethostname()
        nonce, expected, certificate = new_nonce(), "", certificate_of(link.stream)
        hello = {"version": PROTOCOL_VERSION, "service": service.name, "client": self._id, "worker": self.worker,
                 "name": name[:64], "idle": self._most_idle, "nonce": nonce, "token": bool(token)}  # fmt: skip
        if service.port is not None:
            hello |= {"service_port": service.port, "had_port": service.had}
        if self.in_doubt:
            hello["doubtful"] = True
        bound = self._is_bound
        if token and (bound or verified) and (ahead := self._take_nonce()):
            parts = (nonce, ahead, service.name, self._id, certificate if bound else "")
            hello |= {"server_nonce": ahead, "proof": prove(token, CLIENT, *parts)}
            if bound:
                hello["certificate"] = certificate
            expected = prove(token, SERVER, *parts)
        link.send(HELLO, hello)
        # Once WELCOME may be on its way, so may START behind it: then nothing but BYE ends a link in peace.
        try:
            stop = runtime.stop if token and not expected else runtime.cut
            answer = self._patiently(lambda until: link.receive(until, stop), link.sock, deadline, doubt)
        except LinkFault as error:
            spoken = guess_protocol(link.unread())
            hint = f"; is {self.relay} the relay port, and not a service port?"
            raise RefusedByServer(
                f"the relay port answers with {spoken}, not the link protocol ({error}){hint}"
            ) from error
        except ConnectionResetError:
            if link.stream.secure:
                raise
            raise ConnectionResetError(f"the relay reset the link without a word; {WHY_NO_WORD}") from None
        except OSError as error:
            if not is_tls_error(error):
                raise
            # With TLS 1.3 a client learns only now that its certificate was not accepted.
            reason = f"refused by the relay, maybe for this client's certificate: {say_error(error)}"
            raise RefusedByServer(reason) from error
        except EOFError:
            if link.stream.secure:
                raise
            raise EOFError(f"the relay closed the link without a word; {WHY_NO_WORD}") from None
        if answer.kind == CHALLENGE:
            if not token:
                link.refuse("token", "it has no token; set --token-file there")
                raise RefusedByServer("the relay asks for a token; set --token-file or --token")
            self._is_bound = bound = check_binding(link, answer.text("certificate"), certificate, verified)
            parts = (nonce, answer.text("nonce"), service.name, self._id, certificate if bound else "")
            expected = prove(token, SERVER, *parts)
            auth = {"proof": prove(token, CLIENT, *parts)}
            link.send(AUTH, {**auth, "certificate": certificate} if bound else auth)
            answer = link.receive(deadline, runtime.cut)
        if answer.kind == REFUSED:
            raise refused(answer)
        if token and not (expected and is_proof(answer.text("proof"), expected)):
            raise RefusedByServer("the relay did not prove that it knows the token; is --token-file set there?")
        if service.port is not None:
            if "service_port" not in answer.fields:
                raise RefusedByServer("this relay server cannot be asked for a port: it is older than this client")
            service.had = int(answer.number("service_port", 0, 65535))
        self.keep_nonces(answer)
        return answer

    def _take_nonce(self) -> str:
        """The one that came last; "" where there is none."""
        try:
            return self._nonces.pop()
        except IndexError:
            return ""


class NotBound(ConnectionError):
    """The relay server's proofs would not cover its certificate, which has not been verified otherwise."""


def check_binding(link: Link, named: str, found: str, verified: bool) -> bool:
    """Whether the proofs are to cover the certificate that was found on a link: CHALLENGE names the server's.

    Raises `RefusedByServer` where they are two, and `NotBound` where none is named and it is not verified otherwise.
    """
    if named and found:
        if named != found:
            link.refuse("certificate", "another certificate than this server's has arrived there")
            raise RefusedByServer(
                f"the relay server's certificate is {shown(named, 80)}, and the one that arrives here is {found}: "
                "somebody on the way has opened the TLS connection; if that is a proxy of yours, let it pass TLS on"
            )
        return True
    if found and not verified:
        raise NotBound("the relay server's proofs do not cover its certificate")
    return False


def certificate_of(stream: Stream) -> str:
    """The digest of the certificate that the other side of a link has shown, as a pin; "" without TLS."""
    found = stream.tls.getpeercert(binary_form=True) if isinstance(stream, TLSStream) else None
    return pin_of(found) if found else ""


ResultT = TypeVar("ResultT")


def refused(frame: Frame) -> RefusedByServer:
    """What to raise for a REFUSED."""
    return RefusedByServer(f"refused by the relay: {shown(frame.text('reason'), 240)}", frame.text("code"))


def explain_tls(error: BaseException) -> str:
    """What to do about a failed TLS handshake that will not succeed by itself; "" for other errors."""
    if not is_tls_error(error):
        return ""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (NOT_YET_VALID, EXPIRED):
        return f"{say_error(error)}{CLOCK}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"{say_error(error)}; give --ca-file or --pin, or --tls-server-name where the name differs; the server's "
            f"token would do, too, if it has {SHORTEST_TOKEN} characters or more"
        )
    if error.reason == "TLSV1_ALERT_ACCESS_DENIED":
        return (
            "refused by the relay: it accepts no links from this address, by its --allow-links or --deny-links; or it "
            "asks for neither a token nor certificates, so it accepts links from its own machine alone: then set "
            "--token-file on both sides"
        )
    if error.reason in NOT_TLS:
        return (
            "what answers there does not speak TLS: is it the relay port of a tcprelays that was started with --tls? "
            "A service port answers as its service does"
        )
    return ""
