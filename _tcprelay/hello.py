"""What a TLS client asks for in its first message, the ClientHello, and which certificate is for it; no I/O.

It is read here before OpenSSL reads it.  Python's ``SSLContext.sni_callback`` is told the name alone, not the protocols
(ALPN), so that nothing could be refused; prints a traceback where strangers put bytes into the name that are no ASCII;
and changes the certificate when it is settled already from which session tickets the connection may go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ssl import SSLContext

LONGEST_HELLO = 16384
"""Bytes of records in which the message has to be whole, or counts as one that asks for nothing: those of browsers have
two thousand."""
HANDSHAKE, CLIENT_HELLO = 22, 1
SERVER_NAME, ALPN = 0, 16
"""Extensions: RFC 6066, 3; RFC 7301, 3.1."""


class Hello(NamedTuple):
    """What a TLS client asks for."""

    name: str = ""
    """The host that it means (SNI), in lower case; "" where it names none."""
    protocols: tuple[str, ...] = ()
    """What it would speak (ALPN), the best first; none where it says nothing of that."""


class HelloReader:
    """Reads a ClientHello as it comes, in whatever pieces and records."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0  # where the next record begins
        self._message = bytearray()

    def feed(self, piece: bytes | memoryview) -> Hello | None:
        """Take what came next; ``None`` while more is to come.  What is no ClientHello asks for nothing: OpenSSL then
        says what is wrong with it."""
        self._data += piece
        while (record := self._next_record()) is not None:
            self._message += record
            if not record or self._message[0] != CLIENT_HELLO:
                return Hello()
            if len(self._message) >= 4:
                end = 4 + int.from_bytes(self._message[1:4], "big")
                if len(self._message) >= end:
                    return parse_hello(bytes(self._message[4:end]))
        return Hello() if len(self._data) > LONGEST_HELLO else None

    def _next_record(self) -> bytes | None:
        """What the next record holds, once it is whole; nothing where it is none of a handshake."""
        head = self._data[self._at : self._at + 5]
        if head[:1] not in (b"", bytes([HANDSHAKE])):
            return b""
        end = self._at + 5 + int.from_bytes(head[3:5], "big")
        if len(head) < 5 or len(self._data) < end:
            return None
        record = bytes(self._data[self._at + 5 : end])
        self._at = end
        return record


class Fields:
    """The parts of a TLS message, taken one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bool__(self) -> bool:
        return bool(self._data)

    def take(self, count: int) -> bytes:
        """So many bytes.  Raises `ValueError` where there are fewer."""
        if len(self._data) < count:
            raise ValueError("the message is too short")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """What stands behind its own length, which has so many bytes."""
        return self.take(self.number(size))


def parse_hello(body: bytes) -> Hello:
    """What a ClientHello without its header asks for (RFC 8446, 4.1.2; it is the same in TLS 1.2): nothing, where that
    cannot be read."""
    name, protocols = "", list[str]()
    try:
        fields = Fields(body)
        fields.take(2 + 32)  # the version, and what is random
        for size in (1, 2, 1):  # the session, ciphers, compression
            fields.vector(size)
        extensions = Fields(fields.vector(2) if fields else b"")
        while extensions:
            kind, extension = extensions.number(2), Fields(extensions.vector(2))
            if kind == SERVER_NAME:
                names = Fields(extension.vector(2))
                if names.number(1) == 0:  # a host's: there is no other kind
                    name = names.vector(2).decode("ascii").lower().removesuffix(".")
            elif kind == ALPN:
                entries = Fields(extension.vector(2))
                while entries:
                    protocols.append(entries.vector(1).decode("latin-1"))
    except ValueError:
        return Hello()
    return Hello(name, tuple(protocols))


class Faces:
    """What a TLS service port shows: a context for each certificate, chosen by the name that is asked for.

    Parameters: the contexts, each with the host names in its certificate, of which the first one is for whoever asks
    for none of these; and the protocols that are spoken (ALPN), the best first, as they are set in each context.

    A name is that of a certificate if it stands there, in whatever case, or with ``*`` in the place of its first label
    and of nothing else (RFC 9525, 6.3).  One that stands there goes before one with ``*``, and of several certificates
    with the same name the first one is shown.
    """

    def __init__(self, shown: Iterable[tuple[SSLContext, Iterable[str]]], protocols: tuple[str, ...] = ()) -> None:
        pairs = list(shown)
        self.first = pairs[0][0]
        self.protocols = protocols
        self.is_plain = len(pairs) == 1 and not protocols
        """Whatever a client asks for, it gets the same."""
        self._named: dict[str, SSLContext] = {}
        for context, names in pairs:
            for name in names:
                self._named.setdefault(name.lower(), context)

    def choose(self, hello: Hello) -> SSLContext:
        """The context for a client that asks for this."""
        wild = "*." + hello.name.partition(".")[2]
        return self._named.get(hello.name) or self._named.get(wild) or self.first

    def have_in_common(self, hello: Hello) -> bool:
        """Whether a client can be served that would speak these protocols: one that says nothing of them can, and
        speaks what such clients do."""
        return not (self.protocols and hello.protocols) or bool(set(self.protocols) & set(hello.protocols))
