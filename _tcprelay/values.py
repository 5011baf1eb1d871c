"""Options as such, and what the value of one may be."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .addresses import Endpoint, Network, parse_endpoint, parse_host, parse_place, parse_port
from .text import has_controls, trim


@dataclass(frozen=True)
class Option:
    """What a field of an options class says about its option."""

    parse: Callable[[str], Any]
    """From text; raises `ValueError` that says what is accepted."""
    help: str
    group: str
    metavar: str
    spelling: str
    """node-tcp-relay's name for it, where it has one."""
    many: bool
    secret: bool
    public: Callable[[Any], str]
    """Of a secret's value, what may be shown."""
    secures: bool
    """It restricts access.  A variable that is there and empty is then a mistake: where it was set, the default is not
    what is meant.  Other empty variables count as not given (Compose passes on what is not set as empty)."""
    default: str
    """The default in words."""
    fixed: bool
    """It cannot change while the role runs: a reload leaves it as it is, and says so."""

    @property
    def is_flag(self) -> bool:
        """It may stand without a value."""
        return self.parse in (parse_flag, parse_tls)

    def hides(self, value: Any) -> bool:
        """Whether a secret stands in such a value."""
        return self.secret and self.public(value) != value


def show_nothing(value: Any) -> str:
    """What is shown of most secrets."""
    return "(not shown)"


LONGEST_SECRET = 65536
"""Bytes of the line that holds a secret, at most."""
OPTION_GROUPS = ("Addresses", "Trust", "TLS", "Links", "Connections", "Status", "Running")


def option(
    default: Any,
    parse: Callable[[str], Any],
    help: str,
    *,
    group: str,
    metavar: str = "",
    spelling: str = "",
    many: bool = False,
    secret: bool = False,
    public: Callable[[Any], str] = show_nothing,
    secures: bool = False,
    shown_default: str | None = None,
    fixed: bool = False,
) -> Any:
    """A field of an options class; those of the groups Trust and TLS all secure."""
    if shown_default is None:
        shown_default = "" if default in (None, (), "") else str(default).lower().removesuffix(".0")
    secures = secures or group in ("Trust", "TLS")
    info = Option(parse, help, group, metavar, spelling, many, secret, public, secures, shown_default, fixed)
    return field(default=default, repr=not secret, metadata={"option": info})


def parse_flag(text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError("true or false")
    return text.lower() in ("true", "yes", "on", "1")


def seconds(least: float, most: float, accepted: str) -> Callable[[str], float]:
    """What takes a number of seconds within these bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= most:
            raise ValueError(accepted)
        return value

    return parse


parse_seconds = seconds(0, 2e6, "a number of seconds, 0 or more")  # poll takes no more milliseconds than that
parse_heartbeat = seconds(0.05, 3600, "a number of seconds from 0.05 to 3600")
parse_interval = seconds(0, 86_400, "a number of seconds from 0 to 86400")
parse_lease = seconds(1, 2e6, "a number of seconds, 1 or more")
parse_keepalive = seconds(1, 20_000, "a number of seconds from 1 to 20000")  # Linux takes up to 32,767


def whole(least: int, most: int, accepted: str) -> Callable[[str], int]:
    """What takes a whole number within these bounds."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and least <= int(text) <= most):
            raise ValueError(accepted)
        return int(text)

    return parse


parse_count = whole(0, 999_999_999, "a whole number, 0 or more")
parse_positive = whole(1, 999_999_999, "a whole number, 1 or more")
parse_workers = whole(0, 64, "a whole number from 0 to 64")


def parse_secret(text: str) -> str:
    if not text:
        raise ValueError("something that is not empty")
    if "\n" in text or "\r" in text:
        raise ValueError("one line of text")
    return text


def parse_path(text: str) -> str:
    if not text or has_controls(text):
        raise ValueError("the path of a file")
    return text


def parse_relay(text: str) -> str:
    """A host, with its port or without."""
    if text.startswith("unix:"):
        raise ValueError("HOST or HOST:PORT; a relay server has no Unix socket")
    return parse_place(text)


def parse_further_relay(text: str) -> Endpoint:
    """A host with its port."""
    if text.startswith("unix:"):
        raise ValueError("HOST:PORT; a relay server has no Unix socket")
    return parse_endpoint(text)


def parse_status(text: str) -> Endpoint:
    """``PORT``, which is one of this host's loopback address, or ``ADDRESS:PORT``."""
    if text.startswith("unix:"):
        raise ValueError("PORT or ADDRESS:PORT; a Unix socket is there anyway, where there is a runtime directory")
    try:
        return parse_endpoint(text, "127.0.0.1")
    except ValueError:
        if ":" in text or text.isdigit():
            raise
        raise ValueError("PORT or ADDRESS:PORT, as in 9090 or 127.0.0.1:9090") from None


def parse_tls(text: str) -> str:
    """``--tls`` alone secures the links ("relay"), ``--tls both`` everything, as in node-tcp-relay."""
    if text in ("both", "relay", "service"):
        return text
    try:
        return "relay" if parse_flag(text) else ""
    except ValueError:
        raise ValueError("true (or yes, on, relay), both, service, or false (no, off)") from None


def parse_name(text: str) -> str:
    """The name of a service: letters, digits and ``._-``."""
    if not 0 < len(text) <= 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise ValueError("a name of 1 to 64 letters, digits, dots, dashes and underscores")
    return text


@dataclass(frozen=True)
class PortRange:
    """Ports from the first to the last one."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def parse_ports(text: str) -> PortRange:
    """``PORT`` or ``FIRST-LAST``.  Raises `ValueError` that says what is accepted."""
    first, dash, last = text.partition("-")
    try:
        ports = PortRange(parse_port(trim(first)), parse_port(trim(last if dash else first)))
    except ValueError:
        ports = PortRange(0, 0)
    if not 0 < ports.first <= ports.last:
        raise ValueError("a port, or ports as in 20000-20099")
    return ports


@dataclass(frozen=True)
class Pin:
    """The digest of the certificate that a relay server shows; of one of several, or where `relay` is "" of all."""

    relay: str
    digest: str

    def __str__(self) -> str:
        return f"{self.relay}={self.digest}" if self.relay else self.digest


def parse_pin(text: str) -> Pin:
    """``sha256:`` and 64 hexadecimal digits, with or without colons between them; before that the relay server that it
    is for, as in ``HOST:PORT=``, where there are several."""
    relay, _, pin = text.rpartition("=")
    kind, _, digest = pin.lower().partition(":")
    digest = digest.replace(":", "")
    if kind != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError("sha256: and 64 hexadecimal digits, as tcprelays --tls prints it")
    return Pin(str(parse_endpoint(relay)) if relay else "", f"sha256:{digest}")


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(" or ".join(choices))
        return text.lower()

    return parse


@dataclass(frozen=True)
class ServicePort:
    """A service and where its clients connect; host "" means the server's ``hostname``."""

    name: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}={Endpoint(self.host, self.port) if self.host else self.port}"


