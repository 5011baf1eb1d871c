"""Connections that come back: a service that is published onto a service port of the relay's.

Each connection to such a service would make the relay client dial that port, which is a further connection to it, until
all links are in use.  Two things show it:

- START tells where its service client comes from, and at which address it has connected.  Where this relay client, in
  whichever of its processes, has a connection to a service between these very addresses, it is its own one that has
  come back (`OwnConnections`).  One of the two is not enough: a system gives the same port to connections that go to
  different places.  And both are not where they may be another host's, which has loopback and private ones as well
  (`are_shared`).
- A NAT in between changes that address.  There it is where the service was dialled that counts: at the relay server's
  host, and the port at which the server says that service clients come (`leads_back`).

A connection may come back for another service, which is published onto the service port of the first: once for each
service, but not again and again.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import zlib
from collections.abc import Iterator

from ..addresses import host_of, is_loopback, show_address, show_own, show_peer


class OwnConnections:
    """A relay client's connections to its services, by the addresses of both ends; any thread.

    They are in memory that the worker processes share, and that is made before these are forked: a connection comes
    back to any of them.  Each port has one mark: of two connections with the same one, the later one counts.
    """

    def __init__(self) -> None:
        self._marks = memoryview(mmap.mmap(-1, 4 * 65536)).cast("I")  # what is not used takes no memory

    @contextlib.contextmanager
    def holding(self, sock: socket.socket, times: int) -> Iterator[None]:
        """While a connection to a service is open, which has come back so many times before."""
        port, mark = _mark(show_own(sock), show_peer(sock))
        mark |= min(times + 1, 255) << 24
        if port:
            self._marks[port] = mark
        try:
            yield
        finally:
            if port and self._marks[port] == mark:
                self._marks[port] = 0

    def times(self, near: str, far: str) -> int:
        """How often the connection between these addresses has come back, as the relay server shows them; 0 where it is
        none of these."""
        port, mark = _mark(near, far)
        found = self._marks[port] if port else 0
        return found >> 24 if found & 0xFFFFFF == mark else 0


def _mark(near: str, far: str) -> tuple[int, int]:
    """The near port, and 24 bits that stand for both addresses; port 0 where there is none."""
    port = near.rpartition(":")[2]
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536
    return (int(port) if is_port else 0), zlib.crc32(f"{near} {far}".encode(errors="replace")) & 0xFFFFFF


def are_shared(link: socket.socket, address: str) -> bool:
    """Whether an address of the relay server's, at which a service client has connected, is known here by that name,
    too: on one host with it, or as the host to which the link leads."""
    try:
        relay, here = link.getpeername(), link.getsockname()
    except OSError:
        return False
    if is_loopback(relay) or host_of(relay) == host_of(here):
        return True
    return address.rpartition(":")[0] == show_address(relay).rpartition(":")[0]


def leads_back(service: socket.socket, link: socket.socket, address: str) -> bool:
    """Whether a service was dialled at the relay port itself, or at the relay server's host and the port of its
    `address` there; by a link.

    On one host with the relay server another network of that host, a container's say, can have the service port: there
    that is left to `OwnConnections`.
    """
    try:
        relay, here, dialled = link.getpeername(), link.getsockname(), service.getpeername()
    except OSError:
        return False
    if not all(isinstance(one, tuple) for one in (relay, here, dialled)):
        return False
    if dialled[1] == relay[1] and (host_of(dialled) == host_of(relay) or (is_loopback(dialled) and is_loopback(relay))):
        return True
    if is_loopback(relay) or host_of(relay) == host_of(here):
        return False
    return host_of(dialled) == host_of(relay) and str(dialled[1]) == address.rpartition(":")[2]
