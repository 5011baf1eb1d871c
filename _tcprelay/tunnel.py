"""What is said to a proxy so that it connects on to a relay server, and how its answers are read; no I/O.

HTTP proxies are asked with CONNECT (RFC 9110, 9.3.6; user and password as Basic, RFC 7617), SOCKS5 ones as RFC 1928 and
RFC 1929 say.  Either gets the name of the relay server as it is, and looks it up itself.  What comes behind the answer
is the relay server's: not a byte of it is taken.
"""

from __future__ import annotations

import abc
import base64
import ipaddress
import re
from dataclasses import dataclass, field

from .addresses import Endpoint, parse_endpoint
from .text import shown

LONGEST_HEAD = 8192
"""Bytes of an HTTP proxy's answer, all its header lines included: many servers take no longer requests either."""
LONGEST_QUOTE = 60
"""Characters of what a proxy has said that are shown."""
HTTP, SOCKS5 = "http", "socks5"
NO_PROOF, BY_PASSWORD, NOTHING = 0, 2, 255
"""Ways to prove oneself to a SOCKS5 proxy (RFC 1928, 3); the last one is none of those that were offered."""
SOCKS_FAILURES = {
    1: "it has failed",
    3: "its network is unreachable",
    4: "that host is unreachable",
    5: "connection refused",
    6: "its packets came to the end of their time",
    7: "it connects to nobody",
    8: "it has no such addresses",
}
"""What a SOCKS5 proxy says that has not connected (RFC 1928, 6); 2 is that its rules forbid it."""


class ProxyFault(ConnectionError):
    """A proxy does not connect to the relay server; the message says which of the two, and why.  It is `lasting` where
    it will not pass before somebody changes a setting."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Proxy:
    """A proxy, how it is spoken to ("http" or "socks5"), and who one is there; no user where nobody is asked."""

    scheme: str
    endpoint: Endpoint
    user: bytes | None = field(default=None, repr=False)
    password: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        """For people: without the user, who may be as secret as the password."""
        return f"{self.scheme}://{'' if self.user is None else '***@'}{self.endpoint}"


def parse_proxy(text: str) -> Proxy:
    """``http://[USER:PASSWORD@]HOST:PORT`` or ``socks5://…``, where user and password have ``%XX`` for what would have
    another meaning; ``socks5h`` is what curl calls the latter.  Raises `ValueError` that says what is accepted, and
    shows nothing."""
    found = re.fullmatch(r"(http|socks5h?)://(?:(.*)@)?([^@/]+)/?", text, re.IGNORECASE | re.DOTALL)
    if not found or not text.isprintable():
        raise ValueError(ACCEPTED)
    scheme, credentials = found[1].lower().removesuffix("h"), found[2]
    try:
        endpoint = parse_endpoint(found[3])
    except ValueError as error:
        raise ValueError(ACCEPTED) from error
    if not endpoint.port:
        raise ValueError("a proxy with the port that it listens on, as in http://proxy.example.net:3128")
    if credentials is None:
        return Proxy(scheme, endpoint)
    user, _, password = map(_decode, credentials.partition(":"))
    if scheme == HTTP and (not user or b":" in user):
        raise ValueError("a user whose name is not empty and has no colon in it")
    if scheme == SOCKS5 and not (0 < len(user) < 256 and 0 < len(password) < 256):
        raise ValueError("a user and a password of 1 to 255 bytes each: SOCKS5 has no others")
    return Proxy(scheme, endpoint, user, password)


def parse_via(text: str) -> str:
    """The same, left as text, which the option keeps."""
    parse_proxy(text)
    return text


def show_via(text: str) -> str:
    """What may be shown of it."""
    return str(parse_proxy(text)) if "@" in text else text


ACCEPTED = (
    "http://[USER:PASSWORD@]HOST:PORT or socks5://[USER:PASSWORD@]HOST:PORT, in user and password %XX for what is no "
    "letter and no digit"
)


def _decode(text: str) -> bytes:
    """What stands for itself or as ``%XX`` (RFC 3986, 2.1).  Raises `ValueError`."""
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise ValueError(ACCEPTED)
    raw = text.encode("utf-8", "surrogateescape")
    return re.sub(b"%(..)", lambda found: bytes.fromhex(found[1].decode()), raw)


class Tunnel(abc.ABC):
    """Asks a proxy to connect to a relay server, and reads its answers in pieces of any size.

    Parameters: the proxy, and the relay server, whose name may be one that only the proxy knows.  Raises `ProxyFault`
    where it is none.
    """

    def __init__(self, proxy: Proxy, relay: Endpoint) -> None:
        self.proxy = proxy
        self.relay = relay
        self.count = 0
        """Bytes that were taken so far."""
        self.is_open = False
        """From here on all bytes are the relay server's."""

    @property
    @abc.abstractmethod
    def is_amid(self) -> bool:
        """A part of an answer has come."""

    @abc.abstractmethod
    def begin(self) -> bytes:
        """What is sent first."""

    @abc.abstractmethod
    def feed(self, piece: bytes) -> tuple[int, bytes]:
        """Take what belongs to the proxy's answer from a piece of the stream; returns how many bytes that are, and what
        is to be sent now.  Raises `ProxyFault` as soon as there can be no way."""

    def _quote(self, said: bytes) -> str:
        """The first line of what the proxy has said, made safe; also where it says back what it was told."""
        for secret in (_basic(self.proxy), self.proxy.password, self.proxy.user):
            if secret:
                said = said.replace(secret, b"***")
        return shown(said.split(b"\n")[0].decode("latin-1").strip(), LONGEST_QUOTE)

    def _forbidden(self, said: str = "") -> ProxyFault:
        return ProxyFault(
            f"the proxy {self.proxy} refuses connections to {self.relay}{said}; its owner has to allow them, and many "
            "allow port 443 alone",
            lasting=True,
        )

    def _unproven(self, said: str = "") -> ProxyFault:
        if self.proxy.user is None:
            why = f"asks for a user and a password{said}; give them as in --via {self.proxy.scheme}://USER:PASSWORD@…"
        else:
            why = f"does not accept the user and the password of --via{said}"
        return ProxyFault(f"the proxy {self.proxy} {why}", lasting=True)