def parse_service(text: str) -> ServicePort:
    """``NAME=[ADDRESS:]PORT``.  Raises `ValueError` that says what is accepted."""
    name, equals, where = text.partition("=")
    if not equals:
        raise ValueError("NAME=PORT or NAME=ADDRESS:PORT")
    endpoint = parse_endpoint(where, default_host="")
    if endpoint.path:
        raise ValueError("NAME=PORT or NAME=ADDRESS:PORT")
    return ServicePort(parse_name(name), endpoint.host, endpoint.port)


def parse_network(text: str) -> Network:
    """An IPv4 or IPv6 network with the length of its prefix, or an address, which is a network of one.

    Bits behind the prefix do not count, and an IPv4 address mapped into IPv6 (RFC 4291, 2.5.5.2) is an IPv4 one.
    Raises `ValueError` that says what is accepted.
    """
    host, slash, length = text.partition("/")
    if "%" in host:
        raise ValueError("a network or an address without a zone (%eth0)")
    try:
        if slash and not (length.isascii() and length.isdigit()):  # a mask may be meant, either way round
            raise ValueError
        address, network = ipaddress.ip_address(host), ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("a network, as in 192.0.2.0/24, or an address") from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if mapped is None:
        return network
    if network.prefixlen < 96:
        raise ValueError("a prefix length from 96 to 128 behind an IPv4 address in IPv6 form")
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96), strict=False)


@dataclass(frozen=True)
class ServiceNetwork:
    """A network of service clients; service "" stands for all services."""

    service: str
    network: Network

    def __str__(self) -> str:
        return f"{self.service}={self.network}" if self.service else str(self.network)


def parse_service_network(text: str) -> ServiceNetwork:
    """``[SERVICE=]NETWORK``.  Raises `ValueError` that says what is accepted."""
    name, equals, network = text.rpartition("=")
    return ServiceNetwork(parse_name(name) if equals else "", parse_network(network))


LEAST_RATE = 1024
"""Bytes a second: with less, what one packet holds would take longer than people wait for a sign of life."""
RATE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_rate(text: str) -> int:
    """Bytes a second: a whole number, with k, M or G (powers of 1000) or Ki, Mi or Gi (of 1024) behind it, and ``/s``
    if you like.  Raises `ValueError` that says what is accepted."""
    found = re.fullmatch("([0-9]{1,12})([kmg]i?)?(/s)?", text.strip(), re.IGNORECASE)
    rate = int(found[1]) * RATE_UNITS[(found[2] or "").lower()] if found else 0
    if rate < LEAST_RATE:
        raise ValueError("bytes a second, 1024 or more, as in 65536, 512Ki or 10M/s")
    return rate


