"""PROXY protocol headers: how they are made, and that nothing but a right one is taken for one."""

from __future__ import annotations

import socket

import pytest

from _tcprelay.protocol import PROXY, guess_protocol
from _tcprelay.proxy_header import (
    HEAD, LONGEST_LINE, LONGEST_REST, SIGNATURE, HeaderFault, HeaderParser, Source, begins_header, encode_proxy_header,
    may_begin_header,
)  # fmt: skip

V4 = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + (50312).to_bytes(2, "big") + (443).to_bytes(2, "big")
V6 = bytes.fromhex("20010db8" + "00" * 11 + "07" + "20010db8" + "00" * 11 + "01") + V4[8:]
MAPPED = bytes.fromhex("00" * 10 + "ffff") + V4[:4] + bytes.fromhex("00" * 10 + "ffff") + V4[4:8] + V4[8:]

OF_OLD = socket.inet_ntop(socket.AF_INET6, bytes(12) + b"\xff\xff\0\7")
"""As the system writes it."""


def v2(command: int, family: int, rest: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + bytes([command, family]) + (len(rest) if length is None else length).to_bytes(2, "big") + rest


def line(text: str) -> bytes:
    return f"PROXY {text}\r\n".encode()


RIGHT: dict[str, tuple[bytes, Source | None]] = {
    "v1 TCP4": (line("TCP4 192.0.2.7 198.51.100.1 50312 443"), ("192.0.2.7", 50312)),
    "v1 TCP6": (line("TCP6 2001:db8::7 2001:db8::1 0 65535"), ("2001:db8::7", 0)),
    "v1 TCP6 of old": (line("TCP6 ::ffff:7 ::1 1 2"), (OF_OLD, 1)),
    "v1 TCP6 in full": (line("TCP6 2001:0DB8:0:0:0:0:0:7 ::1 1 2"), ("2001:db8::7", 1)),
    "v1 IPv4 in TCP6": (line("TCP6 ::ffff:192.0.2.7 ::ffff:c633:6401 1 2"), ("192.0.2.7", 1)),
    "v1 UNKNOWN": (line("UNKNOWN"), None),
    "v1 UNKNOWN with more": (line("UNKNOWN ffff::1 whatever 65536"), None),
    "v1, the longest": (line("UNKNOWN ".ljust(LONGEST_LINE - 8, "x")), None),
    "v2 TCP4": (v2(0x21, 0x11, V4), ("192.0.2.7", 50312)),
    "v2 TCP6": (v2(0x21, 0x21, V6), ("2001:db8::7", 50312)),
    "v2 IPv4 in TCP6": (v2(0x21, 0x21, MAPPED), ("192.0.2.7", 50312)),
    "v2 with TLVs": (v2(0x21, 0x11, V4 + b"\x02\0\x05a.org\x20\0\x05\x01\0\0\0\0"), ("192.0.2.7", 50312)),
    "v2 with what are no TLVs": (v2(0x21, 0x21, V6 + b"\xff\xff\xff"), ("2001:db8::7", 50312)),
    "v2, the longest": (v2(0x21, 0x11, V4.ljust(LONGEST_REST, b"\0")), ("192.0.2.7", 50312)),
    "v2 LOCAL": (v2(0x20, 0x00, b""), None),
    "v2 LOCAL, with what does not count": (v2(0x20, 0x99, b"PROXY "), None),
    "v2 UNSPEC": (v2(0x21, 0x00, b"whatever"), None),
    "v2 UNIX": (v2(0x21, 0x31, b"/run/a".ljust(216, b"\0")), None),
    "v2 UDP": (v2(0x21, 0x12, V4), None),
}  # fmt: skip

SOMETHING, TOO_LONG_LINE = "it began with something else", "its line has more than 107 bytes"
MALFORMED, UNKNOWN_FAMILY = "its line is malformed", "its family of addresses is unknown"
UNKNOWN_COMMAND, SHORT = "its version or command is unknown", "it is too short for its addresses"
TOO_LONG = f"it has more than {HEAD + LONGEST_REST} bytes"

WRONG: dict[str, tuple[bytes, str]] = {
    "HTTP": (b"GET / HTTP/1.1\r\n", SOMETHING),
    "TLS": (b"\x16\x03\x01\x02\x00", SOMETHING),
    "a blank before it": (b" PROXY UNKNOWN\r\n", SOMETHING),
    "small letters": (b"proxy UNKNOWN\r\n", SOMETHING),
    "another word": (b"PROXX UNKNOWN\r\n", SOMETHING),
    "no blank": (b"PROXY\r\n", SOMETHING),
    "half a signature": (b"\r\n\r\n\0\r\nQUIT\r", SOMETHING),
    "a signature of text": (b"\r\n\r\nGET /", SOMETHING),
    "a line feed alone": (b"PROXY UNKNOWN\n", MALFORMED),
    "a carriage return in it": (b"PROXY UNKNOWN\r \r\n", MALFORMED),
    "nothing in it": (b"PROXY \r\n", MALFORMED),
    "UNKNOWN in small letters": (line("unknown"), MALFORMED),
    "UNKNOWN with a tail": (line("UNKNOWN4"), MALFORMED),
    "UDP4": (line("UDP4 192.0.2.7 198.51.100.1 50312 443"), MALFORMED),
    "no port": (line("TCP4 192.0.2.7 198.51.100.1 50312"), MALFORMED),
    "one word more": (line("TCP4 192.0.2.7 198.51.100.1 50312 443 x"), MALFORMED),
    "a blank behind it": (line("TCP4 192.0.2.7 198.51.100.1 50312 443 "), MALFORMED),
    "two blanks": (line("TCP4  192.0.2.7 198.51.100.1 50312 443"), MALFORMED),
    "a tab": (line("TCP4 192.0.2.7\t198.51.100.1 50312 443"), MALFORMED),
    "a port too large": (line("TCP4 192.0.2.7 198.51.100.1 65536 443"), MALFORMED),
    "a negative port": (line("TCP4 192.0.2.7 198.51.100.1 -1 443"), MALFORMED),
    "a zero before a port": (line("TCP4 192.0.2.7 198.51.100.1 050312 443"), MALFORMED),
    "a wrong destination port": (line("TCP4 192.0.2.7 198.51.100.1 50312 0443"), MALFORMED),
    "no number": (line("TCP4 192.0.2.7 198.51.100.1 5o312 443"), MALFORMED),
    "a short address": (line("TCP4 192.0.2 198.51.100.1 50312 443"), MALFORMED),
    "a zero before a number": (line("TCP4 192.0.2.07 198.51.100.1 50312 443"), MALFORMED),
    "an octet too large": (line("TCP4 192.0.2.256 198.51.100.1 50312 443"), MALFORMED),
    "a wrong destination": (line("TCP4 192.0.2.7 example.org 50312 443"), MALFORMED),
    "IPv6 in TCP4": (line("TCP4 2001:db8::7 2001:db8::1 50312 443"), MALFORMED),
    "IPv4 in TCP6": (line("TCP6 192.0.2.7 198.51.100.1 50312 443"), MALFORMED),
    "a zone": (line("TCP6 fe80::1%eth0 fe80::2 50312 443"), MALFORMED),
    "brackets": (line("TCP6 [2001:db8::7] 2001:db8::1 50312 443"), MALFORMED),
    "a network": (line("TCP4 192.0.2.7/32 198.51.100.1 50312 443"), MALFORMED),
    "digits outside ASCII": (line("TCP4 192.0.2.7 198.51.100.1 5031\u0662 443"), MALFORMED),
    "no text": (b"PROXY UNKNOWN \xff\r\n", MALFORMED),
    "a line too long by one": (line("UNKNOWN ".ljust(LONGEST_LINE - 7, "x")), TOO_LONG_LINE),
    "a line without an end": (b"PROXY UNKNOWN ".ljust(LONGEST_LINE, b"x"), TOO_LONG_LINE),
    "version 1 in binary": (v2(0x11, 0x11, V4), UNKNOWN_COMMAND),
    "version 3": (v2(0x31, 0x11, V4), UNKNOWN_COMMAND),
    "command 2": (v2(0x22, 0x11, V4), UNKNOWN_COMMAND),
    "family 4": (v2(0x21, 0x41, V4), UNKNOWN_FAMILY),
    "transport 3": (v2(0x21, 0x13, V4), UNKNOWN_FAMILY),
    "TCP4 without its end": (v2(0x21, 0x11, V4[:-1]), SHORT),
    "TCP6 with the addresses of TCP4": (v2(0x21, 0x21, V4), SHORT),
    "UNIX without its end": (v2(0x21, 0x31, b"\0" * 215), SHORT),
    "TCP4 without anything": (v2(0x21, 0x11, b""), SHORT),
    "a length too large by one": (v2(0x21, 0x11, b"", LONGEST_REST + 1), TOO_LONG),
    "the largest length, of LOCAL": (v2(0x20, 0x00, b"", 0xFFFF), TOO_LONG),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_header_is_taken_whole_and_nothing_behind_it(name: str) -> None:
    """In one piece, with more behind it; and cut into two at every byte."""
    header, source = RIGHT[name]
    for behind in (b"", b"\n", b"PROXY UNKNOWN\r\n", SIGNATURE, b"x" * 9000):
        for cut in {0, *range(1, len(header), 1 + len(header) // 100), len(header) - 1, len(header)}:
            parser = HeaderParser()
            first, second = header[:cut], header[cut:] + behind
            taken = parser.feed(first) if first else 0
            if cut < len(header):
                assert (taken, parser.is_whole) == (cut, False)
                taken += parser.feed(second)
            assert (taken, parser.count, parser.is_whole) == (len(header), len(header), True)
            assert parser.source == source


@pytest.mark.parametrize("name", RIGHT)
def test_a_header_that_comes_byte_by_byte(name: str) -> None:
    """It is whole with its last byte, and there is always room for one more until then."""
    header, source = RIGHT[name]
    parser = HeaderParser()
    for number in range(len(header)):
        assert not parser.is_whole
        assert parser.room > 0
        assert may_begin_header(header[:number])
        assert parser.feed(header[number : number + 1]) == 1
    assert (parser.is_whole, parser.source) == (True, source)
    assert begins_header(header)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_fault(name: str) -> None:
    """Whole, byte by byte, and with more behind it; and it says what is wrong."""
    data, why = WRONG[name]
    for pieces in ([data], [data[n : n + 1] for n in range(len(data))], [data + b"\r\n"]):
        parser = HeaderParser()
        with pytest.raises(HeaderFault) as caught:
            for piece in pieces:
                parser.feed(piece)
        assert str(caught.value) == why
        assert not parser.is_whole


def test_a_fault_is_found_with_the_first_byte_that_shows_it() -> None:
    """What can be no header any more is not waited on for."""
    for data in (b"G", b"PROXY_", SIGNATURE[:4] + b"x", SIGNATURE + b"\x12", b"PROXY UNKNOWN\n"):
        parser = HeaderParser()
        parser.feed(data[:-1])
        with pytest.raises(HeaderFault):
            parser.feed(data[-1:])


@pytest.mark.parametrize(
    ("source", "destination", "text", "binary"),
    [
        ("192.0.2.7:50312", "198.51.100.1:443", line("TCP4 192.0.2.7 198.51.100.1 50312 443"), v2(0x21, 0x11, V4)),
        (
            "[2001:db8::7]:50312", "[2001:db8::1]:443", line("TCP6 2001:db8::7 2001:db8::1 50312 443"),
            v2(0x21, 0x21, V6),
        ),
        (
            "192.0.2.7:50312", "[2001:db8::1]:443", line("TCP6 ::ffff:192.0.2.7 2001:db8::1 50312 443"),
            v2(0x21, 0x21, MAPPED[:16] + V6[16:]),
        ),
        (
            "[2001:db8::7]:50312", "198.51.100.1:443", line("TCP6 2001:db8::7 ::ffff:198.51.100.1 50312 443"),
            v2(0x21, 0x21, V6[:16] + MAPPED[16:]),
        ),
        (
            "[::ffff:192.0.2.7]:50312", "198.51.100.1:443", line("TCP4 192.0.2.7 198.51.100.1 50312 443"),
            v2(0x21, 0x11, V4),
        ),
        (
            "[fe80::1%eth0]:1", "[fe80::2%eth0]:2", line("TCP6 fe80::1 fe80::2 1 2"),
            v2(0x21, 0x21, bytes.fromhex("fe80" + "00" * 13 + "01" + "fe80" + "00" * 13 + "02" + "0001" + "0002")),
        ),
    ],
)  # fmt: skip
def test_headers_that_are_made(source: str, destination: str, text: bytes, binary: bytes) -> None:
    """Each version says what the other does, and the parser reads what was written."""
    assert encode_proxy_header(1, source, destination) == text
    assert encode_proxy_header(2, source, destination) == binary
    found = []
    for header in (text, binary):
        parser = HeaderParser()
        assert parser.feed(header + b"x") == len(header)
        found.append(parser.source)
    assert found[0] == found[1] is not None


@pytest.mark.parametrize(
    "odd",
    ["", ":", "a Unix socket", "unix:/run/a:80", "192.0.2.7", "192.0.2.7:", "192.0.2.7:x", "192.0.2.7:65536",
     "192.0.2.7:-1", "relay.example.net:80", "[192.0.2.7:80", "2001:db8::7%eth 0:80", "192.0.2.07:80",
     "192.0.2.7:\u0662", "1.2.3.4\r\nx:80", "[::1]x:80", "2001:db8::7:80", "[192.0.2.7]:80", "192.0.2.7:999999999999"],
)  # fmt: skip
def test_an_address_that_is_none_makes_a_header_that_says_nothing(odd: str) -> None:
    """Whatever a relay server says, the service gets a right header."""
    for pair in ((odd, "192.0.2.7:80"), ("192.0.2.7:80", odd), (odd, odd)):
        assert encode_proxy_header(1, *pair) == b"PROXY UNKNOWN\r\n"
        assert encode_proxy_header(2, *pair) == v2(0x20, 0, b"")


def test_either_version_is_recognised() -> None:
    """From the four bytes on that a frame's header has."""
    for mark in (b"PROXY ", SIGNATURE):
        for count in range(4, len(mark) + 1):
            assert guess_protocol(mark[:count]) == PROXY
        assert guess_protocol(mark + b"x") == PROXY
        assert guess_protocol(mark[:3]) == "something else"
    for other in (b"PROXX", b"\r\n\r\nGET", b"PRO", b""):
        assert guess_protocol(other) == "something else"