class HTTPTunnel(Tunnel):
    """The same with an HTTP proxy: CONNECT, and any answer of 200 to 299."""

    def __init__(self, proxy: Proxy, relay: Endpoint) -> None:
        super().__init__(proxy, relay)
        place = Endpoint(_ascii_name(relay.host).decode(), relay.port)
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if proxy.user is not None:
            lines.append(f"Proxy-Authorization: Basic {_basic(proxy).decode()}")
        self._request = "\r\n".join([*lines, "", ""]).encode()
        self._line = bytearray()
        self._status = 0
        self._said = ""
        self._schemes: list[str] = []
        """In which ways the proxy lets users prove themselves."""

    @property
    def is_amid(self) -> bool:
        return bool(self._status or self._line)

    def begin(self) -> bytes:
        return self._request

    def feed(self, piece: bytes) -> tuple[int, bytes]:
        taken = 0
        while taken < len(piece) and not self.is_open:
            end = piece.find(b"\n", taken) + 1 or len(piece)
            self._line += piece[taken:end]
            self.count += end - taken
            taken = end
            if self.count > LONGEST_HEAD:
                raise self._no_proxy(f"its answer has more than {LONGEST_HEAD} bytes")
            whole = self._line.endswith(b"\n")
            begun = HTTP_MARK.startswith(self._line[: len(HTTP_MARK)])
            if not self._status and (not begun or (whole and not STATUS_LINE.match(self._line))):
                raise self._no_proxy(f"it says {self._quote(bytes(self._line))}")
            if whole:
                line = bytes(self._line.rstrip(b"\r\n"))
                self._line.clear()
                self._read_line(line)
        return taken, b""

    def _read_line(self, line: bytes) -> None:
        """A whole line; an empty one is the end of an answer.  Lines may end with a bare LF (RFC 9112, 2.2)."""
        if not self._status:
            self._status, self._said = int(line[9:12]), self._quote(line[9:])
        elif line:
            name, _, value = line.partition(b":")
            if name.lower() == b"proxy-authenticate" and value.split():
                self._schemes.append(self._quote(value.split()[0]))
        elif self._status < 200:
            self._status = 0  # another one follows
        else:
            self._conclude()

    def _conclude(self) -> None:
        """An answer is whole; of one that opens the way length and coding do not count."""
        status, proxy = self._status, self.proxy
        if status < 300:
            self.is_open = True
        elif status == 407 and self._schemes and "basic" not in [scheme.lower() for scheme in self._schemes]:
            ways = ", ".join(self._schemes[:4])
            raise ProxyFault(f"the proxy {proxy} asks for {ways} (407), and a relay client knows Basic alone", True)
        elif status in (401, 407):  # tinyproxy says 401 where the password is wrong
            raise self._unproven(f" ({status})")
        elif status == 403:
            raise self._forbidden(" (403)")
        elif status >= 500:
            raise ProxyFault(f"the proxy {proxy} cannot reach {self.relay}; it says {self._said}")
        else:
            raise ProxyFault(f"the proxy {proxy} does not connect to {self.relay}; it says {self._said}")

    def _no_proxy(self, why: str) -> ProxyFault:
        return ProxyFault(f"what answers at {self.proxy.endpoint} is no HTTP proxy: {why}", lasting=True)


