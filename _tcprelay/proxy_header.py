"""The header of the PROXY protocol, versions 1 and 2: made, and read by a strict parser; no I/O.

A proxy puts it before the first byte of a connection, to say where that comes from.  HAProxy's specification has it
(proxy-protocol.txt), which all figures and forms here are from.  Version 1 is a line of text, version 2 binary:

    PROXY TCP4 192.0.2.7 198.51.100.1 50312 443\\r\\n
    signature, version and command, family, length of the rest; addresses, ports, and whatever else
"""

from __future__ import annotations

import ipaddress
import socket
import struct

MARK = b"PROXY "
"""What a header of version 1 begins with."""
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
"""What one of version 2 begins with."""
LONGEST_LINE = 107
"""Bytes of the longest line of version 1, its end included."""
HEAD = 16
"""Bytes of a header of version 2 before the part whose length it says."""
LONGEST_REST = 4096
"""Bytes of that part that are accepted: the specification has no bound, and headers with a few hundred are long."""
LOCAL, PROXY = 0x20, 0x21
"""Version 2 with its two commands: from the proxy itself, a health check say, and on behalf of somebody."""
TCP4, TCP6 = 0x11, 0x21
FAMILIES = {0x00: 0, TCP4: 12, 0x12: 12, TCP6: 36, 0x22: 36, 0x31: 216, 0x32: 216}
"""The families of addresses, with the transport, and how many bytes the addresses and ports of each take."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Source = tuple[str, int]
"""The host and the port that a connection comes from; of an IPv4 address mapped into IPv6, the IPv4 one."""


class HeaderFault(ConnectionError):
    """What came is no header, or not a right one; the message says why."""


def encode_proxy_header(version: int, source: str, destination: str) -> bytes:
    """A header of version 1 or 2 that says between which addresses a connection is, as `show_address` writes them.

    Where one of them is unknown or no Internet address, the header says that nothing is known (UNKNOWN, LOCAL).  Where
    one is IPv4 and the other IPv6, both are written as IPv6.
    """
    near, far = _take_address(source), _take_address(destination)
    if near is None or far is None:
        return b"PROXY UNKNOWN\r\n" if version == 1 else SIGNATURE + struct.pack("!BBH", LOCAL, 0, 0)
    hosts, ports = [near[0], far[0]], (near[1], far[1])
    if hosts[0].version != hosts[1].version:
        hosts = [_map(host) for host in hosts]
    is_ipv4 = hosts[0].version == 4
    if version == 1:
        words = ["PROXY", "TCP4" if is_ipv4 else "TCP6", *map(_say_host, hosts), *map(str, ports)]
        return " ".join(words).encode() + b"\r\n"
    rest = hosts[0].packed + hosts[1].packed + struct.pack("!HH", *ports)
    return SIGNATURE + struct.pack("!BBH", PROXY, TCP4 if is_ipv4 else TCP6, len(rest)) + rest


def may_begin_header(start: bytes | bytearray) -> bool:
    """Whether a stream that begins so has a header of either version there, as far as can be seen."""
    return MARK.startswith(start[: len(MARK)]) or SIGNATURE.startswith(start[: len(SIGNATURE)])


def begins_header(start: bytes | bytearray) -> bool:
    """Whether it is certain: the whole mark is there."""
    return start.startswith((MARK, SIGNATURE))


class HeaderParser:
    """Takes a header in pieces of any size, and not a byte of what follows it."""

    def __init__(self) -> None:
        self._taken = bytearray()
        self.is_whole = False
        """The header has come to its end, and is right."""
        self.source: Source | None = None
        """Where the connection comes from, once the header is whole; ``None`` where it does not say so (UNKNOWN, LOCAL,
        addresses that are not of TCP): then the connection's own address is the best there is."""

    @property
    def count(self) -> int:
        """Bytes that were taken so far."""
        return len(self._taken)

    @property
    def room(self) -> int:
        """How many more bytes the longest header has; so many are worth looking at."""
        return HEAD + LONGEST_REST - len(self._taken)

    def feed(self, piece: bytes) -> int:
        """Take what belongs to the header from a piece of the stream; returns how many bytes that are.  Raises
        `HeaderFault` as soon as the header cannot become a right one."""
        before = len(self._taken)
        self._taken += piece
        length = _measure(self._taken)
        if length is not None and length <= len(self._taken):
            del self._taken[length:]
            self.source, self.is_whole = _decode(bytes(self._taken)), True
        return len(self._taken) - before


