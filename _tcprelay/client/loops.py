"""Connections that come back: a service that is published onto its own service port.

Each connection to such a service would make the relay client dial that port, which is a further connection to it, until
all links are in use.  Two things show it:

- START tells where its service client comes from, and at which address it has connected.  Where this relay client, in
  whichever of its processes, has a connection to a service between these very addresses, it is its own one that has
  come back (`OwnConnections`).  One of the two is not enough: a system gives the same port to connections that go to
  different places.
- A NAT in between changes that address.  There it is where the service was dialled that counts: at the relay server's
  host, and the port at which the server says that service clients come (`leads_back`).
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import zlib
from collections.abc import Iterator
from typing import Any

from ..addresses import host_of, is_loopback, show_own, show_peer


class OwnConnections:
    """A relay client's connections to its services, by the addresses of both ends; any thread.

    They are in memory that the worker processes share, and that is made before these are forked: a connection comes
    back to any of them.  Each port has one mark: of two connections with the same one, the later one counts.
    """

    def __init__(self) -> None:
        self._marks = memoryview(mmap.mmap(-1, 4 * 65536)).cast("I")  # what is not used takes no memory

    @contextlib.contextmanager
    def holding(self, sock: socket.socket) -> Iterator[None]:
        """While a connection to a service is open."""
        port, mark = _mark(show_own(sock), show_peer(sock))
        if port:
            self._marks[port] = mark
        try:
            yield
        finally:
            if port and self._marks[port] == mark:
                self._marks[port] = 0

    def has(self, near: str, far: str) -> bool:
        """Whether one of them goes from one address to the other, as the relay server shows them."""
        port, mark = _mark(near, far)
        return bool(port) and self._marks[port] == mark


def _mark(near: str, far: str) -> tuple[int, int]:
    """The near port, and what stands for both addresses, which is never 0; port 0 where there is none."""
    port = near.rpartition(":")[2]
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536
    return (int(port) if is_port else 0), zlib.crc32(f"{near} {far}".encode(errors="replace")) or 1


def leads_back(service: socket.socket, link: socket.socket, address: str) -> bool:
    """Whether a service was dialled at the relay server's host, at the port of its `address` there; by a link.

    On one host with the relay server another network of that host, a container's say, can have the same port: there it
    is left to `OwnConnections`.
    """
    try:
        relay, here, dialled = link.getpeername(), link.getsockname(), service.getpeername()
    except OSError:
        return False
    if not all(isinstance(one, tuple) for one in (relay, here, dialled)) or _is_same_host(relay, here):
        return False
    return host_of(dialled) == host_of(relay) and str(dialled[1]) == address.rpartition(":")[2]


def _is_same_host(peer: Any, own: Any) -> bool:
    return is_loopback(peer) or host_of(peer) == host_of(own)
