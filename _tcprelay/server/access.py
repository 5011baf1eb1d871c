"""Which addresses may connect: the lists of networks, and the file of those that may not.

An address is looked up once for each length of prefix that there is in a list, however many networks have it.  So it
takes microseconds (measured: 2 with a hundred thousand addresses, 10 with networks of all lengths), and a flood of who
may not connect costs little.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..addresses import Network
from ..server_options import ServerOptions
from ..text import say_error, trim
from ..values import ServiceNetwork, parse_network

OTHERS = "@"
"""Stands for all services that only relay clients know; in a key it is before the port."""
BITS = {4: 32, 6: 128}
"""Of an address, by its version."""


def number_of(host: str) -> tuple[int, int]:
    """The version and the number of an address, without its zone; of an IPv4 address mapped into IPv6 (RFC 4291,
    2.5.5.2) those of the IPv4 one.  Raises `OSError` and `ValueError` for what is none."""
    if ":" not in host:
        return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, host), "big")
    number = int.from_bytes(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), "big")
    return (4, number & 0xFFFFFFFF) if number >> 32 == 0xFFFF else (6, number)


class Networks:
    """Networks, each given as its version, how many bits stand behind its prefix, and the number of the prefix."""

    def __init__(self, blocks: Iterable[tuple[int, int, int]] = ()) -> None:
        found: dict[int, dict[int, set[int]]] = {version: {} for version in BITS}
        for version, behind, prefix in blocks:
            found[version].setdefault(behind, set()).add(prefix)
        self._prefixes = {version: tuple(prefixes.items()) for version, prefixes in found.items()}

    def __bool__(self) -> bool:
        return any(self._prefixes.values())

    def hold(self, version: int, number: int) -> bool:
        """Whether an address of this version and number is in one of them."""
        return any(number >> behind in prefixes for behind, prefixes in self._prefixes[version])


@dataclass(frozen=True)
class Lists:
    """What counts for the clients of one service, or for relay clients."""

    denied: tuple[tuple[Networks, str], ...]
    """Who may not connect, and what is said then; these go first."""
    allowed: Networks
    """Who alone may connect, unless that is nobody."""
    otherwise: str
    """What is said to who is not among them."""


@dataclass(frozen=True)
class Access:
    """Who may connect: replaced as a whole when the lists are read again."""

    lists: Mapping[str, Lists] = field(default_factory=dict)
    """Of each service for which there are any, on whatever port, of the relay port under "", and of all others."""
    names: frozenset[str] = frozenset()
    """The services that have their own, and the relay port."""

    def refuses(self, service: str, address: Any) -> str:
        """Why a socket address, IPv4's or IPv6's, may not connect to this service, or to the relay port under ""; ""
        where it may.  Any thread.  Raises `OSError` and `ValueError` where the host in it is no such address."""
        if not self.lists:
            return ""
        name = service.partition(OTHERS)[0]
        lists = self.lists.get(name if name in self.names else OTHERS)
        if lists is None:
            return ""
        version, number = number_of(address[0])
        for networks, reason in lists.denied:
            if networks.hold(version, number):
                return reason
        return lists.otherwise if lists.allowed and not lists.allowed.hold(version, number) else ""


def load_access(options: ServerOptions) -> Access:
    """The lists in the options, and what the deny file holds.

    Raises `OSError` where that cannot be read, and `ValueError` where something else than networks is in it.
    """
    from_file = Networks(read_networks(options.deny_file) if options.deny_file else ())
    found = {"": make_lists(
        [(list_networks(options.deny_links), "links from its address are not accepted (--deny-links)")],
        list_networks(options.allow_links),
        "its address is not among those that links are accepted from (--allow-links)",
    )}  # fmt: skip
    for name in (*(service.name for service in options.services), OTHERS):
        found[name] = make_lists(
            [(list_networks(for_service(options.deny, name)), "its address may not connect (--deny)"),
             (from_file, "its address may not connect (--deny-file)")],
            list_networks(for_service(options.allow, name)),
            "its address is not among those that may connect (--allow)",
        )  # fmt: skip
    lists = {name: lists for name, lists in found.items() if lists.denied or lists.allowed}
    return Access(lists, frozenset(found) - {OTHERS})


def make_lists(denied: list[tuple[Networks, str]], allowed: Networks, otherwise: str) -> Lists:
    """The same without the lists in which there is nothing."""
    return Lists(tuple((networks, reason) for networks, reason in denied if networks), allowed, otherwise)


def for_service(items: Iterable[ServiceNetwork], service: str) -> Iterator[Network]:
    """The networks that were given for this service or for all of them."""
    return (item.network for item in items if item.service in ("", service))


def list_networks(networks: Iterable[Network]) -> Networks:
    return Networks(map(block_of, networks))


def block_of(network: Network) -> tuple[int, int, int]:
    behind = BITS[network.version] - network.prefixlen
    return network.version, behind, int(network.network_address) >> behind


def block_in(item: str) -> tuple[int, int, int]:
    """The network that stands in a line.  Raises `ValueError` that says what is accepted.

    It knows what `parse_network` does, which takes ten times as long (measured) and is asked where this is none.
    """
    host, slash, length = item.partition("/")
    with contextlib.suppress(OSError, ValueError):
        version, number = number_of(host)
        if not slash:
            return version, 0, number
        is_mapped = version == 4 and ":" in host
        if length.isascii() and length.isdigit() and int(length) <= BITS[version] and not is_mapped:
            behind = BITS[version] - int(length)
            return version, behind, number >> behind
    return block_of(parse_network(item))


def read_networks(path: str) -> Iterator[tuple[int, int, int]]:
    """The networks in a file: one a line; blank lines, and from ``#`` on what stands in one, do not count.

    A zone is left out: it stands behind an address in the log, from which such a file is made.  Raises `OSError`, and
    `ValueError` that names the line and shows nothing of it: another file, with a secret in it, may have been named.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        raise OSError(error.errno, f"--deny-file {path}: {say_error(error)}") from error
    for count, line in enumerate(text.split("\n"), 1):
        item = trim(line.partition("#")[0])
        if not item:
            continue
        try:
            yield block_in(item)
        except ValueError as error:
            raise ValueError(f"--deny-file {path}, line {count}: expected {error}") from None