@dataclass(frozen=True)
class RateLimit:
    """How many bytes a second a connection may carry each way; service "" means all that have no limit of their own."""

    service: str
    rate: int

    def __str__(self) -> str:
        return f"{self.service}={self.rate}" if self.service else str(self.rate)


def parse_rate_limit(text: str) -> RateLimit:
    """``BYTES`` or ``SERVICE=BYTES``, as `parse_rate` takes them.  Raises `ValueError` that says what is accepted."""
    service, equals, rate = text.rpartition("=")
    return RateLimit(parse_name(service) if equals else "", parse_rate(rate))


@dataclass(frozen=True)
class Publication:
    """A service's name at the relay server, and where it is reached from here."""

    name: str
    target: Endpoint
    port: int | None = None
    """That the relay server is asked for; 0 is any, ``None`` one that it has for this name."""

    def __str__(self) -> str:
        return f"{self.name}={self.target}" + ("" if self.port is None else f"@{self.port}")


def parse_publication(text: str) -> Publication:
    """``NAME=HOST:PORT``, ``NAME=PORT`` on this host, or ``NAME=unix:PATH``; each with ``@PORT`` behind it where that
    is asked for at the relay server, and then the name ``default`` may be left out.  Raises `ValueError` that says what
    is accepted."""
    before, at, asked = text.rpartition("@")
    port = parse_port(asked) if at and asked.isascii() and asked.isdigit() else None
    name, equals, target = (text if port is None else before).partition("=")
    if not equals and port is None:
        raise ValueError("NAME=[HOST:]PORT or NAME=unix:PATH, with @PORT behind it for a port of its own")
    if not equals:
        name, target = "default", name
    return Publication(parse_name(name), parse_endpoint(target, "localhost"), port)


@dataclass(frozen=True)
class ServiceHost:
    """The name that must stand in a service's certificate; service "" is every other one."""

    service: str
    name: str

    def __str__(self) -> str:
        return f"{self.service}={self.name}" if self.service else self.name


def parse_service_host(text: str) -> ServiceHost:
    """``[SERVICE=]NAME``.  Raises `ValueError` that says what is accepted."""
    service, equals, name = text.rpartition("=")
    return ServiceHost(parse_name(service) if equals else "", parse_host(name))


@dataclass(frozen=True)
class ServiceProtocol:
    """A protocol that is spoken over TLS with service clients, or with a service (ALPN, RFC 7301); service "" is every
    one that has none of its own."""

    service: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.service}={self.protocol}" if self.service else self.protocol


def parse_protocol(text: str) -> str:
    """A protocol as ALPN calls it.  Raises `ValueError` that says what is accepted."""
    if not 0 < len(text) <= 255 or not all("!" <= c <= "~" and c not in ",=" for c in text):
        raise ValueError("a protocol as ALPN calls it, as in h2 or http/1.1, with a service before it as in web=h2")
    return text


def parse_service_protocol(text: str) -> ServiceProtocol:
    """``[SERVICE=]PROTOCOL``.  Raises `ValueError` that says what is accepted."""
    service, equals, protocol = text.rpartition("=")
    return ServiceProtocol(parse_name(service) if equals else "", parse_protocol(protocol))


def protocols_of(given: tuple[ServiceProtocol, ...], service: str) -> tuple[str, ...]:
    """Those of a service, the best first."""
    own = tuple(one.protocol for one in given if one.service == service)
    return own or tuple(one.protocol for one in given if not one.service)


@dataclass(frozen=True)
class ProxyProtocol:
    """The version of the PROXY protocol in which a service is told of its clients; service "" is every other one."""

    service: str
    version: int

    def __str__(self) -> str:
        return f"{self.service}=v{self.version}" if self.service else f"v{self.version}"


@dataclass(frozen=True)
class CheckPath:
    """The path of a service's check over HTTP; service "" is every other one."""

    service: str
    path: str

    def __str__(self) -> str:
        return f"{self.service}={self.path}" if self.service else self.path


def parse_check_path(text: str) -> CheckPath:
    """``[SERVICE=]PATH``.  Raises `ValueError` that says what is accepted."""
    service, equals, path = ("", "", text) if text.startswith("/") else text.partition("=")
    if not path.startswith("/") or len(path) > 1024 or not all("!" <= c <= "~" for c in path):
        raise ValueError("a path as it stands in a URL, /health say, with a service before it as in web=/health")
    return CheckPath(parse_name(service) if equals else "", path)


def parse_proxy_protocol(text: str) -> ProxyProtocol:
    """``[SERVICE=]v1`` or ``v2``.  Raises `ValueError` that says what is accepted."""
    service, equals, version = text.rpartition("=")
    if version.lower() not in ("v1", "v2"):
        raise ValueError("v1 or v2, with a service before it as in web=v2")
    return ProxyProtocol(parse_name(service) if equals else "", int(version[1]))