HTTP_MARK = b"HTTP/1."
STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] [1-9][0-9]{2}(?: [^\r\n]*)?\r?\n")


class SOCKSTunnel(Tunnel):
    """The same with a SOCKS5 proxy: ways to prove oneself, the proof where the proxy wants one, CONNECT."""

    def __init__(self, proxy: Proxy, relay: Endpoint) -> None:
        super().__init__(proxy, relay)
        self._place = _pack_host(relay.host) + relay.port.to_bytes(2, "big")
        self._ways = [NO_PROOF] if proxy.user is None else [NO_PROOF, BY_PASSWORD]
        self._answer = bytearray()
        self._take = self._take_way
        """What the answer that is under way is for."""

    @property
    def is_amid(self) -> bool:
        return bool(self._answer)

    def begin(self) -> bytes:
        return bytes([5, len(self._ways), *self._ways])

    def feed(self, piece: bytes) -> tuple[int, bytes]:
        taken = 0
        while taken < len(piece) and not self.is_open:
            self._answer.append(piece[taken])
            self.count += 1
            taken += 1
            if self._answer[0] not in ((1, 5) if self._take == self._take_proof else (5,)):
                # A proof may have been sent, which could come back: no more than this is shown then.
                more = piece[taken:] if self._take == self._take_way else b""
                raise self._no_proxy(bytes(self._answer) + more)
            if len(self._answer) >= 2 and (out := self._take()) is not None:
                return taken, out
        return taken, b""

    def _take_way(self) -> bytes | None:
        """Which way the proxy has chosen; returns the next message.  `_answer` has two bytes or more, here and below,
        and ``None`` is that it is not whole."""
        way = self._answer[1]
        if way == NOTHING and self.proxy.user is None:
            raise self._unproven()
        if way == NOTHING:
            raise ProxyFault(f"the proxy {self.proxy} asks for more than a user and a password", lasting=True)
        if way not in self._ways:
            raise self._no_proxy(bytes(self._answer))
        self._answer.clear()
        if way == NO_PROOF:
            return self._connect()
        self._take = self._take_proof
        user, password = self.proxy.user or b"", self.proxy.password
        return bytes([1, len(user)]) + user + bytes([len(password)]) + password

    def _take_proof(self) -> bytes | None:
        if self._answer[1]:
            raise self._unproven()
        self._answer.clear()
        return self._connect()

    def _connect(self) -> bytes:
        self._take = self._take_end
        return b"\5\1\0" + self._place

    def _take_end(self) -> bytes | None:
        """Whether there is a connection.  The address behind that, the proxy's own, says nothing that is needed."""
        answer = self._answer
        if answer[1] == 2:
            raise self._forbidden()
        if answer[1]:
            why = SOCKS_FAILURES.get(answer[1], f"it says {answer[1]}")
            raise ProxyFault(f"the proxy {self.proxy} cannot reach {self.relay}: {why}")
        if len(answer) < 5:
            return None
        sizes = {1: 4, 3: 1 + answer[4], 4: 16}
        if answer[3] not in sizes:
            raise self._no_proxy(bytes(answer))
        self.is_open = len(answer) == 4 + sizes[answer[3]] + 2
        return b"" if self.is_open else None

    def _no_proxy(self, said: bytes) -> ProxyFault:
        quote = self._quote(said)
        return ProxyFault(f"what answers at {self.proxy.endpoint} is no SOCKS5 proxy: it says {quote}", lasting=True)


def open_tunnel(proxy: Proxy, relay: Endpoint) -> Tunnel:
    """The one that this proxy is spoken to with."""
    return (HTTPTunnel if proxy.scheme == HTTP else SOCKSTunnel)(proxy, relay)


def _basic(proxy: Proxy) -> bytes:
    """User and password as Basic has them; nothing without a user."""
    return b"" if proxy.user is None else base64.b64encode(proxy.user + b":" + proxy.password)


def _ascii_name(host: str) -> bytes:
    """A host as it is told to others.  Raises `ProxyFault`."""
    try:
        return host.encode("idna")
    except UnicodeError:
        raise ProxyFault(f"{shown(host)} is not a host name", lasting=True) from None


def _pack_host(host: str) -> bytes:
    """A host as SOCKS5 has it: the kind, and an IPv4 or IPv6 address, or a name with its length.  Raises
    `ProxyFault`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = _ascii_name(host)
        if not 0 < len(name) < 256:
            raise ProxyFault(f"{shown(host)} is not a host name", lasting=True) from None
        return bytes([3, len(name)]) + name
    return bytes([1 if address.version == 4 else 4]) + address.packed