def _measure(start: bytearray) -> int | None:
    """The length of the header that begins so; ``None`` where that is not known yet.  Raises `HeaderFault`."""
    if not may_begin_header(start):
        raise HeaderFault("it began with something else")
    if MARK.startswith(start[: len(MARK)]):
        end = start.find(b"\n", 0, LONGEST_LINE)
        if end < 0 and len(start) >= LONGEST_LINE:
            raise HeaderFault(f"its line has more than {LONGEST_LINE} bytes")
        return end + 1 or None
    if len(start) > len(SIGNATURE) and start[len(SIGNATURE)] not in (LOCAL, PROXY):
        raise HeaderFault("its version or command is unknown")
    if len(start) < HEAD:
        return None
    length = int.from_bytes(start[HEAD - 2 : HEAD], "big")
    if length > LONGEST_REST:
        raise HeaderFault(f"it has more than {HEAD + LONGEST_REST} bytes")
    return HEAD + length


def _decode(header: bytes) -> Source | None:
    """What a whole header says.  Raises `HeaderFault`."""
    if header.startswith(MARK):
        return _decode_line(header)
    if header[12] == LOCAL:
        return None  # whatever else stands there
    family, rest = header[13], header[HEAD:]
    if family not in FAMILIES:
        raise HeaderFault("its family of addresses is unknown")
    if len(rest) < FAMILIES[family]:
        raise HeaderFault("it is too short for its addresses")
    if family == TCP4:
        return _source(ipaddress.IPv4Address(rest[:4]), int.from_bytes(rest[8:10], "big"))
    if family == TCP6:
        return _source(ipaddress.IPv6Address(rest[:16]), int.from_bytes(rest[32:34], "big"))
    return None


def _decode_line(line: bytes) -> Source | None:
    """The same of version 1."""
    fault = HeaderFault("its line is malformed")
    if not line.endswith(b"\r\n") or not line.isascii() or b"\r" in line[:-2]:
        raise fault
    kind, *words = line[len(MARK) : -2].decode().split(" ")
    if kind == "UNKNOWN":
        return None  # whatever stands behind it
    if kind not in ("TCP4", "TCP6") or len(words) != 4 or "%" in words[0] + words[1]:
        raise fault
    make: type[IPAddress] = ipaddress.IPv4Address if kind == "TCP4" else ipaddress.IPv6Address
    try:
        source, _ = make(words[0]), make(words[1])
    except ValueError:
        raise fault from None
    for port in words[2:]:
        if not port.isdigit() or str(int(port)) != port or int(port) > 65535:
            raise fault
    return _source(source, int(words[2]))


def _source(host: IPAddress, port: int) -> Source:
    """An address as the system writes those that it gives: other rooms look at that text."""
    if isinstance(host, ipaddress.IPv6Address):
        host = host.ipv4_mapped or host
    if host.version == 4:
        return str(host), port
    return socket.inet_ntop(socket.AF_INET6, host.packed), port


def _take_address(text: str) -> tuple[IPAddress, int] | None:
    """An address and its port, as `show_address` writes them, without a zone; ``None`` for anything else."""
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        return None
    try:
        if not (host.startswith("[") and host.endswith("]")):
            return ipaddress.IPv4Address(host), int(port)
        address = ipaddress.IPv6Address(host[1:-1].partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address, int(port)


def _map(host: IPAddress) -> IPAddress:
    """An IPv4 address as the IPv6 one that stands for it (RFC 4291, 2.5.5.2)."""
    return host if host.version == 6 else ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + host.packed)


def _say_host(host: IPAddress) -> str:
    """An address in text; one of IPv4 in IPv6 in the same way in every Python."""
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return f"::ffff:{mapped}" if mapped else str(host)
