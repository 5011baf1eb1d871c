"""Endpoints and socket addresses: parsing them, showing them, and which count as one."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .text import has_controls, shown

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Endpoint:
    """Where to listen or what to dial: a host and a port, or the path of a Unix socket."""

    host: str
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_port(text: str) -> int:
    """A TCP port, 0 to 65535.  Raises `ValueError` that says what is accepted."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ValueError("a port number from 0 to 65535")
    return int(text)


def parse_endpoint(text: str, default_host: str | None = None) -> Endpoint:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``unix:PATH`` or, where there is a default host, ``PORT``.

    Raises `ValueError` that says what is accepted.
    """
    if text.startswith("unix:"):
        if not text[5:] or has_controls(text):
            raise ValueError("unix:PATH")
        return Endpoint("", 0, text[5:])
    _refuse_url(text)
    host, colon, port = text.rpartition(":")
    if not colon and default_host is not None:
        return Endpoint(default_host, parse_port(port))
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed):
        raise ValueError("HOST:PORT, of an IPv6 address [HOST]:PORT")
    return Endpoint(parse_host(host), parse_port(port))


def parse_host(text: str) -> str:
    """A host name or address; brackets around an IPv6 one are taken off.  Or ``unix:PATH``."""
    if text.startswith("unix:"):
        return str(parse_endpoint(text))
    if not text or not text.isprintable() or set(text) & set(" \"'/@"):
        raise ValueError("a host name or an address")
    if ":" in text and not is_ipv6(text.removeprefix("[").removesuffix("]")):
        raise ValueError("a host name or an address, without a port")
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def parse_place(text: str) -> str:
    """A host, ``unix:PATH``, or a host with its port, which `split_place` takes apart.  Raises `ValueError` that says
    what is accepted."""
    _refuse_url(text)
    host, port = split_place(text)
    if ":" in host and not (is_ipv6(host.strip("[]")) or text.startswith("unix:")):
        raise ValueError("HOST or HOST:PORT, of an IPv6 address [HOST]:PORT")
    return parse_host(host) if port is None else str(parse_endpoint(text))


def split_place(text: str) -> tuple[str, int | None]:
    """A host and, if it is there, the port behind it; a bare IPv6 address has none.  Raises `ValueError`."""
    has_port = not text.startswith("unix:") and re.search(r"^[^:]*:[^:]*$|\]:", text)
    if not has_port:
        return text, None
    endpoint = parse_endpoint(text)
    return endpoint.host, endpoint.port


def is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _refuse_url(text: str) -> None:
    """Raises `ValueError` for a URL, with what to write instead."""
    scheme, mark, rest = text.partition("://")
    if mark and not text.startswith("unix:"):
        place = re.split("[/?#]", rest)[0].rpartition("@")[2]
        port = "" if re.search(r":\d+$", place) else f":{URL_PORTS.get(scheme.lower(), 'PORT')}"
        raise ValueError(f"a host and a port, not a URL: write {shown(place)}{port}")


URL_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "ssh": 22, "sftp": 22, "ftp": 21}
"""The ports that URLs leave out (IANA's registry)."""


def show_address(address: Any) -> str:
    """A socket address as users write it; an IPv4 address mapped into IPv6 as the IPv4 one."""
    if not isinstance(address, tuple):
        return f"unix:{address}" if address else "a Unix socket"
    host = host_of(address)
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def show_own(sock: socket.socket) -> str:
    """The near address of a connected socket; "" where it has none any more."""
    try:
        return show_address(sock.getsockname())
    except OSError:
        return ""


def host_of(address: Any) -> str:
    """The host of an Internet socket address, with the zone that a link-local one needs to be connected to."""
    if len(address) == 2:
        return str(address[0])
    host = str(address[0].removeprefix("::ffff:"))
    if len(address) < 4 or not address[3] or "%" in host:
        return host
    try:
        return f"{host}%{socket.if_indextoname(address[3])}"
    except OSError:  # that interface is gone
        return f"{host}%{address[3]}"


def is_loopback(address: Any) -> bool:
    """Whether a peer's socket address is on this machine's loopback (or a Unix socket)."""
    if not isinstance(address, tuple):
        return True
    try:
        return ipaddress.ip_address(address[0].removeprefix("::ffff:").partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_own_host(host: str) -> bool:
    """Whether a host, as it stands in an option, is this one as it calls itself: only its own programs can connect."""
    return host == "localhost" or is_loopback((host, 0))


def address_group(address: Any) -> str:
    """What counts as one address where each may have only so much: of IPv6 the first 64 bits, since one
    customer gets at least that many (RFC 6177)."""
    if not isinstance(address, tuple):
        return "unix"
    host = address[0].removeprefix("::ffff:").partition("%")[0]
    if ":" not in host:
        return str(host)
    return str(ipaddress.ip_network(f"{host}/64", strict=False))


def is_among(address: Any, networks: Sequence[Network]) -> bool:
    """Whether a peer's socket address is in one of these networks; one without an Internet address is in none."""
    if not networks or not isinstance(address, tuple):
        return False
    try:
        host = ipaddress.ip_address(address[0].partition("%")[0])
    except ValueError:
        return False
    if isinstance(host, ipaddress.IPv6Address):
        host = host.ipv4_mapped or host
    return any(host in network for network in networks)


def name_in_certificate(host: str) -> str:
    """A host as its certificate names it: without a trailing dot, or the zone of an IPv6 address."""
    return host.partition("%")[0].removesuffix(".")
